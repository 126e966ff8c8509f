"""The scorer of the race: the winners of the public `prune`, less the control."""

import numpy as np
import pytest

from tests.tuning.world import world
from ttsnap_lib import Schedule, best_of_n, prune
from ttsnap_lib.tuning.race import CONTROL, Scorer, Selection, balanced_subsets


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
            subsets = scorer.labels[p][scorer.subsets[:, :n]]
            sums = []
            for plan in (schedule, Schedule()):
                won = prune(checks[p : p + 1], subsets, plan, final[p : p + 1], chosen, weights)[:, 0]
                sums.append(final[p, won].sum())
            if scorer.exact is not None:
                control = sums[1] - 16 * scorer.exact[n - 1, p, 0]
                sums = [sums[0] - CONTROL * control, 16 * scorer.exact[n - 1, p, 0]]
            assert [found[row, p], best[row, p]] == pytest.approx(sums, abs=1e-9)


@pytest.mark.parametrize("pool", [150, 300])  # sets of several words; positions that do not fit into a byte
def test_scores_of_large_pools_equal_prune(pool):
    """Budgets from a few candidates to the whole pool go through tables of several widths."""
    data = world(prompts=3, pool=pool)
    checks = data["noise_aware"].transpose("prompt", "image", "step", "reward").values
    final = data["base"].isel(step=-1).transpose("prompt", "image", "reward").values.astype(float)
    selection = Selection((0,), "rank_sum", None, np.ones(1))
    scorer = Scorer(checks, tuple(range(8)), final, selection, 4, np.random.default_rng(3))
    schedule = Schedule((1, 3, 6), (0.7, 0.5, 0.1))
    sizes = [1, 2, 40, 64, 65, 128, 129, pool]
    found = scorer.sums(schedule.steps, np.array([schedule.survivors(n) for n in sizes]), 1, 4, prompts=slice(1, 3))
    for p in (1, 2):
        for row, n in enumerate(sizes):
            subsets = scorer.labels[p][scorer.subsets[1:4, :n]]
            pruned, best = (
                final[p, prune(checks[p : p + 1], subsets, plan, final[p : p + 1])[:, 0]].sum()
                for plan in (schedule, Schedule())
            )
            control = best - 3 * scorer.exact[n - 1, p, 0]
            assert found[row, p - 1] == pytest.approx(pruned - CONTROL * control, abs=1e-9)


def test_closed_form_of_the_baseline():
    data = world(prompts=5, pool=16)
    final = data["base"].values[0, :, :, -1:]
    scorer = Scorer(
        final[:, :, None, :], (0,), final, Selection((0,), "rank_sum", None, np.ones(1)), 4, np.random.default_rng(0)
    )
    for n in (1, 4, 16):
        np.testing.assert_allclose(scorer.exact[n - 1, :, 0], best_of_n(final[:, :, 0], n), rtol=1e-12)
