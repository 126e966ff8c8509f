"""Sweeps of a notebook over a grid of parameters: in parallel, resumable, collected into one table and a figure.

Every run has its own run folder, named by its parameters (:mod:`ttsnap_lib.runner`); a sweep only says which runs
there are. So a sweep that was interrupted, or that another sweep overlaps, takes up what has finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from . import provenance
from ._sweep_table import collect, draw
from ._sweep_view import SweepView, short_parameters
from .checks import integer, real
from .grids import GridSpec, load_grid, parse_grid
from .paths import atomic_write, data_cache, git_state, lock, write_json
from .runner import Plan, finished, plan
from .workers import Outcome, Task, cores, run_local

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SweepResult", "run_sweep"]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gave.

    Attributes
    ----------
    folder : Path
        Holds ``results.csv``, ``results.parquet``, ``summary.png`` and ``sweep.json``.
    table : pandas.DataFrame
        Parameters as first columns, then each run's results, in the sweep's order.
    failed : list of dict
        Of each failed run: label, parameters, folder, cell, last_line.
    reused : int
        How many runs had finished before.
    """

    folder: Path
    table: pd.DataFrame
    failed: list[dict[str, Any]]
    reused: int
    elapsed_s: float


def run_sweep(
    grid: GridSpec | str | Path | Mapping[str, Any],
    *,
    folder: str | Path | None = None,
    runs_folder: str | Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    retries: int = 2,
    timeout_s: float | None = None,
    stream: TextIO | None = None,
) -> SweepResult:
    """Run every parameter set of `grid` that has not finished before, and collect all of them.

    Parameters
    ----------
    grid : GridSpec, path or mapping
        The sweep, a YAML file of it, or its content.
    folder : str or Path, optional
        For the sweep's table and figure; ``data_cache/sweeps/<name>`` by default.
    runs_folder : str or Path, optional
        Holds the run folders; ``data_cache/runs`` by default, where single runs stand too. On a cluster it has to be
        on a file system that all workers share.
    workers : int, optional
        Local worker processes; as many as there are cores by default. Each may use its share of the cores.
    scheduler : str, optional
        Address of a Dask scheduler (or its scheduler file): the runs go there, `workers` plays no part.
    retries : int
        How often a run is tried again when its worker or kernel is lost. A cell that raises is not tried again.
    timeout_s : float, optional
        Longest time for one cell.
    stream : TextIO, optional
        Where to show the live table.

    Returns
    -------
    SweepResult

    Raises
    ------
    ConfigError
        Anything wrong in the grid, before the first run.
    DiskError
        Another process is at the same sweep.
    """
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
        return _run_locked(grid, plans, home, workers, scheduler, retries, timeout_s, stream)


def _run_locked(
    grid: GridSpec,
    plans: list[Plan],
    home: Path,
    workers: int,
    scheduler: str | None,
    retries: int,
    timeout_s: float | None,
    stream: TextIO | None,
) -> SweepResult:
    begin, started = time.monotonic(), provenance.now()
    done: dict[str, Outcome] = {}
    for planned in plans:
        before = finished(planned)
        if before is not None:
            done[planned.run_hash] = {"status": "complete", "folder": str(before.folder), "reused": True}
    reused = len(done)
    tasks: list[Task] = [
        {
            "key": planned.run_hash,
            "notebook": str(planned.notebook),
            "parameters": planned.parameters,
            "folder": str(planned.folder.parent.parent),
            "timeout_s": timeout_s,
        }
        for planned in plans
        if planned.run_hash not in done
    ]
    labels = {
        planned.run_hash: short_parameters(planned.parameters, grid.axes, case)
        for planned, case in zip(plans, grid.cases, strict=True)
    }
    view = SweepView(stream, grid.name, labels, reused)

    def on_end(key: str, outcome: Outcome) -> None:
        done[key] = outcome
        view.end(key, outcome)

    try:
        if tasks and scheduler is not None:
            from .cluster import run_dask

            run_dask(tasks, scheduler, retries=retries, on_end=on_end)
        elif tasks:
            run_local(
                tasks, workers, retries=retries, log=home / "workers.log",
                on_start=view.start, on_said=view.said, on_end=on_end,
            )  # fmt: skip
    finally:
        view.close()
    good = [(k, p.folder) for k, p in enumerate(plans) if done[p.run_hash]["status"] == "complete"]
    table = collect(grid, good)
    _save(home, grid, table)
    failed = [
        {
            "label": labels[planned.run_hash],
            "run_hash": planned.run_hash,
            "parameters": planned.parameters,
            "folder": str(planned.folder),
            "cell": done[planned.run_hash]["cell"],
            "last_line": done[planned.run_hash]["last_line"],
        }
        for planned in plans
        if done[planned.run_hash]["status"] != "complete"
    ]
    elapsed_s = round(time.monotonic() - begin, 3)
    write_json(
        home / "sweep.json",
        {
            "name": grid.name,
            "notebook": grid.notebook.stem,
            "axes": list(grid.axes),
            "runs": [
                {
                    "run_hash": planned.run_hash,
                    "case": case,
                    "parameters": planned.parameters,
                    "status": done[planned.run_hash]["status"],
                    "folder": str(planned.folder),
                }
                for planned, case in zip(plans, grid.cases, strict=True)
            ],
            "failed": failed,
            "reused": reused,
            "workers": scheduler or workers,
            "git": git_state(),
            "versions": provenance.versions(),
            "device": provenance.device(),
            "started": started,
            "ended": provenance.now(),
            "elapsed_s": elapsed_s,
        },
    )
    return SweepResult(home, table, failed, reused, elapsed_s)


def _save(home: Path, grid: GridSpec, table: pd.DataFrame) -> None:
    """Write the table as CSV and Parquet and the figure as PNG and PDF."""
    with atomic_write(home / "results.csv", "w") as file:
        table.to_csv(file, index=False, lineterminator="\n")
    with atomic_write(home / "results.parquet") as file:
        table.to_parquet(file, index=False)
    figure = draw(grid, table)
    for suffix, options in ((".png", {"dpi": 200}), (".pdf", {"metadata": {"CreationDate": None}})):
        path = home / f"summary{suffix}"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        with atomic_write(path) as file:
            figure.savefig(file, format=suffix[1:], **options)
