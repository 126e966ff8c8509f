"""Settings of a curriculum, the rate of learning, losses and the order of the data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ttsnap_lib.errors import ConfigError, CurriculumError
from ttsnap_lib.finetuning.batches import Part, Plan, TargetScale, batch_loss
from ttsnap_lib.finetuning.config import CurriculumConfig, learning_rate, load_config, shipped_configs

MODELS = ("flux", "sdxl")
REWARDS = ("image_reward", "pickscore", "hpsv2")


def test_shipped_configurations_load():
    names = shipped_configs()
    assert {f"{model}-{reward}" for model in MODELS for reward in REWARDS} <= set(names)
    assert {"pocket-flux", "pocket-sdxl"} <= set(names)
    for name in names:
        config = load_config(name)
        first = {"pocket-flux": 5, "pocket-sdxl": 7}.get(name, 14)
        assert config.steps == tuple(range(first, -1, -1)), name
        assert config.reward == ("pocket-clip" if name.startswith("pocket") else name.split("-", 1)[1])


@pytest.mark.parametrize("reward", REWARDS)
def test_flux_configurations_are_as_published(reward):
    config = load_config(f"flux-{reward}")
    assert config.learning_rate == (3e-6 if reward == "image_reward" else 5e-7)
    assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.999, 0.01)
    assert (config.batch_size, config.epochs_per_step, config.max_grad_norm) == (100, 1, 5.0)
    assert (config.decay, config.decay_floor, config.mse, config.preference_tau) == ("linear", 0.5, 1.0, 0.5)


def test_yaml_round_trip_and_changes(tmp_path):
    import yaml

    config = load_config("sdxl-hpsv2", seed=4)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(path) == config and config.seed == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3


def test_unknown_keys_are_errors(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("learning_rat: 1.0e-3\n")
    with pytest.raises(ConfigError, match="learning_rate"):
        load_config(path)
    with pytest.raises(ConfigError, match="unknown key"):
        load_config("pocket-flux", sead=1)
    with pytest.raises(ConfigError, match="pocket-flux"):
        load_config("pocket-flu")
    path.write_text("learning_rate: 1e-5\n")  # text in YAML 1.1
    assert load_config(path).learning_rate == 1e-5
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": (0, 3)},
        {"steps": ()},
        {"steps": "14"},
        {"batch_size": 10, "group_size": 4},
        {"centered_mse": 1.0, "group_size": 1},
        {"preference": 1.0},
        {"mse": 0.0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"decay": "linaer"},
        {"accumulation": 9, "batch_size": 8},
        {"method": "qlora"},
        {"restart": "yes"},
        {"lora_rank": 2.5},
        {"max_updates_per_step": 0},
        {"patience": 2},
        {"seed": 2**63},
    ],
)
def test_bad_values(changes):
    with pytest.raises(ConfigError):
        CurriculumConfig(**changes)


def test_learning_rate_shapes():
    def rates(position=0, n=11, **changes):
        config = CurriculumConfig(steps=(1, 0), learning_rate=2.0, decay_floor=0.25, **changes)
        return np.array([learning_rate(config, position, k, n) for k in range(n)])

    linear = rates(decay="linear")
    np.testing.assert_allclose(linear, np.linspace(2, 0.5, 11))
    cosine = rates(decay="cosine")
    assert cosine[0] == 2 and abs(cosine[-1] - 0.5) < 1e-12 and abs(cosine[5] - 1.25) < 1e-12
    exponential = rates(decay="exponential")
    np.testing.assert_allclose(exponential[1:] / exponential[:-1], 0.25**0.1)
    assert (rates(decay="constant") == 2).all()
    np.testing.assert_allclose(rates(warmup_updates=4)[:4], [0.5, 1, 1.5, 2])
    np.testing.assert_allclose(rates(1, step_rate_decay=0.5), linear / 2)
    both = np.concatenate([rates(0, restart=False), rates(1, restart=False)])
    np.testing.assert_allclose(both, np.linspace(2, 0.5, 22))
    # Without a curriculum there is one stage: its updates are all there are.
    np.testing.assert_allclose(rates(curriculum=False, restart=False), linear)


LOSSES = [{"mse": 1.0}, {"centered_mse": 2.0}, {"preference": 1.0}, {"listwise": 1.0},
          {"mse": 0.5, "preference": 0.25}, {"mse": 1.0, "standardize": True}]  # fmt: skip


@pytest.mark.parametrize("weights", LOSSES)
def test_parts_of_a_batch_add_up(weights):
    config = CurriculumConfig(batch_size=24, group_size=4, **{"mse": 0.0, **weights})
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(24, generator=generator, dtype=torch.float64).float().requires_grad_()
    targets = torch.randn(24, generator=generator) * 3
    scale = TargetScale.of(targets, config.standardize)
    whole, _ = batch_loss(Part(scores, targets, 4), config, 24, scale)
    (expected,) = torch.autograd.grad(whole, scores)
    for cuts in ([8, 16], [4, 20], [12, 4, 8]):
        parts = zip(scores.split(cuts), targets.split(cuts), strict=True)
        total = sum(batch_loss(Part(s, t, 4), config, 24, scale)[0] for s, t in parts)
        (gradient,) = torch.autograd.grad(total, scores, retain_graph=True)
        torch.testing.assert_close(total, whole, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_losses_are_what_they_say():
    def loss(scores, targets, **weights):
        config = CurriculumConfig(batch_size=4, group_size=4, preference_tau=0.5, **{"mse": 0.0, **weights})
        return float(batch_loss(Part(scores, targets, 4), config, 4, TargetScale())[0])

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
    scale = TargetScale.of(targets, True)
    assert scale.center == 23 and scale.spread == pytest.approx(targets.std().item())
    assert TargetScale.of(torch.ones(4), True).spread == 1.0 and TargetScale.of(targets, False) == TargetScale()
    config = CurriculumConfig(batch_size=4, standardize=True)
    value, _ = batch_loss(Part(targets + 2, targets, 1), config, 4, scale)
    assert float(value) == pytest.approx(4 / scale.spread**2)


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
