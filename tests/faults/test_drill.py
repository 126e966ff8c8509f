"""The fault drill as tests: a short form of some faults, and the long form of all (``-m slow``)."""

from __future__ import annotations

import random

import pytest

from tests.faults.__main__ import tries_of
from tests.faults.commands import COMMANDS, World
from tests.faults.scenarios import SCENARIOS

ALL = [(fault, name) for fault, scenario in SCENARIOS.items() for name in scenario.commands]
# One command each is enough to see that the ways out still work; kills are tried on those that keep most state.
SHORT = [
    ("kill -9", "generate", 2),
    ("kill -9", "score", 1),
    ("kill -9", "finetune", 2),
    ("kill -9", "search", 1),
    ("Ctrl-C (SIGINT)", "generate", 1),
    ("disk full, ENOSPC when a file is opened", "search", 1),
    ("file cut short, EFBIG (ulimit -f)", "finetune", 1),
    ("folder that cannot be written, user nobody", "score", 1),
    ("started twice on one output", "score", 1),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drill")
    for path in (folder, folder.parent):  # user nobody has to come in
        path.chmod(0o755)
    return World(folder)


def _try(world: World, fault: str, name: str, tries: int) -> None:
    SCENARIOS[fault].run(world, COMMANDS[name], tries, random.Random(f"{fault} {name}"))


@pytest.mark.parametrize(("fault", "name", "tries"), SHORT)
def test_short(world, fault, name, tries):
    _try(world, fault, name, tries)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("fault", "name"), ALL)
def test_long(world, fault, name):
    _try(world, fault, name, tries_of(fault))
