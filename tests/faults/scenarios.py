"""The faults, one function each: disturb a command, take it up again, hold it to the undisturbed result."""

from __future__ import annotations

import functools
import os
import random
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults import faults
from tests.faults.commands import COMMANDS, Command, World
from tests.faults.drill import Ended, alive, below, wait_for
from tests.launch import launcher

__all__ = ["SCENARIOS", "Scenario", "Skip"]


class Skip(Exception):
    """The fault cannot be tried on this machine; the message says why, and how it could."""


@dataclass(frozen=True)
class Scenario:
    """A fault: its name, what happens then, which commands it is for, and the function that tries it.

    ``run(world, command, tries, chance)`` returns a line on what happened, and raises AssertionError when a promise is
    broken.
    """

    name: str
    promise: str
    run: Callable[[World, Command, int, random.Random], str]
    commands: tuple[str, ...] = tuple(COMMANDS)


def _refused(ended: Ended, says: str) -> None:
    """Hold a command to a clean end: exit status 1 and one line of ours."""
    assert ended.code == 1, (ended.code, ended.said[-3000:])
    assert not ended.traceback, ended.said[-3000:]
    assert "ttsnap: " in ended.said and says in ended.said, ended.said[-3000:]


def killed(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Kill it by signal 9 at random moments, up to three times in a row, then let it end."""
    kills = series = found = 0
    while kills < tries:
        place, series = world.new(command.name), series + 1
        for _ in range(min(3, tries - kills)):
            started = world.start(command, place)
            started.until(world.moment(command, chance))
            children = below(started.pid)
            started.send(signal.SIGKILL)
            ended = started.end()
            kills += ended.code == -signal.SIGKILL
            assert ended.code in (0, -signal.SIGKILL), ended.said[-3000:]
            wait_for(lambda of=children: not any(alive(pid) for pid in of), 60)  # workers and kernels end with it
        found += world.resumed(command, place)
        world.remove(place)
    return f"{kills} kills in {series} runs; {_found(command, found, series)}"


def interrupted(world: World, command: Command, tries: int, chance: random.Random, program: bool = False) -> str:
    """Send SIGINT at random moments; it must end soon, with exit status 130 and a short message.

    With `program` it begins from nothing, and most moments fall into its imports.
    """
    work_s = world.undisturbed(command)[3]
    if program:
        work_s = world.run(command, world.new("from-nothing"), program=True).work_s
    hits = found = 0
    slowest = 0.0
    while hits < tries:
        place = world.new(command.name)
        started = world.start(command, place, program=program)
        started.until(chance.uniform(0.1, work_s))
        children = below(started.pid)
        begin = time.monotonic()
        started.send(signal.SIGINT)
        ended = started.end(60)
        if ended.code == 130:
            hits += 1
            slowest = max(slowest, time.monotonic() - begin)
            assert "interrupted" in ended.said and len(ended.said) < 5000, ended.said[-3000:]
        else:  # it had ended, or Python had not come to our first line
            assert ended.code in (0, -signal.SIGINT), (ended.code, ended.said[-3000:])
        assert not ended.traceback or ended.code == -signal.SIGINT, ended.said[-3000:]
        wait_for(lambda of=children: not any(alive(pid) for pid in of), 60)
        found += world.resumed(command, place)
        world.remove(place)
    return f"{hits} interrupts, the slowest end after {slowest:.1f} s; {_found(command, found, hits)}"


interrupted_early = functools.partial(interrupted, program=True)


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
            _refused(ended, "disk full")
        found += world.resumed(command, place)
        world.remove(place)
    return f"{hits} times one line, exit status 1; {_found(command, found, hits)}"


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
            _refused(ended, "disk full")
        hits += 1
        found += world.resumed(command, place)
        world.remove(place)
    return f"{hits} times one line, exit status 1; {_found(command, found, hits)}"


def small_disk(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Run on a disk that is too small, then make it larger and go on."""
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in _files(world.undisturbed(command)[0]))
    hits = found = 0
    for _ in range(tries):
        place = world.new(command.name)
        with faults.small_disk(place, max(8192, int(used * chance.uniform(0.1, 0.8)))) as resize:
            if resize is None:
                raise Skip("mounting is not allowed: run as root outside a container that forbids it")
            ended = world.start(command, place).end()
            assert ended.code == 1 and not ended.traceback, (ended.code, ended.said[-3000:])
            assert any(words in ended.said for words in ("disk full", "not enough disk", "not enough room")), ended.said
            hits += 1
            resize(16 * used + 2**26)
            found += world.resumed(command, place)
        world.remove(place)
    return f"{hits} times one line, exit status 1; {_found(command, found, hits)}"


