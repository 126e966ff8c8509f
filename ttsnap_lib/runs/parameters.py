"""The parameters of a notebook: read from its cell tagged ``parameters``, checked strictly, named by a hash."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttsnap_lib.checks import known_keys
from ttsnap_lib.errors import ConfigError, shown
from ttsnap_lib.files import digest, failures_as, parse_yaml, read_json

_PLAIN: dict[str, Any] = {
    "bool": bool, "int": int, "float": float, "str": str, "list": list, "tuple": list, "dict": dict, "None": type(None),
}  # fmt: skip
# What ast and json raise on bad values.
_REFUSED = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, OverflowError)


@dataclass(frozen=True)
class Parameter:
    """One declared parameter: its name, its type as written ("" when not annotated), its default and its comment."""

    name: str
    annotation: str
    default: Any
    help: str = ""


def read_notebook(path: str | Path) -> dict[str, Any]:
    """Return the notebook at `path` as its JSON content, every cell's source as one text."""
    remedy = "Open it in JupyterLab and save it again; a shipped notebook goes by its name alone, for example simulate."
    content = read_json(path, "notebook", remedy=remedy)
    with failures_as(ConfigError, f"notebook {path}: expected cells of notebook format 4. {remedy}"):
        if content["nbformat"] != 4:
            raise ValueError(f"format {content['nbformat']}")
        for cell in content["cells"]:
            cell["source"] = "".join(cell.get("source", ""))  # the format allows a text or a list of lines
            cell.setdefault("metadata", {}).setdefault("tags", [])
    return content


def declared_parameters(content: Mapping[str, Any], name: str = "notebook") -> dict[str, Parameter]:
    """Return the parameters of a notebook in their order; none when it has no cell tagged ``parameters``.

    That cell may hold assignments of literals only: a default that has to be computed cannot be checked, hashed or
    recorded before the run.
    """
    source = next((cell["source"] for cell in content["cells"] if "parameters" in cell["metadata"]["tags"]), "")
    lines = source.split("\n")
    found: dict[str, Parameter] = {}
    line = 1
    try:
        for node in ast.parse(source).body:
            line = node.lineno
            match node:
                case ast.AnnAssign(target=ast.Name(id=key), annotation=kind, value=ast.expr() as value):
                    annotation = ast.unparse(kind)
                    # `n: int = None` may be None: papermill's --help-notebook does not see `n: int | None`.
                    if isinstance(value, ast.Constant) and value.value is None and "None" not in annotation:
                        annotation += " | None"
                case ast.Assign(targets=[ast.Name(id=key)], value=value):
                    annotation = ""
                case _:
                    raise SyntaxError
            # The comment stands behind the value, on its last line.
            tail = lines[(node.end_lineno or line) - 1].encode()[node.end_col_offset :].decode().strip()
            comment = tail.lstrip("# ") if tail.startswith("#") else ""
            found[key] = Parameter(key, annotation, ast.literal_eval(value), comment)
    except _REFUSED as error:
        line = getattr(error, "lineno", None) or line
        raise ConfigError(
            f"{name}: line {line} of the cell tagged parameters: got {shown(lines[line - 1])}, expected an assignment of "
            "a literal, such as `budget: float = 100.0`. Move computed values to a later cell."
        ) from error
    return found


def resolve(declared: Mapping[str, Parameter], given: Mapping[str, Any], name: str = "notebook") -> dict[str, Any]:
    """Return the defaults overlaid with `given`, in the order of declaration, as plain values of JSON.

    A tuple becomes a list. Each value is brought to the declared type, so that equal runs have equal hashes.
    """
    if given and not declared:
        raise ConfigError(
            f"parameters of {name}: got {shown(dict(given))}, but no cell tagged parameters. Tag its cell of defaults."
        )
    known_keys(f"parameters of {name}", given, declared)
    resolved = {}
    for key, parameter in declared.items():
        value, default = given.get(key, parameter.default), parameter.default
        kind = parameter.annotation or ("None | object" if default is None else type(default).__name__)
        try:
            plain = json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
            resolved[key] = _fit(plain, ast.parse(kind, mode="eval").body)
            if isinstance(value, dict) and value.keys() != plain.keys():
                raise TypeError
        except _REFUSED as error:
            raise ConfigError(
                f"parameter {key} of {name}: got {shown(value)}, expected {kind}, of finite numbers, text, true or "
                f"false, null, lists and mappings by text. Its default is {default!r}; give a value of that kind."
            ) from error
    return resolved


def settle(variables: dict[str, Any], name: str = "notebook") -> None:
    """Bring the parameters among a notebook's ``globals()`` to their declared types, in place.

    Plain papermill hands over what its command line says: a list as text. IPython keeps the cells that have run in
    ``In``: the parameters are the latest that declares types and nothing else. Objects are left as they are.
    """
    for source in reversed(variables.get("In", ())):
        with contextlib.suppress(ConfigError):
            cell = {"source": source, "metadata": {"tags": ["parameters"]}}
            declared = declared_parameters({"cells": [cell]}, name)
            if declared and all(one.annotation for one in declared.values()):
                break
    else:
        return
    plain = (*_PLAIN.values(),)
    given = {key: variables[key] for key in declared if isinstance(variables.get(key), plain)}
    given = {key: from_text(value, declared[key]) if isinstance(value, str) else value for key, value in given.items()}
    settled = resolve(declared, given, name)
    variables.update({key: settled[key] for key in given})


def parameter_hash(resolved: Mapping[str, Any]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the resolved parameters; their order plays no part."""
    return digest(resolved)


def from_text(text: str, parameter: Parameter | None = None) -> Any:
    """Return the value that `text` (one word of the command line) stands for; text when the parameter is a string."""
    if parameter is not None:
        kinds = [kind.strip() for kind in (parameter.annotation or type(parameter.default).__name__).split("|")]
        if "str" in kinds and not ("None" in kinds and text in ("None", "null", "~")):
            return text
    with contextlib.suppress(*_REFUSED):
        return ast.literal_eval(text)
    with contextlib.suppress(ConfigError):
        return parse_yaml(text, "value", remedy="Quote it.")
    return text


def _fit(value: Any, kind: ast.expr) -> Any:
    """Return `value` in the type that the annotation `kind` names, or raise TypeError."""
    if isinstance(kind, ast.Constant) and isinstance(kind.value, str):  # an annotation in quotes
        return _fit(value, ast.parse(kind.value, mode="eval").body)
    if isinstance(kind, ast.BinOp):  # a | b: the type that leaves the value as it is, else the first that takes it
        fits = []
        for option in (kind.left, kind.right):
            with contextlib.suppress(TypeError):
                fits.append(_fit(value, option))
        if not fits:
            raise TypeError
        return next((fit for fit in fits if type(fit) is type(value)), fits[0])
    name = ast.unparse(kind.value if isinstance(kind, ast.Subscript) else kind)
    if name == "float" and type(value) is int:
        value = float(value)
    elif name == "int" and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not _PLAIN.get(name, type(value)):  # a type of the notebook's own is not looked at
        raise TypeError
    if not isinstance(kind, ast.Subscript):
        return value
    inner = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
    if name == "list":
        return [_fit(item, inner[0]) for item in value]
    if name == "dict":
        return {key: _fit(item, inner[-1]) for key, item in value.items()}
    if name == "tuple" and len(inner) == len(value):
        return [_fit(item, each) for item, each in zip(value, inner, strict=True)]
    return value
