"""CLIP rewards against the model card's formula and open_clip's own, random weights in the real classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from tests.rewards.conftest import PROMPTS, as_tensor, embedding, make_images, pillow_processor, save_clip
from ttsnap_lib.errors import RewardError
from ttsnap_lib.rewards.base import TextBatch
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.rewards.towers import OpenClipReward


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


def test_one_prompt_for_all_and_one_image(clip_folder, images):
    reward = load_reward(clip_folder, device="cpu")
    together = reward.score(PROMPTS[0], images)
    np.testing.assert_allclose(together, reward.score([PROMPTS[0]] * 7, images), rtol=1e-6)
    np.testing.assert_allclose(together[2], reward.score(PROMPTS[0], images[2])[0], rtol=1e-5)
    assert reward.score(PROMPTS[0], []).shape == (0,)


def test_tensors_and_files_score_as_images(clip_folder, images, tmp_path):
    reward = load_reward(clip_folder, device="cpu")
    expected = reward.score(PROMPTS, images)
    assert np.array_equal(reward.score(PROMPTS, as_tensor(images)), expected)
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    assert np.array_equal(reward.score(PROMPTS, paths), expected)


def test_each_distinct_prompt_is_encoded_once(clip_folder, images, monkeypatch):
    reward = load_reward(clip_folder, device="cpu")
    seen: list[str] = []
    encode = reward.encode_text
    monkeypatch.setattr(reward, "encode_text", lambda prompts: (seen.extend(prompts), encode(prompts))[1])
    first = reward.score(PROMPTS, images, batch_size=2)
    reward.score(PROMPTS[::-1], images)
    assert sorted(seen) == sorted(set(PROMPTS))
    # An in-place update of the weights makes the kept encodings stale.
    with torch.no_grad():
        reward.module.text_projection.weight.mul_(-1)
    np.testing.assert_allclose(reward.score(PROMPTS, images), -first, rtol=1e-4)


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


def test_scoring_leaves_training_mode_as_it_was(clip_folder, images):
    reward = load_reward(clip_folder, device="cpu")
    reward.module.train()
    reward.module.vision_model.eval()
    reward.score(PROMPTS, images)
    assert reward.module.training and not reward.module.vision_model.training


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


def test_named_rewards_take_local_weights(clip_folder, images, tmp_path):
    """`weights` replaces the hub's file, `processor` its processor."""
    from safetensors.torch import load_file, save_file

    other = save_clip(tmp_path / "other", seed=5)
    reward = load_reward(clip_folder, weights=other / "model.safetensors", device="cpu")
    np.testing.assert_allclose(reward.score(PROMPTS, images), _model_card(other, PROMPTS, images), rtol=1e-4)
    # The buffers that older versions wrote are let pass, anything else is not.
    state = load_file(other / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(state, tmp_path / "old.safetensors")
    load_reward(clip_folder, weights=tmp_path / "old.safetensors", device="cpu")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "old.pt")
    load_reward(clip_folder, weights=tmp_path / "old.pt", device="cpu")


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit(clip_folder, fault, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(clip_folder / "model.safetensors")
    key = "visual_projection.weight"
    if fault == "missing":
        del state[key]
    elif fault == "unexpected":
        state["extra.weight"] = torch.zeros(2)
    else:
        state[key] = torch.zeros(3, 32)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(RewardError, match=key if fault != "unexpected" else "extra.weight"):
        load_reward(clip_folder, weights=tmp_path / "bad.safetensors", device="cpu")


def test_a_folder_with_missing_weights(clip_folder, tmp_path):
    """`from_pretrained` would fill the gap with random numbers and only warn."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "gap"
    shutil.copytree(clip_folder, folder)
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"visual_projection\.weight"):
        load_reward(folder, device="cpu")


def test_pickles_are_refused(clip_folder, tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(1)}, "code": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(RewardError, match="cannot be read"):
        load_reward(clip_folder, weights=tmp_path / "evil.pt", device="cpu")
    assert not _Evil.ran


class _Evil:
    ran = False

    def __reduce__(self):
        return (_run, ())


def _run() -> None:
    _Evil.ran = True


def test_offline_error_says_what_to_download(tmp_path):
    """In a process of its own: the hub's settings are read when it is imported."""
    import os
    import subprocess
    import sys

    repositories = {
        "pickscore": "yuvalkirstain/PickScore_v1",
        "hpsv2": "xswu/HPSv2 HPS_v2_compressed.pt",
        "hpsv2.1": "xswu/HPSv2 HPS_v2.1_compressed.pt",
        "clipscore": "openai/clip-vit-large-patch14",
        "image_reward": "THUDM/ImageReward ImageReward.pt",
        "someone/some-clip": "someone/some-clip",
    }
    code = (
        "import sys\nfrom ttsnap_lib.errors import RewardError\nfrom ttsnap_lib.rewards import load_reward\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        load_reward(name, device='cpu')\n    except RewardError as error:\n        print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, *repositories]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == len(repositories), done.stderr
    for line, repository in zip(lines, repositories.values(), strict=True):
        assert f"hf download {repository}" in line and str(tmp_path) in line


def test_bad_sources(tmp_path, clip_folder):
    with pytest.raises(RewardError, match="Did you mean 'pickscore'"):
        load_reward("pickscor")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RewardError, match="model cannot be loaded"):
        load_reward(tmp_path / "empty")
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(RewardError, match="does not say which model"):
        load_reward(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="unknown key"):
        load_reward(clip_folder, med_config="x")


def test_bad_inputs(clip_folder, images):
    reward = load_reward(clip_folder, device="cpu")
    with pytest.raises(RewardError, match="2 prompts, 7 images"):
        reward.score(PROMPTS[:2], images)
    with pytest.raises(RewardError, match=r"uint8"):
        reward.score(PROMPTS[0], torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(RewardError, match=r"\(2, 8, 8, 3\)"):
        reward.score(PROMPTS[0], torch.zeros(2, 8, 8, 3))
    with pytest.raises(RewardError, match="PIL images"):
        reward.score(PROMPTS[0], [np.zeros((3, 3))])
    with torch.no_grad():
        reward.module.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(RewardError, match="not finite for image 0"):
        reward.score(PROMPTS, images)
    assert np.isnan(reward.score(PROMPTS, images, check=False)).all()


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


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_equals_open_clip_similarity(open_clip_tiny, images, batch_size):
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-H-14")
    reward = OpenClipReward("hpsv2", open_clip_tiny, tokenizer, device="cpu")
    scores = reward.score(PROMPTS, images, batch_size=batch_size)
    with torch.no_grad():
        for prompt, image, score in zip(PROMPTS, images, scores, strict=True):
            image_features, text_features, _ = open_clip_tiny(reward.preprocess([image]), tokenizer([prompt]))
            expected = torch.diagonal(image_features @ text_features.T).item()
            assert score == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert np.ptp(scores) > 1e-3


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


@pytest.mark.slow
def test_compiled_forward_agrees(clip_folder):
    plain = load_reward(clip_folder, device="cpu")
    compiled = load_reward(clip_folder, device="cpu", compile=True)
    images = make_images(9)
    np.testing.assert_allclose(
        compiled.score("a red circle", images, batch_size=4), plain.score("a red circle", images), rtol=1e-4
    )
