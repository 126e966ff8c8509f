"""The parameters of a notebook: read from its cell tagged ``parameters``, checked strictly, injected as literals."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._literals import MismatchError, fit, kind_of, require_literal
from .checks import known_keys
from .errors import ConfigError

__all__ = [
    "Parameter",
    "declared_parameters",
    "from_text",
    "injected_source",
    "load_yaml",
    "parameter_hash",
    "read_notebook",
    "resolve",
]


@dataclass(frozen=True)
class Parameter:
    """One declared parameter: its name, its type as written ("" when not annotated), its default and its comment."""

    name: str
    annotation: str
    default: Any
    help: str = ""


def read_notebook(path: str | Path) -> dict[str, Any]:
    """Return the notebook at `path` as its JSON content.

    Raises
    ------
    ConfigError
        When the file is missing or is no notebook of format 4.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["nbformat"] != 4 or not isinstance(content["cells"], list):
            raise ValueError("not of format 4")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"notebook cannot be read ({error.__class__.__name__})",
            value=str(path),
            bound="an existing .ipynb file of notebook format 4",
            remedy="Check the spelling; a shipped notebook goes by its name alone, for example simulate.",
        ) from error
    return content


def cell_source(cell: Mapping[str, Any]) -> str:
    """Return a cell's source; the format allows a string or a list of lines."""
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def tagged_cell(content: Mapping[str, Any], tag: str) -> int | None:
    """Return the index of the first cell with `tag`, or None."""
    for index, cell in enumerate(content["cells"]):
        if tag in cell.get("metadata", {}).get("tags", ()):
            return index
    return None


def declared_parameters(content: Mapping[str, Any], name: str = "notebook") -> dict[str, Parameter]:
    """Return the parameters of a notebook in their order; none when it has no cell tagged ``parameters``.

    Raises
    ------
    ConfigError
        When that cell holds anything but assignments of literals: a default that has to be computed cannot be
        checked, hashed or recorded before the run.
    """
    index = tagged_cell(content, "parameters")
    if index is None:
        return {}
    source = cell_source(content["cells"][index])
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise _bad_cell(name, error.lineno or 1, error.text or "") from error
    lines = source.splitlines()
    found: dict[str, Parameter] = {}
    for node in tree.body:
        text = lines[node.lineno - 1]
        value: ast.expr
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue  # a docstring
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            target, annotation, value = node.target.id, ast.unparse(node.annotation), node.value
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            target, annotation, value = node.targets[0].id, "", node.value
        else:
            raise _bad_cell(name, node.lineno, text)
        try:
            default = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError) as error:
            raise _bad_cell(name, node.lineno, text) from error
        # The comment stands behind the value, on its last line.
        tail = lines[(node.end_lineno or 1) - 1].encode()[node.end_col_offset :].decode().strip()
        found[target] = Parameter(target, annotation, default, tail.lstrip("# ") if tail.startswith("#") else "")
    return found


def _bad_cell(name: str, line: int, text: str) -> ConfigError:
    return ConfigError(
        f"{name}: line {line} of the cell tagged parameters",
        value=text.strip(),
        bound="an assignment of a literal, such as `budget: float = 100.0`",
        remedy="Move computed values to a later cell.",
    )


def resolve(declared: Mapping[str, Parameter], given: Mapping[str, Any], name: str = "notebook") -> dict[str, Any]:
    """Return the defaults overlaid with `given`, in the order of declaration.

    Raises
    ------
    ConfigError
        An unknown name (the closest known one is suggested), a value of another type than declared, or a value that
        is no plain finite literal.
    """
    if given and not declared:
        raise ConfigError(
            f"parameters of {name}",
            value=dict(given),
            bound="none: the notebook has no cell tagged parameters",
            remedy="Tag its cell of defaults with `parameters`, or give none.",
        )
    known_keys(f"parameters of {name}", given, declared)
    resolved = {}
    for key, parameter in declared.items():
        value = given.get(key, parameter.default)
        label = f"parameter {key} of {name}"
        require_literal(label, value)
        kind = parameter.annotation or kind_of(parameter.default)
        try:
            resolved[key] = fit(value, ast.parse(kind, mode="eval").body) if kind else value
        except MismatchError as error:
            raise ConfigError(
                label,
                value=value,
                bound=f"{kind}{f' ({error})' if str(error) else ''}",
                remedy=f"Its default is {parameter.default!r}; give a value of that kind.",
            ) from None
    return resolved


def parameter_hash(resolved: Mapping[str, Any]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the resolved parameters; their order plays no part."""
    text = json.dumps(resolved, sort_keys=True, ensure_ascii=True, allow_nan=False, default=_json_key)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _json_key(value: Any) -> Any:
    raise TypeError(f"{value!r} is no literal")  # cannot be reached after resolve(); guards direct callers


def injected_source(parameters: Mapping[str, Any]) -> str:
    """Return the source of the cell that sets `parameters`: one literal a line, proved by reading it back.

    Raises
    ------
    ConfigError
        Values that do not come back from the source as they were.
    """
    lines = ["# Parameters", *(f"{name} = {value!r}" for name, value in parameters.items())]
    source = "\n".join(lines) + "\n"
    read_back = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if len(source.splitlines()) != len(lines) or read_back != dict(parameters):
        raise ConfigError(
            "parameters",
            value=dict(parameters),
            bound="plain literals",
            remedy="Give numbers, text, lists or mappings.",
        )
    return source


# -- values from the command line and from files -------------------------------------------------------------------


def from_text(text: str, parameter: Parameter | None = None) -> Any:
    """Return the value that `text` (one word of the command line) stands for; text when the parameter is a string."""
    if parameter is not None:
        kinds = {part.strip() for part in (parameter.annotation or kind_of(parameter.default)).split("|")}
        if "str" in kinds and not ("None" in kinds and text in ("None", "null", "~")):
            return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    try:
        value = load_yaml(text)
        require_literal("value", value)
    except ConfigError:
        return text
    return value


def load_yaml(source: str | Path, what: str = "YAML") -> Any:
    """Read YAML from a file (a ``Path``) or from text, strictly: a repeated key is an error, 1e-3 is a number.

    Returns
    -------
    Any
        Plain values.

    Raises
    ------
    ConfigError
        A file that is missing or no YAML, or a mapping that names a key twice.
    """
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
            return super().construct_mapping(node, deep)

    # YAML 1.1 reads 1e-3 as text; nobody who writes it means text.
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        text = source.read_text("utf-8") if isinstance(source, Path) else source
        return yaml.load(text, Loader=Loader)  # Loader is a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{what} cannot be read ({' '.join(str(error).split())[:160]})",
            value=str(source),
            bound="YAML with each key once",
            remedy="Correct the file; indent with spaces, and write `name: value`.",
        ) from error
