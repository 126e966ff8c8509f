"""The parameters of a notebook: read from its cell tagged ``parameters``, checked strictly, injected as literals."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._literals import MismatchError, fit, kind_of, require_annotation, require_literal
from ._reading import parse_yaml, read_json
from .checks import known_keys
from .errors import ConfigError

__all__ = [
    "Parameter",
    "declared_parameters",
    "from_text",
    "injected_source",
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
    remedy = "Check the spelling; a shipped notebook goes by its name alone, for example simulate."
    content = read_json(path, "notebook", remedy=remedy, strict=False)  # outputs of other programs may hold NaN
    cells = content.get("cells")
    bad = ("cells", cells) if not isinstance(cells, list) else ("nbformat", content.get("nbformat"))
    if bad[0] == "cells" or content.get("nbformat") != 4 or isinstance(content["nbformat"], bool):
        raise ConfigError(f"notebook {path}: {bad[0]}", value=bad[1], bound="notebook format 4", remedy=remedy)
    for number, cell in enumerate(cells):
        if not _is_cell(cell):
            raise ConfigError(
                f"notebook {path}: cell {number}",
                value=cell,
                bound="a cell of notebook format 4: cell_type, metadata, source as text or lines",
                remedy="Open it in JupyterLab and save it again.",
            )
    return content


def _is_cell(cell: Any) -> bool:
    if not isinstance(cell, dict) or cell.get("cell_type") not in ("code", "markdown", "raw"):
        return False
    metadata, source = cell.get("metadata", {}), cell.get("source", "")
    tags = metadata.get("tags", []) if isinstance(metadata, dict) else None
    return (
        isinstance(tags, list)
        and all(isinstance(tag, str) for tag in tags)
        and (isinstance(source, str) or (isinstance(source, list) and all(isinstance(line, str) for line in source)))
    )


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
    except (ValueError, RecursionError, MemoryError) as error:  # a NUL; nesting too deep for Python's parser
        raise _bad_cell(name, 1, source[:200]) from error
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
            require_annotation(annotation)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
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
        value = parse_yaml(text, "value", remedy="Quote it.")
        require_literal("value", value)
    except ConfigError:
        return text
    return value
