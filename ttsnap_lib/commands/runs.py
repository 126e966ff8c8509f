"""``ttsnap runs``: the run folders, whose names are hashes."""

from __future__ import annotations

import argparse
from typing import Any


def add(subparsers: Any) -> None:
    """Register the command with argparse's subparsers."""
    runs = subparsers.add_parser(
        "runs",
        help="list, show and remove the run folders of `ttsnap run` and `sweep`",
        description="list: the newest first, with the parameters that are not the notebook's own. show: parameters, "
        "tables and figures. remove: deletes the folders.",
    )
    runs.add_argument("action", nargs="?", choices=("list", "show", "remove"), default="list")
    runs.add_argument("runs", nargs="*", metavar="HASH", help="of show and remove: the beginning of a hash is enough")
    runs.add_argument("-o", "--folder", help="holds the run folders (default: data_cache/runs)")
    runs.set_defaults(func=_runs)


def _runs(arguments: argparse.Namespace) -> None:
    from ttsnap_lib.commands.notebooks import show_result
    from ttsnap_lib.errors import ConfigError
    from ttsnap_lib.files import data_cache
    from ttsnap_lib.runs.folders import find_run, run_folders

    if arguments.action == "list":
        if arguments.runs:
            raise ConfigError(
                f"list: got {arguments.runs}, expected no hash. Write `ttsnap runs show {arguments.runs[0]}`."
            )
        found = run_folders(arguments.folder)
        for run in found:
            changed = ", ".join(f"{name}={value}" for name, value in run.changed().items()) or "defaults"
            print(f"{run.name:<28} {run.status:<9} {str(run.manifest['started'])[:16]}  {changed}")
        print(f"{len(found)} runs in {arguments.folder or data_cache() / 'runs'}")
        return
    if not arguments.runs:
        raise ConfigError(f"{arguments.action}: got no hash, expected one or more. `ttsnap runs list` shows them.")
    chosen = {run.folder: run for run in (find_run(name, arguments.folder) for name in arguments.runs)}
    for one in chosen.values():
        if arguments.action == "remove":
            one.remove()
            print(f"removed {one.folder}")
            continue
        print(
            f"{one.folder}\n{one.status}, started {one.manifest['started']}, {one.manifest.get('elapsed_s', '?')} s\n"
        )
        for name, value in one.manifest["parameters"].items():
            print(f"{name} = {value!r}{'  # changed' if name in one.changed() else ''}")
        show_result(one.result)
