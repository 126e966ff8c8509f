"""ImageReward through the package's own class; random weights, a small text tower and tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.worlds import PROMPTS, as_tensor, randomize_image_reward
from ttsnap_lib.errors import RewardError
from ttsnap_lib.rewards.image_reward import ImageRewardModel, build_module
from ttsnap_lib.rewards.loading import load_reward


def _check_parity(module, images) -> None:
    raw = ImageRewardModel("image_reward", module, device="cpu")
    standard = ImageRewardModel("image_reward", module, device="cpu", standardize=True)
    with torch.no_grad():
        single = np.array([module.score(prompt, image) for prompt, image in zip(PROMPTS, images, strict=False)])
        ranks, ranked = module.inference_rank(PROMPTS[0], images)
    assert np.ptp(single) > 1e-2
    prompts = PROMPTS[: len(images)]
    for batch_size in (1, 3, 32):
        np.testing.assert_allclose(standard.score(prompts, images, batch_size=batch_size), single, rtol=1e-4, atol=1e-5)
        own = standard.score(PROMPTS[0], images, batch_size=batch_size)
        np.testing.assert_allclose(own, ranked, rtol=1e-4, atol=1e-5)
        assert (np.argsort(np.argsort(-own)) + 1).tolist() == ranks
    np.testing.assert_allclose(
        raw.score(prompts, images), single * 1.0333394966054072 + 0.16717362830052426, rtol=1e-4, atol=1e-5
    )


def test_equals_the_package(image_reward_module, images):
    _check_parity(image_reward_module, images)


def test_long_prompts_are_cut_at_35_tokens(image_reward_module, images):
    reward = ImageRewardModel("image_reward", image_reward_module, device="cpu")
    assert reward.encode_text(PROMPTS).tensors["input_ids"].shape == (7, 35)
    long = " ".join(["red circle"] * 40)
    assert reward.score(long, images[:1]) == pytest.approx(reward.score(long + " blue", images[:1]), rel=1e-6)


def test_tensors_score_as_images(image_reward_module, images):
    reward = ImageRewardModel("image_reward", image_reward_module, device="cpu")
    assert np.array_equal(reward.score(PROMPTS, as_tensor(images)), reward.score(PROMPTS, images))


def test_forward_trains(image_reward_module, images):
    reward = ImageRewardModel("image_reward", image_reward_module, device="cpu")
    out = reward.forward(reward.preprocess(images[:3]), reward.encode_text(PROMPTS[:3]))
    assert out.shape == (3,)
    out.sum().backward()
    assert image_reward_module.blip.visual_encoder.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    image_reward_module.zero_grad()


@pytest.mark.parametrize("where", ["folder", "working directory"])
def test_loads_the_checkpoint_format(image_reward_module, bert_folder, med_config, tmp_path, monkeypatch, where):
    """`load_reward` end to end with local files; the real vision tower is replaced in the fixture's way."""
    from ImageReward.models.BLIP import blip_pretrain

    monkeypatch.setattr(
        blip_pretrain, "create_vit", lambda *given: (type(image_reward_module.blip.visual_encoder)(
            img_size=224, patch_size=56, embed_dim=48, depth=2, num_heads=4), 48)
    )  # fmt: skip
    options = {"tokenizer": bert_folder}
    if where == "working directory":  # where the package itself looks for `bert-base-uncased`
        monkeypatch.chdir(bert_folder.parent)
        options = {}
    state = image_reward_module.state_dict()
    torch.save(state, tmp_path / "ImageReward.pt")
    given = {"weights": tmp_path / "ImageReward.pt", "med_config": med_config, "device": "cpu", **options}
    reward = load_reward("image_reward", **given)
    assert reward.name == "image_reward" and not reward.standardize
    for key, value in reward.module.state_dict().items():
        assert torch.equal(value, state[key]), key
    state = {key: value for key, value in state.items() if key != "mlp.layers.0.bias"}
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(RewardError, match=r"mlp\.layers\.0\.bias"):
        load_reward("image_reward", **given)


def test_missing_files(tmp_path, bert_folder, med_config):
    with pytest.raises(RewardError, match="weights file"):
        load_reward("image_reward", weights=tmp_path / "no.pt", med_config=med_config)
    with pytest.raises(RewardError, match="med_config"):
        build_module(tmp_path / "no.json", bert_folder)


@pytest.mark.slow
def test_equals_the_package_at_real_size(bert_folder, med_config, images):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build_module(med_config, bert_folder)
    assert sum(p.numel() for p in module.blip.visual_encoder.parameters()) > 3e8
    randomize_image_reward(module)
    _check_parity(module, images[:3])
