"""Flawed pictures in any number: renders whose latents are bent toward another scene or shaken, then decoded.

They look like the mistakes of the diffusion models (half a ring, a square with a round corner, a color between two),
cost a decoding each, and may show any training caption; the oracle labels them like generated pictures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import ndimage

from ttsnap_lib.pocket.training.models import LATENT_PIXELS
from ttsnap_lib.pocket.training.vae import decode, encode
from ttsnap_lib.pocket.world import caption, hard_negative, render, training_scenes


def flawed_pictures(vae: Any, prompts: int, images: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Return captions and their flawed pictures, uint8 (prompts, images, 32, 32, 3).

    Half of the pictures are bent toward a scene with one attribute changed, by a random amount everywhere or in
    places; all are shaken by noise of a strength that differs from place to place.
    """
    scenes = [scene for scene in training_scenes(prompts, rng) for _ in range(images)]
    others = [hard_negative(scene, rng) for scene in scenes]
    seed = int(rng.integers(2**32))
    # the same jitter in both, so that only the changed attribute moves
    first, second = (render(which, np.random.default_rng(seed)) for which in (scenes, others))
    clean, bent = encode(vae, first), encode(vae, second)
    count, side = len(scenes), LATENT_PIXELS
    amount = rng.uniform(0, 1, (count, 1, 1)) * (rng.random((count, 1, 1)) < 0.5)
    local = np.where(rng.random((count, 1, 1)) < 0.5, 1.0, _patches(rng, count, side))
    strength = rng.uniform(0.05, 0.7, (count, 1, 1)) * _patches(rng, count, side)
    weight, level = (torch.from_numpy(x.astype(np.float32))[:, None] for x in (amount * local, strength))
    noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), dtype=np.float32))
    made = decode(vae, clean + weight * (bent - clean) + level * noise)
    return [caption(scene) for scene in scenes[::images]], made.reshape(prompts, images, *made.shape[1:])


def _patches(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    """Return smooth random weights in [0, 1], (count, side, side)."""
    field = ndimage.gaussian_filter(rng.standard_normal((count, side, side)), (0, 1.2, 1.2))
    field /= field.std(axis=(1, 2), keepdims=True)
    return 1.0 / (1.0 + np.exp(-2.0 * field))
