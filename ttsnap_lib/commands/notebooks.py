"""Notebooks from the command line: ``ttsnap run``, ``sweep`` and ``report``, and ``ttsnap demo``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ttsnap_lib.commands.options import digits, old_spelling

_SHORT = 12  # rows of a table that is printed
_DEMO_GENERATE = {"prompts": "pocket:evaluation:3", "images": 4, "compare_diversity": False}
_DEMO_FINETUNE = {"trajectories": "pocket-sdxl:train:96x8+mirror", "steps": [2, 0]}
_NEXT = """
Next:
  make lab                                  open the notebooks: explore.ipynb moves a schedule by hand
  .venv/bin/ttsnap run simulate --list      the parameters of a notebook
  .venv/bin/ttsnap search "a large red ring left of a small blue square on a white background" \\
      --candidates 8 --out data_cache/search   one prompt, for real
"""


def add(subparsers: Any) -> None:
    """Add the commands of this group."""
    demo = subparsers.add_parser("demo", help="generate, finetune and simulate on the tiny built-in models")
    demo.add_argument(
        "--values", type=Path, metavar="FOLDER", help="folder of published reward values to simulate on instead"
    )
    demo.set_defaults(func=_demo)

    run = subparsers.add_parser(
        "run",
        help="run a notebook headless, with strict parameters, in a run folder",
        description="Run a notebook headless. A finished run with the same parameters is not run again.",
    )
    run.add_argument("notebook", help="path of a notebook, or the name of a shipped one (simulate)")
    run.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set one parameter (may stand several times)",
    )  # fmt: skip
    run.add_argument("-f", dest="file", type=Path, metavar="PARAMS.yaml", help="set the parameters named in a file")
    run.add_argument("-o", "--folder", help="holds the run folders (default: data_cache/runs)")
    run.add_argument("--force", action="store_true", help="run again even when a finished run exists")
    run.add_argument("--timeout", type=float, metavar="SECONDS", help="longest time for one cell")
    run.add_argument("--list", action="store_true", help="show the notebook's parameters and stop")
    run.add_argument("-q", "--quiet", action="store_true", help="print the run folder only")
    run.set_defaults(func=_run)

    sweep = subparsers.add_parser(
        "sweep",
        help="run a notebook over a grid of parameters, in parallel, resumable",
        description="Run a notebook over the grid in a YAML file. What has finished is not run again.",
        epilog="Exit status: 0 all runs are good, 1 some failed, 130 interrupted.",
    )
    sweep.add_argument("grid", type=Path, metavar="GRID.yaml", help="notebook, parameters, grid, cases")
    sweep.add_argument("-j", "--workers", type=int, help="local worker processes (default: one for each core)")
    sweep.add_argument("--scheduler", metavar="ADDRESS", help="run on this Dask cluster (tcp://host:8786) instead")
    sweep.add_argument("-o", "--folder", help="for the table and the figure (default: data_cache/sweeps/NAME)")
    sweep.add_argument("--runs", metavar="FOLDER", help="holds the run folders (default: data_cache/runs)")
    sweep.add_argument("--retries", type=int, default=2, help="tries again after a lost worker (default: 2)")
    sweep.add_argument("--timeout", type=float, metavar="SECONDS", help="longest time for one cell")
    sweep.add_argument("--dry-run", action="store_true", help="show the runs and stop")
    sweep.add_argument("-q", "--quiet", action="store_true", help="print the sweep's folder and its failures only")
    sweep.set_defaults(func=_sweep)

    report = subparsers.add_parser(
        "report",
        help="render a run or a sweep as one HTML file",
        description="Render a run folder or a sweep folder as one HTML file that needs nothing else.",
    )
    report.add_argument("folder", type=Path, help="what `ttsnap run` or `ttsnap sweep` printed")
    report.add_argument("-o", "--out", type=Path, metavar="REPORT.html", help="default: report.html in the folder")
    old_spelling(report, "--output", type=Path, dest="out")
    report.set_defaults(func=_report)


def _run(arguments: argparse.Namespace) -> None:
    from ttsnap_lib.errors import ConfigError
    from ttsnap_lib.files import read_yaml
    from ttsnap_lib.runs.parameters import declared_parameters, from_text, read_notebook
    from ttsnap_lib.runs.run import find_notebook, run

    path = find_notebook(arguments.notebook)
    declared = declared_parameters(read_notebook(path), path.name)
    if arguments.list:
        for parameter in declared.values():
            kind = f": {parameter.annotation}" if parameter.annotation else ""
            comment = f"  # {parameter.help}" if parameter.help else ""
            print(f"{parameter.name}{kind} = {parameter.default!r}{comment}")
        return
    remedy = "Write lines of `name: value`, indented with spaces."
    given = (read_yaml(arguments.file, "parameters", remedy=remedy) if arguments.file else None) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{arguments.file}: got {given!r}, expected a mapping of parameters. {remedy}")
    given |= {name: from_text(text, declared.get(name)) for name, text in arguments.parameters}
    loud = not arguments.quiet
    result = run(
        path, given, folder=arguments.folder, force=arguments.force, progress=loud, echo=loud,
        timeout_s=arguments.timeout,
    )  # fmt: skip
    if result.reused and loud:
        print("finished before; --force runs it again", file=sys.stderr)
    if loud:
        show_result(result)
    print(result.folder)


def show_result(result: Any) -> None:
    """Print the tables that a run saved, short ones whole, and the names of its figures."""
    for name in result.tables:
        frame = result.table(name)
        if len(frame) > _SHORT:
            print(f"\n{name}.csv: {len(frame)} rows")
            continue
        print(f"\n{name}\n{frame.to_string(index=False, float_format=digits)}")
    if result.figures:
        print(f"\nfigures: {', '.join(path.name for path in result.figures.values())}")


def _sweep(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.runs.run import finished, plan
    from ttsnap_lib.runs.sweep import load_grid, run_sweep, short_parameters

    grid = load_grid(arguments.grid)
    if arguments.dry_run:
        for parameters, case in zip(grid.runs, grid.cases, strict=True):
            planned = plan(grid.notebook, parameters, folder=arguments.runs)
            state = "finished" if finished(planned) else "to run"
            print(f"{planned.run_hash}  {state:<8}  {short_parameters(parameters, grid.axes, case)}")
        return 0
    result = run_sweep(
        grid,
        folder=arguments.folder,
        runs_folder=arguments.runs,
        workers=arguments.workers,
        scheduler=arguments.scheduler,
        retries=arguments.retries,
        timeout_s=arguments.timeout,
        progress=not arguments.quiet,
    )
    if not arguments.quiet:
        done = len(grid.runs) - len(result.failed)
        told = f"{done}/{len(grid.runs)} done, {result.reused} of them before, {len(result.failed)} failed"
        print(f"sweep {grid.name}: {told}", file=sys.stderr)
    for failure in result.failed:
        where = f" at {failure['cell']}" if failure["cell"] else ""
        print(f"failed: {failure['label']}{where}: {failure['last_line']}", file=sys.stderr)
        print(f"        {failure['folder']}/executed.ipynb", file=sys.stderr)
    if result.compared is not None and not arguments.quiet:
        from ttsnap_lib.runs.compare import comparison_text

        print(f"\n{comparison_text(result.compared).to_string(index=False)}\n", file=sys.stderr)
    print(result.folder)
    return 1 if result.failed else 0


def _report(arguments: argparse.Namespace) -> None:
    from ttsnap_lib.runs.report import render

    print(render(arguments.folder, arguments.out))


def _demo(arguments: argparse.Namespace) -> None:
    from ttsnap_lib.files import data_cache
    from ttsnap_lib.runs.run import run
    from ttsnap_lib.schedule import PUBLISHED_SCHEDULE
    from ttsnap_lib.style import progress_bar
    from ttsnap_lib.tensors.published import find_published, import_published
    from ttsnap_lib.tensors.tensor import save_rewards

    start = time.monotonic()
    parameters: dict[str, Any] = {}
    made = []
    if arguments.values:
        model, rewards = next(iter(find_published(arguments.values).items()), ("flux", None))
        tensor = data_cache() / "published" / f"{model}.zarr"
        if not tensor.exists():
            dataset = import_published(arguments.values, model, rewards, progress=progress_bar("files"))
            save_rewards(dataset, tensor)
        # One reward selects; the notebook's own schedule is one for the pocket models.
        parameters = {
            "tensor": str(tensor), "rewards": [(rewards or ["image_reward"])[0]], **PUBLISHED_SCHEDULE.to_dict(),
        }  # fmt: skip
    else:
        made.append(run("generate", _DEMO_GENERATE, progress=True))
        made.append(run("finetune", _DEMO_FINETUNE, progress=True))
    made.append(run("simulate", parameters, progress=True))
    print(f"\nDone in {time.monotonic() - start:.0f} s. What it made:")
    for result in made:
        print(f"  {result.folder}")
        for path in [*result.tables.values(), *result.figures.values(), result.folder / "executed.ipynb"]:
            print(f"    {path.name}")
    if not arguments.values:
        print("\nKendall tau of a small finetuning on held-out prompts, base and noise-aware:")
        shown = made[1].table("comparison")[["step", "base_tau", "noise_aware_tau", "gain", "gain_low", "gain_high"]]
        print(shown.round(3).to_string(index=False))
    print("\nRelative gain over Best-of-N in percent, with its 95% interval over prompts:")
    print(made[-1].table("relative_gains").round(1).to_string(index=False))
    print(_NEXT)
