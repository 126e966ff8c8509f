"""Processes that end when they should not, and processes that meet on one output."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from tests.faults.commands import Command, World, found_again
from tests.faults.drill import alive, below, wait_for
from tests.launch import launcher


def killed(world: World, command: Command, tries: int, chance: random.Random) -> str:
    """Kill it by signal 9 at random moments, up to three times in a row, then let it end."""
    kills = series = found = 0
    while kills < tries:
        place, series = world.new(command.name), series + 1
        for _ in range(min(3, tries - kills)):
            started = world.start(command, place)
            started.until(world.moment(command, chance))
            ended = started.kill()
            kills += ended.code == -signal.SIGKILL
            assert ended.code in (0, -signal.SIGKILL), ended.said[-3000:]
        found += world.resumed(command, place)
        world.remove(place)
    return f"{kills} kills in {series} runs; {found_again(command, found, series)}"


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
    return f"{hits} interrupts, the slowest end after {slowest:.1f} s; {found_again(command, found, hits)}"


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
        workers = [pid for pid in below(started.pid) if "spawn_main" in _words(pid)]
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
                ended.check_refused("another process")
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
        done = [ended.code == 0 for ended in ends]
        assert sum(done) == 1, [ended.said[-500:] for ended in ends]
        ends[done.index(False)].check_refused("")
        won = command if ends[0].code == 0 else changed
        if won is command:
            world.resumed(command, place)
        else:  # the other one's results stand alone: taking them up changes nothing
            before = command.result(place / "out")
            world.run(changed, place)
            assert command.result(place / "out") == before
        world.remove(place)
    return f"{tries} times one of them filled it, the other one was refused in one line"


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
