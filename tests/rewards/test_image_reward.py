"""ImageReward on transformers' BLIP classes: numbers of the package, files of both namings; random weights, small towers."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.image_reward import SMALL_VISION, pictures, prompts, random_state
from tests.worlds import PROMPTS, as_tensor, make_images
from ttsnap_lib.errors import CheckpointError, RewardError
from ttsnap_lib.rewards import image_reward
from ttsnap_lib.rewards.checkpoints import package_name, todays_name, todays_names
from ttsnap_lib.rewards.image_reward import ImageRewardModel, build_module
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.rewards.pixels import IMAGE_REWARD_PIXELS

# What image-reward 1.5 gives for the first pictures of tests/parity, with its weights, on transformers 4.53.3.
PACKAGE_RAW = [0.447238, 0.755098, 1.004178, 0.601627]

PACKAGE_TARGETS = (
    r"blip\.visual_encoder\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
    r"|blip\.text_encoder\.encoder\.layer\.\d+\.crossattention\.(self\.(query|key|value)|output\.dense)"
)


@pytest.fixture
def small_vision(monkeypatch):
    """Let ImageReward be built with a vision transformer of two layers."""
    monkeypatch.setattr(image_reward, "_VISION", SMALL_VISION)


@pytest.fixture
def small(image_reward_module):
    """Return ImageReward with small towers."""
    return image_reward_module


def _as_package(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state under the package's names, with what the package has besides."""
    extra = {f"blip.{tower}_proj.weight": torch.zeros(256, 48) for tower in ("vision", "text")}
    constant = {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}
    return {package_name(key): value for key, value in state.items()} | extra | constant


def test_gives_the_numbers_of_the_package(small, small_vision, bert_folder, med_config, tmp_path):
    names = {package_name(name): tuple(value.shape) for name, value in small.state_dict().items()}
    torch.save(_as_package(random_state(names)), tmp_path / "ImageReward.pt")
    given = {"weights": tmp_path / "ImageReward.pt", "med_config": med_config, "tokenizer": bert_folder}
    reward = load_reward("image_reward", device="cpu", **given)
    n = len(PACKAGE_RAW)
    for batch_size in (1, 3, 32):
        scores = reward.score(prompts(12)[:n], pictures(12)[:n], batch_size=batch_size)
        np.testing.assert_allclose(scores, PACKAGE_RAW, rtol=0, atol=1e-5)
    standard = ImageRewardModel("image_reward", reward.module, device="cpu", standardize=True)
    expected = (np.array(PACKAGE_RAW) - 0.16717362830052426) / 1.0333394966054072
    np.testing.assert_allclose(standard.score(prompts(12)[:n], pictures(12)[:n]), expected, rtol=0, atol=1e-5)


