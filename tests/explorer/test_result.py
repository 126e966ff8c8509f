"""The explorer's numbers (pool and result), without widgets."""

from __future__ import annotations

import dataclasses
import html

import numpy as np
import pytest

from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.errors import BudgetError, ConfigError, TTSnapError
from ttsnap_lib.explorer.pool import Pool
from ttsnap_lib.explorer.result import State, compute, lacking
from ttsnap_lib.explorer.view import numbers_html
from ttsnap_lib.simulation.metrics import kendall_tau
from ttsnap_lib.simulation.plots import headline
from ttsnap_lib.simulation.simulate import curves
from ttsnap_lib.tensors.tensor import RepeatedImagesWarning, synthetic_rewards

COST = CostModel.preset("flux-512+image_reward")
ONE = COST.total(1)
BUDGETS = tuple(multiple * ONE for multiple in (2, 4, 8, 12))
LATER = Schedule((4, 9), (0.5, 0.3))


@pytest.fixture(scope="module")
def dataset():
    return synthetic_rewards(24, 60, 20, rewards=("a", "b"))


@pytest.fixture(scope="module")
def pool(dataset):
    return Pool(dataset, iterations=40, seed=3)


def state(**changes) -> State:
    given = {"rewards": ("a",), "shown": "a", "cost": COST, "budgets": BUDGETS, "budget": 8 * ONE}
    return State(**{**given, **changes})


@pytest.mark.parametrize("method", ["ttsp", "ttsnap"])
@pytest.mark.parametrize(
    ("rewards", "combine"), [(("a",), "rank_sum"), (("a", "b"), "rank_sum"), (("a", "b"), "z_score")]
)
def test_numbers_are_those_of_the_simulation(dataset, pool, method, rewards, combine):
    result = compute(state(method=method, rewards=rewards, combine=combine, schedule=LATER, shown="b"), pool)
    report = [name for name in ("a", "b") if name not in rewards]
    expected = curves(dataset, [method], BUDGETS, COST, LATER, iterations=40, rng=3, report=report, combine=combine)
    assert result.complete
    current = result.curves["current"]
    np.testing.assert_array_equal(current.per_prompt, expected.per_prompt[1, :, 1])
    np.testing.assert_array_equal(current.n, expected.n[1])
    np.testing.assert_array_equal(current.spent, expected.spent[1])
    if len(rewards) > 1:  # Best-of-N by several rewards is simulated too, on the same subsets
        np.testing.assert_array_equal(result.curves["best_of_n"].per_prompt, expected.per_prompt[0, :, 1])
        gains = expected.relative_gains().query("reward == 'b'").iloc[0]
        gain = result.gains["current"]
        assert gain.value == pytest.approx(gains["relative_gain"], abs=1e-9)
        assert (gain.low, gain.high) == pytest.approx((gains["low"], gains["high"]), abs=1e-9)
        needs = expected.needs().query("reward == 'b' and budget == @BUDGETS[2]").iloc[0]
        assert result.needs == pytest.approx(needs["needs"]) and result.most == expected.ladder_spent[-1]
        told = headline(expected, COST, method, "b").split(" [")[0]  # the intervals have other resamples
        assert told in html.unescape(numbers_html(result))


def test_best_of_n_by_one_reward_is_exact_and_also_told_for_another_reward(dataset, pool):
    result = compute(state(shown="b"), pool)
    expected = curves(dataset, ["best_of_n"], BUDGETS, COST, iterations=4000, report=["b"])
    assert np.abs(result.curves["best_of_n"].per_prompt - expected.per_prompt[0, :, 1]).max() < 0.1  # spread 0.6


def test_changes_are_paired_and_vanish_for_the_pinned_schedule_itself(pool):
    same = compute(state(), pool, 10)
    over = same.over["A"]
    assert (over.value, over.low, over.high) == (0, 0, 0)
    assert not np.any(same.changes["A"][1].value) and same.gain_changes["A"].value == 0
    other = compute(state(schedule=LATER), pool)
    at, pinned = other.at["current"].reward, other.at["A"].reward
    assert other.over["A"].value == pytest.approx(at.value[0] - pinned.value[0], abs=1e-12)
    paired = other.over["A"].high - other.over["A"].low
    assert paired < 0.7 * np.hypot(at.high[0] - at.low[0], pinned.high[0] - pinned.low[0])
    assert other.gain_changes["A"].value == pytest.approx(other.gains["current"].value - other.gains["A"].value)
    assert other.gains["current"].low < other.gains["current"].value < other.gains["current"].high


def test_tau_and_stages(dataset, pool):
    result = compute(state(shown="b", schedule=LATER), pool, 10)
    scores = dataset["noise_aware"].sel(reward="b").transpose("prompt", "image", "step").values
    np.testing.assert_allclose(result.tau[1].mean, kendall_tau(scores, scores[:, :, -1]).mean)
    n = COST.candidates(8 * ONE, LATER)
    assert [stage.candidates for stage in result.stages] == list(LATER.survivors(n))
    assert sum(stage.total for stage in result.stages) == pytest.approx(result.at["current"].spent[0])


