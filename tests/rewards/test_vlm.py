"""Vision-language models as rewards, against the formulas of their authors; real classes, random weights, tiny sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.worlds import as_tensor, make_images, save_vlm, vlm_tokenizer
from ttsnap_lib.errors import CurriculumError, RewardError
from ttsnap_lib.finetuning.weights import trainable_module
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.rewards.vlm import _HPS_INSTRUCTION, QUESTION

KINDS = [
    kind for kind in ("Qwen2_5_VL", "Qwen3VL") if hasattr(transformers, f"{kind}Config")
]  # the latter from 4.57 on
PICTURES = [make_images(1, *size, seed=seed)[0] for seed, size in enumerate([(512, 512), (300, 500), (640, 200)])]


# VQAScore


def _t2v_metrics(folder, question: str, prompts, images) -> np.ndarray:
    """``Qwen2VLModel.forward`` of the t2v_metrics package (question, chat, one generated token), one image at a time."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    (answer,) = processor.tokenizer.encode("Yes", add_special_tokens=False)
    found = []
    for prompt, image in zip(prompts, images, strict=True):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question.replace("{prompt}", prompt)}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text=[text], images=[image], padding=True, return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(
                **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
        found.append(torch.softmax(made.scores[-1][0], dim=-1)[answer].item())
    return np.array(found, np.float32)


@pytest.fixture(scope="module", params=KINDS)
def vlm_folder(request, tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp(request.param), request.param)


def test_vqascore_equals_t2v_metrics(vlm_folder):
    prompts = ["a red circle", "the cat above a {blue} square and left of it", "green"]
    for question in (QUESTION, "{prompt}?"):
        expected = _t2v_metrics(vlm_folder, question, prompts, PICTURES)
        reward = load_reward("vqascore", model=vlm_folder, question=question, device="cpu")
        assert reward.name == "vqascore" and np.ptp(expected) / expected.mean() > 0.1
        for batch_size in (1, 3):  # texts and pictures of different lengths in one batch
            scores = reward.score(prompts, PICTURES, batch_size=batch_size)
            np.testing.assert_allclose(scores, expected, rtol=2e-4)
    assert reward.fingerprint() != load_reward("vqascore", model=vlm_folder, device="cpu").fingerprint()
    small = make_images(2)  # 40 x 30
    assert np.array_equal(reward.score("a cat", as_tensor(small)), reward.score("a cat", small))
    assert not any(p.grad is not None or p.dtype != torch.float32 for p in reward.module.parameters())
    assert (
        load_reward("vqascore", model=vlm_folder, device="cpu", dtype="bf16").score("a cat", small).dtype == np.float32
    )


def test_what_a_vlm_reward_refuses(vlm_folder, tmp_path):
    reward = load_reward("vqascore", model=vlm_folder, device="cpu")
    with pytest.raises(CurriculumError, match="takes pictures as they are"):
        trainable_module(reward)

    def refused(message: str, **options) -> None:
        with pytest.raises(RewardError, match=message) as caught:
            load_reward("vqascore", device="cpu", **options)
        assert "\n" not in str(caught.value)

    refused(r"question: got 'Is it good\?', expected a text with \{prompt\}", question="Is it good?", model=vlm_folder)
    vlm_tokenizer(tmp_path / "text").save_pretrained(tmp_path / "text")
    transformers.Qwen2Config().save_pretrained(tmp_path / "text")
    refused("without image_processor, expected a vision-language model", model=tmp_path / "text")
    refused("processor cannot be loaded .*expected a folder with a vision-language model", model=tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(vlm_folder)
    processor.tokenizer.encode = lambda text, **_: [1, 2]
    with pytest.raises(RewardError, match="got 2 tokens for 'Yes', expected one"):
        type(reward)("odd", reward.module, processor, device="cpu")


# HPSv3


def _hpsv3_package(module, processor, prompts, images) -> np.ndarray:
    """``HPSv3RewardInferencer.reward`` and ``Qwen2VLRewardModelBT.forward`` of hpsv3 1.0.0, one image at a time."""
    model, head, found = module.model, module.rm_head, []
    for prompt, image in zip(prompts, images, strict=True):
        height, width = (max(28, round(side / 28) * 28) for side in (image.height, image.width))
        area = 256 * 28 * 28
        if height * width > area:
            beta = math.sqrt(image.height * image.width / area)
            height, width = (math.floor(side / beta / 28) * 28 for side in (image.height, image.width))
        elif height * width < area:
            beta = math.sqrt(area / (image.height * image.width))
            height, width = (math.ceil(side * beta / 28) * 28 for side in (image.height, image.width))
        image = image.convert("RGB").resize((width, height), Image.BICUBIC)
        text = _HPS_INSTRUCTION.replace("{prompt}", prompt)
        message = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        chat = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        batch = processor(text=chat, images=[image], padding=True, return_tensors="pt")
        embeds = model.language_model.embed_tokens(batch["input_ids"])
        seen = model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        mask = (batch["input_ids"] == model.config.image_token_id).unsqueeze(-1).expand_as(embeds)
        embeds = embeds.masked_scatter(mask, getattr(seen, "pooler_output", seen))
        # "the hard coded `3`" of transformers 4.45, for which the package was written
        positions = torch.arange(embeds.shape[1]).view(1, 1, -1).expand(3, 1, -1)
        hidden = model.language_model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=positions, use_cache=False
        )[0]
        logits = head(hidden.float())
        special = batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|Reward|>")
        found.append(logits[special].view(-1))
    return torch.stack(found).detach().numpy()


@pytest.fixture(scope="module")
def hpsv3_files(tmp_path_factory):
    """Return a tiny Qwen2-VL, weights in the published file's form, and the same model put together by hand."""
    folder = save_vlm(tmp_path_factory.mktemp("hpsv3") / "qwen", area=16384 * 28 * 28)
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder, padding_side="right")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    model.resize_token_embeddings(len(processor.tokenizer))
    linear = torch.nn.Linear
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.rm_head = torch.nn.Sequential(
            linear(48, 1024), torch.nn.ReLU(), torch.nn.Dropout(0.05), linear(1024, 16), torch.nn.ReLU(), linear(16, 2)
        ).eval()
    for name, buffer in model.named_buffers():  # create_model_and_processor: model.to(torch.bfloat16)
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.to(torch.bfloat16).float())
    package = {}  # as transformers 4.45 names them
    for name, value in model.state_dict().items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        package[name] = value.clone().contiguous()
    save_file(package, folder / "HPSv3.safetensors")
    scorer = torch.nn.Module()
    scorer.model, scorer.rm_head = model.model, model.rm_head
    return folder, scorer, processor


