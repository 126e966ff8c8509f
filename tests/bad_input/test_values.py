"""Bad values handed to Python functions."""

from __future__ import annotations

import pytest

from tests.bad_input.cases_values import CASES
from tests.bad_input.drill import check


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_value(case, tmp_path):
    check(case, tmp_path)
