"""Bad words on the command line."""

from __future__ import annotations

import pytest

from tests.bad_input.cases_commands import CASES
from tests.bad_input.drill import check


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_command(case, tmp_path):
    check(case, tmp_path)
