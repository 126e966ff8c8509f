"""Argument checks: each returns the value in its plain type, or raises with the value, the bound and the remedy."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import ConfigError, TTSnapError

__all__ = ["choice", "existing_path", "integer", "known_keys", "real", "text"]


def integer(
    name: str, value: Any, low: int | None = None, high: int | None = None, *, error: type[TTSnapError] = ConfigError
) -> int:
    """Return `value` as an int within [low, high]; booleans and fractions are refused."""
    bound = "an integer" + _range(low, high)
    whole = isinstance(value, numbers.Integral) or (isinstance(value, numbers.Real) and float(value).is_integer())
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
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not good or _outside(value, low, high) or (open_low and value == low):
        raise error(name, value=value, bound=bound, remedy=f"Set {name} to {bound}.")
    return float(value)


def choice(name: str, value: Any, options: Iterable[Any], *, error: type[TTSnapError] = ConfigError) -> Any:
    """Return `value` when it is one of `options`; suggest the closest one otherwise."""
    options = list(options)
    if value not in options:
        raise error(name, value=value, bound=f"one of {options}", remedy=_suggest(value, options))
    return value


def text(name: str, value: Any, *, error: type[TTSnapError] = ConfigError) -> str:
    """Return `value` when it is a string with something in it."""
    if not isinstance(value, str) or not value.strip():
        raise error(name, value=value, bound="a non-empty string", remedy=f"Give {name} as text.")
    return value


def known_keys(
    what: str, given: Iterable[Any], known: Iterable[str], *, error: type[TTSnapError] = ConfigError
) -> None:
    """Refuse keys of `given` that are not in `known`; an unknown key is never ignored."""
    known = list(known)
    unknown = [key for key in given if key not in known]
    if unknown:
        raise error(
            f"{what}: unknown key", value=unknown[0], bound=f"one of {known}", remedy=_suggest(unknown[0], known)
        )


def existing_path(name: str, value: Any, *, error: type[TTSnapError] = ConfigError) -> Path:
    """Return `value` as a path that exists."""
    if not isinstance(value, str | Path) or not Path(value).exists():
        raise error(name, value=str(value), bound="an existing path", remedy="Check the spelling and the folder.")
    return Path(value)


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
    close = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
    return f"Did you mean {close[0]!r}?" if close else "Use one of those."
