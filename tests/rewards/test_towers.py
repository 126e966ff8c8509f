"""CLIP rewards against the model card's formula and open_clip's own, random weights in the real classes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from tests.rewards.test_pixels import hps_transform
from tests.worlds import PROMPTS, as_tensor, embedding, make_images, pillow_processor
from ttsnap_lib.errors import RewardError
from ttsnap_lib.rewards.base import TextBatch
from ttsnap_lib.rewards.loading import load_reward


def _model_card(folder, prompts: list[str], images: list[Image.Image]) -> np.ndarray:
    """PickScore's published formula, one image at a time."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder).tokenizer
    processor = CLIPProcessor(pillow_processor().from_pretrained(folder), tokenizer)
    scores = []
    with torch.no_grad():
        for prompt, image in zip(prompts, images, strict=True):
            pixels = processor(images=image, return_tensors="pt")
            text = processor(
                text=prompt, padding=True, truncation=True, max_length=model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )  # fmt: skip
            image_embs = embedding(model.get_image_features(**pixels))
            image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
            text_embs = embedding(model.get_text_features(**text))
            text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
            scores.append((model.logit_scale.exp() * (text_embs @ image_embs.T)[0]).item())
    return np.array(scores, np.float32)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_equals_the_model_card_formula(clip_folder, images, batch_size):
    reward = load_reward(str(clip_folder), device="cpu")
    expected = _model_card(clip_folder, PROMPTS, images)
    scores = reward.score(PROMPTS, images, batch_size=batch_size)
    assert scores.dtype == np.float32 and scores.shape == (7,)
    assert np.ptp(expected) > 0.1  # images and prompts matter, so equality says something
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_forward_trains_and_agrees_with_score(clip_folder, images):
    reward = load_reward(clip_folder, device="cpu")
    reward.module.requires_grad_(True)
    pixels, text = reward.preprocess(images), reward.encode_text(PROMPTS)
    assert pixels.shape == (7, 3, 32, 32) and isinstance(text, TextBatch) and len(text) == 7
    out = reward.forward(pixels, text)
    assert out.shape == (7,) and out.dtype == torch.float32
    np.testing.assert_allclose(out.detach().numpy(), reward.score(PROMPTS, images), rtol=1e-5)
    out.sum().backward()
    grads = {name: p.grad for name, p in reward.module.named_parameters() if p.grad is not None}
    assert any("vision_model" in name for name in grads) and any("text_model" in name for name in grads)
    torch.testing.assert_close(reward.forward(pixels[:2], PROMPTS[:2]), reward.forward(pixels[:2], text[:2]))


def test_gradients_reach_the_image(clip_folder, images):
    reward = load_reward(clip_folder, device="cpu")
    pixels = as_tensor(images).requires_grad_()
    reward.forward(reward.preprocess(pixels, differentiable=True), [PROMPTS[0]]).sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_bfloat16_keeps_the_scale_exact(clip_folder, images):
    exact = load_reward(clip_folder, device="cpu").score(PROMPTS, images)
    rough = load_reward(clip_folder, device="cpu", dtype="bf16").score(PROMPTS, images)
    assert rough.dtype == np.float32
    np.testing.assert_allclose(rough, exact, atol=0.05 * np.abs(exact).max())
    assert not np.array_equal(rough, exact)


def test_cosine_scale(clip_folder, images):
    logit = load_reward(clip_folder, device="cpu")
    cosine = load_reward(clip_folder, device="cpu", scale=1.0).score(PROMPTS, images)
    factor = logit.module.logit_scale.exp().item()
    np.testing.assert_allclose(cosine * factor, logit.score(PROMPTS, images), rtol=1e-5)


# -- open_clip ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_clip_tiny():
    """Return a tiny model of open_clip's own class, with the parts that ViT-H-14 has."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(
            embed_dim=24,
            vision_cfg=CLIPVisionCfg(image_size=224, layers=2, width=40, head_width=20, patch_size=28),
            text_cfg=CLIPTextCfg(context_length=77, vocab_size=49408, width=32, heads=2, layers=2),
        )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    return model.eval()


def _hpsv2_package(model, prompts: list[str], images: list[Image.Image]) -> np.ndarray:
    """``hpsv2.score`` of hpsv2 1.2.0, one image at a time: its transform, tokens and product."""
    import open_clip

    tokenizer, scores = open_clip.get_tokenizer("ViT-H-14"), []
    with torch.no_grad():
        for prompt, image in zip(prompts, images, strict=True):
            image_features, text_features, _ = model(hps_transform(image).unsqueeze(0), tokenizer([prompt]))
            scores.append(torch.diagonal(image_features @ text_features.T).item())
    return np.array(scores, np.float32)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_hpsv2_equals_the_package_on_open_clip(open_clip_tiny, tmp_path, monkeypatch, batch_size):
    import open_clip

    torch.save({"state_dict": open_clip_tiny.state_dict()}, tmp_path / "HPS_v2_compressed.pt")
    blank = copy.deepcopy(open_clip_tiny)
    for parameter in blank.parameters():
        parameter.data.zero_()
    monkeypatch.setattr(open_clip, "create_model", lambda name, **options: blank)
    reward = load_reward("hpsv2", weights=tmp_path / "HPS_v2_compressed.pt", device="cpu")
    images = [make_images(1, *size, seed)[0] for seed, size in enumerate([(512, 512), (300, 227), (64, 40)])]
    images += make_images(4, 40, 96)
    expected = _hpsv2_package(open_clip_tiny, PROMPTS, images)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(reward.score(PROMPTS, images, batch_size=batch_size), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_hpsv2_at_real_size(images, tmp_path):
    """The published architecture, from a checkpoint file in the published form."""
    import open_clip

    model = open_clip.create_model("ViT-H-14", pretrained=None, precision="fp32", device="cpu").eval()
    path = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"state_dict": model.state_dict()}, path)
    reward = load_reward("hpsv2", weights=path, device="cpu")
    tokenizer = open_clip.get_tokenizer("ViT-H-14")
    scores = reward.score(PROMPTS[:2], images[:2])
    with torch.no_grad():
        for prompt, image, score in zip(PROMPTS[:2], images[:2], scores, strict=True):
            image_features, text_features, _ = model(reward.preprocess([image]), tokenizer([prompt]))
            assert score == pytest.approx((image_features @ text_features.T).item(), rel=1e-4, abs=1e-6)
    state = model.state_dict()
    state.pop("logit_scale")
    torch.save({"state_dict": state}, path)
    with pytest.raises(RewardError, match="logit_scale"):
        load_reward("hpsv2", weights=path, device="cpu")
