"""The published reward classes take adapters and an optimization step; random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.worlds import WORDS, make_bank, randomize_image_reward, save_clip
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.finetuning.data import score_step
from ttsnap_lib.finetuning.train import finetune
from ttsnap_lib.finetuning.weights import Weights, checkpoint_blocks
from ttsnap_lib.rewards.image_reward import ImageRewardModel
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.rewards.pixels import Preprocessing
from ttsnap_lib.rewards.towers import ClipReward, OpenClipReward

ONE_UPDATE = {"steps": (1,), "batch_size": 2, "group_size": 2, "max_updates_per_step": 1, "learning_rate": 1e-2,
              "lora_rank": 2, "validation_prompts": 0, "keep": "last"}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


def check_one_update(make, folder, **changes):
    """One optimization step moves the scores as the written adapter tells, and the reward itself comes back as it was."""
    bank = make_bank(2, 2, 2)
    fresh = make()
    before = score_step(fresh, bank, 1, batch_size=2)
    trained = make()
    # The base is its own target at the clean step: shift it, or there is nothing to learn.
    result = finetune(
        bank,
        folder,
        CurriculumConfig(reward=trained.name, **{**ONE_UPDATE, **changes}),
        reward=trained,
        validation=bank,
        targets=before + 1,
        validation_targets=before + 1,
    )
    assert result.trained_parameters < 0.6 * result.base_parameters
    np.testing.assert_array_equal(score_step(trained, bank, 1, batch_size=2), before)
    assert trained.fingerprint() == fresh.fingerprint()
    assert [name for name, _ in trained.module.named_modules()] == [name for name, _ in fresh.module.named_modules()]
    fresh.attach_steps(folder)
    after = score_step(fresh.use_step(1), bank, 1, batch_size=2)
    assert np.abs(after - before).max() > 1e-6 and np.isfinite(after).all()
    # Measured by the run with the weights as they were trained.
    assert result.table["after_mse"][0] == pytest.approx(np.square(after - before - 1).mean(), rel=1e-4)
    np.testing.assert_allclose(score_step(fresh.use_step(None), bank, 1, batch_size=2), before, rtol=1e-4, atol=1e-5)


def test_image_reward(image_reward_module, tmp_path):
    import copy

    check_one_update(
        lambda: ImageRewardModel("image_reward", copy.deepcopy(image_reward_module), device="cpu"), tmp_path / "run"
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_open_clip(tmp_path, checkpointing):
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = CLIP(
                16,
                CLIPVisionCfg(image_size=224, layers=2, width=32, head_width=16, patch_size=32),
                CLIPTextCfg(width=32, heads=2, layers=1),
            )
        return OpenClipReward("hpsv2", module, tokenizer, device="cpu")

    check_one_update(make, tmp_path / "run", gradient_checkpointing=checkpointing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapted_attention_is_base_plus_adapter_and_leaves_the_base_alone(dtype):
    import copy

    from peft import LoraConfig, get_peft_model

    from ttsnap_lib.rewards.checkpoints import keep_base_exact

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


def test_recomputed_blocks_give_the_same_gradients_and_keep_less(tmp_path):
    clip = save_clip(tmp_path / "tiny-clip")
    pictures = [Image.fromarray(p) for p in make_bank(1, 4).pixels[0, :, -1]]
    gradients, kept = [], []
    for recompute in (False, True):
        reward = load_reward(clip, device="cpu")
        weights = Weights(reward, CurriculumConfig(lora_rank=2))
        for index, (name, parameter) in enumerate(weights.parameters.items()):
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(index)
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        if recompute:
            assert checkpoint_blocks(reward.module) == 4  # two of each tower
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            out = reward.forward(reward.preprocess(pictures), reward.encode_text(["a cat"]))
        out.sum().backward()
        gradients.append({name: p.grad for name, p in weights.parameters.items()})
        kept.append(sum(saved))
    assert kept[1] < 0.5 * kept[0]
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_clip_h(tmp_path):
    """The model class and size of PickScore."""
    from transformers import CLIPConfig, CLIPModel

    folder = save_clip(tmp_path / "tiny-clip")
    tokenizer = load_reward(folder, device="cpu").tokenizer
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
              "patch_size": 14, "image_size": 224, "projection_dim": 1024}  # fmt: skip
    text = {"vocab_size": len(tokenizer) + len(WORDS), "hidden_size": 64, "num_hidden_layers": 1, "eos_token_id": 1,
            "num_attention_heads": 2, "intermediate_size": 64, "projection_dim": 1024}  # fmt: skip
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=1024)

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = CLIPModel(config)
        return ClipReward("pickscore", module, tokenizer, Preprocessing(224, centre="floor"), device="cpu")

    check_one_update(make, tmp_path / "run", gradient_checkpointing=True)


@pytest.mark.slow
def test_open_clip_h(tmp_path):
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = open_clip.create_model("ViT-H-14", pretrained=None, precision="fp32", device="cpu")
        return OpenClipReward("hpsv2", module, tokenizer, device="cpu")

    check_one_update(make, tmp_path / "run", gradient_checkpointing=True)


@pytest.mark.slow
def test_image_reward_at_real_size(bert_folder, med_config, tmp_path):
    from ttsnap_lib.rewards.image_reward import build_module

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = build_module(med_config, bert_folder)
        randomize_image_reward(module)
        return ImageRewardModel("image_reward", module, device="cpu")

    check_one_update(make, tmp_path / "run")
