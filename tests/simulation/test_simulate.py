"""Methods at budgets: paired, reproducible, never over budget, and what the paper publishes."""

import dataclasses
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel, Schedule, best_of_n, simulate, sweep
from ttsnap_lib.errors import BudgetError, ConfigError, CostError, ScheduleError, TensorError
from ttsnap_lib.simulation.simulate import TinyChecksWarning, as_published, curves
from ttsnap_lib.tensors.tensor import RepeatedImagesWarning, synthetic_rewards
from ttsnap_lib.tuning.optimize import compare_schedules

COST = CostModel(step=3, verify=0.5, decode=1, n_steps=8)
SCHEDULE = Schedule((1, 4), (0.5, 0.4))


@pytest.fixture(scope="module")
def tensor():
    return synthetic_rewards(12, 30, 8, rewards=("a", "b", "c"))


def test_simulate_draws_the_closed_form(tensor):
    one = tensor.sel(reward=["a"])
    result = simulate(one, "best_of_n", n=5, iterations=4000, rng=1)
    exact = best_of_n(one["base"].values[0, :, :, -1], 5)
    # Standard error of a per-prompt mean of 4000 draws is below 0.01 for rewards with standard deviation 0.6.
    assert result.per_prompt[0] == pytest.approx(exact, abs=0.045)
    assert result.mean[0] == pytest.approx(exact.mean(), abs=0.012)
    assert result.low[0] < result.mean[0] < result.high[0]
    assert result.winners.shape == (4000, 12) and np.isnan(result.spent)


def test_winners_and_values_agree_and_subsets_differ_between_prompts(tensor):
    result = simulate(tensor, "ttsnap", budget=150, cost=COST, schedule=SCHEDULE, iterations=20)
    final = tensor["base"].values[..., -1]
    for r in range(3):
        picked = np.take_along_axis(final[r], result.winners.T, axis=1)
        assert result.per_prompt[r] == pytest.approx(picked.mean(1), rel=1e-6)
    assert result.spent == COST.total(result.n, SCHEDULE) <= 150
    flat = synthetic_rewards(6, 30, 8)
    flat["base"][:] = flat["base"].values[:, :1]  # all prompts alike: equal winners would mean shared subsets
    winners = simulate(flat, "best_of_n", n=3, iterations=50).winners
    assert (winners != winners[:, :1]).any()


@pytest.mark.parametrize("method", ["ttsp", "ttsnap"])
def test_an_empty_schedule_is_best_of_n_on_the_same_subsets(tensor, method):
    pruned = simulate(tensor, method, budget=100, cost=COST, schedule=Schedule(), rng=3)
    plain_n = simulate(tensor, "best_of_n", budget=100, cost=COST, rng=3)
    assert np.array_equal(pruned.winners, plain_n.winners)
    assert pruned.spent == plain_n.spent and pruned.n == plain_n.n


def test_budgets_are_nested_and_order_does_not_matter(tensor):
    budgets = [200, 60, 120]
    together = curves(tensor, ["ttsnap"], budgets, COST, SCHEDULE, rng=5, keep_winners=True)
    for b, budget in enumerate(budgets):
        alone = simulate(tensor, "ttsnap", budget=budget, cost=COST, schedule=SCHEDULE, rng=5)
        assert np.array_equal(together.winners[1, b], alone.winners)
    # More candidates from the same draw can only help Best-of-N by one reward.
    one = curves(tensor.sel(reward=["a"]), ["best_of_n"], [60, 120, 200], COST, rng=5).per_prompt[0, :, 0]
    assert (np.diff(one, axis=0) >= 0).all()


def test_reproducible_and_thread_independent(tensor, monkeypatch):
    first = sweep(tensor, ["ttsp"], [60, 120], COST, SCHEDULE, rng=np.random.default_rng(7))
    import numba

    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 1)
    assert first.equals(sweep(tensor, ["ttsp"], [60, 120], COST, SCHEDULE, rng=7))


def test_sweep_frame(tensor):
    frame = sweep(tensor, ["best_of_n", "ttsp", "ttsnap"], [60, 120], COST, SCHEDULE)
    assert frame.columns.tolist() == (
        ["method", "reward", "budget", "n", "spent", "mean", "low", "high", "gain", "gain_low", "gain_high"]
    )
    assert len(frame) == 3 * 3 * 2
    assert (frame["spent"] <= frame["budget"]).all()
    base = frame[frame["method"] == "best_of_n"]
    assert (base[["gain", "gain_low", "gain_high"]] == 0).all(None)
    assert sweep(tensor, ["ttsnap"], [60, 120], COST, SCHEDULE)["method"].unique().tolist() == ["ttsnap"]
    aware = frame[(frame["method"] == "ttsnap") & (frame["reward"] == "a")]
    assert ((aware["gain_low"] <= aware["gain"]) & (aware["gain"] <= aware["gain_high"])).all()


