"""What goes wrong around a command: its disk, its permissions, the clock."""

from __future__ import annotations

import functools
import random
import stat
import time
from pathlib import Path

from tests.faults import faults
from tests.faults.commands import Command, World, found_again

__all__ = ["clock_jumps", "file_limit", "full_disk", "read_only", "small_disk"]


def full_disk(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Let opening a file fail with ENOSPC, from a random file on."""
    most, hits, found = 4 * len(_files(world.undisturbed(command)[0])), 0, 0
    while hits < tries:
        place = world.new(command.name)
        after = chance.randrange(most)
        ended = world.start(command, place, prepare=functools.partial(faults.fill_disk, str(place), after)).end()
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
        ended = world.start(command, place, prepare=functools.partial(faults.limit_files, size)).end()
        if command.name == "sweep" and "failed: " in ended.said:  # the workers met it: runs fail, and are listed
            assert ended.code == 1 and not ended.traceback and "disk full" in ended.said, ended.said[-3000:]
        else:
            ended.check_refused("disk full")
        hits += 1
        found += world.resumed(command, place)
        world.remove(place)
    return f"{hits} times one line, exit status 1; {found_again(command, found, hits)}"


def small_disk(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Run on a disk that is too small, then make it larger and go on."""
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in _files(world.undisturbed(command)[0]))
    hits = found = 0
    for _ in range(tries):
        place = world.new(command.name)
        with faults.small_disk(place, max(8192, int(used * chance.uniform(0.1, 0.8)))) as resize:
            if resize is None:
                raise faults.Skip("mounting is not allowed: run as root outside a container that forbids it")
            ended = world.start(command, place).end()
            assert ended.code == 1 and not ended.traceback, (ended.code, ended.said[-3000:])
            assert any(words in ended.said for words in ("disk full", "not enough disk", "not enough room")), ended.said
            hits += 1
            resize(16 * used + 2**26)
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
        ended = world.start(command, place, environment=environment, prepare=faults.become_nobody).end()
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


def clock_jumps(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Let the clock of the system jump a year, back and forth, while the command is at work."""
    library, jumps = faults.clock_library(), 0
    if library is None and command.name != "sweep":
        raise faults.Skip("libfaketime is not installed: apt-get install libfaketime")
    for _ in range(tries):
        place, clock = world.new(command.name), world.new("clock")
        file = clock / "clock"
        file.write_text("+0")
        if command.name == "sweep":
            environment = faults.clock_in_python(clock)
        else:
            environment = {
                "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }  # fmt: skip
        started = world.start(command, place, program=True, environment=environment)
        sign = 1
        while started.running:
            time.sleep(chance.uniform(0.05, 0.3))
            sign, jumps = -sign, jumps + 1
            file.write_text(f"{sign * chance.randrange(1, 366):+d}d")
        ended = started.end()
        assert ended.code == 0, ended.said[-3000:]
        world.resumed(command, place)
        world.remove(place)
    how = "time.time in Python" if command.name == "sweep" else "libfaketime"
    return f"{tries} runs through {jumps} jumps of up to a year, back and forth ({how})"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return names, sizes and times of all files."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(_files(folder))
    }
