"""Best-of-N in closed form, and pruning held to its plain statement and to the released winners."""

import json
from math import comb

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import plain
from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel, Schedule, best_of_n, prune
from ttsnap_lib.errors import ConfigError, ScheduleError, TensorError
from ttsnap_lib.tensors.tensor import synthetic_rewards

SCHEDULE = Schedule((1, 4), (0.5, 0.4))
NAMES = {"imr": "image_reward", "pic": "pickscore"}


@pytest.fixture(scope="module")
def tensor():
    return synthetic_rewards(12, 30, 8, rewards=("a", "b", "c"))


@pytest.mark.parametrize("n", [1, 2, 7, 29, 30])
def test_best_of_n_is_the_exact_expectation(n):
    final = np.random.default_rng(0).standard_normal((3, 30))
    weights = [comb(k - 1, n - 1) / comb(30, n) if k >= n else 0 for k in range(1, 31)]
    assert best_of_n(final, n) == pytest.approx(np.sort(final, axis=1) @ weights, rel=1e-12)


@st.composite
def cases(draw):
    """Small tensors with many ties, any schedule, unordered subsets."""
    pool, n_steps, n_rewards = draw(st.integers(1, 70)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    rewards = rng.integers(0, draw(st.sampled_from([2, 5, 1000])), (3, pool, n_steps, n_rewards)).astype(np.float32)
    steps = sorted(draw(st.sets(st.integers(0, n_steps - 2), max_size=4))) if n_steps > 1 else []
    schedule = Schedule(steps, [draw(st.floats(0.01, 1)) for _ in steps])
    n = draw(st.integers(1, pool))
    subsets = np.stack([rng.permutation(pool)[:n] for _ in range(2)])
    return rewards, subsets, schedule


@settings(max_examples=150)
@given(cases(), st.sampled_from(["rank_sum", "z_score", "weighted_sum"]))
def test_prune_equals_the_plain_statement_of_the_rule(case, combine):
    rewards, subsets, schedule = case
    weights = [0.5, 2.0, -1.0][: rewards.shape[3]] if combine == "weighted_sum" else None
    if combine == "z_score" and rewards.shape[3] > 1:
        # sums of z-scores of tied sets are equal only up to rounding, so ties are taken out here; of two candidates
        # the z-scores are 1 and -1 whatever the rewards, and two rewards that disagree tie
        assume(2 not in schedule.survivors(subsets.shape[1]))
        rewards = rewards + np.random.default_rng(0).random(rewards.shape).astype(np.float32) * 1e-2
    winners = prune(rewards, subsets, schedule, combine=combine, weights=weights)
    assert winners.dtype == np.int64 and winners.shape == (2, 3)
    for i, subset in enumerate(subsets):
        for p in range(3):
            expected = plain.prune(rewards[p], subset, schedule, rewards[p, :, -1], combine, weights)
            assert winners[i, p] == expected


def test_ties_go_to_the_lower_index():
    rewards = np.zeros((1, 6, 3))
    assert prune(rewards, np.array([[5, 3, 4]]), Schedule((0,), (0.5,)))[0, 0] == 3
    both = np.zeros((1, 6, 3, 2))
    both[0, 2, :, 0], both[0, 4, :, 1] = 1, 1  # equal rank sums: 2 is first in one and last in the other, so is 4
    assert prune(both, np.array([[4, 2]]), Schedule())[0, 0] == 2


def test_dims_by_name_and_steps_by_coordinate(tensor):
    array = tensor["noise_aware"]
    subsets = np.stack([np.random.default_rng(k).permutation(30)[:10] for k in range(3)])
    plain_order = prune(array.transpose("prompt", "image", "step", "reward").values, subsets, SCHEDULE)
    assert np.array_equal(prune(array, subsets, SCHEDULE), plain_order)
    assert np.array_equal(prune(array.transpose("step", ...), subsets, SCHEDULE), plain_order)
    assert np.array_equal(prune(array.sel(step=[1, 4, 7]), subsets, SCHEDULE), plain_order)
    with pytest.raises(ScheduleError, match=r"one of the scored steps \[1, 7\]"):
        prune(array.sel(step=[1, 7]), subsets, SCHEDULE)


def test_nan_is_refused_only_where_it_would_be_read(tensor):
    rewards = tensor["base"].values[0].copy()
    subsets = np.arange(30)[None]
    clean = prune(rewards, subsets, SCHEDULE)
    order = np.argsort(-rewards[0, :, 1], kind="stable")
    rewards[0, order[-1], 4] = np.nan  # pruned at step 1, so nobody looks
    rewards[:, :, 2] = np.nan  # no pruning step
    assert np.array_equal(prune(rewards, subsets, SCHEDULE), clean)
    assert np.array_equal(prune(rewards, np.delete(subsets, order[-1], axis=1), SCHEDULE).shape, (1, 12))
    rewards[0, order[0], 4] = np.nan
    with pytest.raises(TensorError, match="prompt 0 at stage 1"):
        prune(rewards, subsets, SCHEDULE)


def test_weights_go_with_the_weighted_sum(tensor):
    subsets, base = np.arange(10)[None], tensor["base"].values[0]
    for combine, weights in (("rank_sum", [1.0]), ("weighted_sum", None), ("weighted_sum", [1.0, 2.0])):
        with pytest.raises(ConfigError, match="weights"):
            prune(base, subsets, SCHEDULE, combine=combine, weights=weights)


def test_golden_winners_and_means(reference, pools):
    golden = np.load(reference / "golden_official.npz")
    cases = sorted({name.split("_")[0] for name in golden.files if name.startswith("c")})
    assert len(cases) == 6
    for case in cases:
        meta = json.loads(str(golden[f"{case}_meta"]))
        model, short = meta["tensor"].split("_")
        one = pools[model].sel(reward=NAMES[short])
        final = one["base"].values[:, :, -1]
        subsets = np.stack([np.flatnonzero(mask) for mask in golden[f"{case}_masks"]])
        schedule = Schedule(meta["steps"], meta["keep_ratios"])
        scores = one["noise_aware" if meta["variant"] == "naft" else "base"]
        winners = prune(scores, subsets, schedule, final=final)
        assert np.array_equal(winners, golden[f"{case}_winner"])
        means = np.take_along_axis(final[None].astype(float), winners[:, :, None], axis=2)[..., 0].mean(1)
        assert means == pytest.approx(golden[f"{case}_mean"], abs=1e-6)
        cost = CostModel(step=meta["denoise"], verify=meta["verify"], accounting="published")
        assert cost.total(meta["n"], schedule) / meta["n"] == pytest.approx(meta["cost_official"], rel=1e-12)


def test_golden_best_of_n(reference, pools):
    golden = np.load(reference / "golden_official.npz")
    final = pools["flux"].sel(reward="image_reward")["base"].values
    for n in (1, 10, 50):
        subsets = np.stack([np.flatnonzero(mask) for mask in golden[f"bon{n}_masks"]])
        winners = prune(final, subsets, Schedule())
        means = np.take_along_axis(final[None, :, :, -1].astype(float), winners[:, :, None], axis=2)[..., 0].mean(1)
        assert means == pytest.approx(golden[f"bon{n}_mean"], abs=1e-6)


def test_multi_reward_agrees_with_the_plain_rule(pools):
    flux = pools["flux"].isel(prompt=slice(0, 40))
    final = np.moveaxis(flux["base"].values[..., -1], 0, -1)
    scores = flux["noise_aware"].transpose("prompt", "image", "step", "reward").values
    rng = np.random.default_rng(0)
    subsets = np.stack([rng.permutation(200)[:38] for _ in range(2)])
    winners = prune(scores, subsets, PUBLISHED_SCHEDULE, final=final)
    for i in range(2):
        for p in range(40):
            assert winners[i, p] == plain.prune(scores[p], subsets[i], PUBLISHED_SCHEDULE, final[p])
