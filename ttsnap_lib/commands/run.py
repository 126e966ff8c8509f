"""``ttsnap run``, ``ttsnap sweep`` and ``ttsnap report``: notebooks headless, many of them, and what came of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

__all__ = ["add"]


def add(commands: Any) -> None:
    """Register the commands with argparse's subparsers."""
    run = commands.add_parser(
        "run",
        help="run a notebook headless, with strict parameters, in a run folder",
        description="Run a notebook headless. A finished run with the same parameters is not run again.",
    )
    run.add_argument("notebook", help="path of a notebook, or the name of a shipped one (simulate)")
    _parameter_arguments(run)
    run.add_argument("-o", "--folder", help="holds the run folders (default: data_cache/runs)")
    run.add_argument("--force", action="store_true", help="run again even when a finished run exists")
    run.add_argument("--timeout", type=float, metavar="SECONDS", help="longest time for one cell")
    run.add_argument("--list", action="store_true", help="show the notebook's parameters and stop")
    run.add_argument("-q", "--quiet", action="store_true", help="print the run folder only")
    run.set_defaults(func=_run)


def _parameter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set one parameter (may stand several times)",
    )  # fmt: skip
    parser.add_argument("-f", dest="file", type=Path, metavar="PARAMS.yaml", help="set the parameters named in a file")


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of the file, overlaid with those of the command line."""
    from ttsnap_lib.errors import ConfigError
    from ttsnap_lib.parameters import declared_parameters, from_text, load_yaml, read_notebook
    from ttsnap_lib.runner import find_notebook

    declared = declared_parameters(read_notebook(find_notebook(arguments.notebook)))
    given = load_yaml(arguments.file, str(arguments.file)) if arguments.file else {}
    if not isinstance(given, dict | None):
        raise ConfigError(
            str(arguments.file), value=given, bound="a mapping of parameters", remedy="Write lines of `name: value`."
        )
    return {**(given or {}), **{name: from_text(text, declared.get(name)) for name, text in arguments.parameters}}


def _run(arguments: argparse.Namespace) -> int:
    from ttsnap_lib import runner

    if arguments.list:
        return _list(arguments.notebook)
    given = _given(arguments)
    planned = runner.plan(arguments.notebook, given, folder=arguments.folder)
    quiet = arguments.quiet
    result = runner.run(
        planned.notebook,
        given,
        folder=arguments.folder,
        force=arguments.force,
        progress=None if quiet else lambda line: print(f"{planned.notebook.stem}: {line}", file=sys.stderr, flush=True),
        echo=not quiet,
        timeout_s=arguments.timeout,
    )
    print(result.folder)
    return 0


def _list(notebook: str) -> int:
    from ttsnap_lib.parameters import declared_parameters, read_notebook
    from ttsnap_lib.runner import find_notebook

    path = find_notebook(notebook)
    for parameter in declared_parameters(read_notebook(path), path.name).values():
        kind = f": {parameter.annotation}" if parameter.annotation else ""
        comment = f"  # {parameter.help}" if parameter.help else ""
        print(f"{parameter.name}{kind} = {parameter.default!r}{comment}")
    return 0
