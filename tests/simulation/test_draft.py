"""Drafts beside the other methods: who wins, at what price, and which drafts belong to a pool."""

import dataclasses

import numpy as np
import pytest

from ttsnap_lib import CostModel, Schedule, simulate, sweep
from ttsnap_lib.errors import BudgetError, ConfigError, CostError, TensorError
from ttsnap_lib.schedule import Draft
from ttsnap_lib.simulation import plots
from ttsnap_lib.simulation.draft import Drafts
from ttsnap_lib.simulation.simulate import curves
from ttsnap_lib.tensors.tensor import make_rewards, synthetic_rewards

COST = CostModel(step=3, verify=0.5, decode=1, n_steps=8, per_prompt=0.25)
BUDGETS = [130, 200]
MADE = {"made_with": {"seed": 0, "weights": "aa"}, "model": "m", "scores": {"a": {"weights": "w"}}}


@pytest.fixture(scope="module")
def full():
    tensor = synthetic_rewards(6, 30, 8, rewards=("a",))
    return tensor.assign_attrs(MADE)


def drafts_of(full, noise=0.3, **attrs):
    """Draft rewards: those of the finished pictures, and noise."""
    final = full["base"].values[..., -1:]
    wrong = np.random.default_rng(0).normal(0, noise, final.shape).astype(np.float32) if noise else 0
    texts = full["prompt_text"].values.tolist() if "prompt_text" in full.variables else None
    return make_rewards(
        (final + wrong).astype(np.float32), rewards=["a"], steps=[2], prompt_text=texts, attributes={**MADE, **attrs}
    )


def test_the_best_of_the_best_drafts_wins(full):
    drafts, final = drafts_of(full), full["base"].values[0, :, :, -1]
    result = simulate(full, Drafts(drafts, 4), n=30, iterations=2)  # of the whole pool: one subset
    best = np.argsort(-drafts["base"].values[0, :, :, 0], axis=1)[:, :4]
    assert result.winners[0].tolist() == [row[final[p, row].argmax()] for p, row in enumerate(best)]
    assert result.method == "draft 3, finish 4"


def test_perfect_drafts_are_best_of_n_at_the_price_of_drafts(full):
    drafts = Drafts(drafts_of(full, noise=0), 1)
    frame = sweep(full, ["ttsnap", drafts], BUDGETS, COST, Schedule((1, 4), (0.5, 0.4)), iterations=5, rng=3)
    assert frame["method"].unique().tolist() == ["ttsnap", "draft 3, finish 1"]
    mine = frame[frame["method"] == str(drafts)]
    # A draft: 3 steps, a decode, a score; a full run besides; the text once.
    assert mine["n"].tolist() == [int((b - 0.25 - (8 * 3 + 1.5)) // (3 * 3 + 1.5)) for b in BUDGETS]
    assert mine["spent"].tolist() == [0.25 + n * 10.5 + 25.5 for n in mine["n"]]
    for n, mean in zip(mine["n"], mine["mean"], strict=True):
        assert mean == pytest.approx(simulate(full, "best_of_n", n=n, iterations=5, rng=3).mean[0])  # the same subsets
    assert (mine["gain_low"] > 0).all()


def test_tables_and_figures_show_drafts_beside_the_methods(full):
    found = curves(full, ["best_of_n", Drafts(drafts_of(full), 2)], BUDGETS, COST, iterations=5)
    assert "draft 3, finish 2" in plots.by_budget(found, COST.unit).columns.get_level_values(0)
    labels = [label.get_text() for label in plots.gain_dots(found.relative_gains()).get_yticklabels()]
    assert labels == ["draft 3, finish 2"]


def test_seconds_by_batch_charge_the_batches_that_run():
    table = CostModel(step={1: 1.0, 8: 0.5}, verify=0.1, n_steps=8, unit="seconds")
    draft = Draft(3, 2)
    each = dataclasses.replace(table, n_steps=3).total(8)
    assert table.total(8, draft) == pytest.approx(each + table.total(2))
    assert table.candidates(table.total(8, draft), draft) == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"made_with": {"seed": 1, "weights": "aa"}}, "seed 1, expected 0"),
        ({"model": "other"}, "model 'other', expected 'm'"),
        ({"scores": {"a": {"weights": "v"}}}, "weights of a 'v'"),
    ],
)
def test_drafts_of_another_pool_are_refused(full, change, says):
    with pytest.raises(TensorError, match=says):
        simulate(full, Drafts(drafts_of(full, **change), 1), n=5)


def test_what_else_does_not_fit(full):
    drafts = drafts_of(full)
    with pytest.raises(TensorError, match=r"without the image 20 and 9 more"):
        simulate(full, Drafts(drafts.isel(image=slice(0, 20)), 1), n=5)
    texts = drafts.assign_coords(prompt_text=("prompt", ["x"] * 6))
    with pytest.raises(TensorError, match=r"prompt 0 'x', expected"):
        simulate(full.assign_coords(prompt_text=("prompt", list("abcdef"))), Drafts(texts, 1), n=5)
    with pytest.raises(ConfigError, match="steps of a draft: got 8"):
        simulate(full, Drafts(full, 1), n=5)
    with pytest.raises(BudgetError, match=r"at least 72.25 TFLOPs, the cost of all of its full runs"):
        simulate(full, Drafts(drafts, 2), budget=60, cost=COST)
    with pytest.raises(BudgetError, match="n: got 1"):
        simulate(full, Drafts(drafts, 2), n=1)
    with pytest.raises(CostError, match="knows no drafts"):
        simulate(full, Drafts(drafts, 2), budget=60, cost=dataclasses.replace(COST, accounting="published"))
    with pytest.warns(UserWarning, match="does not tell its seeds"):
        simulate(full.assign_attrs(made_with={}).drop_attrs(), Drafts(drafts, 1), n=5)
