"""The schedule optimiser, on a synthetic world where the right answer is known, and on the published data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ttsnap_lib import CostModel, Schedule, optimize_schedule
from ttsnap_lib._scoring import _CONTROL, Scorer, Selection, balanced_subsets
from ttsnap_lib._search_space import SearchSpace
from ttsnap_lib.errors import BudgetError, ConfigError, ScheduleError, TensorError  # noqa: F401
from ttsnap_lib.simulate import best_of_n, prune
from ttsnap_lib.tensors import make_rewards

COST = CostModel(step=1.0, verify=0.1, decode=0.1, n_steps=8)
BUDGETS = np.arange(2, 7) * COST.total(1)


def world(prompts=40, pool=32, steps=8, rewards=1, seed=0, noise=None):
    """Return a tensor whose checks tell the final reward with noise that shrinks with the step."""
    rng = np.random.default_rng(seed)
    noise = np.linspace(1.2, 0, steps) if noise is None else noise
    final = rng.normal(size=(rewards, prompts, pool, 1))
    aware = final + rng.normal(size=(rewards, prompts, pool, steps)) * noise
    base = final + 2 * rng.normal(size=(rewards, prompts, pool, steps)) * noise
    base[..., -1] = aware[..., -1] = final[..., 0]
    return make_rewards(base, aware, rewards=[f"r{k}" for k in range(rewards)])


def fast(dataset, **options):
    options = {"n_trials": 150, "iterations": 12, "resamples": 200, **options}
    return optimize_schedule(dataset, options.pop("cost", COST), options.pop("budgets", BUDGETS), **options)


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


def test_subsets_are_balanced_permutations():
    subsets = balanced_subsets(24, 8, np.random.default_rng(0))
    assert (np.sort(subsets, axis=1) == np.arange(24)).all()
    assert (np.bincount(subsets[:, :3].ravel(), minlength=24) == 1).all()


@pytest.mark.parametrize("combine", ["single", "rank_sum", "z_score", "weighted_sum"])
def test_scores_equal_prune(combine):
    """Same winners as the public `prune`, given the same subsets, less the control where there is a closed form."""
    rewards = 1 if combine == "single" else 2
    data = world(prompts=6, pool=20, rewards=rewards)
    checks = data["noise_aware"].transpose("prompt", "image", "step", "reward").values
    final = data["base"].isel(step=-1).transpose("prompt", "image", "reward").values.astype(float)
    weights = np.array([0.3, 0.7]) if combine == "weighted_sum" else None
    chosen = "rank_sum" if combine == "single" else combine
    selection = Selection(tuple(range(rewards)), chosen, weights, np.ones(rewards))
    scorer = Scorer(checks, tuple(range(8)), final, selection, 16, np.random.default_rng(3))
    schedule = Schedule((2, 5), (0.5, 0.4))
    counts = np.array([schedule.survivors(n) for n in (5, 12)])
    found = scorer.sums(schedule.steps, counts, 0, 16)
    best = scorer.sums((), counts[:, :1], 0, 16)
    for p in range(6):
        for row, n in enumerate((5, 12)):
            subsets = scorer._labels[p][scorer.subsets[:, :n]]
            sums = []
            for plan in (schedule, Schedule()):
                won = prune(checks[p : p + 1], subsets, plan, final[p : p + 1], chosen, weights)[:, 0]
                sums.append(final[p, won].sum())
            if scorer.exact is not None:
                control = sums[1] - 16 * scorer.exact[n - 1, p, 0]
                sums = [sums[0] - _CONTROL * control, 16 * scorer.exact[n - 1, p, 0]]
            assert [found[row, p], best[row, p]] == pytest.approx(sums, abs=1e-9)


def test_closed_form_of_the_baseline():
    data = world(prompts=5, pool=16)
    final = data["base"].values[0, :, :, -1:]
    scorer = Scorer(
        final[:, :, None, :], (0,), final, Selection((0,), "rank_sum", None, np.ones(1)), 4, np.random.default_rng(0)
    )
    for n in (1, 4, 16):
        np.testing.assert_allclose(scorer.exact[n - 1, :, 0], best_of_n(final[:, :, 0], n), rtol=1e-12)


def test_same_seed_same_answer():
    data = world()
    one, two = fast(data, seed=3), fast(data, seed=3)
    assert one.schedule == two.schedule
    assert one.tuned_gain == two.tuned_gain and one.test_gain == two.test_gain
    assert one.test_interval == two.test_interval
    assert one.trials.equals(two.trials)
    assert not fast(data, seed=4).trials.equals(one.trials)


def test_gains_where_checks_tell_and_not_where_they_do_not():
    found = fast(world())
    assert found.complete and len(found.trials) == 150
    assert found.test_interval[0] > 0 and found.test_interval[0] < found.test_gain < found.test_interval[1]
    # Checks that tell nothing and cost something: no pruning is best.
    blind = fast(world(noise=np.r_[np.full(7, 1e3), 0.0]))
    assert blind.schedule == Schedule() and blind.test_gain == pytest.approx(0, abs=1e-9)
