"""How things are written: beside, then renamed, under a lock where two could write; and what a failing disk says."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DiskError, TTSnapError

__all__ = [
    "atomic_folder",
    "atomic_write",
    "disk_error",
    "lock",
    "require_space",
    "tidy",
    "typed_disk_errors",
    "write_json",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# No permission; or a file stands where a folder should, or the other way round; or a name that no disk takes.
_REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


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
                f"disk full while writing {path}",
                value=os.strerror(number),
                bound="room for what is written",
                remedy="Free some space (or raise a quota or `ulimit -f`), or choose another folder, then run the same "
                "again: what was finished stays.",
            )
        if number in _REFUSED and link in (error, error.__cause__):
            return DiskError(
                f"cannot {doing} {path}",
                value=os.strerror(number),
                bound=f"a place that you may {doing}, not taken by something else",
                remedy="Change its permissions or choose another place (TTSNAP_DATA_CACHE moves the cache).",
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
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[Any]:
    """Open a temporary file beside `path` and rename it onto `path` when the block ends well.

    A reader, or a process killed half-way, sees the old file or the new one, never a part. What a killed writer left of
    the same file is removed.

    Yields
    ------
    file
        Open for writing.

    Raises
    ------
    DiskError
        When the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with typed_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead_parts(path)
        handle, name = _part_of(path)
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


def _part_of(path: Path) -> tuple[int, str]:
    """Open a new temporary file beside `path`, locked as long as its writer lives: so a leftover can be told."""
    import fcntl

    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(name)
        except (BlockingIOError, FileNotFoundError):  # another writer took it for a leftover before it was locked
            os.close(handle)
            continue
        except OSError:  # a file system without locks: leftovers stay there
            pass
        return handle, name


def _remove_dead_parts(path: Path) -> None:
    import fcntl

    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError), open(part, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its writer lives
            part.unlink()


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its place, whole, when the block ends well.

    An existing folder at `path` is replaced.

    Raises
    ------
    DiskError
        When the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with typed_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            os.chmod(part, 0o755)
            yield part
            if not path.exists():
                os.replace(part, path)
            elif _exchange(part, path):
                _remove(part)
            else:  # a process that ends between the next two lines leaves it to `tidy` to put the old folder back
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
                os.replace(path, old / "old")
                os.replace(part, path)
                shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@functools.cache
def _renameat2() -> Any:
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, so that no reader finds neither; False where the system cannot (not Linux, NFS)."""
    if _renameat2() is None:
        return False
    at_cwd, exchange = -100, 2
    return _renameat2()(at_cwd, os.fsencode(one.absolute()), at_cwd, os.fsencode(other.absolute()), exchange) == 0


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


@contextlib.contextmanager
def lock(path: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; it ends with the process, so a crash leaves nothing behind.

    Raises
    ------
    DiskError
        When another process holds it and `wait` is false.
    """
    import fcntl

    path = Path(path)
    with typed_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 - closed by the with below
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise DiskError(
                f"{path.parent} is in use by another process",
                value=str(path),
                bound="one writer at a time",
                remedy="Wait for the other process to end, or give this one an output folder or shard of its own.",
            ) from error
        yield


def require_space(folder: str | Path, needed_bytes: float, what: str) -> None:
    """Refuse to start when the disk under `folder` has less than `needed_bytes` free.

    Raises
    ------
    DiskError
        Less is free.
    """
    folder = Path(folder)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise DiskError(
            f"not enough disk for {what} in {folder}",
            value=f"{needed_bytes / 1e9:.2f} GB needed",
            bound=f"at most the {free / 1e9:.2f} GB that are free",
            remedy="Free some space, choose another folder, or ask for less.",
        )
