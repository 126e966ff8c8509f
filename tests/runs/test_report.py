"""Reports: whole, escaped, and free of anything that loads or runs."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from ttsnap_lib.errors import RunError
from ttsnap_lib.runs.report import render

_HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class _Reader(HTMLParser):
    """Collects tags, addresses and visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.addresses, self.attributes, self.said = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.said += data


def _png() -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(stream, "PNG")
    return stream.getvalue()


def _run_folder(folder: Path) -> Path:
    """Write a run folder whose every text is hostile."""
    cells = [
        nbformat.v4.new_markdown_cell(f"# A title\n\nwith **bold** text {_HOSTILE}"),
        nbformat.v4.new_code_cell(
            f"print({_HOSTILE!r})",
            outputs=[
                nbformat.v4.new_output("stream", text=_HOSTILE),
                nbformat.v4.new_output(
                    "display_data",
                    {
                        "text/html": f"<style>b {{}}</style><table><tr><td>kept cell {_HOSTILE}</td></tr></table>",
                        "text/plain": "table",
                    },
                ),
                nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(_png()).decode()}),
                nbformat.v4.new_output("display_data", {"application/javascript": "alert(3)", "text/plain": "script"}),
            ],
        ),
    ]
    folder.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "executed.ipynb")
    manifest = {
        "notebook": "demo", "run_hash": "0123", "status": "complete", "parameters": {"label": _HOSTILE, "n": 3},
        "git": {"commit": "abc", "dirty": True}, "device": "cpu", "versions": {"numpy": "2"}, "seed": 4,
        "inputs": {_HOSTILE: "sha256:1"}, "error": None,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    pd.DataFrame({"value": range(600), _HOSTILE: _HOSTILE}).to_csv(folder / "results.csv", index=False)
    (folder / "curve.png").write_bytes(_png())
    return folder


def _check_safe(text: str) -> _Reader:
    reader = _Reader(text)
    assert "script" not in reader.tags and "iframe" not in reader.tags
    assert not [name for name in reader.attributes if name.startswith("on")]
    assert all(address.startswith(("data:image/", "#")) for address in reader.addresses)
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(", text)
    return reader


def test_a_run_is_one_file_that_loads_and_runs_nothing(tmp_path):
    folder = _run_folder(tmp_path / "run")
    path = render(folder)
    assert path == folder / "report.html"
    reader = _check_safe(path.read_text())
    assert reader.said.count(_HOSTILE) >= 4  # shown as text: parameter, table, input, source
    for text in ("demo - run 0123", "abc with local changes", "kept cell", "the first 500 of 600 rows", "A title"):
        assert text in reader.said
    assert sum(address.startswith("data:image/png") for address in reader.addresses) == 2
    assert "alert(3)" not in reader.said


def test_a_sweep_lists_its_failures_and_shows_its_table(tmp_path, capsys):
    runs = [{"status": "complete"}, {"status": "failed"}]
    failed = [{"label": "x=3", "cell": "code cell 2", "last_line": f"ValueError: {_HOSTILE}", "folder": "/f"}]
    stored = {"name": "budgets", "notebook": "demo", "runs": runs, "failed": failed, "git": {"commit": None}}
    (tmp_path / "sweep.json").write_text(json.dumps(stored))
    pd.DataFrame({"x": [1.5], "label": ["[2, 6]"]}).to_csv(tmp_path / "results.csv", index=False)
    (tmp_path / "summary.png").write_bytes(_png())

    import argparse

    from ttsnap_lib.commands.notebooks import add_run as add

    parser = argparse.ArgumentParser()
    add(parser.add_subparsers())
    arguments = parser.parse_args(["report", str(tmp_path), "-o", str(tmp_path / "out" / "my.html")])
    assert arguments.func(arguments) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "my.html")
    reader = _check_safe((tmp_path / "out" / "my.html").read_text())
    for text in ("demo - sweep budgets", "2 runs: 1 complete, 1 failed", f"ValueError: {_HOSTILE}", "1.5", "[2, 6]"):
        assert text in reader.said


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(RunError, match="nothing to report"):
        render(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"model": "a trajectory folder"}))
    with pytest.raises(RunError, match="nothing to report"):
        render(tmp_path)


def test_a_real_run_reads_well(tmp_path, monkeypatch):
    from ttsnap_lib.runs.run import run

    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    result = run(Path(__file__).parents[1] / "notebooks" / "figure.ipynb")
    reader = _check_safe(render(result.folder).read_text())
    for text in ("points", "budget", "Figure curve", "below", f"python{sys.version_info[0]}"[:6]):
        assert text in reader.said
    assert result.manifest["device"] == "cpu"
