"""Intervals over prompts, by the bootstrap: prompts are what a result should carry over to."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from .checks import integer, real

__all__ = ["Estimate", "bootstrap_means"]


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its interval; fields are floats or equally shaped arrays.

    Attributes
    ----------
    mean, low, high : float or ndarray
    per_prompt : ndarray (prompt, ...)
    """

    mean: np.ndarray | Any
    low: np.ndarray | Any
    high: np.ndarray | Any
    per_prompt: np.ndarray

    @classmethod
    def over_prompts(
        cls,
        per_prompt: np.ndarray,
        rng: np.random.Generator | int | None = None,
        *,
        level: float = 0.95,
        resamples: int = 1000,
    ) -> Estimate:
        """Average over the first axis, with a percentile bootstrap; prompts that are NaN throughout a cell drop out."""
        values = np.asarray(per_prompt, dtype=np.float64)
        valid = ~np.isnan(values)
        # A ratio of bootstrap sums keeps the mean right where prompts drop out (a constant reward has no tau).
        stacked = np.stack([np.where(valid, values, 0.0), valid.astype(np.float64)], axis=-1)
        boot = bootstrap_means(stacked, rng, resamples)
        with np.errstate(invalid="ignore", divide="ignore"):
            samples = boot[..., 0] / boot[..., 1]
            mean = stacked[..., 0].sum(0) / stacked[..., 1].sum(0)
        tail = (1 - real("level", level, 0, 1, open_low=True)) / 2
        # A resample of dropped prompts alone has no mean; the few of them are left out.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a cell without any value stays NaN
            low, high = np.nanquantile(samples, [tail, 1 - tail], axis=0)
        return cls(mean, low, high, values)


def bootstrap_means(
    values: np.ndarray, rng: np.random.Generator | int | None = None, resamples: int = 1000
) -> np.ndarray:
    """Return means over resampled prompts; all cells of a resample share its prompts, so differences are paired.

    Parameters
    ----------
    values : (prompt, ...)
    rng : numpy.random.Generator or int, optional
        0 by default. A Generator is advanced.
    resamples : int

    Returns
    -------
    float64 (resample, ...)
    """
    values = np.asarray(values, dtype=np.float64)
    n_prompts = values.shape[0]
    rng = np.random.default_rng(0 if rng is None else rng)
    flat = values.reshape(n_prompts, -1)
    means = np.empty((integer("resamples", resamples, 1), flat.shape[1]))
    block = max(1, 1_000_000 // n_prompts)  # bounds the matrix of counts
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(0, n_prompts, (rows, n_prompts))
        drawn += np.arange(rows)[:, None] * n_prompts
        counts = np.bincount(drawn.ravel(), minlength=rows * n_prompts).reshape(rows, n_prompts)
        means[start : start + rows] = counts @ flat / n_prompts
    return means.reshape(resamples, *values.shape[1:])
