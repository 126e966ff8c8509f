"""The documentation site builds, and a warning is an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("mkdocs")


def test_site_builds_without_a_warning(tmp_path):
    told = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]
    made = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("index.html")}
    assert {"index.html", "commands/index.html", "numbers/index.html", "api/simulation/index.html"} <= made
    page = (tmp_path / "site" / "api" / "simulation" / "index.html").read_text("utf-8")
    assert "best_of_n" in page and "Returns" in page