def test_names_go_both_ways(small):
    own = list(small.state_dict())
    theirs = [package_name(name) for name in own]
    assert theirs != own and [todays_name(name) for name in theirs] == own
    assert [todays_name(name) for name in own] == own and [package_name(name) for name in theirs] == theirs
    visual = [name for name in theirs if "visual" in name and "blocks.1" not in name]
    assert sorted(visual) == sorted(
        [f"blip.visual_encoder.{name}" for name in ("cls_token", "pos_embed")]
        + [
            f"blip.visual_encoder.{layer}.{kind}"
            for layer in ("patch_embed.proj", "norm")
            + tuple(f"blocks.0.{part}" for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
            for kind in ("weight", "bias")
        ]
    )


def test_long_prompts_are_cut_at_35_tokens(small, images):
    reward = ImageRewardModel("image_reward", small, device="cpu")
    assert reward.encode_text(PROMPTS).tensors["input_ids"].shape == (7, 35)
    long = " ".join(["red circle"] * 40)
    assert reward.score(long, images[:1]) == pytest.approx(reward.score(long + " blue", images[:1]), rel=1e-6)


def test_the_two_added_tokens_come_last(small):
    known = len(small.tokenizer)
    assert small.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [known - 2, known - 1]


def test_tensors_score_as_images(small, images):
    reward = ImageRewardModel("image_reward", small, device="cpu")
    assert np.array_equal(reward.score(PROMPTS, as_tensor(images)), reward.score(PROMPTS, images))


def test_embeddings_are_the_class_tokens_that_the_text_tower_looks_at(small, images):
    reward = ImageRewardModel("image_reward", small, device="cpu")
    plain = reward.score(PROMPTS, images)
    with reward.embeddings() as found:
        assert np.array_equal(reward.score(PROMPTS, images), plain)
    with torch.no_grad():
        seen = small.blip.visual_encoder(pixel_values=reward.preprocess(images)).last_hidden_state[:, 0]
    torch.testing.assert_close(found[0], torch.nn.functional.normalize(seen, dim=-1))


def test_forward_trains(small, images):
    reward = ImageRewardModel("image_reward", small, device="cpu")
    out = reward.forward(reward.preprocess(images[:3]), reward.encode_text(PROMPTS[:3]))
    assert out.shape == (3,)
    out.sum().backward()
    assert small.blip.visual_encoder.encoder.layers[0].self_attn.qkv.weight.grad.abs().sum() > 0
    small.zero_grad()


@pytest.mark.parametrize("where", ["folder", "working directory"])
@pytest.mark.parametrize("naming", ["today's", "the package's"])
def test_loads_the_checkpoint_format(
    small, small_vision, bert_folder, med_config, tmp_path, monkeypatch, where, naming
):
    """`load_reward` end to end with local files."""
    options = {"tokenizer": bert_folder}
    if where == "working directory":  # where the package itself looks for `bert-base-uncased`
        monkeypatch.chdir(bert_folder.parent)
        options = {}
    state = small.state_dict()
    torch.save(state if naming == "today's" else _as_package(state), tmp_path / "ImageReward.pt")
    given = {"weights": tmp_path / "ImageReward.pt", "med_config": med_config, "device": "cpu", **options}
    reward = load_reward("image_reward", **given)
    assert reward.name == "image_reward" and not reward.standardize
    for key, value in reward.module.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_weights_that_do_not_fit(small, small_vision, bert_folder, med_config, tmp_path):
    given = {"weights": tmp_path / "ImageReward.pt", "med_config": med_config, "tokenizer": bert_folder}
    whole = _as_package(small.state_dict())

    def refused(state: dict, message: str) -> None:
        torch.save(state, tmp_path / "ImageReward.pt")
        with pytest.raises(RewardError, match=message) as caught:
            load_reward("image_reward", device="cpu", **given)
        assert "\n" not in str(caught.value)

    refused(
        {key: value for key, value in whole.items() if key != "mlp.layers.0.bias"}, r"1 missing.*mlp\.layers\.0\.bias"
    )
    refused({"visual.conv1.weight": torch.zeros(3)}, r"missing and 1 unexpected keys")
    refused(whole | {"blip.visual_encoder.pos_embed": torch.zeros(1, 9, 48)}, r"position_embedding: got \(1, 9, 48\)")
    torch.save(whole, tmp_path / "ImageReward.pt")
    os.truncate(tmp_path / "ImageReward.pt", 1_000_000)  # a download that broke off
    with pytest.raises(RewardError, match=r"cannot be read.*Download it again"):
        load_reward("image_reward", device="cpu", **given)


def test_missing_files(small_vision, tmp_path, bert_folder, med_config):
    with pytest.raises(RewardError, match="weights file"):
        load_reward("image_reward", weights=tmp_path / "no.pt", med_config=med_config)
    with pytest.raises(RewardError, match="med_config"):
        build_module(tmp_path / "no.json", bert_folder)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "no", tmp_path / "empty"):
        with pytest.raises(RewardError, match=r"tokenizer cannot be loaded.*vocab\.txt"):
            build_module(med_config, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_cross_attention": False}, "add_cross_attention: got False, expected true"),
        ({"hidden_size": 512}, "hidden_size: got 512"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": 8}, "got 21 tokens with .* expected at most 8"),
        ({"max_position_embeddings": 16}, "max_position_embeddings: got 16"),
        ({"hidden_act": "gelly"}, "no text tower can be built"),
        ({"num_attention_heads": 7}, "no text tower can be built"),
    ],
)
def test_configuration_of_another_model(small_vision, tmp_path, bert_folder, med_config, changes, message):
    (tmp_path / "med.json").write_text(json.dumps(json.loads(med_config.read_text()) | changes))
    with pytest.raises(RewardError, match=message) as caught:
        build_module(tmp_path / "med.json", bert_folder)
    assert "\n" not in str(caught.value)


