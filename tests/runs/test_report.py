"""Reports: whole, escaped, and free of anything that loads or runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from tests.conftest import ROOT
from ttsnap_lib.errors import RunError
from ttsnap_lib.runs.report import render
from ttsnap_lib.runs.run import run, write_figure, write_table

_HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class _Reader(HTMLParser):
    """Collects tags, addresses and visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.addresses, self.said = [], [], ""
        self.feed(text)
        assert "script" not in self.tags and "iframe" not in self.tags
        assert all(address.startswith(("data:image/", "#")) for address in self.addresses)
        assert "default-src 'none'" in text

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.said += data


def test_a_run_is_one_file_with_its_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures are shown, as they are to users
    result = run(ROOT / "tests" / "notebooks" / "figure.ipynb")
    path = render(result.folder)
    assert path == result.folder / "report.html"
    reader = _Reader(path.read_text())
    for text in (f"figure - run {result.folder.name}: complete", "points", "The text below the figure", "pandas"):
        assert text in reader.said
    assert not re.search(r"</?\w+[^>]*>|Out\[", reader.said)
    assert "savefig" not in reader.said and "here.record" not in reader.said  # code is left out
    assert sum(address.startswith("data:image/png") for address in reader.addresses) == 1


def test_a_sweep_lists_its_failures_and_shows_its_table(tmp_path):
    from matplotlib.figure import Figure

    runs = [{"status": "complete"}, {"status": "failed"}]
    failed = [{"label": "x=3", "cell": "code cell 2", "last_line": f"ValueError: {_HOSTILE}", "folder": "/f"}]
    stored = {"name": "budgets", "notebook": _HOSTILE, "runs": runs, "failed": failed, "git": {"commit": "abc"}}
    (tmp_path / "sweep.json").write_text(json.dumps(stored))
    write_table(pd.DataFrame({"x": [1.5] * 600, "label": ["[2, 6]"] * 600}), tmp_path / "results.csv")
    write_figure(Figure(figsize=(2, 2)), tmp_path / "summary.png")
    path = render(tmp_path, tmp_path / "out" / "my.html")
    assert path == tmp_path / "out" / "my.html"
    reader = _Reader(path.read_text())
    for text in (f"{_HOSTILE} - sweep budgets: 1 of 2 runs", f"ValueError: {_HOSTILE}", "1.5", "[2, 6]", "500 of 600",
                 "abc"):  # fmt: skip
        assert text in reader.said
    assert "img" in reader.tags


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(RunError, match="nothing to report"):
        render(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"model": "a trajectory folder"}))
    with pytest.raises(RunError, match="nothing to report"):
        render(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps({"notebook": "x", "runs": 5}))
    with pytest.raises(RunError, match="broken"):
        render(tmp_path)