def test_ttsp_reads_base_and_ttsnap_noise_aware(tensor):
    swapped = tensor.assign(noise_aware=tensor["base"])
    a = simulate(tensor, "ttsp", n=20, schedule=SCHEDULE)
    b = simulate(swapped, "ttsnap", n=20, schedule=SCHEDULE)
    c = simulate(tensor, "ttsnap", n=20, schedule=SCHEDULE)
    assert np.array_equal(a.winners, b.winners) and not np.array_equal(a.winners, c.winners)


def test_reported_rewards_do_not_select(tensor):
    chosen = simulate(tensor.sel(reward=["a"]), "ttsnap", n=20, schedule=SCHEDULE)
    reported = simulate(tensor, "ttsnap", n=20, schedule=SCHEDULE, report=["b", "c"])
    assert np.array_equal(chosen.winners, reported.winners)
    assert reported.mean[0] == chosen.mean[0] and len(reported.mean) == 3
    weighted = simulate(
        tensor, "ttsnap", n=20, schedule=SCHEDULE, combine="weighted_sum", weights={"a": 1, "b": 0, "c": 0}
    )
    assert np.array_equal(chosen.winners, weighted.winners)


@settings(max_examples=60)
@given(st.data())
def test_never_over_budget(data):
    tensor = synthetic_rewards(3, 40, 8)
    steps = sorted(data.draw(st.sets(st.integers(0, 6), max_size=4)))
    schedule = Schedule(steps, [data.draw(st.floats(0.05, 1)) for _ in steps])
    price = st.floats(0, 20)
    cost = CostModel(
        step=data.draw(st.floats(0.1, 20)), verify=data.draw(price), decode=data.draw(price),
        preview_decode=data.draw(st.none() | price), per_prompt=data.draw(price), n_steps=8,
    )  # fmt: skip
    budget = data.draw(st.floats(0.5, 30)) * cost.total(1)
    try:
        frame = sweep(tensor, ["best_of_n", "ttsp", "ttsnap"], [budget], cost, schedule, iterations=2, resamples=5)
    except BudgetError as error:
        n = min(cost.candidates(budget, plan) for plan in (None, schedule))
        assert n == 0 or max(cost.candidates(budget, plan) for plan in (None, schedule)) > 40, error
        return
    assert (frame["spent"] <= budget * (1 + 1e-9)).all()


GOOD = {"method": "ttsnap", "budget": 100, "cost": COST, "schedule": SCHEDULE}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"n": 4}, ConfigError, "either budget or n"),
        ({"budget": None, "n": 0}, BudgetError, "n: got 0"),
        ({"cost": None}, CostError, "cost: got None"),
        ({"schedule": {"steps": [1]}}, ScheduleError, "without a schedule"),
        ({"level": 95}, ConfigError, "level: got 95"),
        ({"report": ["d"]}, ConfigError, "report: got 'd'"),
        ({"combine": "weighted_sum", "weights": {"a": 1}}, ConfigError, "reward with a weight: got 'b'"),
        ({"combine": "weighted_sum", "weights": {"a": 1, "b": 1, "c": 1, "d": 1}}, ConfigError, "weights: got 'd'"),
    ],
)
def test_what_is_refused(tensor, change, error, match):
    arguments = {**GOOD, **change}
    with pytest.raises(error, match=match):
        simulate(tensor, arguments.pop("method"), **arguments)


def test_an_unknown_keyword_is_refused(tensor):
    with pytest.raises(TypeError, match="iteratoins"):
        simulate(tensor, **GOOD, iteratoins=3)


