"""Pictures to learn from: of the pocket pipelines, with the clean estimate of each step when asked, and flawed renders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from ttsnap_lib.pocket import POCKET_DEFAULTS
from ttsnap_lib.pocket.training.models import LATENT_CHANNELS, LATENT_PIXELS
from ttsnap_lib.pocket.training.vae import decode, encode
from ttsnap_lib.pocket.world import caption, hard_negative, render, training_scenes


def call_settings(pipeline: Any) -> dict[str, Any]:
    """Return the keyword arguments of the stock call that a pocket pipeline needs."""
    name = "pocket-flux" if hasattr(pipeline, "transformer") else "pocket-sdxl"
    settings = dict(POCKET_DEFAULTS[name])
    settings["num_inference_steps"] = settings.pop("n_steps")
    settings["guidance_scale"] = settings.pop("guidance")
    return settings


def initial_noise(base_seed: int, prompt: int, image: int) -> torch.Tensor:
    """Return the noise of one image, float32 (8, 8, 8), by the seed rule of the trajectory folders."""
    seed = int(np.random.SeedSequence([base_seed, prompt, image]).generate_state(1, np.uint64)[0] & ((1 << 63) - 1))
    shape = (LATENT_CHANNELS, LATENT_PIXELS, LATENT_PIXELS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample_steps(
    pipeline: Any,
    prompts: Sequence[str],
    images: int,
    *,
    base_seed: int = 0,
    batch: int = 64,
    every_step: bool = True,
) -> np.ndarray:
    """Return uint8 (prompt, image, step, 32, 32, 3): the decoded clean estimate of every step, the picture last.

    Euler steps move a latent x from noise level s to t by ``(t - s) * d`` with clean estimate ``x - s * d``, for flow
    matching and for SDXL's scheduler alike, so the estimates follow from the latents that the stock callback shows.
    """
    texts = [text for text in prompts for _ in range(images)]
    noise = torch.stack([initial_noise(base_seed, p, k) for p in range(len(prompts)) for k in range(images)])
    pipeline.set_progress_bar_config(disable=True)
    settings, flux = call_settings(pipeline), hasattr(pipeline, "transformer")
    out = []
    for start in range(0, len(texts), batch):
        part = noise[start : start + batch]
        size = len(part)
        shape = (size, LATENT_CHANNELS, LATENT_PIXELS, LATENT_PIXELS)
        given = pipeline._pack_latents(part, *shape) if flux else part
        seen: list[torch.Tensor] = []

        def keep(pipe, step, timestep, values, seen=seen):
            seen.append(values["latents"].clone())
            return values

        final = pipeline(
            prompt=texts[start : start + batch],
            latents=given.clone(),
            output_type="latent",
            callback_on_step_end=keep,
            **settings,
        ).images
        sigmas = pipeline.scheduler.sigmas
        before = given if flux else given * pipeline.scheduler.init_noise_sigma
        estimates = []
        for step, after in enumerate(seen):
            direction = (after - before) / (sigmas[step + 1] - sigmas[step])
            estimates.append(before - sigmas[step] * direction)
            before = after
        wanted = torch.stack(estimates[:-1] + [final] if every_step else [final], dim=1)
        steps = wanted.shape[1]
        flat = wanted.flatten(0, 1)
        if flux:
            flat = pipeline._unpack_latents(flat, 32, 32, pipeline.vae_scale_factor)
        pixels = decode(pipeline.vae, flat)
        out.append(pixels.reshape(size, steps, *pixels.shape[1:]))
    stacked = np.concatenate(out)
    return stacked.reshape(len(prompts), images, *stacked.shape[1:])


def flawed_pictures(vae: Any, prompts: int, images: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Return training captions and flawed pictures of them, uint8 (prompts, images, 32, 32, 3).

    They look like the mistakes of the diffusion models (half a ring, a square with a round corner, a color between two)
    and cost a decoding each. The latents of half of them are bent toward a scene with one attribute changed, by a
    random amount everywhere or in places; all are shaken by noise of a strength that differs from place to place.
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
