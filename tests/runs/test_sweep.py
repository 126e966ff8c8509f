"""Sweeps in real worker processes and on a real Dask cluster; killed and taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.faults.drill import alive, below, wait_for
from ttsnap_lib.errors import DiskError, RunError
from ttsnap_lib.files import lock
from ttsnap_lib.runs.sweep import SweepView, run_sweep

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
LOGS = str(NOTEBOOKS / "logs.ipynb")  # writes a line for each execution, and waits, or dies once


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_grid(tmp_path: Path, **content) -> Path:
    """Write a sweep of the logging notebook and return its file."""
    content = {"notebook": LOGS, "parameters": {"log": str(tmp_path / "log")}, **content}
    content["parameters"] = {"log": str(tmp_path / "log"), **content["parameters"]}
    path = tmp_path / "logs.yaml"
    path.write_text(json.dumps(content))
    return path


def executions(tmp_path: Path) -> list[float]:
    """Return the values of x that were executed, sorted, one for each execution that came to its end."""
    return sorted(float(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines() if "end" in line)


def test_a_sweep_collects_one_tidy_table_and_goes_on_after_a_failure(tmp_path, capsys):
    grid = write_grid(tmp_path, grid={"x": [1, 2, 3], "fail_at": [3.0]})
    result = run_sweep(grid, workers=2, stream=sys.stderr)
    table = pd.read_csv(result.folder / "results.csv")
    assert list(table.columns)[:2] == ["run", "x"] and table["x"].tolist() == [1.0, 2.0]
    assert table["value"].tolist() == [1.0, 4.0]
    pd.testing.assert_frame_equal(pd.read_parquet(result.folder / "results.parquet"), result.table)
    (failure,) = result.failed
    assert failure["last_line"] == "ValueError: asked to fail" and "if x == fail_at" in failure["cell"]
    assert "before the failure" in (Path(failure["folder"]) / "executed.ipynb").read_text()
    assert (result.folder / "summary.png").stat().st_size > 5000
    shown = capsys.readouterr().err
    assert "sweep logs: 3 runs" in shown and "ValueError: asked to fail" in shown and "\x1b" not in shown
    assert "2/3 done, 1 failed" in shown
    stored = json.loads((result.folder / "sweep.json").read_text())
    assert [run["status"] for run in stored["runs"]] == ["complete", "complete", "failed"]
    again = run_sweep(grid, workers=1)  # only what failed is tried again
    assert again.reused == 2 and len(again.failed) == 1
    assert executions(tmp_path) == [1.0, 2.0]
    with lock(result.folder / ".lock"), pytest.raises(DiskError, match="in use"):
        run_sweep(grid)


def test_a_killed_worker_and_a_dying_kernel_are_survived(tmp_path):
    grid = write_grid(tmp_path, grid={"x": [1, 2], "kill": ["kernel", "worker"]})
    result = run_sweep(grid, workers=2)
    assert not result.failed and result.table["value"].tolist() == [1.0, 1.0, 4.0, 4.0]
    lines = (tmp_path / "log").read_text().splitlines()
    assert sum("begin" in line for line in lines) == 8  # each died once
    assert executions(tmp_path) == [1.0, 1.0, 2.0, 2.0]


def test_a_worker_that_always_dies_fails_its_run_alone(tmp_path):
    grid = write_grid(tmp_path, grid={"x": [1], "kill": ["no", "kernel always"]})
    result = run_sweep(grid, workers=2, retries=1)
    assert len(result.table) == 1
    assert "kernel died" in result.failed[0]["last_line"] and "(2 times)" in result.failed[0]["last_line"]


def completed(cache: Path) -> int:
    """Return how many runs have been brought to their end, with a whole manifest."""
    return sum('"status": "complete"' in path.read_text() for path in cache.glob("runs/*/*/manifest.json"))


def _start(grid: Path, *words: str) -> subprocess.Popen:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # tests in the background ignore it
    )
    code += "import sys; from ttsnap_lib.__main__ import run; sys.exit(run())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "sweep", str(grid), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Folder of a sweep that nothing has disturbed: its grid in ``logs.yaml``, its table in ``straight``."""
    folder = tmp_path_factory.mktemp("straight")
    grid = write_grid(folder, grid={"x": [1, 2, 3, 4], "wait_s": [0.3]})
    run_sweep(grid, workers=2, folder=folder / "straight", runs_folder=folder / "runs")
    assert executions(folder) == [1.0, 2.0, 3.0, 4.0]
    return folder