@pytest.fixture
def two_namings(small, tmp_path):
    """Return run folders with the same two adapters, under the names of today and under the package's."""
    import copy

    from peft import LoraConfig, get_peft_model

    today, package = tmp_path / "today", tmp_path / "package"
    for step in (1, 4):
        torch.manual_seed(step)
        adapted = get_peft_model(
            copy.deepcopy(small),
            LoraConfig(r=2, target_modules=image_reward._LORA_TARGETS, init_lora_weights=False),
        )
        adapted.save_pretrained(today / f"step_{step:02d}")
        old = package / f"step_{step:02d}"
        old.mkdir(parents=True)
        about = json.loads((today / old.name / "adapter_config.json").read_text())
        (old / "adapter_config.json").write_text(json.dumps(about | {"target_modules": PACKAGE_TARGETS}))
        state = load_file(today / old.name / "adapter_model.safetensors")
        save_file({package_name(key): value for key, value in state.items()}, old / "adapter_model.safetensors")
    for folder in (today, package):
        (folder / "curriculum.json").write_text('{"reward": "image_reward"}')
    return today, package


def _with_adapters(small, folder):
    import copy

    return ImageRewardModel("image_reward", copy.deepcopy(small), device="cpu").attach_steps(folder)


def test_adapters_of_both_namings_score_alike(small, two_namings, images):
    today, package = (_with_adapters(small, folder) for folder in two_namings)
    base = today.score(PROMPTS, images)
    assert today.adapter_steps == package.adapter_steps == (1, 4)
    for step in (4, 1, None):
        scores = today.use_step(step).score(PROMPTS, images)
        assert np.array_equal(package.use_step(step).score(PROMPTS, images), scores)
        assert (np.abs(scores - base).max() > 1e-3) == (step is not None)


def test_adapters_by_ends_of_names(small, two_namings, images):
    """The package's layer `attn.proj` is `self_attn.projection` now."""
    _, package = two_namings
    for step in ("step_01", "step_04"):
        path = package / step / "adapter_config.json"
        ends = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "crossattention.self.query", "crossattention.self.key"]
        ends += ["crossattention.self.value", "crossattention.output.dense"]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ends}))
    first, second = (_with_adapters(small, folder).use_step(1) for folder in two_namings)
    assert np.array_equal(first.score(PROMPTS, images), second.score(PROMPTS, images))


@pytest.mark.parametrize("gone", [r"blocks\.1\.attn\.proj", r"visual_encoder", r"crossattention\.self\.key"])
def test_adapters_of_the_package_with_a_missing_layer(small, two_namings, gone):
    path = two_namings[1] / "step_04" / "adapter_model.safetensors"
    state = load_file(path)
    save_file({key: value for key, value in state.items() if not re.search(gone, key)}, path)
    with pytest.raises(
        CheckpointError, match=r"adapter of step 4 does not fit: \d+ missing and 0 unexpected"
    ) as caught:
        _with_adapters(small, two_namings[1])
    assert "\n" not in str(caught.value)


def test_full_weights_under_the_package_s_names(small, tmp_path, images):
    from ttsnap_lib.finetuning.weights import import_series

    changed = {key: value * 1.1 if "mlp" in key else value for key, value in small.state_dict().items()}
    torch.save(_as_package(changed), tmp_path / "Ct4.pt")
    reward = ImageRewardModel("image_reward", small, device="cpu")
    import_series({4: tmp_path / "Ct4.pt"}, tmp_path / "run", reward)
    (tmp_path / "old" / "step_04").mkdir(parents=True)  # as an earlier version of ours wrote it
    (tmp_path / "old" / "curriculum.json").write_text("{}")
    save_file(_as_package(changed), tmp_path / "old" / "step_04" / "model.safetensors")
    base = reward.score(PROMPTS, images)
    found = [_with_adapters(small, tmp_path / run).use_step(4).score(PROMPTS, images) for run in ("run", "old")]
    assert np.array_equal(*found) and np.abs(found[0] - base).max() > 1e-3