def test_what_has_been_pruned_is_not_done_again(pool):
    wanted = state(schedule=Schedule((5,), (0.25,)))
    preview = compute(wanted, pool, pool.preview(1))
    assert preview.iterations == 25 and not preview.complete
    missing = lacking(wanted, pool)
    assert {job.schedule for job, _ in missing} >= {wanted.schedule}
    for job, n in missing:
        pool.per_prompt(job, [n], pool.iterations)
    assert lacking(wanted, pool) == []
    assert compute(wanted, pool).complete


def test_previews_of_more_work_are_smaller(pool):
    assert [pool.preview(n) for n in (1, 10, 100, 1000)] == [25, 20, 2, 1]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"budget": 0.5 * ONE}, BudgetError, "Raise the budget"),
        ({"budget": 12 * ONE, "schedule": Schedule((0,), (0.05,))}, BudgetError, "at most 60, the images in the pool"),
        ({"rewards": ()}, ConfigError, "Choose a reward"),
        ({"budgets": BUDGETS[:2]}, ConfigError, "three or more"),
        ({"shown": "c"}, ConfigError, "'c'"),
        ({"cost": CostModel(step=1, verify=1, n_steps=30)}, TTSnapError, "n_steps"),
    ],
)
def test_a_bad_state_is_told(pool, changes, error, words):
    with pytest.raises(error, match=words):
        compute(state(**changes), pool, 10)


def test_budgets_that_cannot_run_are_left_out_and_told(pool):
    costly = Schedule((0,), (0.05,))
    result = compute(state(schedule=costly, budget=2 * ONE), pool, 10)
    assert len(result.curves["current"].n) < len(BUDGETS) == len(result.curves["best_of_n"].n)
    assert any("left out" in note for note in result.notes)
    pins = (("A", "ttsnap", Schedule((4,), (0.5,))), ("B", "ttsnap", costly))
    beside = compute(state(pins=pins, budget=12 * ONE), pool, 10)
    assert set(beside.over) == {"best_of_n", "A"} and set(beside.changes) == {"A"}
    assert set(beside.gains) == {"current", "A"} and any("B cannot run" in note for note in beside.notes)
    known = [multiple * ONE for multiple in (2, 4, 6, 8, 12)]
    narrow = compute(state(pins=pins, budget=4 * ONE, budgets=known), pool, 10)
    assert set(narrow.changes) == {"A", "B"} and len(narrow.above["B"][0]) < len(narrow.above["A"][0])
    assert any("the 3 budgets that all schedules can run" in note for note in narrow.notes)


def test_gains_over_best_of_n_are_paired(pool):
    result = compute(state(schedule=LATER), pool)
    assert set(result.above) == {"current", "A"}
    for name, (budgets, gain) in result.above.items():
        curve, base = result.curves[name], result.curves["best_of_n"]
        np.testing.assert_array_equal(budgets, curve.budgets)
        np.testing.assert_allclose(gain.value, curve.reward.value - base.reward.value, atol=1e-12)
        alone = np.hypot(curve.reward.high - curve.reward.low, base.reward.high - base.reward.low)
        assert (gain.high - gain.low < 0.7 * alone).all()


def test_copied_steps_are_told(dataset):
    copied = dataset.copy(deep=True)
    copied["noise_aware_source"].values[0, 4] = "copied_from_base"
    notes = compute(state(schedule=LATER), Pool(copied, iterations=4)).notes
    assert any("step 4" in note and "copy" in note for note in notes)


def test_repeats_and_a_tiny_decoder_are_told_and_repeats_left_out(dataset):
    twice = dataset.isel(image=[*range(60), 7, 3]).assign_coords(image=np.arange(62))
    with pytest.warns(RepeatedImagesWarning, match="60 distinct trajectories of 62"):
        pool = Pool(twice, iterations=4)
    tiny = dataclasses.replace(COST, preview_decode=0.1)
    notes = compute(state(cost=tiny), pool).notes
    assert any("60 distinct" in note for note in notes) and any("tiny decoder" in note for note in notes)
    assert Pool(twice, iterations=4, distinct=True).n_images == 60


def test_a_missing_score_is_told_where_it_would_be_read(dataset):
    holes = dataset.copy(deep=True)
    holes["noise_aware"].loc[{"reward": "a", "prompt": 20, "image": slice(None), "step": 4}] = np.nan
    compute(state(), Pool(holes, iterations=4))
    with pytest.raises(TTSnapError, match="prompt 20 at stage 0"):
        compute(state(schedule=LATER), Pool(holes, iterations=4))


def test_a_single_prompt_has_no_interval(dataset):
    result = compute(state(schedule=LATER), Pool(dataset.isel(prompt=[0]), iterations=30))
    assert (
        np.isnan(result.at["current"].reward.low)
        and np.isnan(result.gains["current"].low)
        and not np.isnan(result.gains["current"].value)
    )


def test_published_accounting_and_empty_schedules(pool):
    published = CostModel.preset("published")
    wanted = state(cost=published, budgets=(400.0, 800.0, 1600.0), budget=800.0)
    result = compute(wanted, pool, 10)
    assert result.at["best_of_n"].n[0] == published.candidates(800.0)
    assert result.at["current"].n[0] == published.candidates(800.0, wanted.schedule)
    empty = compute(state(schedule=Schedule()), pool, 10)
    np.testing.assert_array_equal(empty.curves["current"].per_prompt, empty.curves["best_of_n"].per_prompt)
    assert empty.gains["current"].value == 0
