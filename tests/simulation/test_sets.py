"""Sets of images simulated: one image is today's winner, none different is the top k, and the rule at every check."""

from __future__ import annotations

import numpy as np
import pytest

from ttsnap_lib import CostModel, Schedule, open_rewards, optimize_schedule, save_rewards, simulate
from ttsnap_lib.errors import BudgetError, ConfigError, TensorError
from ttsnap_lib.sets import choose_set, mean_distance, pairwise_distances
from ttsnap_lib.simulation.plots import set_trade_off, tau_per_step
from ttsnap_lib.simulation.sets import distance_agreement, simulate_sets
from ttsnap_lib.tensors.tensor import synthetic_rewards

COST = CostModel(step=3, verify=0.5, decode=1, n_steps=8)
SCHEDULE = Schedule((1, 4), (0.5, 0.6))
METHODS = ["best_of_n", "ttsp", "ttsnap"]
KNOWN = np.array([0.1, 0.1, 0.3, 0.3, 0.6, 0.6, 0.9, 1.0])  # what the estimates of a step show of the final image


@pytest.fixture(scope="module")
def tensor():
    dataset = synthetic_rewards(12, 30, 8, rewards=("a", "b"))
    rng = np.random.default_rng(0)
    seen, noise = rng.normal(size=(12, 30, 1, 6)), rng.normal(size=(12, 30, 8, 6))
    mixed = seen * KNOWN[:, None] + noise * (1 - KNOWN[:, None])
    return dataset.assign(embedding=(("prompt", "image", "step", "feature"), mixed.astype(np.float16)))


@pytest.mark.parametrize("options", [{"report": ["b"]}, {}, {"combine": "z_score"},
                                     {"combine": "weighted_sum", "weights": [1, 2]}])  # fmt: skip
def test_a_set_of_one_is_the_winner_of_simulate(tensor, options):
    found = simulate_sets(tensor, METHODS, 1, [0], budget=200, cost=COST, schedule=SCHEDULE, rng=3, **options)
    for m, method in enumerate(METHODS):
        one = simulate(tensor, method, budget=200, cost=COST, schedule=SCHEDULE, rng=3, **options)
        np.testing.assert_allclose(found.reward[m, 0], one.per_prompt, rtol=1e-12)
        assert found.n[m] == one.n and found.spent[m] == one.spent
    assert np.isnan(found.distance).all()


def test_every_stage_follows_the_rule(tensor):
    """By hand: the images of each stage are looked up by their index, and chosen one prompt at a time."""
    found = simulate_sets(tensor, METHODS, 3, [0, 0.7], n=12, schedule=SCHEDULE, iterations=2, rng=5, report=["b"])
    drawn = np.random.default_rng(5)
    subsets, labels = (drawn.permuted(np.tile(np.arange(30), (rows, 1)), axis=1) for rows in (2, 12))
    base, aware = (tensor[name].values[0] for name in ("base", "noise_aware"))
    for m, (checks, scores) in enumerate((((), base), ((1, 4), base), ((1, 4), aware))):
        for w, diversity in enumerate((0, 0.7)):
            for p in (0, 7):
                sets = []
                for subset in subsets[:, :12]:
                    alive = np.sort(labels[p][subset])
                    for at, count in zip((*checks, 7), (*(6, 4)[: len(checks)], 3), strict=True):
                        values = (base if at == 7 else scores)[p, alive, at]
                        far = pairwise_distances(tensor["embedding"].values[p, alive, at])
                        alive = np.sort(alive[choose_set(values[:, None], count, diversity, far)])
                    sets.append(alive)
                assert found.reward[m, w, 0, p] == pytest.approx(base[p, sets, 7].mean())
                apart = [mean_distance(pairwise_distances(tensor["embedding"].values[p, one, 7])) for one in sets]
                assert found.distance[m, w, p] == pytest.approx(np.mean(apart))


def test_difference_is_paid_with_reward(tensor):
    weights = [0, 0.5, 1, 2]
    found = simulate_sets(tensor, METHODS, 4, weights, budget=250, cost=COST, schedule=SCHEDULE, report=["b"])
    frame = found.frame()
    assert frame.groupby(["method", "diversity"]).size().eq(2).all() and len(frame) == 24
    for _, rows in frame[frame["reward"] == "a"].groupby("method"):
        assert (np.diff(rows["distance"]) > 0).all() and (np.diff(rows["mean"]) < 0).all()
        assert ((rows["low"] < rows["mean"]) & (rows["mean"] < rows["high"])).all()
        assert ((rows["distance_low"] < rows["distance"]) & (rows["distance"] < rows["distance_high"])).all()
    ax = set_trade_off(frame, "a")
    assert [text.get_text() for text in ax.texts] == ["0", "0.5", "1", "2"] * 3
    np.testing.assert_allclose(ax.lines[0].get_xdata().astype(float), frame["distance"][:8:2])
    with pytest.raises(ConfigError, match="reward: got None"):
        set_trade_off(frame)


def test_what_the_distances_of_estimates_tell(tensor):
    frame = distance_agreement(tensor)
    assert frame["step"].tolist() == list(range(8)) and frame["correlation"].iloc[-1] == pytest.approx(1)
    late = frame[frame["step"].isin([2, 4, 6])]["correlation"]
    assert (np.diff(late) > 0).all() and late.iloc[-1] > 0.8 and abs(frame["correlation"][0]) < 0.2


def test_a_tensor_with_embeddings_is_drawn_and_tuned_as_any(tensor):
    bare = tensor.drop_vars("embedding")
    budgets = [3 * COST.total(1), 4 * COST.total(1)]
    taus = [tau_per_step(one).get_lines()[0].get_ydata() for one in (tensor, bare)]
    tuned = [optimize_schedule(one, COST, budgets, n_trials=5, seed=0) for one in (tensor, bare)]
    np.testing.assert_array_equal(*taus)
    assert tuned[0].schedule == tuned[1].schedule


def test_embeddings_are_kept_with_a_tensor(tensor, tmp_path):
    path = save_rewards(tensor.isel(prompt=[3, 1], step=[1, 7]), tmp_path / "r.zarr")
    again = open_rewards(path)
    assert again["embedding"].dtype == np.float16 and again["embedding"].dims == ("prompt", "image", "step", "feature")
    np.testing.assert_array_equal(again["embedding"].values, tensor["embedding"].values[[3, 1]][:, :, [1, 7]])


def test_bad_input(tensor):
    options = {"n": 12, "schedule": SCHEDULE, "iterations": 1, "report": ["b"]}
    with pytest.raises(BudgetError, match="keep: got 5, expected at most 4"):
        simulate_sets(tensor, METHODS, 5, **options)
    with pytest.raises(ConfigError, match="with keep=1"):
        simulate_sets(tensor, METHODS, 1, **options)
    with pytest.raises(ConfigError, match="either budget or n"):
        simulate_sets(tensor, METHODS, 2, **options | {"n": None})
    bare = tensor.drop_vars("embedding")
    with pytest.raises(TensorError, match="without embeddings"):
        simulate_sets(bare, METHODS, 2, **options)
    with pytest.raises(TensorError, match="without embeddings"):
        distance_agreement(bare)
    assert np.isnan(simulate_sets(bare, METHODS, 2, [0], **options).frame()["distance"]).all()
    gaps = tensor.copy(deep=True)
    gaps["embedding"][4, :, 4] = np.nan
    with pytest.raises(TensorError, match="embeddings of prompt 4 at step 4"):
        simulate_sets(gaps, METHODS, 2, **options)
    simulate_sets(gaps, ["best_of_n"], 2, **options)  # it reads the final images alone
