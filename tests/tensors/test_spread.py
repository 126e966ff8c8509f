"""Rewards that say nothing within prompts, and those that outvote the others: told where they are used."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from ttsnap_lib import CostModel, Schedule, optimize_schedule, simulate
from ttsnap_lib.tensors.spread import SpreadWarning, flat
from ttsnap_lib.tensors.tensor import from_array


@pytest.fixture
def scores():
    """Three rewards of 4 prompts x 6 images x 3 steps: one of a large scale, one that is equal in two prompts."""
    rng = np.random.default_rng(0)
    dull = rng.normal(size=(4, 6, 3))
    dull[1:3] = 5.0
    return from_array({"wide": 40 * rng.normal(size=(4, 6, 3)), "narrow": rng.normal(size=(4, 6, 3)), "dull": dull})


def test_what_is_flat():
    nan = np.nan
    assert flat(np.array([[1, 1], [1, 2], [nan, nan], [nan, 1], [-np.inf, nan]])).tolist() == [
        True,
        False,
        True,
        True,
        True,
    ]


def test_a_reward_that_says_nothing_is_told_once(scores):
    with pytest.warns(SpreadWarning, match=r"say nothing there: dull in 2 of 4 prompts\.") as told:
        simulate(scores, "best_of_n", n=3, iterations=2)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(scores.sel(reward=["wide", "narrow"]), "best_of_n", n=3, iterations=2)
        simulate(scores.isel(prompt=[0, 3]), "best_of_n", n=3, iterations=2)


def test_a_weighted_sum_of_different_scales_is_told(scores):
    two = scores.sel(reward=["wide", "narrow"])
    options = {"n": 3, "iterations": 2, "combine": "weighted_sum"}
    with pytest.warns(
        SpreadWarning, match=r"wide \d+.*narrow 0\.\d+, so wide decides nearly alone\. Take combine z_score"
    ):
        simulate(two, "best_of_n", weights=[1, 1], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weights in ([0.025, 1], [1, 0]):  # on one scale; one reward alone
            simulate(two, "best_of_n", weights=weights, **options)
        simulate(two, "ttsp", n=3, iterations=2, schedule=Schedule((1,), (0.5,)), combine="z_score")


@pytest.mark.slow
def test_the_optimiser_tells_it_too(scores):
    two = scores.sel(reward=["wide", "narrow"])
    cost = CostModel(step=1.0, verify=0.1, n_steps=3)
    with pytest.warns(SpreadWarning, match="so narrow decides nearly alone"):
        optimize_schedule(
            two, cost, [cost.total(3)], "ttsp", objective="single", n_trials=2, combine="weighted_sum",
            weights={"wide": 0.001, "narrow": 1.0},
        )  # fmt: skip
