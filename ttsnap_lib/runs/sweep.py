"""Sweeps of a notebook over a grid of parameters: on Dask workers, resumable, collected into one table and a figure.

Every run has its own run folder, named by its parameters (:mod:`ttsnap_lib.runs.run`); a sweep only says which runs
there are. So a sweep that was interrupted, or that another sweep overlaps, takes up what has finished.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap_lib.checks import integer, known_keys, plain_name, real, text
from ttsnap_lib.errors import ConfigError, RunError, TTSnapError
from ttsnap_lib.files import as_path, cores, data_cache, lock, read_yaml, write_json
from ttsnap_lib.provenance import device, git_state, now, versions
from ttsnap_lib.runs.compare import compare_runs, write_comparison
from ttsnap_lib.runs.parameters import declared_parameters, parameter_hash, read_notebook, resolve
from ttsnap_lib.runs.run import KERNEL_DIED, Plan, find_notebook, finished, plan, run, write_figure, write_table
from ttsnap_lib.style import progress_bar

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client, Future
    from matplotlib.figure import Figure

_KEYS = ("notebook", "name", "parameters", "grid", "cases", "metric", "table")
_MOST_RUNS = 100_000
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_USUAL_METRICS = ("mean", "reward", "value", "score", "gain", "test_gain", "tau", "loss")


# What is to be run


@dataclass(frozen=True)
class GridSpec:
    """A checked sweep: the notebook and the parameter sets, in the order of the file, no set twice.

    ``cases`` holds the named case of each run ("" where the file names none), ``axes`` the parameters under ``grid``,
    ``metric`` the column to draw ("" to choose one), ``table`` the saved table to collect.
    """

    name: str
    notebook: Path
    runs: tuple[dict[str, Any], ...]
    cases: tuple[str, ...]
    axes: tuple[str, ...]
    metric: str = ""
    table: str = "results"


def load_grid(path: str | Path) -> GridSpec:
    """Read a sweep from the YAML file `path`; a notebook's path in it is relative to the file."""
    path = as_path("sweep", path)
    content = read_yaml(path, "sweep", remedy="Check the path; indent with spaces, and write `name: value`.")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {content!r}, expected a mapping. Write notebook: and grid: lines.")
    notebook = content.get("notebook")
    if isinstance(notebook, str) and (path.parent / as_path("sweep: notebook", notebook or " ")).is_file():
        content = {**content, "notebook": str(path.parent / notebook)}
    return parse_grid(content, default_name=path.stem)


def parse_grid(content: Mapping[str, Any], default_name: str = "sweep") -> GridSpec:
    """Check a sweep given as a mapping with the keys of the YAML file, and expand it, the first axis slowest."""
    known_keys("sweep", content, _KEYS)
    notebook = find_notebook(text("sweep: notebook", content.get("notebook")))
    name = plain_name("sweep: name", content.get("name", default_name))
    table = plain_name("sweep: table", content.get("table", "results"))
    metric = text("sweep: metric", content["metric"]) if "metric" in content else ""
    constants, grid, cases = (content.get(key) or {} for key in ("parameters", "grid", "cases"))
    for key, value in {"parameters": constants, "grid": grid, "cases": cases}.items():
        if not isinstance(value, dict):
            raise ConfigError(f"sweep: {key}: got {value!r}, expected a mapping. Write `name: value` lines.")
    for case, overlay in cases.items():
        if not isinstance(case, str) or not isinstance(overlay, dict):
            raise ConfigError(f"sweep: cases: got {case!r}, expected a name and a mapping. Write `name: {{x: 1}}`.")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(
                f"sweep: grid.{key}: got {values!r}, expected a list of values. Put one under parameters."
            )
        if any(key in part for part in (constants, *cases.values())):
            raise ConfigError(f"sweep: {key} stands under grid and elsewhere too. Keep one of the two.")
    size = math.prod(len(values) for values in grid.values()) * max(1, len(cases))
    integer("number of runs in the sweep", size, 1, _MOST_RUNS)
    declared = declared_parameters(read_notebook(notebook), notebook.name)
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for case, overlay in (cases or {"": {}}).items():
        for values in itertools.product(*grid.values()):
            given = {**constants, **overlay, **dict(zip(grid, values, strict=True))}
            point = resolve(declared, given, notebook.name)
            found.setdefault(parameter_hash(point), (case, point))
    named, runs = zip(*found.values(), strict=True)
    return GridSpec(name, notebook, runs, named, tuple(grid), metric, table)


