"""Run folders and where results come from, on real notebooks in real kernels."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import nbformat
import pytest

from tests.conftest import ROOT
from tests.faults.drill import alive, wait_for
from ttsnap_lib.errors import ConfigError, RunError
from ttsnap_lib.runs.parameters import read_notebook
from ttsnap_lib.runs.run import current_run, plan, run

NOTEBOOKS = ROOT / "tests" / "notebooks"
TINY, TYPES, FAILS = (NOTEBOOKS / f"{name}.ipynb" for name in ("tiny", "types", "fails"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny_with(path, source: str):
    """Write the tiny notebook with another last cell to `path`, and return `path`."""
    content = read_notebook(TINY)
    content["cells"][3]["source"] = source
    content["metadata"] = {}  # no kernelspec at all
    path.write_text(json.dumps(content))
    return path


def test_a_run_keeps_its_results_and_tells_where_they_come_from(tmp_path, cache, capsys):
    data = tmp_path / "data.txt"
    data.write_text("first")
    given = {"x": 3, "label": str(data), "seed": 5}
    result = run(TINY, given, progress=True, echo=True)
    assert result.folder.parent == cache / "runs" / "tiny"
    assert result.table()["value"].tolist() == [9.0]
    with pytest.raises(RunError, match="results"):
        result.table("another")
    assert (result.folder / "results.csv").read_text() == f"value,label\n9.0,{data}\n"
    shown = capsys.readouterr()
    assert "tiny: 100%" in shown.err and "saved " in shown.out
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["parameters"] == {"x": 3.0, "scale": 1, "label": str(data), "seed": 5}
    assert manifest["status"] == "complete"
    assert manifest["seed"] == 5
    assert manifest["inputs"][str(data)].startswith("sha256:")
    assert {"python", "numpy", "papermill"} <= set(manifest["versions"])
    assert set(manifest["git"]) == {"commit", "dirty"}
    assert manifest["elapsed_s"] > 0 and manifest["started"] <= manifest["ended"]
    assert manifest["outputs"] == ["executed.ipynb", "results.csv", "results.parquet"]
    executed = read_notebook(result.folder / "executed.ipynb")
    assert any("injected-parameters" in cell["metadata"]["tags"] for cell in executed["cells"])

    before = (result.folder / "executed.ipynb").stat().st_mtime_ns
    again = run(TINY, given)
    assert again.reused and (result.folder / "executed.ipynb").stat().st_mtime_ns == before
    data.write_text("second")  # the same parameters, but another input: another run
    assert not run(TINY, given).reused
    assert not run(TINY, given, force=True).reused


def test_what_is_wrong_is_refused_before_anything_runs(tmp_path, cache):
    with pytest.raises(ConfigError, match="Did you mean 'count'"):
        run(TYPES, {"coutn": 3})
    for name, text in {"empty": "", "json": "[]", "old": '{"nbformat": 3, "cells": []}'}.items():
        path = tmp_path / f"{name}.ipynb"
        path.write_text(text)
        with pytest.raises(ConfigError, match="notebook"):
            run(path)
    with pytest.raises(ConfigError, match="notebook"):
        run("no_such_notebook")
    (tmp_path / "bare.ipynb").write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "cells": [], "metadata": {}}))
    with pytest.raises(ConfigError, match="no cell tagged parameters"):
        run(tmp_path / "bare.ipynb", {"x": 1})
    assert not cache.exists()


def test_odd_texts_arrive_unchanged_in_the_kernel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = [
        '"""\nimport os; os._exit(3)\n"""',
        "'; raise SystemExit(3) #",
        "\\'; raise SystemExit(3) #",
        "line\r\n!touch hacked\n%%bash\n%run hacked.py\na?",
        "{x} {0} {__import__('os')} ${HOME} $(touch hacked)",
        "\u2028raise SystemExit(3)\u2029\x0c\x1c # coding: latin-1\x00 \x07 \x1b[31m \ufeff \U0001f600 é ß \u202e",
        "\\N{BULLET} \\x41 %s %(x)s a\\",
    ]
    given = {"extra": {text: float(k) for k, text in enumerate(odd)}, "name": "".join(odd), "mode": odd[0]}
    result = run(TYPES, given)
    seen = json.loads((result.folder / "seen.json").read_text())
    assert seen == [3, 0.5, given["name"], False, [2, 6], [1, 0.5], given["extra"], None, odd[0], 7]
    assert not (tmp_path / "hacked").exists()
    assert result.manifest["parameters"]["name"] == given["name"]


def test_changed_code_runs_again_and_changed_prose_does_not(tmp_path):
    content = read_notebook(TINY)
    mine = tmp_path / "mine.ipynb"
    mine.write_text(json.dumps(content))
    first = run(mine)
    content["cells"][0]["source"] = "another text"
    mine.write_text(json.dumps(content))
    assert run(mine).reused
    content["cells"][3]["source"] = content["cells"][3]["source"].replace("scale * x**2", "scale * x**3")
    mine.write_text(json.dumps(content))
    second = run(mine)
    assert not second.reused and second.folder == first.folder
    assert second.table()["value"].tolist() == [8.0]


def test_a_failed_cell_keeps_its_notebook_and_names_notebook_cell_and_last_line():
    with pytest.raises(RunError) as caught:
        run(FAILS, {"message": "the last line"})
    said = str(caught.value)
    assert "fails.ipynb" in said and "code cell 4 (assert not fail" in said and "the last line" in said
    folder = caught.value.folder
    assert str(folder / "executed.ipynb") in said
    assert "before the failure" in (folder / "executed.ipynb").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert manifest["error"]["last_line"] == "AssertionError: the last line"
    with pytest.raises(RunError):  # a failed run is not a finished one
        run(FAILS, {"message": "the last line"})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "code cell 4 .import os.*kernel died .out of mem"),
        ("import time\ntime.sleep(60)", "code cell 4 .import time.*longer than 4 s"),
    ],
)
def test_a_kernel_that_dies_and_a_cell_that_takes_too_long_are_failures(source, said, tmp_path):
    with pytest.raises(RunError, match=said) as caught:
        run(tiny_with(tmp_path / "mine.ipynb", source), timeout_s=4)
    assert json.loads((caught.value.folder / "manifest.json").read_text())["status"] == "failed"


def test_a_kernel_that_cannot_start_says_why(tmp_path, monkeypatch, capfd):
    (tmp_path / ".ipython").symlink_to(tmp_path / "nowhere")  # a home in which IPython cannot make its folder
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("IPYTHONDIR", raising=False)
    with pytest.raises(
        RunError, match=r"start of the kernel failed: the kernel died \(.*Error: .*ipython.*\)\. See"
    ) as caught:
        run(TINY)
    assert str(caught.value).count("\n") == 0 and "Traceback" not in capfd.readouterr().err
    assert json.loads((caught.value.folder / "manifest.json").read_text())["error"]["cell"] == "the start of the kernel"


def test_the_kernel_is_of_this_interpreter_whatever_kernelspec_is_installed(tmp_path, monkeypatch):
    spec = tmp_path / "share" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "wrong", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    source = "import sys\nimport pandas as pd\nhere.save_table(pd.DataFrame({'exe': [sys.executable]}))"
    mine = tiny_with(tmp_path / "{odd} $HOME name.ipynb", source)
    assert run(mine).table()["exe"].tolist() == [sys.executable]


def test_two_processes_at_one_run_do_it_once(tmp_path):
    code = "import sys; from ttsnap_lib.runs.run import run; print(run(sys.argv[1], {'x': 1.25}).reused)"
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(TINY)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    answers = sorted(process.communicate(timeout=120)[0].split()[0] for process in started)
    assert answers == ["False", "True"]


def test_a_killed_run_is_run_again_and_leaves_no_kernel(tmp_path):
    long = tiny_with(
        tmp_path / "long.ipynb",
        "import os, pathlib, time\nmark = pathlib.Path(label)\n"
        "first = not mark.exists()\nmark.write_text(str(os.getpid()))\ntime.sleep(60 if first else 0)\n"
        "import pandas as pd\nhere.save_table(pd.DataFrame({'x': [x]}))",
    )
    mark = tmp_path / "mark"
    code = "import sys; from ttsnap_lib.runs.run import run; run(sys.argv[1], {'label': sys.argv[2]})"
    process = subprocess.Popen([sys.executable, "-c", code, str(long), str(mark)])
    wait_for(lambda: mark.exists() and mark.read_text())
    kernel = int(mark.read_text())
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    result = run(long, {"label": str(mark), "x": 2.0})
    assert not result.reused and result.table()["x"].tolist() == [2.0]
    wait_for(lambda: not alive(kernel))
    assert plan(long, {"label": str(mark), "x": 2}).folder == result.folder


def test_current_run_serves_plain_jupyter_as_well(cache, monkeypatch, capsys):
    import matplotlib.figure
    import pandas as pd

    monkeypatch.delenv("TTSNAP_RUN_FOLDER", raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", "/somewhere/notebooks/simulate.ipynb")
    here = current_run()
    assert here.folder == cache / "runs" / "simulate" / "interactive" and not here.headless
    table = here.save_table(pd.DataFrame({"a": [1.5]}), "mine")
    assert table.read_text() == "a\n1.5\n" and pd.read_parquet(table.with_suffix(".parquet"))["a"].tolist() == [1.5]
    figure = matplotlib.figure.Figure(figsize=(2, 2))
    picture = here.save_figure(figure.add_subplot(), "mine")  # an Axes
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.with_suffix(".pdf").read_bytes()[:4] == b"%PDF"
    assert f"saved {picture}" in capsys.readouterr().out
    first = picture.with_suffix(".pdf").read_bytes()
    here.save_figure(figure, "mine")
    assert picture.with_suffix(".pdf").read_bytes() == first
    with pytest.raises(ConfigError, match="name of a result"):
        here.save_table(pd.DataFrame(), "../up")


def test_a_remnant_of_a_killed_run_cannot_write_into_the_new_one(tmp_path, monkeypatch):
    import pandas as pd

    (tmp_path / "manifest.json").write_text(json.dumps({"token": "new"}))
    monkeypatch.setenv("TTSNAP_RUN_FOLDER", str(tmp_path))
    monkeypatch.setenv("TTSNAP_RUN_TOKEN", "old")
    with pytest.raises(RunError, match="newer run"):
        current_run().save_table(pd.DataFrame({"a": [1]}))
    monkeypatch.setenv("TTSNAP_RUN_TOKEN", "new")
    assert current_run().save_table(pd.DataFrame({"a": [1]})).exists()


# Papermill's own command, as its users run notebooks: small parameters, and a file of the results that they lead to.

GIVEN = {
    "start_here": (
        {
            "prompts": "pocket:train:6", "images": 8, "held_out": 3, "epochs": 1, "multiples": [1.5, 2], "multiple": 2,
        },
        "results.csv",
    ),
    "simulate": (
        {"multiples": [2, 4], "iterations": 20, "trials": 50, "keep": 2, "diversities": [0]}, "relative_gains.csv",
    ),
    "explore": ({"steps": [3, 8], "keep_ratios": [0.3, 0.5], "iterations": 20}, "results.csv"),
    "generate": ({"prompts": "pocket:evaluation:1", "images": 4, "compare_diversity": False}, "contact_sheet.png"),
    "score": ({"rewards": ["pocket-clip"], "prompt": 1}, "rank_correlation.csv"),
    "finetune": (
        {
            "trajectories": "pocket-flux:train:8x8", "validation": "pocket-flux:selection:4x8", "steps": [5],
            "settings": {"epochs_per_step": 1, "warmup_updates": 1},
        },
        "comparison.csv",
    ),
    "search": (
        {
            "prompts": "pocket:evaluation:1", "multiple": 3, "batch_size": 4, "steps": [5], "keep_ratios": [0.6],
            "keep": 2, "diversity": 0.5,
        },
        "compared.csv",
    ),
}  # fmt: skip


def as_words(given: dict) -> dict:
    """Return the parameters as papermill's command line takes them: lists and mappings as text."""
    return {name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in given.items()}


