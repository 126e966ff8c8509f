"""Settings of finetuning and the rate of learning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ttsnap_lib.errors import ConfigError
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
        {"standardize": "yes"},
        {"lora_rank": 2.5},
        {"max_updates_per_step": 0},
        {"seed": 2**63},
    ],
)
def test_bad_values(changes):
    with pytest.raises(ConfigError):
        CurriculumConfig(**changes)


def test_learning_rate_shapes():
    def rates(n=11, **changes):
        config = CurriculumConfig(steps=(1, 0), learning_rate=2.0, decay_floor=0.25, **changes)
        return np.array([learning_rate(config, k, n) for k in range(n)])

    np.testing.assert_allclose(rates(decay="linear"), np.linspace(2, 0.5, 11))
    cosine = rates(decay="cosine")
    assert cosine[0] == 2 and abs(cosine[-1] - 0.5) < 1e-12 and abs(cosine[5] - 1.25) < 1e-12
    exponential = rates(decay="exponential")
    np.testing.assert_allclose(exponential[1:] / exponential[:-1], 0.25**0.1)
    assert (rates(decay="constant") == 2).all()
    np.testing.assert_allclose(rates(warmup_updates=4)[:4], [0.5, 1, 1.5, 2])
