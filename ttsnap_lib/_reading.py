"""Reads files of unknown origin: regular files of bounded size, JSON and YAML of bounded depth, each key once.

Every reader raises the caller's own error. What a parser does with hostile input (a crash of the C stack on deep
nesting, a few bytes of aliases that stand for billions of values, a pipe that never ends) is kept out here, once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError, TTSnapError

__all__ = [
    "MAX_ALIASED",
    "MAX_BYTES",
    "MAX_DEPTH",
    "as_path",
    "failures_as",
    "parse_yaml",
    "read_bytes",
    "read_json",
    "read_yaml",
    "reason",
]

MAX_BYTES = 256 * 2**20
"""Largest text file that is read: a reward file of a million values has 20 MB."""
MAX_DEPTH = 100
"""Deepest nesting of JSON and YAML. Parsers in C crash the process at some tens of thousands."""
MAX_ALIASED = 100_000
"""Most values that YAML aliases may stand for, all told."""


class _RefusedError(ValueError):
    """A text that is well-formed but not taken: what it has, and what is taken."""


def as_path(name: str, value: Any, *, error: type[TTSnapError] = ConfigError) -> Path:
    """Return `value` as a path that the operating system can be asked about.

    Raises
    ------
    TTSnapError
        Of class `error`: no text or path, empty, with a NUL, or longer than file systems take.
    """
    bound = "a path: text without NUL, names of at most 255 bytes, 4095 in all"
    if not isinstance(value, str | os.PathLike) or not os.fspath(value) or isinstance(os.fspath(value), bytes):
        raise error(name, value=value, bound=bound, remedy=f"Give {name} as text or pathlib.Path.")
    path = Path(value)
    encoded = os.fspath(path).encode("utf-8", "surrogatepass")
    if b"\0" in encoded or len(encoded) > 4095 or any(len(part) > 255 for part in encoded.split(b"/")):
        raise error(name, value=os.fspath(path), bound=bound, remedy="Check the spelling.")
    return path


@contextlib.contextmanager
def failures_as(error: type[TTSnapError], problem: str, *, value: object, bound: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises on a broken file into `error`, with its reason; an `error` passes as it is.

    Libraries fail in many ways for one bad file (Pillow, numpy, zarr, torch, safetensors, peft): that the file is bad
    is the fact that matters.
    """
    try:
        yield
    except error:
        raise
    except Exception as failure:
        raise error(f"{problem} ({reason(failure)})", value=value, bound=bound, remedy=remedy) from failure