def test_other_names_stay():
    state = {"vision_model.post_layernorm.weight": 1, "visual.proj": 2, "vision_proj.weight": 3, "norm.weight": 4}
    assert todays_names(state) == state


def test_nothing_imports_the_models_before_they_are_needed():
    import subprocess
    import sys

    code = (
        "import sys, ttsnap_lib.rewards.loading, ttsnap_lib.rewards.image_reward\n"
        "print([m for m in ('ImageReward', 'open_clip', 'transformers', 'diffusers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_real_size_loads_and_scores(bert_folder, med_config):
    module = build_module(med_config, bert_folder)
    assert sum(p.numel() for p in module.blip.visual_encoder.parameters()) > 3e8
    scores = ImageRewardModel("image_reward", module, device="cpu").score("a red circle", make_images(2))
    assert np.isfinite(scores).all()


# CycleReward


def test_cyclereward_equals_its_package(small, small_vision, bert_folder, med_config, tmp_path, monkeypatch):
    """``CycleReward.score`` of cyclereward 0.1.7: 128 tokens, and a head with GELUs."""
    text = {**json.loads(med_config.read_text()), "max_position_embeddings": 128}
    monkeypatch.setattr(image_reward, "_BLIP_TEXT", {key: text[key] for key in image_reward._BLIP_TEXT if key in text})
    linear, gelu = torch.nn.Linear, torch.nn.GELU
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        blip = build_module(None, bert_folder).blip
        layers = torch.nn.Sequential(
            linear(768, 1024),
            gelu(),
            linear(1024, 128),
            gelu(),
            linear(128, 64),
            gelu(),
            linear(64, 16),
            gelu(),
            linear(16, 1),
        )
        for parameter in [*layers.parameters(), *blip.text_encoder.parameters()]:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else None
    blip.eval()
    state = {f"blip.{key}": value for key, value in blip.state_dict().items()}
    state |= {f"mlp.layers.{key}": value for key, value in layers.state_dict().items()}
    torch.save(_as_package(state), tmp_path / "CycleReward-Combo.pth")
    images = make_images(5, 300, 260)
    texts = [*PROMPTS[:4], " ".join(["red circle"] * 50)]  # the last is longer than ImageReward reads
    expected = []
    with torch.no_grad():
        for prompt, image in zip(texts, images, strict=True):
            tokens = small.tokenizer(prompt, padding="max_length", truncation=True, max_length=128, return_tensors="pt")
            embeds = blip.visual_encoder(IMAGE_REWARD_PIXELS.image(image)[None])[0]
            read = blip.text_encoder(
                tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=embeds,
                encoder_attention_mask=torch.ones(embeds.size()[:-1], dtype=torch.long), is_decoder=False,
            ).last_hidden_state  # fmt: skip
            expected.append(layers(read[:, 0, :].float()).item())
    assert np.ptp(expected) > 0.01
    reward = load_reward("cyclereward", weights=tmp_path / "CycleReward-Combo.pth", tokenizer=bert_folder, device="cpu")
    for batch_size in (1, 3):
        np.testing.assert_allclose(reward.score(texts, images, batch_size=batch_size), expected, rtol=1e-4, atol=1e-5)
    assert reward.name == "cyclereward"
    torch.save(_as_package(small.state_dict()), tmp_path / "bad.pth")  # ImageReward's head
    with pytest.raises(RewardError, match=r"missing and \d unexpected keys.*mlp\.layers"):
        load_reward("cyclereward", weights=tmp_path / "bad.pth", tokenizer=bert_folder, device="cpu")
