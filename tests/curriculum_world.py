"""A tiny base reward and noisy pictures for the tests of the curriculum."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.rewards.conftest import WORDS, save_clip
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.finetuning.data import ImageBank

__all__ = ["SMALL", "make_bank", "make_clip"]

SMALL = {
    "steps": (2, 0),
    "batch_size": 8,
    "group_size": 4,
    "learning_rate": 3e-3,
    "centered_mse": 1.0,
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "validation_prompts": 0,
}


def make_clip(folder: Path) -> Path:
    """Save the tiny CLIP reward and return its folder."""
    return save_clip(folder / "tiny-clip")


def make_bank(n_prompts: int = 6, n_images: int = 4, n_steps: int = 4, seed: int = 0) -> ImageBank:
    """Return pictures of random blocks whose early steps are mostly noise."""
    rng = np.random.default_rng(seed)
    prompts = [" ".join(rng.choice(WORDS, 4)) for _ in range(n_prompts)]
    clean = rng.integers(0, 256, (n_prompts, n_images, 8, 8, 3)).repeat(4, 2).repeat(4, 3).astype(float)
    noise = rng.integers(0, 256, clean.shape)
    shares = np.linspace(0.8, 0, n_steps)
    pixels = np.stack([clean * (1 - share) + noise * share for share in shares], axis=2)
    return ImageBank(pixels.round().astype(np.uint8), prompts)


def small(clip: Path, **changes: object) -> CurriculumConfig:
    """Return settings for a run of a second."""
    return CurriculumConfig(reward=str(clip), **{**SMALL, **changes})
