"""Run folders, strict parameters and provenance, on real notebooks in real kernels."""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.drill import alive, wait_for
from ttsnap_lib.errors import ConfigError, RunError
from ttsnap_lib.files import parse_yaml
from ttsnap_lib.runs.parameters import (
    cell_source,
    declared_parameters,
    from_text,
    injected_source,
    read_notebook,
    resolve,
)
from ttsnap_lib.runs.run import current_run, plan, run

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TINY, TYPES, FAILS = (NOTEBOOKS / f"{name}.ipynb" for name in ("tiny", "types", "fails"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def hide_text(content: str) -> dict:
    """Return a notebook whose parameters cell is `content`."""
    return {"nbformat": 4, "cells": [{"cell_type": "code", "source": content, "metadata": {"tags": ["parameters"]}}]}


# -- parameters ----------------------------------------------------------------------------------------------------


def test_declared_parameters_are_read_with_type_default_and_comment():
    declared = declared_parameters(read_notebook(TYPES))
    assert list(declared) == [
        "count", "ratio", "name", "flag", "steps", "pair", "extra", "limit", "mode", "loose",
    ]  # fmt: skip
    assert declared["steps"].annotation == "list[int]"
    assert declared["steps"].default == [2, 6]
    assert declared["steps"].help == "a list of whole numbers"
    hard = 'url: str = "a#b = c"  # has # and =\nlong: list[int] = [\n    1,  # one\n    2,\n]  # two lines\n'
    declared = declared_parameters(hide_text(hard))
    assert declared["url"].default == "a#b = c"
    assert declared["url"].help == "has # and ="
    assert declared["long"].default == [1, 2]


@pytest.mark.parametrize(
    "cell", ["import os", "a = 2 * 3", "a = b = 1", "a, b = 1, 2", "a: int", "def f(): pass", "a = (", "a = print(1)"]
)
def test_a_parameters_cell_of_anything_but_literals_is_refused(cell):
    with pytest.raises(ConfigError, match="line 1 of the cell tagged parameters"):
        declared_parameters(hide_text(cell))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"coutn": 3}, "Did you mean 'count'"),
        ({7: 3}, "unknown key"),
        ({"count": 3.5}, "got 3.5, expected int"),
        ({"count": True}, "expected int"),
        ({"count": "3"}, "got '3', expected int"),
        ({"ratio": "0.5"}, "expected float"),
        ({"ratio": float("nan")}, "finite"),
        ({"ratio": float("inf")}, "finite"),
        ({"name": 5}, "expected str"),
        ({"name": None}, "expected str"),
        ({"name": "half \ud800"}, "literal"),
        ({"flag": 1}, "expected bool"),
        ({"steps": 2}, "expected list"),
        ({"steps": [1, "b"]}, "item 1 is 'b'"),
        ({"steps": "12"}, "expected list"),
        ({"pair": [1]}, "2 values"),
        ({"extra": {"a": "x"}}, "'a' is 'x'"),
        ({"extra": {1: 1.0}}, "text as key"),
        ({"limit": "none"}, "float | None"),
        ({"loose": "x"}, "expected int"),
        ({"loose": object()}, "literal"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_runs(given, said, cache):
    with pytest.raises(ConfigError) as caught:
        run(TYPES, given)
    assert said in str(caught.value)
    assert not cache.exists()


def test_values_are_brought_to_the_declared_type_so_that_equal_runs_have_equal_hashes():
    declared = declared_parameters(read_notebook(TYPES))
    given = {"count": 4.0, "ratio": 1, "pair": [1, 2], "limit": 3}
    resolved = resolve(declared, given)
    assert resolved["count"] == 4 and type(resolved["count"]) is int
    assert type(resolved["ratio"]) is float
    assert resolved["pair"] == (1, 2.0) and type(resolved["pair"][1]) is float
    assert plan(TYPES, given).folder == plan(TYPES, {"count": 4, "ratio": 1.0, "pair": (1, 2.0), "limit": 3.0}).folder
    assert plan(TYPES, given).folder != plan(TYPES, {}).folder
    assert plan(TYPES, {"ratio": 0.5}).folder == plan(TYPES, {}).folder  # a default that is given stays the default


HOSTILE = [
    '"""\nimport os; os._exit(3)\n"""',
    "'; raise SystemExit(3) #",
    "\\'; raise SystemExit(3) #",
    "line\nraise SystemExit(3)\r\nraise SystemExit(3)",
    "!touch hacked",
    "%%bash\ntouch hacked",
    "%run hacked.py",
    "a?\nb??",
    "{x} {0} {__import__('os')} ${HOME} $(touch hacked)",
    "\u2028raise SystemExit(3)\u2029\x0craise SystemExit(3)\x1craise SystemExit(3)",
    "# coding: latin-1\x00 \x07 \x1b[31m \ufeff \U0001f600 é ß \u202e",
    "a\\",
    "\\N{BULLET} \\x41 %s %(x)s",
    "</script><script>alert(1)</script>",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_text_stays_one_literal(value):
    tree = ast.parse(injected_source({"name": value, "after": 1}))
    assert [type(node) for node in tree.body] == [ast.Assign, ast.Assign]
    assert ast.literal_eval(tree.body[0].value) == value


def test_hostile_texts_arrive_unchanged_in_the_kernel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"extra": {text: float(k) for k, text in enumerate(HOSTILE)}, "name": "".join(HOSTILE), "mode": HOSTILE[0]}
    result = run(TYPES, given)
    seen = json.loads((result.folder / "seen.json").read_text())
    assert seen == [3, 0.5, given["name"], False, [2, 6], [1, 0.5], given["extra"], None, HOSTILE[0], 7]
    assert not (tmp_path / "hacked").exists()
    assert result.manifest["parameters"]["name"] == given["name"]


def test_values_of_the_command_line_follow_the_declared_type():
    declared = declared_parameters(read_notebook(TYPES))
    assert from_text("5", declared["name"]) == "5"
    assert from_text("5", declared["count"]) == 5
    assert from_text("1e-3", declared["ratio"]) == 0.001
    assert from_text("[2, 6, 11]", declared["steps"]) == [2, 6, 11]
    assert from_text("null", declared["limit"]) is None
    assert from_text("true", declared["flag"]) is True
    assert from_text("{a: 1}", declared["extra"]) == {"a": 1}
    assert from_text("__import__('os')", declared["count"]) == "__import__('os')"


def test_yaml_is_read_strictly():
    assert parse_yaml("a: 1e-3\nb: [1, 2e5]", "text", remedy="x") == {"a": 0.001, "b": [1, 200000.0]}
    for bad in ("a: 1\na: 2", "a: [", "a: !!python/object/apply:os.system [ls]", "? [1, 2]\n: 3"):
        with pytest.raises(ConfigError, match="text"):
            parse_yaml(bad, "text", remedy="x")
    with pytest.raises(ConfigError, match="inside itself"):
        parse_yaml("steps: &a [*a]", "text", remedy="x")


# -- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_results_and_tells_where_they_come_from(tmp_path, cache):
    data = tmp_path / "data.txt"
    data.write_text("first")
    lines = []
    result = run(TINY, {"x": 3, "label": str(data), "seed": 5}, progress=lines.append)
    assert result.folder.parent == cache / "runs" / "tiny"
    assert result.table()["value"].tolist() == [9.0]
    assert (result.folder / "results.csv").read_text() == f"value,label\n9.0,{data}\n"
    assert lines == [f"cell {k}/4" for k in (1, 2, 3, 4)]
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
    assert any("injected-parameters" in cell["metadata"].get("tags", ()) for cell in executed["cells"])

    before = (result.folder / "executed.ipynb").stat().st_mtime_ns
    again = run(TINY, {"x": 3, "label": str(data), "seed": 5})
    assert again.reused and (result.folder / "executed.ipynb").stat().st_mtime_ns == before
    data.write_text("second")  # the same parameters, but another input: another run
    assert not run(TINY, {"x": 3, "label": str(data), "seed": 5}).reused
    assert not run(TINY, {"x": 3, "label": str(data), "seed": 5}, force=True).reused


def test_changed_code_runs_again_and_changed_prose_does_not(tmp_path):
    content = read_notebook(TINY)
    mine = tmp_path / "mine.ipynb"
    mine.write_text(json.dumps(content))
    first = run(mine)
    content["cells"][0]["source"] = "another text"
    mine.write_text(json.dumps(content))
    assert run(mine).reused
    content["cells"][3]["source"] = cell_source(content["cells"][3]).replace("scale * x**2", "scale * x**3")
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


def test_a_kernel_that_dies_and_a_cell_that_takes_too_long_are_failures(tmp_path):
    content = read_notebook(TINY)
    content["cells"][3]["source"] = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    (tmp_path / "dies.ipynb").write_text(json.dumps(content))
    with pytest.raises(RunError, match="kernel died"):
        run(tmp_path / "dies.ipynb")
    content["cells"][3]["source"] = "import time\ntime.sleep(60)"
    (tmp_path / "slow.ipynb").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"longer than 1 s"):
        run(tmp_path / "slow.ipynb", timeout_s=1)


