"""What is put in the way of a command: a disk that fills up, a limit on files, no permission; in its own process."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "NOBODY",
    "Skip",
    "become_nobody",
    "clock_in_python",
    "clock_library",
    "fill_disk",
    "limit_files",
    "small_disk",
]

NOBODY = 65534


class Skip(Exception):
    """The fault cannot be tried on this machine; the message says why, and how it could."""


def fill_disk(folder: str, after: int) -> None:
    """Let the disk under `folder` be full once `after` files have been opened for writing there."""
    opened, at_work = 0, False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal opened, at_work
        if event not in ("open", "os.mkdir") or at_work or not isinstance(arguments[0], str | bytes):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        at_work = True
        try:
            inside = os.path.abspath(os.fsdecode(arguments[0])).startswith(folder)
        finally:
            at_work = False
        if inside:
            opened += 1
            if opened > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(arguments[0]))

    sys.addaudithook(hook)


def limit_files(size: int) -> None:
    """Let no file grow beyond `size` bytes (``ulimit -f``): a write stops in the middle of the file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def become_nobody() -> None:
    """Become a user who may read everything, and write only what everybody may write.

    Without the right to read, the interpreter itself could be out of reach (a Python in root's home).
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    keep_capabilities, ambient, raise_ambient, may_read = 8, 47, 2, 2

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    def check(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.prctl(keep_capabilities, 1, 0, 0, 0))
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    bits = 1 << may_read
    sets = (ctypes.c_uint32 * 6)(bits, bits, bits, 0, 0, 0)  # effective, permitted, inheritable; low and high words
    check(libc.capset(ctypes.byref(Header(0x20080522, 0)), sets))
    check(libc.prctl(ambient, raise_ambient, may_read, 0, 0))  # for the processes it starts


@functools.cache
def clock_library() -> Path | None:
    """Return libfaketime, or None where it is not installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


_JUMPING = """
import os, time

def jumping(real, unit):
    def now():
        try:
            with open(os.environ["DRILL_CLOCK"]) as file:
                days = float(file.read().strip().rstrip("d") or 0)
        except (OSError, ValueError):
            days = 0.0
        return real() + type(real())(days * 86400 * unit)
    return now

time.time, time.time_ns = jumping(time.time, 1), jumping(time.time_ns, 10**9)
"""


def clock_in_python(folder: Path) -> dict[str, str]:
    """Return the environment of Python processes whose ``time.time`` jumps with the clock in ``folder/clock``.

    For notebooks: under libfaketime with a true monotonic clock their kernels' sockets stop, even when it does not jump.
    """
    (folder / "sitecustomize.py").write_text(_JUMPING)
    paths = [str(folder), *([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [])]
    return {"PYTHONPATH": os.pathsep.join(paths), "DRILL_CLOCK": str(folder / "clock")}


@contextmanager
def small_disk(place: Path, size: int):
    """Mount a disk of `size` bytes at `place`; yield a function that gives it another size, or None where one may not."""

    def mount(*words: str) -> bool:
        return subprocess.run(["mount", *words, str(place)], capture_output=True, check=False).returncode == 0

    place.mkdir(parents=True, exist_ok=True)
    if not sys.platform.startswith("linux") or not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        yield None
        return

    def grow(to: int) -> None:
        assert mount("-o", f"remount,size={to}")

    resize: Callable[[int], None] = grow
    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
