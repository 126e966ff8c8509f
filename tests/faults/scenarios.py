"""The faults of the drill: what is done, what is promised, and to which commands."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults import processes, surroundings
from tests.faults.commands import COMMANDS, Command, World


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


_SHARDED = tuple(name for name, command in COMMANDS.items() if command.shards)

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("kill -9", "the same command goes on; nothing finished is made twice", processes.killed),
        Scenario("Ctrl-C (SIGINT)", "ends with exit status 130 and a line; the same command goes on",
                 processes.interrupted),
        Scenario("Ctrl-C while Python loads", "ends with exit status 130 and a line",
                 functools.partial(processes.interrupted, program=True)),
        Scenario("disk full, ENOSPC when a file is opened", "one line, exit status 1; goes on when there is room",
                 surroundings.full_disk),
        Scenario("file cut short, EFBIG (ulimit -f)", "one line, exit status 1; goes on without the limit",
                 surroundings.file_limit),
        Scenario("folder that cannot be written, user nobody", "one line, exit status 1; nothing is changed",
                 surroundings.read_only),
        Scenario("a shard dies", "the other shard goes on; the lost one is started again", processes.lost_shard, _SHARDED),
        Scenario("a worker of the sweep dies", "it is replaced and its run made again",
                 processes.lost_worker, ("sweep",)),
        Scenario("one of two training processes dies", "the launch ends; the same launch goes on",
                 processes.lost_process, ("finetune",)),
        Scenario("started twice on one output", "the second is refused in one line, or joins",
                 processes.started_twice),
        Scenario("started twice with other settings", "one is refused in one line; results never mix",
                 processes.other_settings_at_once, ("generate", "finetune", "search")),
    )
}  # fmt: skip
