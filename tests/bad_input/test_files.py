"""Bad files, and files that are none."""

from __future__ import annotations

import pytest

from tests.bad_input.cases_files import CASES
from tests.bad_input.drill import check


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_file(case, tmp_path):
    check(case, tmp_path)