def _same_table(folder: Path, straight: Path) -> None:
    for name in ("results.csv", "results.parquet"):
        assert (folder / name).read_bytes() == (straight / "straight" / name).read_bytes()


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_an_interrupted_sweep_is_taken_up_and_gives_the_same_table(how, straight, cache):
    (straight / "log").unlink(missing_ok=True)
    grid = straight / "logs.yaml"
    process = _start(grid, "-j", "2")
    wait_for(lambda: completed(cache))
    children = below(process.pid)
    assert children
    process.send_signal(how)
    code = process.wait(120)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
    wait_for(lambda: not any(alive(pid) for pid in children))  # neither worker nor kernel is left
    before = completed(cache)
    assert 1 <= before < 4
    ended_before = len(executions(straight))
    resumed = run_sweep(grid, workers=2)
    assert resumed.reused == before
    _same_table(resumed.folder, straight)
    assert len(executions(straight)) == ended_before + 4 - before  # what had finished was not run again


def test_the_command_tells_by_its_exit_status(tmp_path):
    grid = write_grid(tmp_path, grid={"x": [1, 2], "fail_at": [2.0]})
    process = _start(grid, "-j", "2", "-q")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "failed: x=2, fail_at=2 at code cell" in err and "ValueError: asked to fail" in err
    assert Path(out.strip()).name == "logs"
    process = _start(grid, "--dry-run")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and [line.split()[1] for line in out.splitlines()] == ["finished", "to"]


def test_workers_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("ttsnap_lib.runs.sweep.cores", lambda: 6)
    table = run_sweep(write_grid(tmp_path), workers=2).table
    assert table["threads"].tolist() == ["3"]


class _Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_the_live_table_is_redrawn_in_a_terminal():
    stream = _Terminal()
    view = SweepView(stream, "demo", {"k1": "x=1", "k2": "x=2"}, 0)
    view.start("k1", 0)
    view.end("k1", {"status": "complete", "elapsed_s": 1.0})
    view.start("k2", 1)
    view.end("k2", {"status": "failed", "last_line": "ValueError: no"})
    view.close()
    assert "worker 1   0:00:00  starting     x=1" in stream.text and "\x1b[2A\x1b[J" in stream.text
    assert "failed" in stream.text and "ValueError: no" in stream.text
    assert stream.text.rstrip().endswith("gone") and "1/2 done, 1 failed" in stream.text


# -- Dask ----------------------------------------------------------------------------------------------------------


def test_a_scheduler_that_is_not_there_is_told(tmp_path, monkeypatch):
    import dask

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
        pytest.raises(RunError, match="no Dask scheduler"),
    ):
        run_sweep(write_grid(tmp_path), scheduler="tcp://127.0.0.1:1")


@pytest.mark.slow
def test_a_dask_cluster_survives_the_loss_of_a_worker(straight, tmp_path, cache):
    (straight / "log").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(NOTEBOOKS.parents[1])}
    dask = [sys.executable, "-m", "dask"]
    file = tmp_path / "scheduler.json"
    options = {"env": environment, "cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    started = [subprocess.Popen([*dask, "scheduler", *words], **options)]
    try:
        wait_for(lambda: file.exists() and file.read_text())
        address = json.loads(file.read_text())["address"]
        worker = [*dask, "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1"]
        started += [subprocess.Popen(worker, **options) for _ in range(2)]
        sweep = _start(straight / "logs.yaml", "--scheduler", address)
        # A worker dies as soon as one run has ended and another one is at work on it.
        wait_for(lambda: completed(cache) or sweep.poll() is not None)
        started[1].kill()
        out, err = sweep.communicate(timeout=400)
        assert sweep.returncode == 0, err
        assert "4/4 done, 0 failed" in err
    finally:
        for process in started:
            process.kill()
            process.wait()
    _same_table(Path(out.strip()), straight)


@pytest.mark.slow
def test_fifty_runs_take_about_the_workers_share_of_the_time():
    from tests.benchmarks.bench_sweep import seconds

    # Two workers; on two quiet cores the ratio is near 2, and a busy machine disturbs both alike.
    parallel, serial = seconds(50, 2), seconds(50, 1)
    assert serial / parallel > 1.4, (serial, parallel)
