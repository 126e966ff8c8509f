"""Trained weights: every family takes adapters and an optimization step; full checkpoints from elsewhere."""

from __future__ import annotations

import copy

import numpy as np
import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from tests.worlds import WORDS, make_bank, randomize_image_reward, save_clip
from ttsnap_lib.errors import CheckpointError
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.finetuning.data import score_step
from ttsnap_lib.finetuning.train import finetune
from ttsnap_lib.finetuning.weights import import_series
from ttsnap_lib.rewards.image_reward import ImageRewardModel, build_module
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.rewards.pixels import Preprocessing
from ttsnap_lib.rewards.towers import ClipReward, OpenClipReward

ONE_UPDATE = {"steps": (1,), "batch_size": 2, "group_size": 2, "max_updates_per_step": 1, "learning_rate": 1e-2,
              "lora_rank": 2, "validation_prompts": 0, "keep": "last"}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("weights") / "tiny-clip")


@pytest.fixture(scope="module")
def bank():
    return make_bank()


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


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def test_image_reward(image_reward_module, tmp_path):
    check_one_update(
        lambda: ImageRewardModel("image_reward", copy.deepcopy(image_reward_module), device="cpu"), tmp_path / "run"
    )


def test_open_clip(tmp_path):
    tokenizer = open_clip.get_tokenizer("ViT-H-14")
    vision = open_clip.model.CLIPVisionCfg(image_size=224, layers=2, width=32, head_width=16, patch_size=32)
    text = open_clip.model.CLIPTextCfg(width=32, heads=2, layers=1)

    def make():
        module = seeded(lambda: open_clip.model.CLIP(16, vision, text))
        return OpenClipReward("hpsv2", module, tokenizer, device="cpu")

    check_one_update(make, tmp_path / "run")


@pytest.mark.slow
def test_clip_h(clip, tmp_path):
    """The model class and size of PickScore."""
    tokenizer = load_reward(clip, device="cpu").tokenizer
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
              "patch_size": 14, "image_size": 224, "projection_dim": 1024}  # fmt: skip
    text = {"vocab_size": len(tokenizer) + len(WORDS), "hidden_size": 64, "num_hidden_layers": 1, "eos_token_id": 1,
            "num_attention_heads": 2, "intermediate_size": 64, "projection_dim": 1024}  # fmt: skip
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=1024)

    def make():
        module = seeded(lambda: CLIPModel(config))
        return ClipReward("pickscore", module, tokenizer, Preprocessing(224, centre="floor"), device="cpu")

    check_one_update(make, tmp_path / "run")


@pytest.mark.slow
def test_open_clip_h(tmp_path):
    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    def make():
        module = seeded(lambda: open_clip.create_model("ViT-H-14", pretrained=None, precision="fp32", device="cpu"))
        return OpenClipReward("hpsv2", module, tokenizer, device="cpu")

    check_one_update(make, tmp_path / "run")


@pytest.mark.slow
def test_image_reward_at_real_size(bert_folder, med_config, tmp_path):
    def make():
        module = seeded(lambda: build_module(med_config, bert_folder))
        randomize_image_reward(module)
        return ImageRewardModel("image_reward", module, device="cpu")

    check_one_update(make, tmp_path / "run")


# Full checkpoints from elsewhere


def write_checkpoints(clip, folder, steps=(14, 3), prefix="", wrap=False):
    folder.mkdir()
    states = {}
    for step in steps:
        state = load_reward(clip, device="cpu").module.state_dict()
        generator = torch.Generator().manual_seed(step)
        state = {
            k: v + 0.05 * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
            for k, v in state.items()
        }
        states[step] = state
        out = {prefix + key: value for key, value in state.items()}
        torch.save({"state_dict": out, "epoch": 1} if wrap else out, folder / f"Ct{step}.pt")
    return states


@pytest.mark.parametrize(("prefix", "wrap"), [("", False), ("module.", False), ("model.", True)])
def test_full_checkpoints_become_a_series(clip, bank, tmp_path, prefix, wrap):
    states = write_checkpoints(clip, tmp_path / "authors", prefix=prefix, wrap=wrap)
    folder = import_series(tmp_path / "authors", tmp_path / "run", load_reward(clip, device="cpu"))
    reward = load_reward(clip, device="cpu", adapters=folder)
    assert reward.adapter_steps == (3, 14) and reward.series_kind == "full"
    for step, state in states.items():
        expected = load_reward(clip, device="cpu")
        expected.module.load_state_dict(state)
        np.testing.assert_array_equal(score_step(reward.use_step(step), bank, 1), score_step(expected, bank, 1))
    half = import_series(tmp_path / "authors", tmp_path / "half", load_reward(clip, device="cpu"), dtype="float16")
    sizes = [(path / "step_14" / "model.safetensors").stat().st_size for path in (folder, half)]
    assert sizes[1] < 0.6 * sizes[0]


def test_checkpoints_that_do_not_fit(clip, tmp_path):
    reward = load_reward(clip, device="cpu")
    with pytest.raises(CheckpointError, match="no checkpoints"):
        import_series(tmp_path / "nothing", tmp_path / "run", reward)
    write_checkpoints(clip, tmp_path / "authors", steps=(14,))
    path = tmp_path / "authors" / "Ct14.pt"
    state = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in state.items() if "fc1" not in key}, path)
    with pytest.raises(CheckpointError, match="step 14 is of another model"):
        import_series(tmp_path / "authors", tmp_path / "run", reward)
    torch.save({key: value[..., None] for key, value in state.items()}, path)
    with pytest.raises(CheckpointError, match="another model"):
        import_series(tmp_path / "authors", tmp_path / "run", reward)
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")  # a pickle that would run a command
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_series(tmp_path / "authors", tmp_path / "run", reward)
    assert not (tmp_path / "run").exists()


def test_an_import_is_whole_or_not_there_and_mixes_with_nothing(clip, bank, tmp_path):
    reward = load_reward(clip, device="cpu")
    write_checkpoints(clip, tmp_path / "authors", steps=(14, 3))
    path = tmp_path / "authors" / "Ct3.pt"
    good = torch.load(path, weights_only=True)
    torch.save({k: v * float("nan") if "fc1.weight" in k else v for k, v in good.items()}, path)
    with pytest.raises(CheckpointError, match="step 3 holds weights that are not finite"):
        import_series(tmp_path / "authors", tmp_path / "run", reward)
    assert not (tmp_path / "run").exists()
    torch.save(good, path)
    import_series(tmp_path / "authors", tmp_path / "run", reward)
    about = (tmp_path / "run" / "curriculum.json").read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match="must not mix"):
        import_series(tmp_path / "authors", tmp_path / "run", reward)
    assert (tmp_path / "run" / "curriculum.json").read_bytes() == about
    for bad in ({"x": path}, {-1: path}, {3: 7}):
        with pytest.raises(CheckpointError, match="checkpoint"):
            import_series(bad, tmp_path / "other", reward)