def test_the_kernel_is_of_this_interpreter_whatever_kernelspec_is_installed(tmp_path, monkeypatch):
    spec = tmp_path / "share" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "wrong", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    content = read_notebook(TINY)
    content["cells"][3]["source"] = (
        "import os, sys\nimport pandas as pd\n"
        "here.save_table(pd.DataFrame({'exe': [sys.executable], 'threads': [os.environ.get('OMP_NUM_THREADS')]}))"
    )
    content["metadata"] = {}  # no kernelspec at all
    (tmp_path / "{odd} name.ipynb").write_text(json.dumps(content))
    table = run(tmp_path / "{odd} name.ipynb", environment={"OMP_NUM_THREADS": "1"}).table()
    assert table.iloc[0].tolist() == [sys.executable, "1"]


def test_two_processes_at_one_run_do_it_once(tmp_path):
    code = (
        "import sys; from ttsnap_lib.runs.run import run; r = run(sys.argv[1], {'x': 1.25}); print(r.reused, r.folder)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(TINY)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    answers = sorted(process.communicate(timeout=120)[0].split()[0] for process in started)
    assert answers == ["False", "True"]


def test_a_killed_run_is_run_again_and_leaves_no_kernel(tmp_path):
    content = read_notebook(TINY)
    content["cells"][3]["source"] = (
        "import os, pathlib, time\nmark = pathlib.Path(label)\n"
        "first = not mark.exists()\nmark.write_text(str(os.getpid()))\ntime.sleep(60 if first else 0)\n"
        "import pandas as pd\nhere.save_table(pd.DataFrame({'x': [x]}))"
    )
    (tmp_path / "long.ipynb").write_text(json.dumps(content))
    mark = tmp_path / "mark"
    code = "import sys; from ttsnap_lib.runs.run import run; run(sys.argv[1], {'label': sys.argv[2]})"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "long.ipynb"), str(mark)])
    wait_for(lambda: mark.exists() and mark.read_text())
    kernel = int(mark.read_text())
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    result = run(tmp_path / "long.ipynb", {"label": str(mark), "x": 2.0})
    assert not result.reused and result.table()["x"].tolist() == [2.0]
    wait_for(lambda: not alive(kernel))


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
    for bad in ("../up", "", ".hidden", "a/b", None):
        with pytest.raises(ConfigError, match="name of a result"):
            here.save_table(pd.DataFrame(), bad)


