"""Grids, and sweeps in real worker processes and on a real Dask cluster; killed and taken up again."""

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
from ttsnap_lib._sweep_table import collect, draw, main_metric
from ttsnap_lib._sweep_view import SweepView
from ttsnap_lib.errors import ConfigError, DiskError, RunError
from ttsnap_lib.grids import axis_values, load_grid, parse_grid
from ttsnap_lib.paths import lock
from ttsnap_lib.sweeps import run_sweep

NOTEBOOKS = Path(__file__).parent / "notebooks"
TINY = str(NOTEBOOKS / "tiny.ipynb")
LOGS = str(NOTEBOOKS / "logs.ipynb")  # writes a line for each execution, and waits, or dies once


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- grids ---------------------------------------------------------------------------------------------------------


def points(**content) -> list[tuple]:
    spec = parse_grid({"notebook": TINY, **content})
    return [(run["x"], run["scale"], run["label"]) for run in spec.runs]


def test_the_first_axis_is_slowest_and_the_rest_keeps_its_default():
    assert points(grid={"x": [1, 2], "scale": [3, 4]}) == [
        (1.0, 3, "a"), (1.0, 4, "a"), (2.0, 3, "a"), (2.0, 4, "a"),
    ]  # fmt: skip
    assert points(parameters={"label": "c"}) == [(2.0, 1, "c")]


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ({"start": 400, "stop": 1000, "step": 200}, [400, 600, 800, 1000]),
        ({"start": 3, "stop": 1, "step": -1}, [3, 2, 1]),
        ({"start": 0, "stop": 0.3, "step": 0.1}, [0.0, 0.1, 0.2, 0.3]),
        ({"start": 0, "stop": 0.35, "step": 0.1}, [0.0, 0.1, 0.2, 0.3]),
        ({"linspace": [0, 1, 5]}, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"logspace": [1e-4, 1e-2, 3]}, [1e-4, 1e-3, 1e-2]),
        ([1, "a", None], [1, "a", None]),
    ],
)
def test_axes(axis, values):
    assert axis_values("grid.x", axis) == ({}, values)


def test_conditions_leave_a_parameter_at_its_default_where_they_do_not_hold():
    grid = {"label": ["a", "b"], "x": {"when": {"label": "b"}, "values": [5, 6]}}
    assert points(grid=grid) == [(2.0, 1, "a"), (5.0, 1, "b"), (6.0, 1, "b")]
    grid = {"x": [1, 2, 3], "scale": {"when": {"x": [2, 3]}, "start": 8, "stop": 9, "step": 1}}
    assert points(grid=grid) == [(1.0, 1, "a"), (2.0, 8, "a"), (2.0, 9, "a"), (3.0, 8, "a"), (3.0, 9, "a")]
    chain = {
        "scale": [1, 2],
        "x": {"when": {"scale": 2}, "values": [7, 8]},
        "label": {"when": {"x": 8}, "values": ["z"]},
    }
    assert points(grid=chain) == [(2.0, 1, "a"), (7.0, 2, "a"), (8.0, 2, "z")]


def test_cases_cross_the_grid_and_rules_leave_points_out():
    cases = {"small": {"scale": 1}, "large": {"scale": 10, "label": "big"}}
    spec = parse_grid({"notebook": TINY, "grid": {"x": [1, 2]}, "cases": cases, "exclude": [{"case": "large", "x": 2}]})
    assert spec.cases == ("small", "small", "large")
    assert [(run["x"], run["scale"], run["label"]) for run in spec.runs] == [
        (1.0, 1, "a"), (2.0, 1, "a"), (1.0, 10, "big"),
    ]  # fmt: skip


