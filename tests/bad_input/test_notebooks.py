"""Bad notebooks, parameters and sweeps."""

from __future__ import annotations

import pytest

from tests.bad_input.cases_notebooks import CASES
from tests.bad_input.drill import check


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_notebook(case, tmp_path):
    check(case, tmp_path)
