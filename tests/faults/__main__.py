"""``python -m tests.faults [--short] [--only TEXT]``: run the drill and print the table of ``docs/faults.md``."""

from __future__ import annotations

import argparse
import platform
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.faults.commands import COMMANDS, World
from tests.faults.scenarios import SCENARIOS

KILLS, TRIES = 20, 3


def tries_of(fault: str) -> int:
    """Return how often the long form tries a fault on each command."""
    return KILLS if fault == "kill -9" else TRIES


def main() -> int:
    """Run all faults on all commands; exit 1 when a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--short", action="store_true", help="two tries each")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults and commands whose names hold this text")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    given = parser.parse_args()
    broken = 0
    print("| Command | Compared |\n| --- | --- |")
    for command in COMMANDS.values():
        print(f"| {command.name} | {command.compared} |")
    print("\n| Fault | Command | What happened | Seconds |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory(prefix="ttsnap-drill-") as folder:
        Path(folder).chmod(0o755)  # user nobody has to come in
        world = World(Path(folder))
        for scenario in SCENARIOS.values():
            for name in scenario.commands:
                if given.only not in f"{scenario.name} / {name}":
                    continue
                tries = 2 if given.short else tries_of(scenario.name)
                chance, begin = random.Random(f"{given.seed} {scenario.name} {name}"), time.monotonic()
                try:
                    told = scenario.run(world, COMMANDS[name], tries, chance)
                except Exception as error:  # noqa: BLE001 - the other faults are still worth trying
                    traceback.print_exc()
                    told, broken = f"**broken**: {type(error).__name__}", broken + 1
                seconds = time.monotonic() - begin
                print(f"| {scenario.name} | {name} | {told} | {seconds:.0f} |", flush=True)
    print(f"\n{platform.system()}, Python {platform.python_version()}; {'all promises held' if not broken else broken}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