def papermill(path, given: dict, folder) -> subprocess.CompletedProcess:
    """Run papermill's command with ``-p``, in `folder`."""
    words = [word for name, value in as_words(given).items() for word in ("-p", name, str(value))]
    environment = {key: value for key, value in os.environ.items() if key not in ("MPLBACKEND", "TTSNAP_RUN_FOLDER")}
    return subprocess.run(
        [sys.executable, "-m", "papermill", path, "out.ipynb", *words],
        cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_papermill_runs_a_notebook_and_reports_a_failed_cell(tmp_path, cache):
    done = papermill(TINY, {"x": 3.0, "label": "from a file"}, tmp_path)
    assert done.returncode == 0, done.stderr
    saved = cache / "runs" / "tiny" / "interactive" / "results.csv"
    assert saved.read_text() == "value,label\n9.0,from a file\n"
    done = papermill(FAILS, {"message": "told"}, tmp_path)
    assert done.returncode == 1 and "told" in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": "[2, "}, "parameter steps of simulate: got '[2, ', expected list"),
        ({"multiples": "[2, many]"}, "multiples: got 'many', expected a finite number"),
    ],
)
def test_a_parameter_of_the_wrong_type_ends_in_one_sentence(given, said, tmp_path):
    done = papermill(ROOT / "notebooks" / "simulate.ipynb", given, tmp_path)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(f"ConfigError: {said}")


def test_no_notebook_is_left_out():
    assert sorted(GIVEN) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", GIVEN)
def test_papermill_runs_every_shipped_notebook(name, tmp_path, cache):
    parameters, wanted = GIVEN[name]
    done = papermill(ROOT / "notebooks" / f"{name}.ipynb", parameters, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert executed.metadata["papermill"]["parameters"] == as_words(parameters)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code" and cell.source)
    assert (cache / "runs" / name / "interactive" / wanted).stat().st_size
