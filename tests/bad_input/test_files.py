"""Bad files, and files that are none."""

from __future__ import annotations

import pytest

from tests.bad_input import cases_files, cases_pictures, cases_tensors
from tests.bad_input.drill import check


@pytest.mark.parametrize(
    "case", [*cases_files.CASES, *cases_pictures.CASES, *cases_tensors.CASES], ids=lambda case: case.id
)
def test_bad_file(case, tmp_path):
    check(case, tmp_path)
