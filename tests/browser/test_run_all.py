"""Every notebook as a stranger meets it: opened in a real JupyterLab and run by Run All, without an edit."""

from __future__ import annotations

import os
import time

import pytest

from tests.browser.lab import (
    ARTIFACTS,
    ROOT,
    browser,
    check_outputs,
    chromium,
    copy_notebook,
    keep_pages,
    run_all,
    serve,
    shut_down,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

NOTEBOOKS = ("start_here", "simulate", "explore", "search", "generate", "score", "finetune")
"""In the order in which a reader opens them; all share one fresh data cache, as a reader's would."""


def test_no_notebook_is_left_out():
    assert sorted(NOTEBOOKS) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    chromium()
    ARTIFACTS.mkdir(exist_ok=True)
    folder = tmp_path_factory.mktemp("notebooks")
    for name in NOTEBOOKS:
        copy_notebook(f"{name}.ipynb", folder)
    with serve("lab", folder) as site:
        yield site


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all(name, site):
    with browser() as page:
        page.goto(site.url(f"{name}.ipynb"))
        begin = time.monotonic()
        notebook = run_all(page, timeout_s=1800)
        taken = time.monotonic() - begin
        keep_pages(page, f"run-all-{name}")
        (ARTIFACTS / f"run-all-{name}.txt").write_text(
            f"Run All of {name}.ipynb: {taken:.0f} s, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
        )
        bars = page.locator(".jp-OutputArea-output .progress-bar")
        unfinished = [bar for bar in bars.all() if "bg-danger" in (bar.get_attribute("class") or "")]
        shut_down(page)
        check_outputs(notebook)
        assert unfinished == []
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert all(cell["execution_count"] for cell in code), "a cell did not run"
        outputs = [output for cell in code for output in cell["outputs"]]
        # Warnings and logs are no output that a reader asked for, and a bare repr is none that a reader can use.
        assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
        assert [output["data"] for output in outputs if set(output.get("data", ())) == {"text/plain"}] == []
        assert page.problems == []
