"""Where things are kept, and how they are read and written: whole or not there, one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ttsnap_lib.checks import integer
from ttsnap_lib.errors import ConfigError, DiskError, TTSnapError

HIDDEN = ".ttsnap"
"""Folder for locks and checksums inside a folder of results."""
SHIPPED_TENSORS = {"pocket-flux": "flux", "pocket-sdxl": "sdxl"}
"""Names of the tensors that come with the package, and their folders in ``data_cache/pocket``."""

_PACKAGE = Path(__file__).resolve().parent
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# No permission; or a file stands where a folder should, or the other way round; or a name that no disk takes.
_REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


# Places


def repository_root() -> Path | None:
    """Return the checkout this package stands in, or None when it is installed from a wheel."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").exists() and (root / "notebooks").is_dir() else None


def data_cache() -> Path:
    """Return the folder of everything computed: ``TTSNAP_DATA_CACHE``, else the repository's, else the user's cache."""
    given = os.environ.get("TTSNAP_DATA_CACHE")
    if given:
        return Path(given).expanduser()
    root = repository_root()
    if root is not None:
        return root / "data_cache"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ttsnap"


def notebooks_folder() -> Path:
    """Return the folder of the shipped notebooks: the repository's, else the copy in the wheel."""
    root = repository_root()
    return root / "notebooks" if root is not None else _PACKAGE / "_notebooks"


def shipped_tensor(name: str) -> Path:
    """Return the folder of a shipped pocket tensor: in the data cache, else in the repository, else in the wheel."""
    relative = Path("pocket") / f"{SHIPPED_TENSORS[name]}.zarr"
    root = repository_root()
    places = [data_cache(), *([root / "data_cache"] if root else []), _PACKAGE / "_data_cache"]
    return next((place / relative for place in places if (place / relative).is_dir()), places[-1] / relative)


def as_path(name: str, value: Any, *, error: type[TTSnapError] = ConfigError) -> Path:
    """Return `value` as a path, or raise `error` when it is not one."""
    if not isinstance(value, str | os.PathLike) or not str(value) or "\0" in str(value):
        raise error(f"{name}: got {value!r}, expected a path. Give {name} as text or pathlib.Path.")
    return Path(value)


# Errors of the disk and of broken files


def disk_error(error: BaseException, path: object, doing: str = "write") -> DiskError | None:
    """Return what a full disk or a folder without permission means for `path`; None for every other error.

    Libraries hide the number of the system's error behind errors of their own (torch, safetensors), so the errors
    that led to this one are looked at too, and their text.
    """
    link: BaseException | None = error
    seen: list[BaseException] = []
    while link is not None and link not in seen:
        seen.append(link)
        if isinstance(link, DiskError):
            return link
        number = getattr(link, "errno", None)
        if number is None:
            number = next((k for k in _FULL if os.strerror(k) in str(link) or f"os error {k}" in str(link)), None)
        if number in _FULL:
            return DiskError(
                f"disk full while writing {path} ({os.strerror(number)}). Free some space (or raise a quota or "
                "`ulimit -f`), or choose another folder, then run the same again: what was finished stays."
            )
        if number in _REFUSED and link in (error, error.__cause__):
            return DiskError(
                f"cannot {doing} {path} ({os.strerror(number)}). Change its permissions or choose another place "
                "(TTSNAP_DATA_CACHE moves the cache)."
            )
        link = link.__cause__ or link.__context__
    return None


@contextlib.contextmanager
def typed_disk_errors(path: object) -> Iterator[None]:
    """Turn a full disk or a folder without write permission into a DiskError that names `path`."""
    try:
        yield
    except TTSnapError:
        raise
    except Exception as error:
        typed = disk_error(error, path)
        if typed is None:
            raise
        raise typed from error


@contextlib.contextmanager
def failures_as(error: type[TTSnapError], message: str) -> Iterator[None]:
    """Turn whatever a library raises on a broken file into `error`, with its reason; an `error` passes as it is.

    Libraries fail in many ways for one bad file (Pillow, numpy, zarr, torch, safetensors, peft): that the file is bad
    is the fact that matters.
    """
    try:
        yield
    except error:
        raise
    except Exception as failure:
        raise error(f"{message} ({reason(failure)})") from failure


def reason(failure: BaseException) -> str:
    """Return the kind of a library's error and the start of its text, on one line."""
    text = " ".join(str(failure).split())[:160]
    return f"{type(failure).__name__}: {text}" if text else type(failure).__name__


