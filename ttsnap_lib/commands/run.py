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

    sweep = commands.add_parser(
        "sweep",
        help="run a notebook over a grid of parameters, in parallel, resumable",
        description="Run a notebook over the grid in a YAML file. What has finished is not run again.",
        epilog="Exit status: 0 all runs are good, 1 some failed, 130 interrupted.",
    )
    sweep.add_argument("grid", type=Path, metavar="GRID.yaml", help="notebook, parameters, grid, cases, exclude")
    sweep.add_argument("-j", "--workers", type=int, help="local worker processes (default: one for each core)")
    sweep.add_argument("--scheduler", metavar="ADDRESS", help="run on this Dask cluster (tcp://host:8786) instead")
    sweep.add_argument("-o", "--folder", help="for the table and the figure (default: data_cache/sweeps/NAME)")
    sweep.add_argument("--runs", metavar="FOLDER", help="holds the run folders (default: data_cache/runs)")
    sweep.add_argument("--retries", type=int, default=2, help="tries again after a lost worker (default: 2)")
    sweep.add_argument("--timeout", type=float, metavar="SECONDS", help="longest time for one cell")
    sweep.add_argument("--dry-run", action="store_true", help="show the runs and stop")
    sweep.add_argument("-q", "--quiet", action="store_true", help="print the sweep's folder and its failures only")
    sweep.set_defaults(func=_sweep)

    report = commands.add_parser(
        "report",
        help="render a run or a sweep as one HTML file",
        description="Render a run folder or a sweep folder as one HTML file that needs nothing else.",
    )
    report.add_argument("folder", type=Path, help="what `ttsnap run` or `ttsnap sweep` printed")
    report.add_argument("-o", "--output", type=Path, metavar="REPORT.html", help="default: report.html in the folder")
    report.set_defaults(func=_report)


def _parameter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set one parameter (may stand several times)",
    )  # fmt: skip
    parser.add_argument("-f", dest="file", type=Path, metavar="PARAMS.yaml", help="set the parameters named in a file")


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of the file, overlaid with those of the command line."""
    from ttsnap_lib._reading import read_yaml
    from ttsnap_lib.errors import ConfigError
    from ttsnap_lib.parameters import declared_parameters, from_text, read_notebook
    from ttsnap_lib.runner import find_notebook

    declared = declared_parameters(read_notebook(find_notebook(arguments.notebook)))
    remedy = "Write lines of `name: value`, indented with spaces."
    given = read_yaml(arguments.file, "parameters", remedy=remedy) if arguments.file else {}
    if not isinstance(given, dict | None):
        raise ConfigError(
            str(arguments.file), value=given, bound="a mapping of parameters", remedy="Write lines of `name: value`."
        )
    return {**(given or {}), **{name: from_text(text, declared.get(name)) for name, text in arguments.parameters}}


def _run(arguments: argparse.Namespace) -> int:
    from ttsnap_lib import execution, runner

    execution.lean_imports()
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


def _sweep(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.grids import load_grid

    grid = load_grid(arguments.grid)
    if arguments.dry_run:
        return _dry_run(grid, arguments.runs)
    from ttsnap_lib.sweeps import run_sweep

    result = run_sweep(
        grid,
        folder=arguments.folder,
        runs_folder=arguments.runs,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        retries=arguments.retries,
        timeout_s=arguments.timeout,
        stream=None if arguments.quiet else sys.stderr,
    )
    for failure in result.failed:
        where = f" at {failure['cell']}" if failure["cell"] else ""
        print(f"failed: {failure['label']}{where}: {failure['last_line']}", file=sys.stderr)
        print(f"        {failure['folder']}/executed.ipynb", file=sys.stderr)
    print(result.folder)
    return 1 if result.failed else 0


def _dry_run(grid: Any, runs: str | None) -> int:
    from ttsnap_lib._sweep_view import short_parameters
    from ttsnap_lib.runner import finished, plan

    for parameters, case in zip(grid.runs, grid.cases, strict=True):
        planned = plan(grid.notebook, parameters, folder=runs)
        state = "finished" if finished(planned) else "to run"
        print(f"{planned.run_hash}  {state:<8}  {short_parameters(parameters, grid.axes, case)}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ttsnap_lib import execution

    execution.lean_imports()
    from ttsnap_lib.report import render

    print(render(arguments.folder, arguments.output))
    return 0