def test_what_best_of_n_needs_reaches_over_the_pool_with_its_interval(tensor):
    one, budgets = tensor.sel(reward=["a"]), [80, 160, 240]
    same = curves(one, ["ttsp"], budgets, COST, Schedule(), iterations=30).needs()
    spent = [COST.total(COST.candidates(budget)) for budget in budgets]
    for column in ("needs", "needs_low", "needs_high"):  # without pruning it is Best-of-N on the same subsets
        np.testing.assert_allclose(same[column], spent)
    np.testing.assert_allclose(same["saved"], 0, atol=1e-12)
    result = curves(one, ["ttsnap"], budgets, COST, SCHEDULE, iterations=100)
    found = result.needs()
    assert result.ladder_spent[[0, -1]].tolist() == [COST.total(1), COST.total(30)]
    assert (found["needs_low"] <= found["needs"]).all() and (found["needs"] <= found["needs_high"]).all()
    # The interval of what is needed holds a budget just where that of the gain there holds 0.
    frame = result.frame().query("method == 'ttsnap'").reset_index(drop=True)
    behind, ahead = frame["gain_high"] < 0, frame["gain_low"] > 0
    at = result.spent[0]
    assert ((found["needs_high"] < at) == behind).all() and ((found["needs_low"] > at) == ahead).all()
    perfect = one.copy(deep=True)
    perfect["noise_aware"][:] = one["base"].isel(step=-1)
    # A perfect check of the whole pool, for 180: Best-of-N needs the whole pool too, or nearly.
    most = curves(perfect, ["ttsnap"], [180], COST, Schedule((0,), (0.05,)), iterations=30)
    assert most.needs()["needs"][0] > most.ladder_spent[-2] and most.needs()["saved_low"][0] > 0.5
    with pytest.raises(ConfigError, match="reach=True"):
        curves(one, ["ttsp"], budgets, COST, SCHEDULE, iterations=2, reach=False).needs()


def test_needs_of_a_pool_that_is_scored_in_part_reach_as_far_as_the_budgets(tensor):
    holes = tensor.sel(reward=["a"]).copy(deep=True)
    holes["base"][0, 3, 4, -1] = np.nan
    with pytest.raises(TensorError, match="prompt 3"):
        simulate(holes, "best_of_n", n=30)
    found = [curves(holes, ["best_of_n"], [80], COST, iterations=1, rng=seed) for seed in range(1, 3)]
    assert {len(one.ladder_spent) for one in found} == {1} and found[0].ladder_spent[0] == COST.total(3)


def test_repeated_trajectories_are_told_once_and_left_out_on_wish(tensor):
    twice = tensor.isel(image=[0, 0, *range(1, 30)]).assign_coords(image=np.arange(31))
    with pytest.warns(RepeatedImagesWarning, match="30 distinct trajectories of 31"):
        simulate(twice, "best_of_n", n=3, iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(twice, "best_of_n", n=3, iterations=2)
        simulate(tensor, "best_of_n", n=3, iterations=2)
    result = simulate(twice, "best_of_n", n=30, iterations=2, distinct=True)
    plain = simulate(tensor, "best_of_n", n=30, iterations=2)
    assert result.mean.tolist() == plain.mean.tolist()
    # Winners are places in the pool that was given: the second of the two never wins.
    assert (result.winners == np.where(plain.winners > 0, plain.winners + 1, 0)).all()
    with pytest.raises(BudgetError, match="at most 30"):
        simulate(twice, "best_of_n", n=31, distinct=True)


def test_a_tiny_decoder_is_told_where_checks_are_charged_by_it(tensor):
    tiny = dataclasses.replace(COST, preview_decode=0.1)
    with pytest.warns(TinyChecksWarning, match="0.1 TFLOPs.*through the full one"):
        simulate(tensor, "ttsp", budget=150, cost=tiny, schedule=SCHEDULE, iterations=2)
    with pytest.warns(TinyChecksWarning):
        compare_schedules(tensor, tiny, [80, 160], [SCHEDULE], "ttsp", iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(tensor, "best_of_n", budget=150, cost=tiny, iterations=2)


@pytest.mark.parametrize(
    ("model", "reward", "ttsnap", "ttsp"),
    [("flux", "image_reward", 30.7, 9.0), ("flux", "pickscore", 37.3, -1.0), ("sdxl", "pickscore", 6.1, -13.2)],
)
def test_published_relative_gains_within_one_point(pools, model, reward, ttsnap, ttsp):
    result = curves(
        pools[model].sel(reward=[reward]), ["ttsnap", "ttsp"], np.arange(400, 4001, 200), CostModel.preset("published"),
        PUBLISHED_SCHEDULE, iterations=300, resamples=2,
    )  # fmt: skip
    gains = result.relative_gains().set_index("method")["relative_gain"]
    assert gains["ttsnap"] == pytest.approx(ttsnap, abs=1)
    assert gains["ttsp"] == pytest.approx(ttsp, abs=1)
    told = as_published(pools[model]).set_index(["reward", "method"])["relative_gain"]  # with fewer subsets
    assert told[reward, "ttsnap"] == pytest.approx(ttsnap, abs=1.5)
    assert told[reward, "ttsp"] == pytest.approx(ttsp, abs=1.5)
