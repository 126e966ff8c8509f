"""The parameters of a notebook: read from its cell tagged ``parameters``, checked strictly, injected as literals."""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttsnap_lib.checks import known_keys
from ttsnap_lib.errors import ConfigError
from ttsnap_lib.files import parse_yaml, read_json

_MOST_BITS = 128  # whole numbers beyond are no parameter, and past 4300 digits Python does not even show them


class MismatchError(Exception):
    """A value does not fit its declared type; the text says which part when it is not the whole."""


def kind_of(default: Any) -> str:
    """Return the type that stands for a parameter without annotation, "" (anything) for None."""
    return "" if default is None else type(default).__name__


def require_literal(label: str, value: Any, depth: int = 0) -> None:
    """Refuse what cannot be written as a literal and as JSON: objects, NaN, infinities, half characters."""
    if depth > 20:  # YAML anchors can make a list that holds itself
        raise ConfigError(f"{label}: got 'a nested value', expected at most 20 levels. Flatten the value.")
    if isinstance(value, list | tuple):
        for item in value:
            require_literal(label, item, depth + 1)
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{label}: got {key!r}, expected text as key of a mapping. Put the key in quotes.")
            require_literal(label, key)
            require_literal(label, item, depth + 1)
        return
    good = value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
    if type(value) is int and value.bit_length() > _MOST_BITS:
        raise ConfigError(
            f"{label}: got an integer of {value.bit_length()} bits, expected integers of at most {_MOST_BITS} bits. "
            "Write it in text."
        )
    if good and isinstance(value, str):
        good = not any(0xD800 <= ord(character) <= 0xDFFF for character in value)
    if not good:
        raise ConfigError(
            f"{label}: got {value!r}, expected a literal: a finite number, text, true or false, null, a list or a "
            "mapping. Put text in quotes (a date too), and convert arrays with .tolist()."
        )


def require_annotation(kind: str) -> None:
    """Raise SyntaxError, ValueError or TypeError when `kind` is an annotation that :func:`fit` cannot follow."""
    if not kind:
        return
    for node in ast.walk(ast.parse(kind, mode="eval")):
        if isinstance(node, ast.Subscript) and _last_name(node.value) == "Literal":
            for option in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
                ast.literal_eval(option)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not _in_literal(kind):
            require_annotation(node.value)


def _in_literal(kind: str) -> bool:
    return "Literal" in kind  # its options may be any text


def fit(value: Any, kind: ast.expr) -> Any:
    """Return `value` in the type that the annotation `kind` names, or raise MismatchError."""
    if isinstance(kind, ast.Constant) and kind.value is None:
        return _need(value, value is None)
    if isinstance(kind, ast.Constant) and isinstance(kind.value, str):  # an annotation in quotes
        return fit(value, ast.parse(kind.value, mode="eval").body)
    if isinstance(kind, ast.BinOp) and isinstance(kind.op, ast.BitOr):
        return _fit_any(value, [kind.left, kind.right])
    if isinstance(kind, ast.Subscript):
        inner = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
        return _fit_container(value, _last_name(kind.value), inner)
    name = _last_name(kind)
    if name == "bool":
        return _need(value, isinstance(value, bool))
    if name == "int":
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return int(_need(value, whole and not isinstance(value, bool)))
    if name == "float":
        return float(_need(value, isinstance(value, int | float) and not isinstance(value, bool)))
    if name in ("str", "Path"):
        return _need(value, isinstance(value, str))
    if name == "list":
        return list(_need(value, isinstance(value, list | tuple)))
    if name == "tuple":
        return tuple(_need(value, isinstance(value, list | tuple)))
    if name in ("dict", "Mapping"):
        return _need(value, isinstance(value, dict))
    if name in ("Sequence", "Iterable"):
        return _need(value, isinstance(value, list | tuple))
    if name in ("None", "NoneType"):
        return _need(value, value is None)
    return value  # a type of the notebook's own: no opinion


def _fit_any(value: Any, kinds: list[ast.expr]) -> Any:
    """Return `value` in the first type that takes it unchanged, else in the first that takes it at all."""
    fits = []
    for kind in kinds:
        try:
            fits.append(fit(value, kind))
        except MismatchError:
            continue
    exact = [fit for fit in fits if type(fit) is type(value)]
    if not fits:
        raise MismatchError
    return (exact or fits)[0]


def _fit_container(value: Any, name: str, inner: list[ast.expr]) -> Any:
    if name == "Literal":
        options = [ast.literal_eval(option) for option in inner]
        return _need(value, any(type(value) is type(option) and value == option for option in options))
    if name == "Optional":
        return value if value is None else fit(value, inner[0])
    if name == "Union":
        return _fit_any(value, inner)
    if name in ("Annotated", "Final"):
        return fit(value, inner[0])
    if name == "dict":
        _need(value, isinstance(value, dict))
        return {key: _fit_item(item, inner[-1], repr(key)) for key, item in value.items()}
    if name in ("list", "tuple", "Sequence", "Iterable"):
        _need(value, isinstance(value, list | tuple))
        open_end = name != "tuple" or (isinstance(inner[-1], ast.Constant) and inner[-1].value is Ellipsis)
        if not open_end and len(value) != len(inner):
            raise MismatchError(f"{len(inner)} values")
        kinds = [inner[0]] * len(value) if open_end else inner
        items = [_fit_item(item, kind, f"item {i}") for i, (item, kind) in enumerate(zip(value, kinds, strict=True))]
        return tuple(items) if name == "tuple" else items
    return value


def _fit_item(value: Any, kind: ast.expr, where: str) -> Any:
    try:
        return fit(value, kind)
    except MismatchError:
        raise MismatchError(f"{where} is {value!r}") from None


def _need(value: Any, good: bool) -> Any:
    if not good:
        raise MismatchError
    return value


def _last_name(kind: ast.expr) -> str:
    return kind.attr if isinstance(kind, ast.Attribute) else kind.id if isinstance(kind, ast.Name) else ""


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
    content = read_json(path, "notebook", remedy=remedy)  # outputs of other programs may hold NaN
    cells = content.get("cells")
    bad = ("cells", cells) if not isinstance(cells, list) else ("nbformat", content.get("nbformat"))
    if bad[0] == "cells" or content.get("nbformat") != 4 or isinstance(content["nbformat"], bool):
        raise ConfigError(f"notebook {path}: {bad[0]}: got {bad[1]!r}, expected notebook format 4. {remedy}")
    for number, cell in enumerate(cells):
        if not _is_cell(cell):
            raise ConfigError(
                f"notebook {path}: cell {number}: got {cell!r}, expected a cell of notebook format 4: cell_type, "
                "metadata, source as text or lines. Open it in JupyterLab and save it again."
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
        f"{name}: line {line} of the cell tagged parameters: got {text.strip()!r}, expected an assignment of a "
        "literal, such as `budget: float = 100.0`. Move computed values to a later cell."
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
            f"parameters of {name}: got {dict(given)!r}, expected none: the notebook has no cell tagged parameters. "
            "Tag its cell of defaults with `parameters`, or give none."
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
                f"{label}: got {value!r}, expected {kind}{f' ({error})' if str(error) else ''}. Its default is "
                f"{parameter.default!r}; give a value of that kind."
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
            f"parameters: got {dict(parameters)!r}, expected plain literals. Give numbers, text, lists or mappings."
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
