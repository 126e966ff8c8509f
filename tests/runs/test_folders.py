"""Run folders found by their hash, shown and removed."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from ttsnap_lib.__main__ import main
from ttsnap_lib.errors import RunError
from ttsnap_lib.files import lock, read_json, write_json
from ttsnap_lib.runs.folders import find_run, run_folders

TINY = str(ROOT / "tests" / "notebooks" / "tiny.ipynb")


def test_list_show_and_remove(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    assert main(["run", TINY, "-p", "x", "3"]) == 0
    shown = capsys.readouterr().out.splitlines()
    first = run_folders()[0]
    assert shown[-1] == str(first.folder)
    assert shown[shown.index("results") + 2].split() == ["9", "a"]  # the table, at the end
    assert first.changed() == {"x": 3.0} and first.status == "complete"
    copy = first.folder.with_name("f" * 16)  # a run that a killed process left
    copy.mkdir()
    manifest = read_json(first.folder / "manifest.json", "manifest", error=RunError, remedy="")
    write_json(copy / "manifest.json", {**manifest, "status": "running", "started": "2000", "run_hash": copy.name})

    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [first.name, "complete", first.manifest["started"][:16], "x=3.0"]
    assert lines[1].split()[:2] == [f"tiny/{'f' * 16}", "killed"] and lines[2].startswith("2 runs in")
    assert main(["runs", "show", first.folder.name[:6]]) == 0
    assert "x = 3.0  # changed" in capsys.readouterr().out
    assert main(["runs", "show", "tiny"]) == 1 and "names 2 runs" in capsys.readouterr().err
    assert main(["runs", "remove", "ffff", "zz"]) == 1 and copy.exists()
    assert main(["runs", "remove", "ffff", "ffff"]) == 0 and not copy.exists()
    assert [run.folder for run in run_folders()] == [first.folder]
    with lock(first.folder.parent / ".locks" / first.folder.name), pytest.raises(RunError, match="in use"):
        find_run(first.folder.name).remove()
    assert first.folder.exists()
