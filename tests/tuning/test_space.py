"""The space of schedules, and what a budget buys of each."""

import dataclasses

import numpy as np
import pytest

from tests.tuning.world import BUDGETS, COST
from ttsnap_lib.tuning.space import SearchSpace


@pytest.mark.parametrize("accounting", ["exact", "published"])
def test_counts_equal_the_cost_model(accounting):
    cost = dataclasses.replace(COST, accounting=accounting, per_prompt=0.7, preview_decode=0.1)
    space = SearchSpace(tuple(range(7)), 4, cost, BUDGETS, 32)
    rng = np.random.default_rng(0)
    for _ in range(60):
        schedule = space.random(rng)
        counts = space.counts(schedule)
        for budget, row in zip(BUDGETS, counts, strict=True):
            n = cost.candidates(budget, schedule)
            expected = schedule.survivors(n) if 1 <= n <= 32 else ((0 if n < 1 else -1),) * (len(schedule) + 1)
            assert tuple(row) == expected


def test_changes_stay_in_the_space():
    space = SearchSpace((1, 2, 4, 6), 3, COST, BUDGETS, 32)
    rng = np.random.default_rng(1)
    schedule = space.random(rng)
    for _ in range(400):
        other = space.random(rng)
        schedule = space.cross(space.change(schedule, rng), other, rng)
        assert set(schedule.steps) <= {1, 2, 4, 6} and len(schedule) <= 3
