"""Grids, and sweeps of them in real worker processes and on a real Dask cluster; killed and taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.faults.drill import alive, below, wait_for
from ttsnap_lib.errors import ConfigError, DiskError, RunError
from ttsnap_lib.files import lock
from ttsnap_lib.runs.sweep import load_grid, parse_grid, run_sweep

NOTEBOOKS = ROOT / "tests" / "notebooks"
TINY = str(NOTEBOOKS / "tiny.ipynb")
LOGS = str(NOTEBOOKS / "logs.ipynb")  # writes a line for each execution, and waits, or dies once


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- grids -----------------------------------------------------------------------------------------------------------


def points(**content) -> list[tuple]:
    spec = parse_grid({"notebook": TINY, **content})
    return [(case, run["x"], run["scale"], run["label"]) for case, run in zip(spec.cases, spec.runs, strict=True)]


def test_a_grid_is_every_combination_the_first_axis_slowest_each_once():
    assert points(grid={"x": [1, 2], "scale": [3, 4]}) == [
        ("", 1.0, 3, "a"), ("", 1.0, 4, "a"), ("", 2.0, 3, "a"), ("", 2.0, 4, "a"),
    ]  # fmt: skip
    assert points(parameters={"label": "c"}) == [("", 2.0, 1, "c")]
    assert points(grid={"x": [1, 1.0, 2]}) == [("", 1.0, 1, "a"), ("", 2.0, 1, "a")]
    cases = {"small": {"scale": 1}, "large": {"scale": 10, "label": "big"}}
    assert points(grid={"x": [1, 2]}, cases=cases, parameters={"label": "b"}) == [
        ("small", 1.0, 1, "b"), ("small", 2.0, 1, "b"), ("large", 1.0, 10, "big"), ("large", 2.0, 10, "big"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"gird": {}}, "Did you mean 'grid'"),
        ({"grid": {"scael": [1]}}, "Did you mean 'scale'"),
        ({"grid": {"x": 1}}, "Put one under parameters"),
        ({"grid": {"x": []}}, "a list of values"),
        ({"grid": {"x": ["one"]}}, "expected float"),
        ({"grid": {"x": [1]}, "parameters": {"x": 2}}, "Keep one of the two"),
        ({"grid": {"x": [1]}, "cases": {"a": {"x": 2}}}, "Keep one of the two"),
        ({"grid": {"x": [1] * 400, "scale": [1] * 400}}, "number of runs"),
        ({"parameters": {"scale": 1.5}}, "expected int"),
        ({"cases": {"a": {"scal": 1}}}, "Did you mean 'scale'"),
        ({"cases": {"a": 1}}, "a name and a mapping"),
        ({"grid": [1]}, "a mapping"),
        ({"name": "../up"}, "plain name"),
        ({"metric": 3}, "metric"),
        ({"notebook": "no_such"}, "notebook"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(content, said):
    with pytest.raises(ConfigError) as caught:
        parse_grid({"notebook": TINY, **content})
    assert said in str(caught.value)


def test_a_grid_file_finds_its_notebook_beside_it(tmp_path):
    (tmp_path / "mine.ipynb").write_text(Path(TINY).read_text())
    (tmp_path / "budgets.yaml").write_text("notebook: mine.ipynb\ngrid:\n  x: [1, 2]\n")
    spec = load_grid(tmp_path / "budgets.yaml")
    assert (spec.name, spec.notebook, len(spec.runs)) == ("budgets", tmp_path / "mine.ipynb", 2)
    (tmp_path / "bad.yaml").write_text("just text")
    with pytest.raises(ConfigError, match="a mapping"):
        load_grid(tmp_path / "bad.yaml")


# -- sweeps ------------------------------------------------------------------------------------------------------------


def write_grid(tmp_path: Path, **content) -> Path:
    """Write a sweep of the logging notebook and return its file."""
    content = {"notebook": LOGS, "parameters": {"output": str(tmp_path / "log")}, **content}
    path = tmp_path / "logs.yaml"
    path.write_text(json.dumps(content))
    return path


def executions(tmp_path: Path) -> list[float]:
    """Return the values of x that were executed, sorted, one for each execution that came to its end."""
    return sorted(float(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines() if "end" in line)


def test_a_sweep_collects_one_tidy_table_and_goes_on_after_a_failure(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("ttsnap_lib.runs.sweep.cores", lambda: 6)
    grid = write_grid(tmp_path, grid={"x": [1, 2, 3], "fail_at": [3.0]})
    result = run_sweep(grid, workers=2, progress=True)
    table = pd.read_csv(result.folder / "results.csv")
    assert list(table.columns)[:2] == ["run", "x"] and table["x"].tolist() == [1.0, 2.0]
    assert table["value"].tolist() == [1.0, 4.0]
    assert table["threads"].tolist() == [3, 3]  # two workers share the cores
    pd.testing.assert_frame_equal(pd.read_parquet(result.folder / "results.parquet"), result.table)
    (failure,) = result.failed
    assert failure["last_line"] == "ValueError: asked to fail" and "if x == fail_at" in failure["cell"]
    assert "before the failure" in (Path(failure["folder"]) / "executed.ipynb").read_text()
    assert (result.folder / "summary.png").stat().st_size > 5000
    assert "3/3" in capsys.readouterr().err
    stored = json.loads((result.folder / "sweep.json").read_text())
    assert [run["status"] for run in stored["runs"]] == ["complete", "complete", "failed"]
    again = run_sweep(grid, workers=1)  # only what failed is tried again
    assert again.reused == 2 and len(again.failed) == 1
    assert executions(tmp_path) == [1.0, 2.0]
    with lock(result.folder / ".lock"), pytest.raises(DiskError, match="in use"):
        run_sweep(grid)


def test_parameters_and_results_of_one_name_stay_apart_and_lists_are_text(tmp_path):
    cases = {"first": {"output": "c"}, "second": {"output": "d"}}
    grid = {"notebook": str(tmp_path / "two.ipynb"), "grid": {"x": [2]}, "cases": cases, "metric": "value"}
    content = json.loads(Path(LOGS).read_text())
    content["cells"] = content["cells"][1:2] + [{
        "cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "id": "c", "source":
            "import pandas as pd\nfrom ttsnap_lib import current_run\n"
            "current_run().save_table(pd.DataFrame({'output': ['ours', 'theirs'], 'value': [x, -x]}))",
    }]  # fmt: skip
    content["cells"][0]["source"] += "\nsteps: list = [2, 6]"
    (tmp_path / "two.ipynb").write_text(json.dumps(content))
    result = run_sweep(grid, workers=2)
    assert list(result.table.columns) == [
        "run", "case", "x", "wait_s", "fail_at", "kill", "output_parameter", "steps", "output", "value",
    ]  # fmt: skip
    assert result.table["output_parameter"].tolist() == ["c"] * 2 + ["d"] * 2
    assert result.table["value"].tolist() == [2.0, -2.0] * 2
    assert set(result.table["steps"]) == {"[2, 6]"}
    with pytest.raises(ConfigError, match="metric"):
        run_sweep({**grid, "metric": "valeu"})


def test_a_killed_worker_and_a_dying_kernel_are_survived(tmp_path):
    grid = write_grid(tmp_path, grid={"x": [2], "kill": ["kernel", "worker"]})
    result = run_sweep(grid, workers=2)
    assert not result.failed and result.table["value"].tolist() == [4.0, 4.0]
    lines = (tmp_path / "log").read_text().splitlines()
    assert sum("begin" in line for line in lines) == 4  # each died once
    assert executions(tmp_path) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("kill", "said"),
    [("kernel always", "the kernel died"), pytest.param("worker", "worker died", marks=pytest.mark.slow)],
)
def test_a_run_that_takes_its_worker_with_it_fails_alone(kill, said, tmp_path):
    retries = 1 if kill == "kernel always" else 0
    result = run_sweep(write_grid(tmp_path, grid={"x": [1], "kill": ["no", kill]}), workers=2, retries=retries)
    assert len(result.table) == 1 and said in result.failed[0]["last_line"]
    assert sum("begin" in line for line in (tmp_path / "log").read_text().splitlines()) == 2 + retries


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


def test_a_scheduler_that_is_not_there_is_told(tmp_path):
    import dask
    import distributed  # noqa: F401 - its defaults have to be there before one of them is changed

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
        pytest.raises(RunError, match="no Dask scheduler"),
    ):
        run_sweep(write_grid(tmp_path), scheduler="tcp://127.0.0.1:1")


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["scheduler", "worker"])
def test_a_dask_cluster_survives_the_loss_of_a_worker_and_says_that_its_scheduler_is_gone(
    lost, straight, tmp_path, cache
):
    (straight / "log").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
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
        started[lost == "worker"].kill()
        out, err = sweep.communicate(timeout=400)
        if lost == "scheduler":
            assert sweep.returncode == 1 and "the Dask scheduler is gone" in err and "Traceback" not in err, err
            return
        assert sweep.returncode == 0, err
        assert "4/4 done" in err and "0 failed" in err
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
