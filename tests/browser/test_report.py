"""The report of every shipped notebook, opened in a browser."""

from __future__ import annotations

import re

import pytest

from tests.browser.lab import ARTIFACTS, browser, chromium
from tests.browser.test_run_all import NOTEBOOKS
from ttsnap_lib.runs.report import render
from ttsnap_lib.runs.run import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    chromium()
    ARTIFACTS.mkdir(exist_ok=True)
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_report_shows_no_markup_and_no_object(name, cache, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(cache))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures are shown, as they are to users
    path = render(run(name).folder)
    with browser(width=1280) as page:
        page.goto(path.as_uri())
        page.screenshot(path=ARTIFACTS / f"report-{name}.png", full_page=True)
        said = page.inner_text("body")
        assert not re.findall(r"</?\w+[^>]*>|<\w+\.\w+|Out\[", said)  # tags, and reprs such as <xarray.Dataset>
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.problems == []
