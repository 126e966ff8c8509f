"""MPS against the formula of its authors: infer_one_sample and Cross_model of Kwai-Kolors/MPS, tiny towers, random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import einsum
from torch.nn import functional
from transformers import AutoTokenizer, CLIPModel

from tests.worlds import PROMPTS, as_tensor, embedding, make_bank, pillow_processor, save_clip, small_config
from ttsnap_lib.errors import RewardError
from ttsnap_lib.rewards import mps
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.rewards.mps import CONDITION

WIDTH, HEADS, LAYERS = 128, 2, 4


def _cross_state() -> dict[str, torch.Tensor]:
    """Return random weights of Cross_model(dim=128, layer_num=4, heads=2) under the authors' names."""
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "0.fn.to_q": (WIDTH, WIDTH), "0.fn.to_kv": (128, WIDTH), "0.fn.to_out": (WIDTH, WIDTH),
        "0.fn.ff.0": (8 * WIDTH, WIDTH), "0.fn.ff.2": (WIDTH, 4 * WIDTH),
        "1.fn.fused_attn_ff_proj": (WIDTH + 128 + 8 * WIDTH, WIDTH), "1.fn.attn_out": (WIDTH, WIDTH),
        "1.fn.ff_out.1": (WIDTH, 4 * WIDTH),
    }  # fmt: skip
    state = {}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            state[f"{layer}.{name}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        for part in (0, 1):
            state[f"{layer}.{part}.fn.norm.weight"] = 1 + torch.randn(WIDTH, generator=generator) / 5
            state[f"{layer}.{part}.fn.norm.bias"] = torch.zeros(WIDTH)
        state[f"{layer}.1.fn.rotary_emb.inv_freq"] = 1.0 / (10000 ** (torch.arange(0, 64, 2).float() / 64))
    return state


def _swiglu(x):
    x, gate = x.chunk(2, dim=-1)
    return functional.silu(gate) * x


def _rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def _heads(x):
    return x.reshape(*x.shape[:2], HEADS, 64).permute(0, 2, 1, 3)


def _attention(sim, v):
    sim = sim - sim.amax(dim=-1, keepdim=True)
    return einsum("b h i j, b j d -> b h i d", sim.softmax(dim=-1), v).permute(0, 2, 1, 3).flatten(2)


def _cross_model(state, query, context, mask):
    for layer in range(LAYERS):
        w = {name.removeprefix(f"{layer}."): value for name, value in state.items() if name.startswith(f"{layer}.")}
        x = functional.layer_norm(query, (WIDTH,), w["0.fn.norm.weight"], w["0.fn.norm.bias"])
        q = _heads(x @ w["0.fn.to_q.weight"].T) * 64**-0.5
        k, v = (context @ w["0.fn.to_kv.weight"].T).chunk(2, dim=-1)
        sim = einsum("b h i d, b j d -> b h i j", q, k) + mask.unsqueeze(1).repeat(1, HEADS, 1, 1)
        out = _attention(sim, v) @ w["0.fn.to_out.weight"].T
        query = out + _swiglu(x @ w["0.fn.ff.0.weight"].T) @ w["0.fn.ff.2.weight"].T + query

        x = functional.layer_norm(query, (WIDTH,), w["1.fn.norm.weight"], w["1.fn.norm.bias"])
        q, k, v, ff = (x @ w["1.fn.fused_attn_ff_proj.weight"].T).split((WIDTH, 64, 64, 8 * WIDTH), dim=-1)
        freqs = einsum("i , j -> i j", torch.arange(x.shape[1]).float(), w["1.fn.rotary_emb.inv_freq"])
        positions = torch.cat((freqs, freqs), dim=-1)
        q, k = ((t * positions.cos()) + (_rotate_half(t) * positions.sin()) for t in (_heads(q), k))
        sim = einsum("b h i d, b j d -> b h i j", q * 64**-0.5, k)
        query = _attention(sim, v) @ w["1.fn.attn_out.weight"].T + _swiglu(ff) @ w["1.fn.ff_out.1.weight"].T + query
    return query


def _infer_one_sample(clip, cross, tokenizer, processor, prompt, image, condition, near) -> tuple[float, torch.Tensor]:
    def tokenize(caption):
        length = tokenizer.model_max_length
        return tokenizer(
            caption, max_length=length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    def text(ids):
        outputs = clip.text_model(input_ids=ids)
        return clip.text_projection(outputs[0]), clip.text_projection(outputs[1])

    image_inputs = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    text_f, text_features = text(tokenize(prompt))
    image_f = clip.visual_projection(clip.vision_model(pixel_values=image_inputs)[0])
    condition_f, _ = text(tokenize(condition))
    sim = einsum("b i d, b j d -> b j i", text_f, condition_f)
    sim = torch.max(sim, dim=1, keepdim=True)[0]
    sim = sim / sim.max()
    mask = torch.where(sim > near, 0, float("-inf"))
    features = _cross_model(cross, image_f, text_f, mask.repeat(1, image_f.shape[1], 1))[:, 0, :]
    features = features / features.norm(dim=-1, keepdim=True)
    text_features = text_features / text_features.norm(dim=-1, keepdim=True)
    return (clip.logit_scale.exp() * text_features @ features.T)[0].item(), mask


@pytest.fixture(scope="module")
def mps_files(tmp_path_factory):
    """Return the folder of a tiny CLIP, its model, and the weights of the cross-attention, in a file of the hub's names."""
    folder = save_clip(tmp_path_factory.mktemp("mps") / "clip", width=WIDTH)
    clip, cross = CLIPModel.from_pretrained(folder).eval(), _cross_state()
    clip.text_model.embeddings.token_embedding.weight.data.mul_(20)  # so that some words are far from the condition
    state = {f"model.{key}": value for key, value in clip.state_dict().items()}
    state |= {f"cross_model.layers.{key}": value for key, value in cross.items()}
    torch.save(state, folder / "authors.pt")
    save_file({f"mps.{key}": value for key, value in state.items()}, folder / "hub.safetensors")
    return folder, clip, cross


@pytest.mark.parametrize(("condition", "near"), [(CONDITION, 0.3), ("a red square", 0.8)])  # 0.3 is the authors'
def test_equals_the_authors_formula(mps_files, images, monkeypatch, condition, near):
    assert mps._NEAR == 0.3
    monkeypatch.setattr(mps, "_NEAR", near)
    folder, clip, cross = mps_files
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = pillow_processor().from_pretrained(folder)
    with torch.no_grad():
        found = [
            _infer_one_sample(clip, cross, tokenizer, processor, prompt, image, condition, near)
            for prompt, image in zip(PROMPTS, images, strict=True)
        ]
    expected, masks = np.array([score for score, _ in found], np.float32), [mask for _, mask in found]
    assert np.ptp(expected) > 0.1 and (near == 0.3 or any(mask.isinf().any() for mask in masks))
    given = {"model": folder, "condition": condition, "device": "cpu"}
    reward = load_reward("mps", weights=folder / "hub.safetensors", **given)
    for batch_size in (1, 3, 32):
        np.testing.assert_allclose(reward.score(PROMPTS, images, batch_size=batch_size), expected, rtol=1e-3, atol=1e-4)
    again = load_reward("mps", weights=folder / "authors.pt", **given)
    np.testing.assert_allclose(again.score(PROMPTS, as_tensor(images)), expected, rtol=1e-3, atol=1e-4)
    with again.embeddings() as parts, torch.no_grad():
        again.score(PROMPTS, images)
        seen = embedding(clip.get_image_features(again.preprocess(images)))
    torch.testing.assert_close(parts[0], functional.normalize(seen, dim=-1), rtol=1e-4, atol=1e-5)
    # it trains, also the layers that adapters go to
    reward.module.requires_grad_(True)
    reward.forward(reward.preprocess(images), reward.encode_text(PROMPTS)).sum().backward()
    assert all(
        p.grad.abs().sum() > 0
        for name, p in reward.module.named_parameters()
        if "self_attn.v_proj" in name or "to_q" in name
    )


def test_the_condition_counts_and_weights_have_to_fit(mps_files, images, tmp_path):
    folder, _, _ = mps_files
    given = {"model": folder, "weights": folder / "authors.pt", "device": "cpu"}
    overall, other = load_reward("mps", **given), load_reward("mps", condition="a red square", **given)
    assert overall.fingerprint() != other.fingerprint()
    with pytest.raises(RewardError, match="condition: got ''"):
        load_reward("mps", condition="", **given)
    state = torch.load(folder / "authors.pt", weights_only=True)
    torch.save({key: value for key, value in state.items() if "to_kv" not in key}, tmp_path / "bad.pt")
    with pytest.raises(RewardError, match=r"4 missing and 0 unexpected keys.*to_kv"):
        load_reward("mps", **{**given, "weights": tmp_path / "bad.pt"})


def test_it_becomes_noise_aware(mps_files, images, tmp_path):
    from ttsnap_lib.finetuning.train import finetune

    folder, _, _ = mps_files
    given = {"model": folder, "weights": folder / "authors.pt", "device": "cpu"}
    base = load_reward("mps", **given).score(PROMPTS, images)
    finetune(make_bank(), tmp_path / "run", small_config("mps", steps=(2,)), reward=load_reward("mps", **given))
    tuned = load_reward("mps", adapters=tmp_path / "run", **given)
    np.testing.assert_allclose(tuned.score(PROMPTS, images), base, rtol=1e-4, atol=1e-5)
    assert np.abs(tuned.use_step(2).score(PROMPTS, images) - base).max() > 1e-3
