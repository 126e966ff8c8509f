"""A tiny world to score in: trajectory folders of random smooth pictures, and a reward that needs no weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.rewards.conftest import PROMPTS, make_images
from ttsnap_lib.trajectories.layout import extend
from ttsnap_lib.trajectories.write import ImageWriter

__all__ = ["IDENTITY", "N_STEPS", "SIZE", "brightness", "fill", "prompts_of"]

N_STEPS, SIZE = 4, (24, 32)
IDENTITY = {"n_steps": N_STEPS, "height": SIZE[0], "width": SIZE[1], "image_format": "png", "seed": 0, "model": "tiny"}


def prompts_of(n: int) -> list[str]:
    """Return n distinct prompts of words that the tiny tokenizer knows."""
    return [f"{PROMPTS[k % len(PROMPTS)]} and the cat" + " red" * (k // len(PROMPTS)) for k in range(n)]


def fill(folder: Path, n_prompts: int = 3, n_images: int = 3, identity: dict = IDENTITY, done=()) -> Path:
    """Write a trajectory folder of random smooth pictures."""
    extend(folder, identity, prompts_of(n_prompts), n_images)
    with ImageWriter(folder, "png", "test", workers=2) as writer:
        for prompt in range(n_prompts):
            for image in range(n_images):
                if (prompt, image) in done:
                    continue
                writer.start(prompt, image, range(N_STEPS))
                for step, picture in enumerate(make_images(N_STEPS, SIZE[1], SIZE[0], seed=prompt * 100 + image)):
                    writer.put(prompt, image, step, lambda picture=picture: np.array(picture))
    return folder


def brightness(prompts: list[str], images: list) -> list[float]:
    """Return the mean of each picture."""
    return [np.asarray(image).mean() for image in images]
