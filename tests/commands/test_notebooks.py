"""``ttsnap run``, ``sweep`` and ``report``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from ttsnap_lib.__main__ import main

TINY = str(ROOT / "tests" / "notebooks" / "tiny.ipynb")
LOGS = str(ROOT / "tests" / "notebooks" / "logs.ipynb")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path / "cache"))


def test_run_takes_a_file_and_single_values(tmp_path, capsys):
    (tmp_path / "params.yaml").write_text("x: 1e1\nlabel: b\n")
    words = ["run", TINY, "-f", str(tmp_path / "params.yaml"), "-p", "label", "7", "-p", "scale", "2"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "tiny: 100%" in shown.err and "saved " in shown.out
    folder = Path(shown.out.strip().splitlines()[-1])
    assert (folder / "results.csv").read_text() == "value,label\n200.0,7\n"
    assert main([*words, "-q"]) == 0
    assert capsys.readouterr() == (f"{folder}\n", "")
    assert main(words) == 0 and "finished before" in capsys.readouterr().err
    assert main(["run", TINY, "--list"]) == 0
    assert "x: float = 2.0  # the number to square" in capsys.readouterr().out
    assert main(["run", TINY, "-p", "scael", "2"]) == 1
    assert "Did you mean 'scale'" in capsys.readouterr().err
    (tmp_path / "params.yaml").write_text("- x\n")
    assert main(["run", TINY, "-f", str(tmp_path / "params.yaml")]) == 1
    assert "mapping of parameters" in capsys.readouterr().err


def test_a_tensor_is_priced_as_its_own_model(capsys):
    few = {"multiples": "[2, 3]", "iterations": "5", "trials": "0"}
    words = [word for name, value in {"tensor": "pocket-sdxl", **few}.items() for word in ("-p", name, value)]
    assert main(["run", "simulate", *words]) == 0
    said = capsys.readouterr().out
    assert "GFLOPs (pocket-sdxl+pocket-clip)" in said and said.count("--cost pocket-sdxl+pocket-clip ") == 2


def test_sweep_tells_by_its_exit_status_and_report_shows_it(tmp_path, capsys):
    log = tmp_path / "log"
    (tmp_path / "logs.yaml").write_text(
        f"{{notebook: {LOGS}, parameters: {{output: {log}, fail_at: 2}}, grid: {{x: [1, 2]}}}}"
    )
    grid = str(tmp_path / "logs.yaml")
    assert main(["sweep", grid, "-j", "2"]) == 1
    out, err = capsys.readouterr()
    assert "failed: x=2 at code cell" in err and "ValueError: asked to fail" in err and "1/2 done" in err
    folder = Path(out.strip())
    assert folder.name == "logs"
    assert main(["sweep", grid, "--dry-run"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["finished", "to"]
    assert main(["report", str(folder)]) == 0
    assert "asked to fail" in Path(capsys.readouterr().out.strip()).read_text()
