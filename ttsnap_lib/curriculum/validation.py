"""How well a reward at a noisy step predicts the clean one, on prompts that were not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ttsnap_lib.metrics import kendall_tau, top_select
from ttsnap_lib.rewards.base import Reward

from .images import Images
from .targets import score_step

__all__ = ["Validation", "measures", "validate"]


@dataclass(frozen=True)
class Validation:
    """Means over prompts."""

    tau: float
    """Kendall's tau-b with the target, over the images of a prompt."""
    mse: float
    top_accuracy: float
    """How often the best image is among the top share by the reward; the released ratios, averaged."""
    top_gap: float
    """By how much the best kept target falls short, in units of the reward."""

    def row(self, prefix: str) -> dict[str, float]:
        """Return the values under names such as ``before_tau``."""
        return {f"{prefix}_{name}": float(value) for name, value in vars(self).items()}


def measures(scores: np.ndarray, targets: np.ndarray) -> Validation:
    """Return the measures of scores (prompt, image) against targets (prompt, image)."""
    deep = scores[:, :, None]
    accuracy, gap = top_select(deep, targets, resamples=1)
    return Validation(
        tau=float(kendall_tau(deep, targets, resamples=1).mean[0]),
        mse=float(np.square(scores.astype(np.float64) - targets).mean()),
        top_accuracy=float(accuracy.mean[0]),
        top_gap=float(gap.mean[0]),
    )


def validate(reward: Reward, images: Images, targets: np.ndarray, step: int, *, batch_size: int = 256) -> Validation:
    """Score all pictures of `images` at `step` with the weights as they are now, and measure.

    Parameters
    ----------
    reward : Reward
    images : Images
    targets : (prompt, image)
        Rewards of the clean images.
    step : int
    batch_size : int

    Returns
    -------
    Validation
    """
    return measures(score_step(reward, images, step, batch_size=batch_size), targets)