def short_parameters(parameters: Mapping[str, Any], axes: tuple[str, ...], case: str = "") -> str:
    """Return the varied parameters in one short line."""
    parts = [case] if case else []
    for name in axes:
        value = parameters[name]
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(f"{name}={shown if len(shown) <= 30 else shown[:27] + '...'}")
    return ", ".join(parts) or "defaults"


# The runs


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gave.

    ``folder`` holds ``results.csv``, ``results.parquet``, ``summary.png`` and ``sweep.json``; ``table`` has the
    parameters as first columns, then each run's results, in the sweep's order; ``failed`` tells of each failed run its
    label, parameters, folder, cell and last_line; ``reused`` counts the runs that had finished before. ``compared`` sets
    runs that simulate on the same prompts side by side (:func:`ttsnap_lib.runs.compare.compare_runs`), else it is None.
    """

    folder: Path
    table: pd.DataFrame
    failed: list[dict[str, Any]]
    reused: int
    compared: pd.DataFrame | None = None


def run_sweep(
    grid: GridSpec | str | Path | Mapping[str, Any],
    *,
    folder: str | Path | None = None,
    runs_folder: str | Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    retries: int = 2,
    timeout_s: float | None = None,
    progress: bool = False,
) -> SweepResult:
    """Run every parameter set of `grid` that has not finished before, and collect all of them.

    Parameters
    ----------
    grid : GridSpec, path or mapping
        The sweep, a YAML file of it, or its content.
    folder, runs_folder : str or Path, optional
        For the sweep's table and figure, and for the run folders; ``data_cache/sweeps/<name>`` and ``data_cache/runs``
        by default. On a cluster they have to be on a file system that all workers share.
    workers : int, optional
        Local worker processes; as many as there are cores by default. Each may use its share of the cores.
    scheduler : str, optional
        Address of a Dask scheduler (or its scheduler file): the runs go there, `workers` plays no part.
    retries : int
        How often a run is tried again when its worker or kernel is lost. A cell that raises is not tried again.
    timeout_s : float, optional
        Longest time for one cell.
    progress : bool
        Show a bar of the runs.
    """
    import nbformat  # noqa: F401 - without the extra "notebooks" every worker would die of it, three times each run

    if isinstance(grid, str | Path):
        grid = load_grid(grid)
    elif not isinstance(grid, GridSpec):
        grid = parse_grid(grid)
    workers = integer("workers", cores() if workers is None else workers, 1)
    retries = integer("retries", retries, 0)
    timeout_s = None if timeout_s is None else real("timeout_s", timeout_s, 0, open_low=True)
    home = (Path(folder) if folder is not None else data_cache() / "sweeps" / grid.name).absolute()
    plans = [plan(grid.notebook, parameters, folder=runs_folder) for parameters in grid.runs]
    with lock(home / ".lock"):
        begin, started = time.monotonic(), now()
        todo = [planned for planned in plans if finished(planned) is None]
        failures = _run_all(todo, len(plans), workers, scheduler, retries, timeout_s, progress) if todo else {}
        table = _collect(grid, {k: each.folder for k, each in enumerate(plans) if each.run_hash not in failures})
        write_table(table, home / "results.csv")
        runs: list[dict[str, Any]] = []
        failed = []
        for each, case in zip(plans, grid.cases, strict=True):
            common = {"run_hash": each.run_hash, "parameters": each.parameters, "folder": str(each.folder)}
            good = each.run_hash not in failures
            runs.append({**common, "case": case, "status": "complete" if good else "failed"})
            if not good:
                label, (cell, line) = short_parameters(each.parameters, grid.axes, case), failures[each.run_hash]
                failed.append({**common, "label": label, "cell": cell, "last_line": line})
        complete = [run for run in runs if run["status"] == "complete"]
        labels = [short_parameters(run["parameters"], grid.axes, run["case"]) for run in complete]
        compared = compare_runs(complete, labels)
        result = SweepResult(home, table, failed, len(plans) - len(todo), compared)
        record = {
            "name": grid.name,
            "notebook": grid.notebook.stem,
            "axes": list(grid.axes),
            "runs": runs,
            "failed": failed,
            "reused": result.reused,
            "workers": scheduler or workers,
            "git": git_state(),
            "versions": versions(),
            "device": device(),
            "started": started,
            "ended": now(),
            "elapsed_s": round(time.monotonic() - begin, 3),
        }
        write_json(home / "sweep.json", record)
        figure = _figure(grid, table)
        if figure is not None:
            write_figure(figure, home / "summary.png")
        if compared is not None:
            write_comparison(compared, home)
        else:  # of an earlier sweep of that name
            for old in home.glob("compared.*"):
                old.unlink()
    return result


def _run_all(
    todo: list[Plan],
    total: int,
    workers: int,
    scheduler: str | None,
    retries: int,
    timeout_s: float | None,
    progress: bool,
) -> dict[str, tuple[str, str]]:
    """Run `todo` on Dask workers; return the cell and the last line of each run that failed, by its hash."""
    from distributed import as_completed

    show = progress_bar("runs", quiet=not progress) or (lambda done, total: None)
    failures = {}
    before = total - len(todo)
    show(before, total)
    with _client(scheduler, workers, len(todo), retries) as client:
        futures = {client.submit(_run_one, each, timeout_s, pure=False, retries=retries): each for each in todo}
        try:
            for count, future in enumerate(as_completed(futures, loop=client.loop), 1):
                failure = _outcome(future)
                if failure is not None:
                    failures[futures[future].run_hash] = failure
                show(before + count, total)
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                client.cancel(list(futures), force=True)
    return failures


def _run_one(planned: Plan, timeout_s: float | None) -> tuple[str, str] | None:
    """Run one notebook on a worker; return its failure. A dead kernel is raised, so that Dask tries again."""
    try:
        run(planned.notebook, planned.parameters, folder=planned.folder.parent.parent, timeout_s=timeout_s)
    except TTSnapError as error:
        line = getattr(error, "last_line", "") or str(error)
        if line.startswith(KERNEL_DIED):
            raise
        return getattr(error, "cell", ""), line
    return None


def _outcome(future: Future) -> tuple[str, str] | None:
    """Return the failure of a run that Dask has ended, or None when it is good."""
    from distributed import KilledWorker

    gone = "the Dask scheduler is gone. Start it again and run the same sweep: what has finished is kept."
    try:
        if future.status == "finished":
            return future.result()
        if future.status != "error":
            raise RunError(gone)
        error = future.exception()
    except OSError as failure:
        raise RunError(gone) from failure
    if isinstance(error, KilledWorker):
        return "", f"its worker died {error.allowed_failures + 1} times (killed, or out of memory)"
    return getattr(error, "cell", ""), getattr(error, "last_line", "") or f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _client(scheduler: str | None, workers: int, most: int, retries: int) -> Iterator[Client]:
    """Yield a client of the Dask cluster at `scheduler`, else of up to `most` local workers that end with the block.

    The workers of a cluster import this package and see the folder of the runs at the same path.
    """
    import dask
    from distributed import Client, LocalCluster

    if scheduler is not None:
        for name in ("distributed.client", "distributed.utils"):  # a lost scheduler is told in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        where = {"scheduler_file": scheduler} if scheduler.endswith(".json") else {"address": scheduler}
        try:
            client = Client(**where, set_as_default=False)
        except (OSError, ValueError) as error:
            raise RunError(
                f"no Dask scheduler answers at {scheduler}, expected tcp://host:8786 or a scheduler file. Start one with "
                "`dask scheduler` and workers with `dask worker ADDRESS`."
            ) from error
        with client:
            yield client
        return
    share = str(max(1, cores() // workers))
    settings = {
        "distributed.scheduler.allowed-failures": retries,
        "distributed.scheduler.worker-saturation": 1.0,  # a run that only waits must not be blamed for a dead worker
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=min(workers, most),
            threads_per_worker=1,
            memory_limit=None,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            env={name: os.environ.get(name, share) for name in _THREAD_VARIABLES},
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


# What came out


def _collect(spec: GridSpec, folders: Mapping[int, Path]) -> pd.DataFrame:
    """Return the tables of runs (run folder by index in the sweep) under each other, parameters as first columns.

    Rows stand in the sweep's order, so the same runs give the same table, to the byte. A parameter whose name the
    results use too is called ``<name>_parameter``. A run without the table gives one row of its parameters.
    """
    import pandas as pd

    frames = {}
    for index, folder in folders.items():
        path = folder / f"{spec.table}.parquet"
        frames[index] = pd.read_parquet(path).reset_index(drop=True) if path.exists() else pd.DataFrame(index=[0])
    taken = {column for frame in frames.values() for column in frame.columns}
    parts = []
    for index, frame in frames.items():
        case = {"case": spec.cases[index]} if any(spec.cases) else {}
        columns = {}
        for name, value in {"run": folders[index].name, **case, **spec.runs[index]}.items():
            cell = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
            columns[f"{name}_parameter" if name in taken else name] = [cell] * len(frame)
        parts.append(pd.DataFrame(columns, index=frame.index).join(frame))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"run": []})
    for name in table.columns:  # one type a column, or Parquet refuses it
        kinds = {type(value) for value in table[name] if value is not None} if table[name].dtype == object else set()
        if len(kinds) > 1:
            table[name] = [None if value is None else str(value) for value in table[name]]
    return table


def _figure(spec: GridSpec, table: pd.DataFrame) -> Figure | None:
    """Return a figure of the metric against what varies; None when there is nothing to draw.

    What varies over the most numbers runs along x, the next two give colour and line style. The rest is averaged
    over, and a band shows its whole spread.
    """
    import seaborn as sns
    from matplotlib.figure import Figure

    own = {"run", "case", *spec.runs[0]} | {f"{name}_parameter" for name in spec.runs[0]}
    numbers = [name for name in table.select_dtypes("number").columns if name not in own]
    if spec.metric and spec.metric not in table.columns:
        raise ConfigError(f"sweep: metric: got {spec.metric!r}, expected one of {list(table.columns)}. Name a column.")
    metric = spec.metric or next((name for name in _USUAL_METRICS if name in numbers), numbers[-1] if numbers else "")
    if not metric or table.empty:
        return None
    axes = [name if name in table.columns else f"{name}_parameter" for name in spec.axes]
    axes = list(dict.fromkeys(["method", *axes, "case", "reward", "budget"]))
    axes = [name for name in axes if name in table.columns and table[name].nunique() > 1]
    axes.sort(key=lambda name: -table[name].nunique() if table[name].dtype.kind in "if" else 0)
    along, hue, style = (*(axes or ["run"]), None, None)[:3]
    shown = table.astype({name: str for name in (hue, style) if name})
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    ax = figure.add_subplot(title=spec.name)
    looks: dict[str, Any] = {"errorbar": ("pi", 100), "marker": "o", "palette": "colorblind" if hue else None}
    sns.lineplot(shown, x=along, y=metric, hue=hue, style=style, ax=ax, **looks)
    if hue:
        sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), frameon=False)
    sns.despine(ax=ax)
    return figure
