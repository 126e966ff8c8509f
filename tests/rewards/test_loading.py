"""Rewards by name, folder, function: weights from elsewhere, and what is said when they cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worlds import PROMPTS, save_clip
from ttsnap_lib.errors import CheckpointError, RewardError
from ttsnap_lib.rewards.loading import find_adapters, load_reward


def test_named_rewards_take_local_weights(clip_folder, images, tmp_path):
    other = save_clip(tmp_path / "other", seed=5)
    expected = load_reward(other, device="cpu").score(PROMPTS, images)
    reward = load_reward(clip_folder, weights=other / "model.safetensors", device="cpu")
    assert reward.score(PROMPTS, images) == pytest.approx(expected, rel=1e-5)
    # The buffers that older versions wrote are let pass, anything else is not.
    state = load_file(other / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "old.pt")
    load_reward(clip_folder, weights=tmp_path / "old.pt", device="cpu")


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit(clip_folder, fault, tmp_path):
    state = load_file(clip_folder / "model.safetensors")
    key = "extra.weight" if fault == "unexpected" else "visual_projection.weight"
    state[key] = torch.zeros(3, 32)
    if fault == "missing":
        del state[key]
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(RewardError, match=key):
        load_reward(clip_folder, weights=tmp_path / "bad.safetensors", device="cpu")


def test_a_folder_with_missing_weights(clip_folder, tmp_path):
    """`from_pretrained` would fill the gap with random numbers and only warn."""
    folder = tmp_path / "gap"
    shutil.copytree(clip_folder, folder)
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"visual_projection\.weight"):
        load_reward(folder, device="cpu")


class _Evil:
    ran = False

    def __reduce__(self):
        return (_run, ())


def _run() -> None:
    _Evil.ran = True


def test_pickles_are_refused(clip_folder, tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(1)}, "code": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(RewardError, match="cannot be read"):
        load_reward(clip_folder, weights=tmp_path / "evil.pt", device="cpu")
    assert not _Evil.ran


def test_offline_error_says_what_to_download(tmp_path):
    """In a process of its own: the hub's settings are read when it is imported."""
    repositories = {
        "pickscore": "yuvalkirstain/PickScore_v1",
        "hpsv2.1": "xswu/HPSv2 HPS_v2.1_compressed.pt",
        "clipscore": "openai/clip-vit-large-patch14",
        "image_reward": "THUDM/ImageReward ImageReward.pt",
        "mps": "RE-N-Y/mpsv1",
        "cyclereward": "carolineec/CycleReward-Combo",
        "aesthetic": "trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth",
        "hpsv3": "Qwen/Qwen2-VL-7B-Instruct",  # its processor; the weights are MizzenAI/HPSv3
        "vqascore": "Qwen/Qwen2.5-VL-7B-Instruct",
        "someone/some-clip": "someone/some-clip",
    }
    code = (
        "import sys\nfrom ttsnap_lib import load_reward\nfrom ttsnap_lib.errors import RewardError\n"
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


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("pickscor", {}, "Did you mean 'pickscore'"),
        ("{folder}", {}, "model cannot be loaded"),
        ("{folder}/weights.pt", {}, "does not say which model"),
        ("{folder}/stops.py", {}, 'Write ".*stops.py:function"'),
        ("{folder}/stops.py:function", {}, r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("{folder}/torn.py:function", {}, r"cannot be imported \(SyntaxError: "),
        ("{clip}", {"med_config": "x"}, "unknown key"),
        ("no.such.module:function", {}, "cannot be imported"),
        ("math:no_such", {}, "cannot be imported"),
        ("math:pi", {}, "a callable"),
        ("math:sqrt", {"adapters": "somewhere"}, "no weights to adapt"),
    ],
)
def test_bad_sources(clip_folder, tmp_path, source, options, message):
    (tmp_path / "weights.pt").write_bytes(b"x")
    (tmp_path / "stops.py").write_text("1 / 0")
    (tmp_path / "torn.py").write_text("def function(")
    with pytest.raises((RewardError, ValueError), match=message):
        load_reward(source.format(folder=tmp_path, clip=clip_folder), **options)


def test_nothing_imports_the_packages_before_they_are_needed():
    code = (
        "import sys, ttsnap_lib.rewards.loading\n"
        "print([m for m in ('ImageReward', 'open_clip', 'transformers', 'diffusers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_noise_aware_weights_by_name(tmp_path):
    assert find_adapters("", "pocket-flux") is None and find_adapters("pocket", "some/model") is None
    assert find_adapters("pocket", str(tmp_path)) is None  # a pipeline's folder is no folder of adapters
    assert find_adapters(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="nowhere"):
        find_adapters("nowhere", "pocket-flux")
