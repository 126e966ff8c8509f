"""Plain literals and the types they are declared with, as far as a parameters cell needs them."""

from __future__ import annotations

import ast
import math
from typing import Any

from .errors import ConfigError

__all__ = ["MismatchError", "fit", "kind_of", "require_annotation", "require_literal"]

_MOST_BITS = 128  # whole numbers beyond are no parameter, and past 4300 digits Python does not even show them


class MismatchError(Exception):
    """A value does not fit its declared type; the text says which part when it is not the whole."""


def kind_of(default: Any) -> str:
    """Return the type that stands for a parameter without annotation, "" (anything) for None."""
    return "" if default is None else type(default).__name__


def require_literal(label: str, value: Any, depth: int = 0) -> None:
    """Refuse what cannot be written as a literal and as JSON: objects, NaN, infinities, half characters."""
    if depth > 20:  # YAML anchors can make a list that holds itself
        raise ConfigError(label, value="a nested value", bound="at most 20 levels", remedy="Flatten the value.")
    if isinstance(value, list | tuple):
        for item in value:
            require_literal(label, item, depth + 1)
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(label, value=key, bound="text as key of a mapping", remedy="Put the key in quotes.")
            require_literal(label, key)
            require_literal(label, item, depth + 1)
        return
    good = value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
    if type(value) is int and value.bit_length() > _MOST_BITS:
        raise ConfigError(
            label,
            value=f"an integer of {value.bit_length()} bits",
            bound=f"integers of at most {_MOST_BITS} bits",
            remedy="Write it in text.",
        )
    if good and isinstance(value, str):
        good = not any(0xD800 <= ord(character) <= 0xDFFF for character in value)
    if not good:
        raise ConfigError(
            label,
            value=value,
            bound="a literal: a finite number, text, true or false, null, a list or a mapping",
            remedy="Put text in quotes (a date too), and convert arrays with .tolist().",
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
