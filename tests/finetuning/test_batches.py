"""Losses, and which pictures every update sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttsnap_lib.errors import CurriculumError
from ttsnap_lib.finetuning.batches import Plan, batch_loss, target_scale
from ttsnap_lib.finetuning.config import CurriculumConfig

LOSSES = [{"mse": 1.0}, {"centered_mse": 2.0}, {"preference": 1.0}, {"listwise": 1.0},
          {"mse": 0.5, "preference": 0.25}, {"mse": 1.0, "standardize": True}]  # fmt: skip


@pytest.mark.parametrize("weights", LOSSES)
def test_parts_of_a_batch_add_up(weights):
    config = CurriculumConfig(batch_size=24, group_size=4, **{"mse": 0.0, **weights})
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(24, generator=generator, dtype=torch.float64).float().requires_grad_()
    targets = torch.randn(24, generator=generator) * 3
    scale = target_scale(targets, config.standardize)
    whole, _ = batch_loss(scores, targets, config, 24, scale)
    (expected,) = torch.autograd.grad(whole, scores)
    for cuts in ([8, 16], [4, 20], [12, 4, 8]):
        parts = zip(scores.split(cuts), targets.split(cuts), strict=True)
        total = sum(batch_loss(s, t, config, 24, scale)[0] for s, t in parts)
        (gradient,) = torch.autograd.grad(total, scores, retain_graph=True)
        torch.testing.assert_close(total, whole, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_losses_are_what_they_say():
    def loss(scores, targets, **weights):
        config = CurriculumConfig(batch_size=4, group_size=4, preference_tau=0.5, **{"mse": 0.0, **weights})
        return float(batch_loss(scores, targets, config, 4, (0.0, 1.0))[0])

    targets, scores = torch.tensor([1.0, 2.0, 4.0, 0.0]), torch.tensor([0.0, 2.0, 3.0, 1.0])
    assert loss(scores, targets, mse=1.0) == pytest.approx(0.75)
    assert loss(scores, targets, mse=2.0) == pytest.approx(1.5)
    assert loss(targets + 7, targets, centered_mse=1.0) == pytest.approx(0, abs=1e-9)
    assert loss(targets + 7, targets, mse=1.0) == pytest.approx(49)
    # Bradley-Terry by hand, with probabilities of 64-bit floats.
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    by_hand = 0.0
    for i, j in pairs:
        better = 1 / (1 + np.exp(-(targets[i] - targets[j]).item() / 0.5))
        predicted = 1 / (1 + np.exp(-(scores[i] - scores[j]).item() / 0.5))
        by_hand -= (better * np.log(predicted) + (1 - better) * np.log(1 - predicted)) / len(pairs)
    assert loss(scores, targets, preference=1.0) == pytest.approx(by_hand, rel=1e-4)
    for name in ("preference", "listwise"):  # both are least where the predictions are the targets
        assert loss(targets, targets, **{name: 1.0}) < loss(targets * 0.7, targets, **{name: 1.0})
        assert loss(targets + 3, targets, **{name: 1.0}) == pytest.approx(
            loss(targets, targets, **{name: 1.0}), rel=1e-5
        )


def test_standardization_uses_the_targets_of_the_whole_batch():
    targets = torch.tensor([20.0, 22.0, 24.0, 26.0])
    center, spread = target_scale(targets, True)
    assert center == 23 and spread == pytest.approx(targets.std().item())
    assert target_scale(torch.ones(4), True)[1] == 1.0 and target_scale(targets, False) == (0.0, 1.0)
    config = CurriculumConfig(batch_size=4, standardize=True)
    value, _ = batch_loss(targets + 2, targets, config, 4, (center, spread))
    assert float(value) == pytest.approx(4 / spread**2)


def test_every_picture_once_per_epoch_and_groups_of_one_prompt():
    plan = Plan(CurriculumConfig(steps=(3, 1), batch_size=8, group_size=4, epochs_per_step=2), 5, 8)
    stage = plan.stages()[1]
    assert plan.updates(stage) == 2 * 5 and stage.steps == (1,)
    seen = [plan.batch(stage, update)[0] for update in range(10)]
    for epoch in (seen[:5], seen[5:]):
        rows = np.concatenate(epoch).reshape(-1, 2)
        assert len(np.unique(rows, axis=0)) == 40 == len(rows)
    assert all((np.ptp(batch[:, :, 0], axis=1) == 0).all() for batch in seen)
    again = Plan(plan.config, 5, 8)
    np.testing.assert_array_equal(again.batch(stage, 7)[0], seen[7])
    assert any((a != b).any() for a, b in zip(seen[:5], seen[5:], strict=True))
    other = Plan(plan.config.replace(seed=1), 5, 8)
    assert (other.batch(stage, 0)[0] != seen[0]).any()
    assert (plan.batch(plan.stages()[0], 0)[0] != seen[0]).any()


def test_without_a_curriculum_all_steps_are_mixed():
    plan = Plan(CurriculumConfig(steps=(3, 2, 1), curriculum=False, batch_size=8, group_size=4), 20, 8)
    (stage,) = plan.stages()
    assert plan.updates(stage) == 3 * 20
    steps = np.concatenate([plan.batch(stage, update)[1] for update in range(60)])
    assert set(steps) == {1, 2, 3} and min(np.bincount(steps)[1:]) > 20


def test_groups_larger_than_the_images_are_refused():
    with pytest.raises(CurriculumError, match="at most the 3 images"):
        Plan(CurriculumConfig(batch_size=8, group_size=4), 5, 3)