def test_the_same_parameters_are_run_once():
    assert points(grid={"x": [1, 1.0, 2]}) == [(1.0, 1, "a"), (2.0, 1, "a")]
    assert points(grid={"scale": [1, 2], "x": {"when": {"scale": 2}, "values": [2.0]}}) == [
        (2.0, 1, "a"),
        (2.0, 2, "a"),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"gird": {}}, "Did you mean 'grid'"),
        ({"grid": {"y": [1]}}, "unknown key"),
        ({"grid": {"x": 1}}, "Put a value that does not vary under parameters"),
        ({"grid": {"x": []}}, "a list of values"),
        ({"grid": {"x": ["one"]}}, "expected float"),
        ({"grid": {"x": {"start": 1, "stop": 2}}}, "step as well"),
        ({"grid": {"x": {"start": 1, "stop": 2, "step": 0}}}, "Change its sign"),
        ({"grid": {"x": {"start": 1, "stop": 2, "step": -1}}}, "Change its sign"),
        ({"grid": {"x": {"start": 1, "stop": 2, "step": 1, "by": 1}}}, "unknown key"),
        ({"grid": {"x": {"start": 0, "stop": 1e9, "step": 1e-3}}}, "number of values"),
        ({"grid": {"x": {"logspace": [0, 1, 3]}}}, "logspace"),
        ({"grid": {"x": {"linspace": [0, 1]}}}, "[first, last, count]"),
        ({"grid": {"x": {"values": [1], "when": {"labl": "a"}}}}, "Did you mean 'label'"),
        ({"grid": {"x": {"values": [1], "wen": {}}}}, "Did you mean 'when'"),
        ({"grid": {"x": {"values": [1], "when": "label"}}}, "a mapping"),
        ({"grid": {"x": [1]}, "parameters": {"x": 2}}, "Keep one of the two"),
        ({"grid": {"x": [1]}, "cases": {"a": {"x": 2}}}, "Keep one of the two"),
        ({"parameters": {"scale": 1.5}}, "expected int"),
        ({"cases": {"a": {"scal": 1}}}, "Did you mean 'scale'"),
        ({"cases": {"a": 1}}, "a name and a mapping"),
        ({"exclude": {"x": 1}}, "a list of mappings"),
        ({"exclude": [{"case": "a"}]}, "unknown key"),
        ({"exclude": [{"x": 2.0}]}, "leave a run"),
        ({"grid": [1]}, "a mapping"),
        ({"name": "../up"}, "plain name"),
        ({"metric": 3}, "expected text"),
        ({"notebook": 3}, "name or path"),
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
    (tmp_path / "bad.yaml").write_text("notebook: mine.ipynb\ngrid:\n  x: [1]\n  x: [2]\n")
    with pytest.raises(ConfigError, match="twice"):
        load_grid(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("just text")
    with pytest.raises(ConfigError, match="a mapping"):
        load_grid(tmp_path / "bad.yaml")


# -- the table and its figure --------------------------------------------------------------------------------------


def _collected(tmp_path: Path, results, **content):
    """Return the sweep and the table of runs whose results `results` gives as frames, by their parameters."""
    spec = parse_grid({"notebook": TINY, **content})
    folders = []
    for k, parameters in enumerate(spec.runs):
        folder = tmp_path / f"run{k}"
        folder.mkdir()
        results(parameters).to_parquet(folder / "results.parquet")
        folders.append((k, folder))
    return spec, collect(spec, folders)


def test_parameters_and_results_of_one_name_stay_apart_and_lists_are_text(tmp_path):
    spec, table = _collected(
        tmp_path,
        lambda p: pd.DataFrame({"label": ["ours", "theirs"], "value": [p["x"], -p["x"]]}),
        grid={"x": [1, 2]}, cases={"first": {"label": "c"}, "second": {"label": "d"}},
    )  # fmt: skip
    assert list(table.columns) == ["run", "case", "x", "scale", "label_parameter", "seed", "label", "value"]
    assert table["label_parameter"].tolist() == ["c"] * 4 + ["d"] * 4
    assert table["value"].tolist() == [1.0, -1.0, 2.0, -2.0] * 2
    assert main_metric(spec, table) == "value"


def test_the_figure_shows_the_metric_against_what_varies(tmp_path):
    spec, table = _collected(
        tmp_path,
        lambda p: pd.DataFrame({"value": [p["x"] * p["scale"]]}),
        grid={"x": {"logspace": [0.01, 100, 5]}, "scale": [1, 2, 3]},
    )
    figure = draw(spec, table)
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("x", "value", "log")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["1", "2", "3"]
    assert ax.lines[2].get_ydata().tolist() == pytest.approx([0.03, 0.3, 3, 30, 300])
    figure.savefig(tmp_path / "lines.png")

    (tmp_path / "bars").mkdir()
    spec, table = _collected(
        tmp_path / "bars", lambda p: pd.DataFrame({"value": [len(p["label"])]}), grid={"label": ["a", "bb", "ccc"]}
    )
    (ax,) = draw(spec, table).axes
    assert [patch.get_height() for patch in ax.patches] == [1, 2, 3]

    (tmp_path / "curves").mkdir()
    budgets = pd.DataFrame({
        "method": ["best_of_n", "best_of_n", "ttsnap", "ttsnap"], "reward": "image_reward", "budget": [100, 200] * 2,
        "mean": [1.0, 2.0, 1.5, 2.5], "low": [0.9, 1.9, 1.4, 2.4], "high": [1.1, 2.1, 1.6, 2.6],
    })  # fmt: skip
    spec, table = _collected(tmp_path / "curves", lambda p: budgets)
    (ax,) = draw(spec, table).axes
    assert "budget per prompt" in ax.get_xlabel() and len(ax.lines) == 2
    bad = parse_grid({"notebook": TINY, "metric": "valeu"})
    with pytest.raises(ConfigError, match="metric"):
        draw(bad, table)


# -- local sweeps --------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("ttsnap_lib.workers.cores", lambda: 6)
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