def test_hpsv3_equals_the_package(hpsv3_files):
    folder, scorer, processor = hpsv3_files
    prompts, pictures = ["a red circle", "the cat above a {blue} square"], PICTURES[:2]
    expected = _hpsv3_package(scorer, processor, prompts, pictures)
    assert np.ptp(expected[:, 0]) > 0.001
    given = {"model": folder, "weights": folder / "HPSv3.safetensors", "device": "cpu"}
    reward = load_reward("hpsv3", **given)
    scores = reward.score(prompts, pictures)  # texts and pictures of different lengths in one batch
    np.testing.assert_allclose(scores, expected[:, 0], rtol=1e-4, atol=1e-5)
    tokens = (reward.inputs(prompts[:1], pictures[:1])["input_ids"] == reward.module.model.config.image_token_id).sum()
    assert tokens == 256
    both = load_reward("hpsv3", sigma=True, **given)
    assert both.names == ("hpsv3.mean", "hpsv3.sigma")
    found = both.score(prompts, pictures, batch_size=1)
    np.testing.assert_allclose(found, np.stack([expected[:, 0], np.exp(expected[:, 1])], 1), rtol=1e-4, atol=1e-5)
    # the names of today
    state = load_file(folder / "HPSv3.safetensors")
    save_file(
        {key.replace("visual.", "model.visual.", 1) if key.startswith("visual.") else
         key.replace("model.", "model.language_model.", 1): value for key, value in state.items()},
        folder / "today.safetensors",
    )  # fmt: skip
    again = load_reward("hpsv3", **{**given, "weights": folder / "today.safetensors"})
    assert np.array_equal(again.score(prompts, pictures), scores)


def test_hpsv3_with_the_wrong_head(hpsv3_files, tmp_path):
    folder, _, _ = hpsv3_files
    state = load_file(folder / "HPSv3.safetensors")

    def refused(changed: dict, message: str) -> None:
        save_file(changed, tmp_path / "bad.safetensors")
        with pytest.raises(RewardError, match=message):
            load_reward("hpsv3", model=folder, weights=tmp_path / "bad.safetensors", device="cpu")

    refused(
        {**state, "rm_head.5.weight": torch.zeros(4, 16)},
        r"rm_head\.5\.weight: got \(4, 16\), expected shape \(2, 16\)",
    )
    refused({key: value for key, value in state.items() if "rm_head" not in key}, r"6 missing and 0 unexpected keys")
    with pytest.raises(RewardError, match="got a qwen2_5_vl"):
        load_reward("hpsv3", model=save_vlm(tmp_path / "other", "Qwen2_5_VL"), device="cpu")
