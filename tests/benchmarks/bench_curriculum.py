"""What the curriculum's machinery costs over a plain PyTorch loop: ``python -m tests.benchmarks curriculum``.

Both train pocket-clip's adapters on the same pictures, in turns; told is the ratio of medians of pictures per second,
and the share of the training time that was spent waiting for data.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.rows import Row
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.finetuning.data import ImageBank
from ttsnap_lib.finetuning.train import finetune
from ttsnap_lib.pocket.world import pocket_prompts
from ttsnap_lib.rewards.loading import load_reward

GROUP = 8


def run(prompts: int = 60, rounds: int = 7) -> list[Row]:
    """Return the rows."""
    rng = np.random.default_rng(0)
    bank = ImageBank(
        rng.integers(0, 256, (prompts, GROUP, 2, 32, 32, 3), dtype=np.uint8), pocket_prompts("train", prompts)
    )
    config = CurriculumConfig(
        steps=(0,), batch_size=64, group_size=GROUP, mse=1.0, validation_prompts=0, epochs_per_step=8, save_every=10**6,
        keep="last",
    )  # fmt: skip
    threads, cache = torch.get_num_threads(), os.environ.get("TTSNAP_DATA_CACHE")
    torch.set_num_threads(1)
    ours, plain, waits = [], [], []
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TTSNAP_DATA_CACHE"] = str(Path(folder) / "cache")
            targets = rng.normal(size=(prompts, GROUP)).astype(np.float32)
            for turn in range(-1, rounds):  # the first warms up
                order = (_ours, _plain) if turn % 2 else (_plain, _ours)
                found = {way: way(bank, targets, config, Path(folder) / f"{turn}") for way in order}
                if turn >= 0:
                    ours.append(found[_ours][0])
                    waits.append(found[_ours][1])
                    plain.append(found[_plain][0])
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("TTSNAP_DATA_CACHE", None)
        if cache is not None:
            os.environ["TTSNAP_DATA_CACHE"] = cache
    paired = [a / b for a, b in zip(ours, plain, strict=True)]
    quartiles = statistics.quantiles(paired, n=4)
    note = f"quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}"
    return [
        Row("finetuning, pocket-clip, LoRA, batch 64", statistics.median(ours), "pictures/s"),
        Row("plain PyTorch loop, the same", statistics.median(plain), "pictures/s"),
        Row(
            "finetuning / plain loop", statistics.median(ours) / statistics.median(plain), "x", at_least=0.95, note=note
        ),
        Row("share of the training time spent waiting for data", statistics.median(waits), "", at_most=0.05),
    ]


def _ours(bank: ImageBank, targets: np.ndarray, config: CurriculumConfig, folder: Path) -> tuple[float, float]:
    reward = load_reward("pocket-clip", device="cpu")
    result = finetune(bank, folder, config, reward=reward, targets=targets)
    return result.pictures_per_s, result.wait_share


def _plain(bank: ImageBank, targets: np.ndarray, config: CurriculumConfig, folder: Path) -> tuple[float, float]:
    """Train as one would write it down: tensors in memory, text encoded once, AdamW, clipping."""
    from peft import LoraConfig, get_peft_model

    reward: Any = load_reward("pocket-clip", device="cpu")
    about = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=reward.default_lora_targets)
    get_peft_model(reward.module, about)
    trained = [p for p in reward.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    rng = np.random.default_rng(0)
    begin, count = time.perf_counter(), 0
    with torch.no_grad():  # in the time of both: the texts are frozen and encoded once
        text = reward.encode_text(bank.prompts)
    goal, per_batch = torch.from_numpy(targets), config.batch_size // GROUP
    for _ in range(config.epochs_per_step):
        order = rng.permutation(len(bank.prompts))
        for start in range(0, len(order), per_batch):
            prompts = order[start : start + per_batch]
            pictures = torch.from_numpy(bank.pixels[prompts, :, 0].reshape(-1, 32, 32, 3)).permute(0, 3, 1, 2)
            pixels = reward.preprocessing.tensor(pictures.float() / 255, differentiable=True)
            scores = reward.forward(pixels, text[torch.from_numpy(prompts).repeat_interleave(GROUP)])
            loss = (scores - goal[prompts].reshape(-1)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            count += len(pixels)
    return count / (time.perf_counter() - begin), 0.0
