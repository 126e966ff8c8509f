"""Batched scoring against one image at a time, and reading ahead of the model.

The real-size classes carry random weights: speed does not depend on them. `TTSNAP_BENCH_REAL=0` leaves them out.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.benchmarks.rows import Row, interleaved, ratio
from tests.worlds import embedding
from ttsnap_lib.files import cores
from ttsnap_lib.rewards.base import Reward, open_image
from ttsnap_lib.rewards.loading import load_reward

PROMPT = "a small red ring left of a large blue square"


def pictures(n: int, side: int) -> list[Image.Image]:
    """Return noise pictures of a side."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(n)]


def pocket_rows(n: int = 128, repeats: int = 5) -> list[Row]:
    """Pocket CLIP: our batches against the way of the model card, one image and its prompt at a time."""
    from transformers import CLIPProcessor

    from ttsnap_lib.pocket import pocket_folder

    folder = pocket_folder("pocket-clip")
    reward, processor, images = load_reward("pocket-clip"), CLIPProcessor.from_pretrained(folder), pictures(n, 32)
    model, options = reward.module, {"padding": True, "truncation": True, "return_tensors": "pt"}

    @torch.no_grad()
    def single() -> list[float]:
        scores = []
        for image in images:
            pixels = processor(images=image, return_tensors="pt").to(reward.device)
            text = processor(text=PROMPT, max_length=reward.max_length, **options).to(reward.device)
            seen = torch.nn.functional.normalize(embedding(model.get_image_features(**pixels)), dim=-1)
            read = torch.nn.functional.normalize(embedding(model.get_text_features(**text)), dim=-1)
            scores.append((model.logit_scale.exp() * (read @ seen.T)[0]).item())
        return scores

    np.testing.assert_allclose(reward.score(PROMPT, images, batch_size=64), single(), rtol=1e-3, atol=1e-3)
    slow, fast = interleaved(single, lambda: reward.score(PROMPT, images, batch_size=64), repeats=repeats)
    times, spread = ratio(slow, fast)
    return [
        Row("pocket CLIP, batches of 64", n / statistics.median(fast), "images/s"),
        Row("pocket CLIP, one at a time as the model card does", n / statistics.median(slow), "images/s"),
        Row("pocket CLIP, batched over one at a time", times, "x", at_least=3.0, note=spread),
    ]


def files_rows(n: int = 64, repeats: int = 5) -> list[Row]:
    """Return scoring of 512 px PNG files by their paths against opening one after the other, with a tiny model."""
    reward = load_reward("pocket-clip")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k}.png" for k in range(n)]
        for path, image in zip(paths, pictures(n, 512), strict=True):
            image.save(path)
        slow, fast = interleaved(
            lambda: reward.score(PROMPT, [open_image(path) for path in paths]),
            lambda: reward.score(PROMPT, paths),
            repeats=repeats,
        )
    times, spread = ratio(slow, fast)
    return [
        Row("pocket CLIP, 512 px PNG files, score(paths)", n / statistics.median(fast), "images/s"),
        Row(
            "pocket CLIP, score(paths) over opening one after the other", times, "x", note=f"{spread}; {cores()} cores"
        ),
    ]


def real_rows(reward: Reward, single, label: str, n: int = 8, repeats: int = 3) -> list[Row]:
    """Return batched scoring of a real-size class against `single(image)`, and preprocessing beside the model."""
    images = pictures(n, 512)
    slow, fast = interleaved(
        lambda: [single(image) for image in images], lambda: reward.score(PROMPT, images, batch_size=n), repeats=repeats
    )
    times, spread = ratio(slow, fast)
    model_s = statistics.median(fast)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k}.png" for k in range(n)]
        for path, image in zip(paths, images, strict=True):
            image.save(path, compress_level=1)
        begin = time.perf_counter()
        for path in paths:
            with Image.open(path) as file:
                reward.preprocessing.image(file)
        reading_s = time.perf_counter() - begin
    return [
        Row(f"{label}, batches of {n}", n / model_s, "images/s"),
        Row(f"{label}, one at a time", n / statistics.median(slow), "images/s"),
        Row(f"{label}, batched over one at a time", times, "x", note=spread),
        Row(f"{label}, 512 px PNG read and preprocessed, one thread", n / reading_s, "images/s"),
        Row(f"{label}, reading over model", model_s / reading_s, "x", at_least=1.0),
    ]


def image_reward_rows() -> list[Row]:
    """Return the rows of ImageReward at real size (small text tower, random weights)."""
    from transformers import BertTokenizer

    from ttsnap_lib.rewards.image_reward import ImageRewardModel, build_module

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(PROMPT.split()))]
    config = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    config |= {"vocab_size": 30524, "max_position_embeddings": 512, "type_vocab_size": 2, "add_cross_attention": True}
    config |= {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "vocab.txt").write_text("\n".join(words))
        (root / "med_config.json").write_text(json.dumps(config | {"encoder_width": 768}))
        BertTokenizer(str(root / "vocab.txt")).save_pretrained(root)
        module = build_module(root / "med_config.json", root)
    reward = ImageRewardModel("image_reward", module)

    @torch.no_grad()
    def single(image: Image.Image) -> float:  # image and prompt through the model, as the package's score does
        return reward.forward(reward.preprocess([image]), [PROMPT]).item()

    return real_rows(reward, single, "ImageReward (real size)")


def clip_h_rows() -> list[Row]:
    """Return the rows of open_clip's ViT-H-14, HPSv2's class, at real size (random weights)."""
    import open_clip

    from ttsnap_lib.rewards.towers import OpenClipReward

    model = open_clip.create_model("ViT-H-14", pretrained=None, precision="fp32", device="cpu")
    tokenizer = open_clip.get_tokenizer("ViT-H-14")
    reward = OpenClipReward("hpsv2", model, tokenizer)

    @torch.no_grad()
    def single(image: Image.Image) -> float:  # image and prompt through the model, as hpsv2.score does
        seen, read, _ = model(reward.preprocess([image]), tokenizer([PROMPT]).to(reward.device))
        return torch.diagonal(seen @ read.T).item()

    return real_rows(reward, single, "CLIP-H (HPSv2, real size)", n=4)


def reading_ahead_rows() -> list[Row]:
    """Share of the time of `score` that it waits for pictures, on pocket trajectories."""
    from ttsnap_lib.scoring.report import pocket_trajectories
    from ttsnap_lib.scoring.score import score

    folder = pocket_trajectories()
    with tempfile.TemporaryDirectory() as out:
        report = score(folder, "pocket-clip", Path(out) / "r.zarr", batch_size=64)
    share = report.seconds["wait"] / report.elapsed_s
    return [
        Row("ttsnap score, pocket CLIP, files to tensor", report.images_per_s, "pictures/s"),
        Row("ttsnap score, pocket CLIP, share of time waiting for files", share, ""),
    ]


def run() -> list[Row]:
    """Return all rows."""
    rows = pocket_rows() + files_rows() + reading_ahead_rows()
    if os.environ.get("TTSNAP_BENCH_REAL", "1") != "0":
        rows += image_reward_rows() + clip_h_rows()
    return rows
