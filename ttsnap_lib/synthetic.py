"""A statistical stand-in for a reward tensor, for tests, benchmarks and first tries without any data.

Every number comes from a normal model, none from a diffusion model: it shows how the tools work, not what TTSnap gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .checks import integer
from .tensors import make_rewards

if TYPE_CHECKING:
    from collections.abc import Sequence

    import xarray as xr

__all__ = ["synthetic_rewards"]


def synthetic_rewards(
    n_prompts: int = 64,
    n_images: int = 200,
    n_steps: int = 20,
    rewards: Sequence[str] = ("image_reward",),
    rng: np.random.Generator | int = 0,
) -> xr.Dataset:
    """Draw a reward tensor whose scores agree better and better with the final ones as the steps go on.

    Final rewards are a prompt effect plus a seed effect; the score at a step mixes the seed effect with a disturbance
    that drifts slowly over the steps. The mixing is set so that the expected Kendall tau rises as ``x ** 1.4`` over
    the loop for the base reward and as ``x ** 0.7`` for the noise-aware one (tau of a normal pair with correlation r is
    ``2 / pi * arcsin(r)``), roughly the shape of the published FLUX tensors.

    Returns
    -------
    xarray.Dataset
        A reward tensor with the attribute ``source = "synthetic"``.
    """
    sizes = [integer(name, value, 1) for name, value in
             (("n_prompts", n_prompts), ("n_images", n_images), ("n_steps", n_steps))]  # fmt: skip
    n_prompts, n_images, n_steps = sizes
    rng = np.random.default_rng(rng)
    x = np.linspace(0, 1, n_steps) if n_steps > 1 else np.ones(1)
    correlations = [np.sin(np.pi / 2 * np.clip(x**power, 0.02, 1)) for power in (1.4, 0.7)]
    correlations[0][-1] = correlations[1][-1] = 1.0
    shape = (len(rewards), n_prompts, n_images)
    seed_effect = rng.standard_normal(shape, np.float32)
    disturbance = np.empty((*shape, n_steps), np.float32)
    disturbance[..., 0] = rng.standard_normal(shape, np.float32)
    for step in range(1, n_steps):
        fresh = rng.standard_normal(shape, np.float32)
        disturbance[..., step] = 0.9 * disturbance[..., step - 1] + np.sqrt(1 - 0.9**2) * fresh
    prompt_effect = 0.8 * rng.standard_normal((len(rewards), n_prompts, 1, 1), np.float32)
    variants = [
        prompt_effect + 0.6 * (seed_effect[..., None] * r + disturbance * np.sqrt(1 - r**2)).astype(np.float32)
        for r in (correlation.astype(np.float32) for correlation in correlations)
    ]
    variants[1][..., -1] = variants[0][..., -1]
    return make_rewards(*variants, rewards=rewards, attributes={"model": "synthetic stand-in", "source": "synthetic"})