def test_a_remnant_of_a_killed_run_cannot_write_into_the_new_one(tmp_path, monkeypatch):
    import pandas as pd

    (tmp_path / "manifest.json").write_text(json.dumps({"token": "new"}))
    monkeypatch.setenv("TTSNAP_RUN_FOLDER", str(tmp_path))
    monkeypatch.setenv("TTSNAP_RUN_TOKEN", "old")
    with pytest.raises(RunError, match="newer run"):
        current_run().save_table(pd.DataFrame({"a": [1]}))
    monkeypatch.setenv("TTSNAP_RUN_TOKEN", "new")
    assert current_run().save_table(pd.DataFrame({"a": [1]})).exists()


def test_a_notebook_that_is_none_is_refused(tmp_path):
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


@pytest.mark.parametrize(("name", "given"), [
    ("tiny", "x: 3.0\nlabel: from a file\n"),
    ("types", "count: 5\nsteps: [1, 2]\nlimit: 0.5\n"),
    ("figure", "points: 4\n"),
    ("fails", "fail: false\n"),
])  # fmt: skip
def test_papermill_itself_runs_each_notebook(name, given, tmp_path, cache):
    from click.testing import CliRunner
    from papermill.cli import papermill

    (tmp_path / "params.yaml").write_text(given)
    words = [NOTEBOOKS / f"{name}.ipynb", tmp_path / "out.ipynb", "-f", tmp_path / "params.yaml"]
    done = CliRunner().invoke(papermill, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out.ipynb").exists()
    if name == "tiny":
        saved = cache / "runs" / "tiny" / "interactive" / "results.csv"
        assert saved.read_text() == "value,label\n9.0,from a file\n"


def test_papermill_as_a_command_reports_a_failed_cell(tmp_path):
    (tmp_path / "params.yaml").write_text("message: told\n")
    done = subprocess.run(
        [sys.executable, "-m", "papermill", FAILS, tmp_path / "out.ipynb", "-f", tmp_path / "params.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "told" in done.stderr


def _command(*words: object) -> int:
    import argparse

    from ttsnap_lib.commands.notebooks import add_run as add

    parser = argparse.ArgumentParser()
    add(parser.add_subparsers())
    arguments = parser.parse_args([str(word) for word in words])
    return arguments.func(arguments)


def test_the_command_takes_a_file_and_single_values(tmp_path, capsys):
    (tmp_path / "params.yaml").write_text("x: 1e1\nlabel: b\n")
    assert _command("run", TINY, "-f", tmp_path / "params.yaml", "-p", "label", "7", "-p", "scale", "2") == 0
    shown = capsys.readouterr()
    assert "tiny: cell 4/4" in shown.err and "saved " in shown.out
    folder = Path(shown.out.strip().splitlines()[-1])
    assert (folder / "results.csv").read_text() == "value,label\n200.0,7\n"
    assert _command("run", TINY, "--list") == 0
    assert "x: float = 2.0  # the number to square" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="Did you mean 'scale'"):
        _command("run", TINY, "-p", "scael", "2")
    (tmp_path / "params.yaml").write_text("- x\n")
    with pytest.raises(ConfigError, match="mapping of parameters"):
        _command("run", TINY, "-f", tmp_path / "params.yaml")