def read_bytes(
    path: str | Path, what: str, *, error: type[TTSnapError] = ConfigError, remedy: str, limit: int = MAX_BYTES
) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises
    ------
    TTSnapError
        Of class `error`: a file that is missing, a folder, a pipe or a device, too large, or not readable.
    """
    path = as_path(what, path, error=error)
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise error(f"{what} is not a file", value=str(path), bound="a regular file", remedy=remedy)
            if state.st_size > limit:
                raise error(
                    f"{what} {path} is too large",
                    value=f"{state.st_size} bytes",
                    bound=f"at most {limit} bytes",
                    remedy=remedy,
                )
            return file.read()
    except OSError as failure:
        raise error(
            f"{what} cannot be read ({failure.strerror or type(failure).__name__})",
            value=str(path),
            bound="an existing file that you may read",
            remedy=remedy,
        ) from failure


def read_json(
    path: str | Path,
    what: str,
    *,
    error: type[TTSnapError] = ConfigError,
    remedy: str,
    kind: type | None = dict,
    strict: bool = True,
) -> Any:
    """Return the content of a JSON file.

    Parameters
    ----------
    what : str
        What the file is, for messages.
    kind : type or None
        What has to stand at the top: dict, list, or None for anything.
    strict : bool
        Refuse repeated keys and numbers that JSON does not have (NaN). Files that other programs write may have them.

    Raises
    ------
    TTSnapError
        Of class `error`.
    """
    content = read_bytes(path, what, error=error, remedy=remedy)
    hooks: dict[str, Any] = {"object_pairs_hook": _once, "parse_constant": _no_constant} if strict else {}
    bound = "JSON" if kind is None else f"JSON with a {'mapping' if kind is dict else 'list'} at the top"
    try:
        found = json.loads(content.decode("utf-8-sig"), **hooks)
    except (ValueError, RecursionError) as failure:
        raise error(f"{what} {path} is not whole JSON", value=reason(failure), bound=bound, remedy=remedy) from failure
    if kind is not None and not isinstance(found, kind):
        raise error(f"{what} {path}", value=found, bound=bound, remedy=remedy)
    return found


def read_yaml(
    path: str | Path, what: str, *, error: type[TTSnapError] = ConfigError, remedy: str, fast: bool = False
) -> Any:
    """Return the content of a YAML file; see :func:`parse_yaml`."""
    content = read_bytes(path, what, error=error, remedy=remedy)
    return parse_yaml(content, f"{what} {path}", error=error, remedy=remedy, fast=fast)


def parse_yaml(
    text: str | bytes, what: str, *, error: type[TTSnapError] = ConfigError, remedy: str, fast: bool = False
) -> Any:
    """Return the plain values that YAML text stands for: a repeated key is an error, and 1e-3 is a number.

    Parameters
    ----------
    fast : bool
        Parse in C, for large files of numbers; 1e-3 stays text then, as YAML 1.1 has it.

    Raises
    ------
    TTSnapError
        Of class `error`: no YAML, tags of objects, nesting deeper than :data:`MAX_DEPTH`, aliases that stand for more
        than :data:`MAX_ALIASED` values.
    """
    import yaml

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        loader = _loader(fast)
        _check_shape(text, loader)
        return yaml.load(text, Loader=loader)  # a SafeLoader
    except _RefusedError as failure:
        value, bound = failure.args
        raise error(f"{what} is not taken", value=value, bound=bound, remedy=remedy) from None
    except Exception as failure:  # besides YAMLError, its constructors raise IndexError, KeyError, AttributeError
        raise error(
            f"{what} cannot be read", value=reason(failure), bound="YAML of plain values, each key once", remedy=remedy
        ) from failure


def _check_shape(text: str, loader: Any) -> None:
    """Refuse YAML that is too deep or that its aliases blow up; events are pulled one by one, without recursion."""
    import yaml

    sizes: dict[str, int | None] = {}  # values behind each anchor, aliases counted in full; None while it is open
    open_: list[tuple[str | None, int]] = []
    count = aliased = 0
    event: Any  # anchor stands on some kinds alone
    for event in yaml.parse(text, Loader=loader):
        kind = type(event)
        if kind is yaml.ScalarEvent:
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif kind is yaml.SequenceStartEvent or kind is yaml.MappingStartEvent:
            if len(open_) >= MAX_DEPTH:
                raise _RefusedError("deeper nesting", f"at most {MAX_DEPTH} levels")
            open_.append((event.anchor, count))
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = None
        elif kind is yaml.SequenceEndEvent or kind is yaml.MappingEndEvent:
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif kind is yaml.AliasEvent:
            size = sizes.get(event.anchor, 0)
            if size is None:
                raise _RefusedError(f"alias *{event.anchor} inside itself", "aliases of what is whole")
            count, aliased = count + size, aliased + size
            if aliased > MAX_ALIASED:
                raise _RefusedError(
                    f"aliases that stand for {aliased} values and more", f"at most {MAX_ALIASED} in all"
                )


@functools.cache
def _loader(fast: bool) -> Any:
    import re

    import yaml

    parent: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if fast else yaml.SafeLoader

    class Loader(parent):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                name = self.construct_object(key, deep=True)
                if name.__hash__ is not None and not isinstance(name, tuple):  # the parent refuses the others
                    if name in seen:
                        raise _RefusedError(f"key {name!r} twice", "each key once")
                    seen.add(name)
            return super().construct_mapping(node, deep)

    if not fast:  # YAML 1.1 reads 1e-3 as text; nobody who writes it means text
        Loader.add_implicit_resolver(
            "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
        )
    return Loader


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait for its writer


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def reason(failure: BaseException) -> str:
    """Return the kind of a library's error and the start of its text, on one line."""
    text = " ".join(str(failure).split())[:160]
    return f"{type(failure).__name__}: {text}" if text else type(failure).__name__
