"""Bad pictures, weights, checkpoints and pipelines."""

from __future__ import annotations

import pytest
import torch

from tests.bad_input import cases_checkpoints, cases_models, cases_pipelines
from tests.bad_input.drill import check


@pytest.fixture(scope="module", autouse=True)
def _ready():
    """Libraries load before the memory of a case is measured; one thread, since processes share few cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cases_models.reward()
    yield
    torch.set_num_threads(before)


CASES = [*cases_models.CASES, *cases_checkpoints.CASES, *cases_pipelines.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_model_input(case, tmp_path):
    check(case, tmp_path)
