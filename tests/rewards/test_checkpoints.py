"""Noise-aware weights: adapters made with peft, and full weights, switched on one base model."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch

from tests.worlds import PROMPTS, save_clip, write_adapters
from ttsnap_lib.errors import CheckpointError
from ttsnap_lib.rewards.checkpoints import keep_base_exact
from ttsnap_lib.rewards.loading import load_reward


@pytest.fixture(scope="module")
def run_folder(clip_folder, tmp_path_factory):
    """Run folder with adapters for steps 14, 8 and 2."""
    return write_adapters(clip_folder, tmp_path_factory.mktemp("run"))


def _merged(base, folder, step, images):
    """Scores of one adapter merged into a fresh base model: another way to the same weights."""
    from peft import PeftModel

    reward = load_reward(base, device="cpu")
    reward.module = PeftModel.from_pretrained(reward.module, str(folder / f"step_{step}")).merge_and_unload()
    return reward.score(PROMPTS, images)


def test_switching_equals_merging(clip_folder, run_folder, images):
    base = load_reward(clip_folder, device="cpu").score(PROMPTS, images)
    reward = load_reward(clip_folder, device="cpu", adapters=run_folder)
    assert reward.adapter_steps == (2, 8, 14) and reward.step is None
    np.testing.assert_allclose(reward.score(PROMPTS, images), base, rtol=1e-6)
    expected = {step: _merged(clip_folder, run_folder, step, images) for step in (2, 8, 14)}
    assert all(np.abs(values - base).max() > 0.1 for values in expected.values())
    for step in (14, 2, 8, None, 8, 14, None, None, 2):
        scores = reward.use_step(step).score(PROMPTS, images)
        np.testing.assert_allclose(scores, base if step is None else expected[step], rtol=1e-4, atol=1e-4)
        assert reward.step == step


def test_a_step_for_a_block(clip_folder, run_folder, images):
    reward = load_reward(clip_folder, device="cpu", adapters=run_folder).use_step(8)
    eight = reward.score(PROMPTS, images)
    with reward.at(None) as same:
        assert same is reward and reward.step is None
        base = reward.score(PROMPTS, images)
    with pytest.raises(ZeroDivisionError), reward.at(2):
        assert reward.step == 2
        raise ZeroDivisionError
    with pytest.raises(CheckpointError, match="one of"), reward.at(3):
        pass
    assert reward.step == 8 and not np.array_equal(base, eight)
    assert np.array_equal(reward.score(PROMPTS, images), eight)


def test_fingerprints_tell_base_weights_apart(clip_folder, run_folder, tmp_path):
    plain = load_reward(clip_folder, device="cpu")
    adapted = load_reward(clip_folder, device="cpu", adapters=run_folder).use_step(8)
    assert plain.fingerprint() == adapted.fingerprint()
    assert plain.fingerprint() != load_reward(clip_folder, device="cpu", scale=1.0).fingerprint()
    other = save_clip(tmp_path / "other", seed=9)
    assert plain.fingerprint() != load_reward(other, device="cpu").fingerprint()
    assert adapted._series.fingerprint(8) != adapted._series.fingerprint(2)


def test_switching_trains_nothing(clip_folder, run_folder):
    reward = load_reward(clip_folder, device="cpu", adapters=run_folder)
    for step in (None, 8, 2):
        reward.use_step(step)
        assert not any(p.requires_grad for p in reward.module.parameters())


@pytest.mark.parametrize("trained", ["all", "vision"])
def test_full_weights(clip_folder, images, tmp_path, trained):
    from safetensors.torch import save_file

    base = load_reward(clip_folder, device="cpu")
    start = base.score(PROMPTS, images)
    expected = {}
    for step in (14, 2):
        source = load_reward(clip_folder, device="cpu")
        state = source.module.state_dict()
        keys = [key for key in state if trained == "all" or "vision_model" in key]
        generator = torch.Generator().manual_seed(step)
        for key in keys:
            state[key] += torch.randn(state[key].shape, generator=generator) * 0.02
        expected[step] = source.score(PROMPTS, images)
        (tmp_path / f"step_{step}").mkdir()
        save_file({key: state[key].clone() for key in keys}, tmp_path / f"step_{step}" / "model.safetensors")
    (tmp_path / "curriculum.json").write_text("{}")
    reward = load_reward(clip_folder, device="cpu", adapters=tmp_path)
    for step in (14, 2, None, 2, 14, None):
        scores = reward.use_step(step).score(PROMPTS, images)
        np.testing.assert_allclose(scores, start if step is None else expected[step], rtol=1e-5, atol=1e-5)


def test_a_run_folder_names_its_base(clip_folder, images, tmp_path):
    folder = write_adapters(clip_folder, tmp_path / "run", steps=(3,), reward=str(clip_folder), padded=True)
    reward = load_reward(folder, device="cpu", name=str(clip_folder))
    assert reward.adapter_steps == (3,)
    with pytest.raises(CheckpointError, match="belong to another reward"):
        load_reward(clip_folder, device="cpu", name="other", adapters=folder)


def test_errors(clip_folder, run_folder, tmp_path):
    reward = load_reward(clip_folder, device="cpu", adapters=run_folder)
    with pytest.raises(CheckpointError, match=r"one of \[2, 8, 14\] or None"):
        reward.use_step(3)
    with pytest.raises(CheckpointError, match="has no noise-aware weights"):
        load_reward(clip_folder, device="cpu").use_step(3)
    with pytest.raises(CheckpointError, match=r"curriculum .* cannot be read"):
        load_reward(clip_folder, device="cpu", adapters=tmp_path / "nowhere")
    (tmp_path / "curriculum.json").write_text("{}")
    (tmp_path / "step_4").mkdir()  # a run cut short
    with pytest.raises(CheckpointError, match="no checkpoints"):
        load_reward(clip_folder, device="cpu", adapters=tmp_path)


@pytest.mark.parametrize("fault", ["missing key", "truncated", "other model"])
def test_broken_adapters(clip_folder, run_folder, tmp_path, fault):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    path = folder / "step_8" / "adapter_model.safetensors"
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    else:
        state = load_file(path)
        key = next(iter(state))
        value = state.pop(key)
        if fault == "other model":
            state[key] = torch.zeros(value.shape[0] + 1, *value.shape[1:])
        save_file(state, path)
    with pytest.raises(CheckpointError, match=r"adapter (cannot be attached|of step 8 does not fit)"):
        load_reward(clip_folder, device="cpu", adapters=folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapted_attention_is_base_plus_adapter_and_leaves_the_base_alone(dtype):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(16, 2, batch_first=True)}).to(dtype).eval()
    module, merged, x = copy.deepcopy(base), copy.deepcopy(base), torch.randn(2, 5, 16).to(dtype)
    adapted = get_peft_model(module, LoraConfig(r=2, lora_alpha=4, target_modules=r"attn"))
    adapted.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules=r"attn"))
    keep_base_exact(module)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    layer = module["attn"]
    projection = layer.get_base_layer().out_proj
    for name in ("default", "other", "default"):  # switching and scoring again and again
        adapted.set_adapter(name)
        with torch.no_grad():
            found = layer(x, x, x, need_weights=False)[0]
    with torch.no_grad():
        merged["attn"].in_proj_weight += layer.get_delta_weight("default").to(dtype)
        merged["attn"].out_proj.weight += projection.get_delta_weight("default").to(dtype)
        torch.testing.assert_close(found, merged["attn"](x, x, x, need_weights=False)[0], rtol=1e-5, atol=1e-6)
    layer(x, x, x, need_weights=False)[0].float().square().sum().backward()
    assert all(p.grad is not None for name, p in module.named_parameters() if "default" in name)
    plain = adapted.unload()
    for key, value in base.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value), key
