"""Functions as rewards, and several rewards in one pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.worlds import PROMPTS, as_tensor
from ttsnap_lib.errors import ConfigError, RewardError
from ttsnap_lib.rewards.base import CallableReward, score_many
from ttsnap_lib.rewards.loading import load_reward


def redness(prompts, images):
    """Return the mean of the red channel plus the prompt's length."""
    return [np.asarray(image)[..., 0].mean() + len(prompt) for prompt, image in zip(prompts, images, strict=True)]


def test_pil_and_tensor_agree(images):
    reward = load_reward(redness, device="cpu")
    assert reward.name == "redness"
    expected = np.array(redness(PROMPTS, images), np.float32)
    for given in (images, as_tensor(images)):
        for batch_size in (1, 3, 32):
            assert np.array_equal(reward.score(PROMPTS, given, batch_size=batch_size), expected)
    named = load_reward("tests.rewards.test_callable:redness", name="red")
    assert named.name == "red" and np.array_equal(named.score(PROMPTS, images), expected)


def test_functions_of_tensors(images):
    reward = load_reward(lambda prompts, x: x.mean((1, 2, 3)), name="mean", takes="tensor", device="cpu")
    np.testing.assert_allclose(reward.score("x", images), as_tensor(images).mean((1, 2, 3)).numpy(), rtol=1e-6)
    with pytest.raises(RewardError, match="differ in size"):
        reward.score("x", [*images, Image.new("RGB", (5, 5))])
    assert reward.score("x", [images[0], Image.new("RGB", (5, 5))], batch_size=1).shape == (2,)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, images: [1.0], "wrong shape"),
        (lambda prompts, images: torch.zeros(len(images), 1), "wrong shape"),
        (lambda prompts, images: ["high"] * len(images), "not numbers"),
        (lambda prompts, images: [float("inf")] * len(images), "not finite"),
    ],
)
def test_bad_functions(function, message, images):
    with pytest.raises(RewardError, match=message):
        load_reward(function, name="bad").score("x", images)


def test_bad_names():
    with pytest.raises(RewardError, match="cannot be imported"):
        load_reward("no.such.module:function")
    with pytest.raises(RewardError, match="cannot be imported"):
        load_reward("math:no_such")
    with pytest.raises(RewardError, match="a callable"):
        load_reward("math:pi")
    with pytest.raises(RewardError, match="no weights to adapt"):
        load_reward(redness, adapters="somewhere")


def test_several_rewards_in_one_pass(clip_folder, images, tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    rewards = [
        load_reward(clip_folder, device="cpu", name="one"),
        load_reward(clip_folder, device="cpu", name="two", scale=1.0),
        CallableReward(redness),
    ]
    expected = {reward.name: reward.score(PROMPTS, images) for reward in rewards}
    opened: list[str] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **kw: (opened.append(str(path)), original(path, **kw))[1])
    scores = score_many(rewards, PROMPTS, paths, batch_size=3)
    assert list(scores) == ["one", "two", "redness"]
    for name, values in scores.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5)
    assert opened == [str(path) for path in paths]  # each file once
    with pytest.raises(ConfigError, match="distinct names"):
        score_many([rewards[0], rewards[0]], PROMPTS, images)
