"""What a sweep of small notebook runs takes in parallel workers, one after another, and with papermill alone."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from tests.benchmarks.rows import Row
from ttsnap_lib.runs.sweep import cores, run_sweep

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "tiny.ipynb"


def seconds(runs: int, workers: int) -> float:
    """Return the wall-clock seconds of a fresh sweep of `runs` runs, its workers' start included."""
    grid = {"notebook": str(NOTEBOOK), "name": "bench", "grid": {"x": list(range(1, runs + 1))}}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        result = run_sweep(grid, folder=Path(folder) / "sweep", runs_folder=Path(folder) / "runs", workers=workers)
        taken = time.perf_counter() - begin
    if result.failed or len(result.table) != runs:
        raise RuntimeError(f"{len(result.failed)} runs failed")
    return taken


def plain_papermill(runs: int) -> float:
    """Return the seconds of `runs` runs by papermill alone, in this process, each in a kernel of its own."""
    import papermill

    with tempfile.TemporaryDirectory() as folder:
        old = os.environ.get("TTSNAP_DATA_CACHE")
        os.environ["TTSNAP_DATA_CACHE"] = folder
        try:
            begin = time.perf_counter()
            for k in range(runs):
                papermill.execute_notebook(
                    NOTEBOOK, Path(folder) / f"{k}.ipynb", {"x": float(k)}, progress_bar=False, kernel_name="python3"
                )
            return time.perf_counter() - begin
        finally:
            os.environ.pop("TTSNAP_DATA_CACHE")
            if old is not None:
                os.environ["TTSNAP_DATA_CACHE"] = old


def run(runs: int = 50) -> list[Row]:
    """Measure `runs` runs three ways; the promise is three quarters of the number of workers."""
    workers = cores()
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    plain_papermill(1)  # imports
    alone = plain_papermill(10) / 10 * runs
    parallel, serial = seconds(runs, workers), seconds(runs, 1)
    return [
        Row(f"{runs} runs by papermill alone, one after another (10 measured)", alone, "s", note=load),
        Row(f"{runs} runs, 1 worker", serial, "s"),
        Row(f"{runs} runs, {workers} workers", parallel, "s"),
        Row(f"speed-up of {workers} workers over 1", serial / parallel, "times", at_least=0.75 * workers),
        Row(f"speed-up of {workers} workers over papermill alone", alone / parallel, "times", at_least=0.75 * workers),
    ]
