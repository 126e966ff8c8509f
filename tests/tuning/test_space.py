"""The space of schedules, and what a budget buys of each."""

import dataclasses

import numpy as np
import pytest

from tests.tuning.world import BUDGETS, COST
from ttsnap_lib.tuning.space import SearchSpace

BY_BATCH = {"step": {1: 3.0, 2: 1.2, 4: 1.1, 8: 1.0}, "verify": {1: 0.9, 8: 0.2}}  # seconds of 2 cost less than of 1


@pytest.mark.parametrize(
    "changes", [{}, {"accounting": "published"}, BY_BATCH, {**BY_BATCH, "batch_size": 3, "prompts_together": 2}]
)
def test_counts_equal_the_cost_model(changes):
    cost = dataclasses.replace(COST, **{"per_prompt": 0.7, "preview_decode": 0.1, **changes})
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