def read_only(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Run as a user who may not write: into a folder that is not there yet, and into one that is half done."""
    found, places = 0, []
    for kind in ("new", "half done")[: max(1, min(2, tries))]:
        place = world.new(command.name)
        if kind == "half done":
            started = world.start(command, place)
            started.until(world.moment(command, chance, 0.3))
            started.send(signal.SIGKILL)
            started.end()
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
            _refused(ended, "cannot")
        assert _contents(place) == before, "something was written"
        places.append(place)
        found += world.resumed(command, place)
        world.remove(place)
    return f"{len(places)} times one line, exit status 1, nothing changed; {_found(command, found, len(places))}"


def lost_shard(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Start two shards, kill one; the other one ends well, and the lost one is started again."""
    kills = 0
    while kills < tries:
        place = world.new(command.name)
        shards = [world.start(command, place, shard=f"{k}/2") for k in range(2)]
        lost = chance.randrange(2)
        shards[lost].until(world.moment(command, chance) / 2)
        shards[lost].send(signal.SIGKILL)
        ends = [shard.end() for shard in shards]
        assert ends[1 - lost].code == 0, ends[1 - lost].said[-3000:]
        kills += ends[lost].code == -signal.SIGKILL
        world.run(command, place, shard=f"{lost}/2")
        world.resumed(command, place)  # one process over all of it finds nothing left
        world.remove(place)
    return f"{kills} times the other shard ended well and the lost one was taken up"


def lost_worker(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Kill a worker process of a sweep; it is replaced, and its run made again."""
    kills = 0
    while kills < tries:
        place = world.new(command.name)
        started = world.start(command, place)
        started.until(world.moment(command, chance, 0.2))
        workers = [pid for pid in below(started.pid) if "workers import serve" in _words(pid)]
        if workers:
            os.kill(chance.choice(workers), signal.SIGKILL)
            kills += 1
        ended = started.end()
        assert ended.code == 0, ended.said[-3000:]
        world.resumed(command, place)
        world.remove(place)
    return f"{kills} workers killed; every sweep went on with another one and ended well"


def lost_process(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Kill one of two processes that train together; the launch ends, and the same launch goes on."""
    whole = world.new("two-processes")
    work_s = world.run(command, whole, program=True, head=launcher(2)).work_s
    kills = 0
    while kills < tries:
        place = world.new(command.name)
        started = world.start(command, place, program=True, head=launcher(2))
        started.until(chance.uniform(0.5, 0.95) * work_s)
        ranks = [pid for pid in below(started.pid) if "RANK=" in _environment(pid) and "finetune" in _words(pid)]
        if ranks:
            os.kill(chance.choice(ranks), signal.SIGKILL)
            kills += 1
        code = started.end(120).code
        assert code != 0 or not ranks, "the launch ended well without one of its processes"
        world.run(command, place, program=True, head=launcher(2))
        assert command.result(place / "out") == command.result(whole / "out")
        world.remove(place)
    return f"{kills} processes killed; the launch ended, and taken up gave what two undisturbed processes give"


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").replace("\0", "\n")
    except OSError:
        return ""


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").replace("\0", " ")
    except OSError:
        return ""


def clock_jumps(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Let the clock of the system jump a year, back and forth, while the command is at work."""
    library, jumps = faults.clock_library(), 0
    if library is None and command.name != "sweep":
        raise Skip("libfaketime is not installed: apt-get install libfaketime")
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


def started_twice(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Start two processes on the same output: the second is refused, or joins."""
    refusals = joins = 0
    for _ in range(tries):
        place = world.new(command.name)
        first = world.start(command, place)
        first.until(chance.choice((0.0, world.moment(command, chance))))
        second = world.start(command, place)
        codes = []
        for ended in (first.end(), second.end()):
            codes.append(ended.code)
            if ended.code != 0:
                _refused(ended, "another process")
        assert 0 in codes, codes
        refusals, joins = refusals + (1 in codes), joins + (1 not in codes)
        world.resumed(command, place)
        world.remove(place)
    return f"{refusals} refused in one line, {joins} joined or found it done; never mixed"


def other_settings_at_once(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Start two processes with different settings on the same new output: one alone may fill it."""
    change = ["-p", "seed", 1] if command.name == "finetune" else ["--seed", 1]
    changed = Command(command.name, lambda *given: [*command.words(*given), *change], command.result, command.pieces,
                      command.made, command.compared)  # fmt: skip
    for _ in range(tries):
        place = world.new(command.name)
        first = world.start(command, place)
        time.sleep(chance.uniform(0, 0.3))
        second = world.start(changed, place)
        ends = [first.end(), second.end()]
        assert 0 in [ended.code for ended in ends], [ended.said[-500:] for ended in ends]
        for ended in ends:
            if ended.code != 0:
                _refused(ended, "")
        won = command if ends[0].code == 0 else changed
        if won is command:
            world.resumed(command, place)
        else:  # the other one's results stand alone: taking them up changes nothing
            before = command.result(place / "out")
            world.run(changed, place)
            assert command.result(place / "out") == before
        world.remove(place)
    return f"{tries} times one of them filled it, the other one was refused in one line or came after"


def _found(command: Command, found: int, runs: int) -> str:
    if not command.pieces is COMMANDS["report"].pieces and runs:
        return f"{found} finished pieces found again, none made twice; the same result"
    return "the same result"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return names, sizes and times of all files; locks, which a reader may touch, by their names alone."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(_files(folder))
    }


_SHARDED = tuple(name for name, command in COMMANDS.items() if command.shards)

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("kill -9", "the same command goes on; nothing finished is made twice", killed),
        Scenario("Ctrl-C (SIGINT)", "ends with exit status 130 and a line; the same command goes on", interrupted),
        Scenario("Ctrl-C while Python loads", "ends with exit status 130 and a line", interrupted_early),
        Scenario("disk full, ENOSPC when a file is opened", "one line, exit status 1; goes on when there is room",
                 full_disk),
        Scenario("file cut short, EFBIG (ulimit -f)", "one line, exit status 1; goes on without the limit", file_limit),
        Scenario("disk too small (tmpfs), then larger", "one line, exit status 1; goes on when there is room",
                 small_disk),
        Scenario("folder that cannot be written, user nobody", "one line, exit status 1; nothing is changed", read_only),
        Scenario("a shard dies", "the other shard goes on; the lost one is started again", lost_shard, _SHARDED),
        Scenario("a worker of the sweep dies", "it is replaced and its run made again", lost_worker, ("sweep",)),
        Scenario("one of two training processes dies", "the launch ends; the same launch goes on", lost_process,
                 ("finetune",)),
        Scenario("clock jumps", "no difference", clock_jumps),
        Scenario("started twice on one output", "the second is refused in one line, or joins", started_twice),
        Scenario("started twice with other settings", "one is refused in one line; results never mix",
                 other_settings_at_once, ("generate", "finetune", "search")),
    )
}  # fmt: skip
