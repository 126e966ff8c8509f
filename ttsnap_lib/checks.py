"""Argument checks: each returns the value in its plain type, or raises with the value, the bound and the remedy."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Iterable
from typing import Any

from .errors import ConfigError, TTSnapError

__all__ = ["choice", "integer", "known_keys", "plain_name", "real", "text"]


def integer(
    name: str, value: Any, low: int | None = None, high: int | None = None, *, error: type[TTSnapError] = ConfigError
) -> int:
    """Return `value` as an int within [low, high]; booleans and fractions are refused."""
    bound = "an integer" + _range(low, high)
    try:
        whole = isinstance(value, numbers.Integral) or (isinstance(value, numbers.Real) and float(value).is_integer())
    except OverflowError:  # a fraction beyond the largest float
        whole = False
    if isinstance(value, bool) or not whole or _outside(int(value), low, high):
        raise error(name, value=value, bound=bound, remedy=f"Set {name} to {bound}.")
    return int(value)


def real(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    open_low: bool = False,
    error: type[TTSnapError] = ConfigError,
) -> float:
    """Return `value` as a finite float within [low, high] ((low, high] if `open_low`)."""
    bound = "a finite number" + _range(low, high, open_low)
    try:
        good = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        good = False
    if not good or _outside(value, low, high) or (open_low and value == low):
        raise error(name, value=value, bound=bound, remedy=f"Set {name} to {bound}.")
    return float(value)


def choice(name: str, value: Any, options: Iterable[Any], *, error: type[TTSnapError] = ConfigError) -> Any:
    """Return `value` when it is one of `options`; suggest the closest one otherwise."""
    options = list(options)
    try:
        known = value in options
    except ValueError:  # an array compares element by element
        known = False
    if not known:
        raise error(name, value=value, bound=f"one of {options}", remedy=_suggest(value, options))
    return value


def text(name: str, value: Any, *, error: type[TTSnapError] = ConfigError) -> str:
    """Return `value` when it is a string with something in it."""
    if not isinstance(value, str) or not value.strip():
        raise error(name, value=value, bound="a non-empty string", remedy=f"Give {name} as text.")
    return value


def plain_name(name: str, value: Any, *, error: type[TTSnapError] = ConfigError) -> str:
    """Return `value` when it can be part of a file name: it climbs out of no folder, on no system."""
    if not isinstance(value, str) or re.fullmatch(r"\w[\w .+=,@()-]{0,98}", value) is None or value[-1] in " .":
        raise error(
            name,
            value=value,
            bound="a plain name: up to 99 letters, digits, spaces and _ . + - = , @ ( ), a letter or digit first",
            remedy="Use letters, digits and _; folders have an option of their own.",
        )
    return value


def known_keys(
    what: str, given: Iterable[Any], known: Iterable[str], *, error: type[TTSnapError] = ConfigError
) -> None:
    """Refuse keys of `given` that are not in `known`; an unknown key is never ignored."""
    known = list(known)
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        raise error(what, value=given, bound=f"a mapping with keys of {known}", remedy="Write lines of `name: value`.")
    unknown = [key for key in given if key not in known]
    if unknown:
        raise error(
            f"{what}: unknown key", value=unknown[0], bound=f"one of {known}", remedy=_suggest(unknown[0], known)
        )


def _outside(value: float, low: float | None, high: float | None) -> bool:
    return (low is not None and value < low) or (high is not None and value > high)


def _range(low: float | None, high: float | None, open_low: bool = False) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f" {'above' if open_low else 'of at least'} {low}"
    if low is None:
        return f" of at most {high}"
    return f" in {'(' if open_low else '['}{low}, {high}]"


def _suggest(value: Any, options: list[Any]) -> str:
    known = [str(option) for option in options]
    close = difflib.get_close_matches(value[:200], known, n=1) if isinstance(value, str) else []
    return f"Did you mean {close[0]!r}?" if close else "Use one of those."