def require_space(folder: str | Path, needed_bytes: float, what: str) -> None:
    """Refuse to start when the disk under `folder` has less than `needed_bytes` free."""
    folder = Path(folder)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise DiskError(
            f"not enough disk for {what} in {folder}: {needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free. "
            "Free some space, choose another folder, or ask for less."
        )


# Writing: beside, then renamed, under a lock


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[Any]:
    """Open a temporary file beside `path` and rename it onto `path` when the block ends well.

    A reader, or a process killed half-way, sees the old file or the new one, never a part. What a killed writer left of
    the same file is removed.
    """
    path = Path(path)
    with typed_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead_parts(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.{os.getpid()}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def _remove_dead_parts(path: Path) -> None:
    """Remove what processes that are gone left of `path`."""
    import psutil

    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        writer = part.name.removeprefix(f".{path.name}.").split(".")[0]
        if writer.isdigit() and not psutil.pid_exists(int(writer)):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its place, whole, when the block ends well.

    An existing folder at `path` is replaced; should the process die between the two renames, `tidy` puts it back.
    """
    path = Path(path)
    with typed_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            os.chmod(part, 0o755)
            yield part
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
                os.replace(path, old / "old")
                os.replace(part, path)
                _remove(old)
            else:
                os.replace(part, path)
        except BaseException:
            _remove(part)
            raise


def tidy(folder: str | Path, name: str = "*") -> None:
    """Remove what killed processes left of folders `name` (a pattern) that they were writing in `folder`.

    An old folder that was on its way out while the new one was not yet there is put back. Call it where no other
    process writes these names: under their lock.
    """
    for path in Path(folder).glob(f".{name}.*.old"):
        place = path.with_name(path.name[1:].rsplit(".", 2)[0])
        with contextlib.suppress(OSError):
            if not place.exists():
                os.replace(path / "old", place)
        _remove(path)
    for path in Path(folder).glob(f".{name}.*.part"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON with sorted keys, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        file.write("\n")


class InUseError(DiskError):
    """A folder or shard that another process is writing."""


@contextlib.contextmanager
def lock(path: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; it ends with the process, so a crash leaves nothing behind.

    Raises
    ------
    InUseError
        When another process holds it and `wait` is false.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    with typed_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path, thread_local=False)
        try:
            held.acquire(blocking=wait)
        except Timeout as error:
            raise InUseError(
                f"{path.parent} is in use by another process ({path.name}). Wait for it to end, or give this one an "
                "output folder or shard of its own."
            ) from error
    try:
        yield
    finally:
        held.release()


# Shards: processes that share the work on one folder


def parse_shard(shard: object) -> tuple[int, int]:
    """Return (index, count) of ``(0, 2)`` or ``"0/2"``; None takes the place in an ``accelerate launch``.

    The launcher tells it by RANK and WORLD_SIZE. No process group is formed: the processes have nothing to say to each
    other, and one may die without the others.
    """
    if shard is None:
        rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
        return (int(rank), int(size)) if rank.isdigit() and size.isdigit() and int(rank) < int(size) else (0, 1)
    if isinstance(shard, str) and re.fullmatch(r"\d+/\d+", shard):
        shard = tuple(int(part) for part in shard.split("/"))
    if not isinstance(shard, tuple | list) or len(shard) != 2:
        raise ConfigError(f"shard: got {shard!r}, expected index/count, such as 0/4. The first shard is 0.")
    count = integer("shard count", shard[1], 1)
    return integer("shard index", shard[0], 0, count - 1), count


@contextlib.contextmanager
def shard_lock(folder: Path, shard: tuple[int, int]) -> Iterator[contextlib.ExitStack]:
    """Hold a shard of `folder`, and during the block alone also the right to start on it.

    The returned stack keeps the shard when the block ends; closing it lets go. InUseError when another process holds
    this shard, or is filling the folder in other shards.
    """
    locks = folder / HIDDEN / "locks"
    index, count = shard
    with lock(locks / "start.lock", wait=True):  # one at a time: two starting at once would trip over each other
        held = contextlib.ExitStack()
        try:
            held.enter_context(lock(_shard_file(folder, index, count)))
            for other in sorted(locks.glob("shard-*-of-*.lock")):
                if not other.name.endswith(f"-of-{count}.lock"):
                    with lock(other):
                        pass
            yield held
        except InUseError as error:
            held.close()
            raise InUseError(
                f"another process is filling {folder} (asked for shard {index}/{count}). Wait for it to end, or give "
                "each process a shard of its own, all of one count (--shard 0/2, --shard 1/2)."
            ) from error
        except BaseException:
            held.close()
            raise


def others_at_work(folder: Path, shard: tuple[int, int]) -> bool:
    """Tell whether another process holds another shard of `folder`, of the same number of shards."""
    index, count = shard
    for other in range(count):
        if other != index:
            try:
                with lock(_shard_file(folder, other, count)):
                    pass
            except InUseError:
                return True
    return False


def _shard_file(folder: Path, index: int, count: int) -> Path:
    return folder / HIDDEN / "locks" / f"shard-{index}-of-{count}.lock"


# Reading


def read_bytes(path: str | Path, what: str, *, error: type[TTSnapError] = ConfigError, remedy: str) -> bytes:
    """Return the content of a file; `what` it is, for the message of `error`."""
    path = as_path(what, path, error=error)
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise error(f"{what} is not a file: got {path}. {remedy}")
    try:
        return path.read_bytes()
    except OSError as failure:
        raise error(f"{what} {path} cannot be read ({failure.strerror}). {remedy}") from failure


def read_json(
    path: str | Path, what: str, *, error: type[TTSnapError] = ConfigError, remedy: str, kind: type | None = dict
) -> Any:
    """Return the content of a JSON file with a `kind` (dict, list, None for anything) at the top, each key once."""
    content = read_bytes(path, what, error=error, remedy=remedy)
    return parse_json(content, f"{what} {path}", error=error, remedy=remedy, kind=kind)


def parse_json(
    content: str | bytes, what: str, *, error: type[TTSnapError] = ConfigError, remedy: str, kind: type | None = dict
) -> Any:
    """Return what JSON text stands for; see :func:`read_json`."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as failure:
        raise error(f"{what} is not whole JSON ({reason(failure)}). {remedy}") from failure
    if kind is not None and not isinstance(found, kind):
        top = "mapping" if kind is dict else "list"
        raise error(f"{what}: got {found!r}, expected JSON with a {top} at the top. {remedy}")
    return found


def read_if_whole(path: Path) -> dict[str, Any] | None:
    """Return the JSON mapping in `path`, or None when there is none to read."""
    try:
        return read_json(path, "record", remedy="")
    except ConfigError:
        return None


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

    `fast` parses in C, for large files of numbers; 1e-3 stays text then, as YAML 1.1 has it.
    """
    import yaml

    try:
        return yaml.load(text.decode("utf-8-sig") if isinstance(text, bytes) else text, Loader=_loader(fast))
    except Exception as failure:  # besides YAMLError, its constructors raise IndexError, KeyError, AttributeError
        raise error(
            f"{what} cannot be read as YAML of plain values, each key once ({reason(failure)}). {remedy}"
        ) from failure


@functools.cache
def _loader(fast: bool) -> Any:
    import yaml

    parent: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if fast else yaml.SafeLoader

    class Loader(parent):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            _once([(key, None) for key in keys])
            return super().construct_mapping(node, deep)

    if not fast:  # YAML 1.1 reads 1e-3 as text; nobody who writes it means text
        Loader.add_implicit_resolver(
            "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
        )
    return Loader


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


# Identities: what decides a result, kept beside it


def digest(content: Any, length: int = 16) -> str:
    """Return the first `length` hex digits of the SHA-256 of `content`, a plain value that JSON can write."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:length]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting, also a nested one, in which two identities differ."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key)!r} there, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def refuse_other(
    folder: str | Path, old: Mapping[str, Any], new: Mapping[str, Any], error: type[TTSnapError], remedy: str
) -> None:
    """Refuse to go on in a `folder` that was made with other settings; each difference is shown."""
    different = differences(old, new)
    if different:
        raise error(f"{folder} was made with other settings: {'; '.join(different[:6])}. {remedy}")


# Reading ahead


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def prefetch(
    make: Callable[[_Item], _Made], items: Iterable[_Item], *, workers: int = 1, ahead: int = 4
) -> Iterator[_Made]:
    """Yield ``make(item)`` of each item in order, made by threads up to `ahead` items before it is asked for."""
    pool = ThreadPoolExecutor(workers)
    queue: deque = deque()
    todo = iter(items)
    try:
        while True:
            while len(queue) <= ahead:
                try:
                    queue.append(pool.submit(make, next(todo)))
                except StopIteration:
                    break
            if not queue:
                return
            yield queue.popleft().result()
    finally:  # without waiting: when the garbage collector ends this generator, it may be in one of the threads
        pool.shutdown(wait=False, cancel_futures=True)
