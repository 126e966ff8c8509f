"""What goes wrong around a command: its disk, its permissions."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import random
import resource
import stat
import sys
from pathlib import Path

from tests.faults.commands import Command, World, found_again

NOBODY = 65534


def full_disk(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Let opening a file fail with ENOSPC, from a random file on."""
    most, hits, found = 4 * len(_files(world.undisturbed(command)[0])), 0, 0
    while hits < tries:
        place = world.new(command.name)
        after = chance.randrange(most)
        ended = world.start(command, place, prepare=functools.partial(fill_disk, str(place), after)).end()
        if ended.code == 0:  # it needed fewer files
            most = max(1, after)
        else:
            hits += 1
            ended.check_refused("disk full")
        found += world.resumed(command, place)
        world.remove(place)
    return f"{hits} times one line, exit status 1; {found_again(command, found, hits)}"


def file_limit(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Let writing stop in the middle of the largest files (EFBIG)."""
    largest = max(path.stat().st_size for path in _files(world.undisturbed(command)[0]))
    hits = found = 0
    for _ in range(tries):
        place = world.new(command.name)
        size = int(largest * chance.uniform(0.3, 0.9))
        ended = world.start(command, place, prepare=functools.partial(limit_files, size)).end()
        if command.name == "sweep" and "failed: " in ended.said:  # the workers met it: runs fail, and are listed
            assert ended.code == 1 and not ended.traceback and "disk full" in ended.said, ended.said[-3000:]
        else:
            ended.check_refused("disk full")
        hits += 1
        found += world.resumed(command, place)
        world.remove(place)
    return f"{hits} times one line, exit status 1; {found_again(command, found, hits)}"


def read_only(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Run as a user who may not write: into a folder that is not there yet, and into one that is half done."""
    found, places = 0, []
    for kind in ("new", "half done")[: max(1, min(2, tries))]:
        place = world.new(command.name)
        if kind == "half done":
            started = world.start(command, place)
            started.until(world.moment(command, chance, 0.3))
            started.kill()
        before = _contents(place)
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (place, *place.rglob("*")) if path.is_dir()}
        for path in modes:
            path.chmod(0o555)
        home = world.new("home")
        home.chmod(0o777)
        environment = {"HOME": str(home), "MPLCONFIGDIR": str(home), "TTSNAP_DATA_CACHE": str(home / "cache")}
        ended = world.start(command, place, environment=environment, prepare=become_nobody).end()
        for path, mode in modes.items():
            path.chmod(mode)
        if ended.code == 0 and kind == "half done":  # it was done already: nothing to write
            assert command.pieces(place / "out") == world.undisturbed(command)[2] or before == _contents(place)
        else:
            ended.check_refused("cannot")
        assert _contents(place) == before, "something was written"
        places.append(place)
        found += world.resumed(command, place)
        world.remove(place)
    return f"{len(places)} times one line, exit status 1, nothing changed; {found_again(command, found, len(places))}"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return names, sizes and times of all files."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(_files(folder))
    }


# -- put in place in the process of the command, before it begins ------------------------------------------------------


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
