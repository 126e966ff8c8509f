"""The schedule optimiser, on a synthetic world where the right answer is known, and on the published data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.benchmarks.bench_optimize_rows import frontier_row
from tests.benchmarks.tuning_cases import CASES, POCKET
from tests.reference_data import MISSING
from tests.tuning.world import BUDGETS, COST, world
from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel, Schedule, import_published, optimize_schedule
from ttsnap_lib.errors import BudgetError, ConfigError, ScheduleError, TensorError
from ttsnap_lib.simulation.plots import flatness_table
from ttsnap_lib.simulation.simulate import curves
from ttsnap_lib.tuning.optimize import compare_schedules


def fast(dataset, **options):
    options = {"n_trials": 150, "iterations": 12, "resamples": 200, **options}
    return optimize_schedule(dataset, options.pop("cost", COST), options.pop("budgets", BUDGETS), **options)


def test_same_seed_same_answer():
    data = world()
    one, two = fast(data, seed=3), fast(data, seed=3)
    for name in ("schedule", "tuned_gain", "test_gain", "test_interval"):
        assert getattr(one, name) == getattr(two, name)
    assert one.trials.equals(two.trials)
    assert not fast(data, seed=4).trials.equals(one.trials)


def test_gains_where_checks_tell_and_not_where_they_do_not():
    found = fast(world())
    assert found.complete and len(found.trials) == 150
    assert found.test_interval[0] > 0 and found.test_interval[0] < found.test_gain < found.test_interval[1]
    # Checks that tell nothing and cost something: no pruning is best.
    blind = fast(world(noise=np.r_[np.full(7, 1e3), 0.0]))
    assert blind.schedule == Schedule() and blind.test_gain == pytest.approx(0, abs=1e-9)


def test_every_result_can_be_checked_against_the_simulation():
    """The report is what `curves` finds on the test prompts, within Monte Carlo noise (3 points of 95, 4 at the ends)."""
    data = world(prompts=60)
    found = fast(data, tune=range(30), test=range(30, 60))
    again = curves(
        data.isel(prompt=slice(30, 60)), ["ttsnap"], BUDGETS, COST, found.schedule, iterations=400, rng=1, resamples=50
    )
    frame = found.frontier
    assert frame["n"].tolist() == again.n[-1].tolist()
    np.testing.assert_allclose(frame["spent"], again.spent[-1])
    gains = again.relative_gains().iloc[0]
    assert found.test_gain == pytest.approx(gains["relative_gain"], abs=3)
    assert found.test_interval == pytest.approx((gains["low"], gains["high"]), abs=4)
    np.testing.assert_allclose(frame["mean"], again.per_prompt[-1, :, 0].mean(-1), atol=0.05)


def test_single_budget():
    data = world()
    found = fast(data, budgets=BUDGETS[2], objective="single")
    assert len(found.frontier) == 1
    row = found.frontier.iloc[0]
    one = data["base"].values[0, found.test, :, -1].mean()
    assert found.test_gain == pytest.approx(100 * row.gain / (row.best_of_n - one), rel=1e-6)
    assert found.test_gain > 0


def test_frontier_has_a_schedule_for_every_budget():
    found = fast(world(), objective="frontier", n_trials=300)
    area = fast(world(), objective="area", n_trials=300)
    assert len(found.frontier) == len(BUDGETS)
    assert all(isinstance(schedule, Schedule) for schedule in found.frontier["schedule"])
    # A choice per budget is no worse than one for all; 3 points of 120 for the noise of 48 subsets.
    assert found.tuned_gain >= area.tuned_gain - 3
    for row in found.frontier.itertuples():
        assert COST.candidates(row.budget, row.schedule) == row.n
    assert (area.frontier["over_single"] == 0).all()


def test_frontier_is_no_worse_than_one_schedule_on_held_out_prompts():
    """At no budget is it surely worse, and what the table tells of the difference is what the simulation finds."""
    # A check costs three steps: what pays at a large budget leaves too few candidates at a small one.
    cost = CostModel(step=1.0, verify=2.0, decode=1.0, n_steps=8)
    budgets = np.array([2, 3, 4, 8, 12]) * cost.total(1)
    found = fast(world(prompts=80, pool=64), cost=cost, budgets=budgets, objective="frontier", n_trials=300,
                 level=1 - 0.05 / 5)  # fmt: skip
    table = found.frontier
    assert (table["over_single_high"] >= 0).all() and table["over_single_low"][0] > 0
    assert (table["over_single_low"] <= table["over_single"]).all()
    # The numbers are those of the public simulation of either schedule, on the same subsets (Monte Carlo, paired).
    test = world(prompts=80, pool=64).isel(prompt=found.test)
    for row in table.itertuples():
        own, single = (
            curves(test, ["ttsnap"], [row.budget], cost, plan, iterations=300, rng=1, resamples=20).per_prompt[-1, 0, 0]
            for plan in (row.schedule, found.schedule)
        )
        assert row.over_single == pytest.approx((own - single).mean(), abs=0.03)


def test_several_rewards_and_reported_ones():
    data = world(rewards=2)
    joint = fast(data)
    assert joint.rewards["selects"].tolist() == [True, True] and (joint.rewards["gain"] > 0).all()
    alone = fast(data, report=["r1"])
    assert alone.rewards["selects"].tolist() == [True, False]
    # Merit is the selecting reward alone, so both rows of the first reward agree.
    assert alone.rewards["gain"][0] == pytest.approx(alone.test_gain)
    assert fast(data, combine="weighted_sum", weights={"r0": 1.0, "r1": 0.5}).test_gain > 0


def test_copied_steps_are_left_out():
    data = world()
    source = np.full((1, 8), "finetuned", dtype=object)
    source[0, [0, 1, 6, 7]] = "copied_from_base"
    data["noise_aware_source"] = (("reward", "step"), source)
    steps = {step for steps in fast(data).trials["steps"] for step in steps}
    assert steps <= {2, 3, 4, 5} and steps
    assert {0, 6} & {step for steps in fast(data, copied_steps=True).trials["steps"] for step in steps}
    data["noise_aware_source"] = (("reward", "step"), np.full((1, 8), "copied_from_base", dtype=object))
    with pytest.raises(ScheduleError, match="ttsp"):
        fast(data)
    assert fast(data, method="ttsp").complete


def test_more_than_the_pool_is_infeasible_not_an_error():
    small = world(pool=9)
    found = fast(small)  # 6 Best-of-N images; pruning early would buy more than the 9 there are
    assert all(COST.candidates(BUDGETS[-1], Schedule(*pair)) <= 9
               for pair in zip(found.trials["steps"], found.trials["keep_ratios"], strict=True))  # fmt: skip
    with pytest.raises(BudgetError, match="pool"):
        fast(world(pool=5))  # Best-of-N itself needs 6


def test_published_schedule_is_compared():
    data = world(steps=20, noise=np.linspace(1, 0, 20))
    cost = dataclasses.replace(COST, n_steps=20)
    found = fast(data, cost=cost, budgets=np.arange(2, 6) * cost.total(1))
    table = compare_schedules(
        data, cost, found.budgets, [found.schedule, PUBLISHED_SCHEDULE], prompts=found.test, iterations=300
    )
    assert found.published_gain == pytest.approx(table["gain"][1], abs=2)  # Monte Carlo noise in points
    assert found.over_published == pytest.approx(found.test_gain - found.published_gain)
    low, high = found.over_published_interval
    assert low <= found.over_published <= high
    assert fast(world()).published_gain is None  # step 11 is not there


def test_time_limit_and_interrupt_keep_the_best_so_far():
    data = world()
    short = fast(data, n_trials=10**6, time_limit_s=3)
    # A million schedules would take hours; the slack is for compiling and for a busy machine.
    assert not short.complete and len(short.trials) > 0 and short.elapsed_s < 120

    def stop(done, total):
        if done >= 96:
            raise KeyboardInterrupt

    cut = fast(data, progress=stop)
    assert not cut.complete and len(cut.trials) == 96
    assert fast(data, n_trials=96).schedule == cut.schedule


def test_how_flat_the_optimum_is():
    data = world()
    found = fast(data)
    flat = found.flatness(data, top=10, also=[Schedule((6,), (0.9,))])
    assert flat["schedule"][0] == found.schedule and flat["as_good"][0] == "yes" and flat["behind"][0] == 0
    # Pruning where little is gained by it is not as good as the best.
    assert flat["schedule"][1] == Schedule((6,), (0.9,)) and flat["as_good"][1] == "no" and flat["behind_low"][1] > 0.5
    assert {"yes", "undecided"} & set(flat["as_good"][2:]) and len(flat) <= 12
    best = compare_schedules(data, COST, BUDGETS, list(flat["schedule"][1::-1]), prompts=found.test, best_first=True)
    assert best.index.tolist() == [1, 0] and best["behind"].tolist() == flat["behind"][:2].tolist()
    text = flatness_table(flat)
    assert text["schedule"][0] == str(found.schedule) and text["as good"][:2].tolist() == ["yes", "no"]
    assert text.iloc[0, 1] == f"{flat['gain'][0]:.1f} [{flat['low'][0]:.1f}, {flat['high'][0]:.1f}]"
    nowhere = flatness_table(compare_schedules(data, COST, BUDGETS, [Schedule((25,), (0.5,))]))
    assert nowhere.iloc[0, 1] == nowhere.iloc[0, 2] == "cannot run"


def test_racing_spends_little_on_poor_schedules():
    trials = fast(world(), n_trials=400).trials
    whole = trials["draws"].max() * len(trials)
    assert trials["draws"].sum() < 0.4 * whole
    last = trials["rounds"] == 3
    assert trials["score"][last].median() > trials["score"][~last].median()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"objective": "single"}, BudgetError, "one budget"),
        ({"budgets": BUDGETS[::-1]}, ConfigError, "increasing"),
        ({"budgets": [COST.total(1) * 0.5, 30.0]}, BudgetError, "at least"),
        ({"budgets": COST.total(1), "objective": "single"}, BudgetError, "two Best-of-N"),
        ({"tune": [0, 0]}, ConfigError, "once"),
        ({"tune": []}, ConfigError, "tune"),
        ({"time_limit_s": -1}, ConfigError, "time_limit_s"),
        ({"cost": dataclasses.replace(COST, n_steps=9)}, ConfigError, "n_steps"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        fast(world(), **options)


def test_missing_values_are_refused_before_the_search():
    data = world()
    data["noise_aware"][0, 3, 4, 2] = np.nan
    with pytest.raises(TensorError, match="prompt 3"):
        fast(data)
    assert fast(data, tune=range(4, 20), test=range(20, 40)).complete  # prompt 3 takes no part


@pytest.mark.slow
def test_published_tensors(reference):
    """Tuned on even prompts, told on odd ones; margins are what two seeds of a short search differ by."""
    data = import_published(reference / "values", "flux", ["image_reward"])
    cost = CostModel(step=21.5, verify=0.335, decode=2.51)
    budgets = np.arange(2, 21) * cost.total(1)
    even, odd = np.arange(0, 200, 2), np.arange(1, 200, 2)
    found = optimize_schedule(data, cost, budgets, tune=even, test=odd, n_trials=1000)
    assert found.test_gain >= 24.0 and found.over_published_interval[0] > 0
    assert found.published_gain == pytest.approx(22.2, abs=1.5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", [CASES[0], CASES[3], *POCKET], ids=lambda case: case.name)
def test_frontier_of_real_tensors_is_no_worse_than_one_schedule(case):
    dataset = case.dataset()
    if dataset is None:
        pytest.skip(MISSING)
    assert frontier_row(case, dataset, n_trials=4000).kept
