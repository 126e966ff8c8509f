"""Intervals over prompts, by the bootstrap: prompts are what a result should carry over to."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from .checks import integer, real

__all__ = ["Estimate", "bootstrap_means", "percentile_interval"]


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
        low, high = percentile_interval(samples, real("level", level, 0, 1, open_low=True))
        return cls(mean, low, high, values)


def percentile_interval(samples: np.ndarray, level: float) -> np.ndarray:
    """Return (low, high) over the first axis. Resamples that are NaN (of dropped prompts alone) are left out."""
    tail = (1 - level) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a cell without any value stays NaN
        return np.nanquantile(samples, [tail, 1 - tail], axis=0)


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
        All NaN for a single prompt: how prompts differ is then unknown, not zero.
    """
    values = np.asarray(values, dtype=np.float64)
    n_prompts = values.shape[0]
    if n_prompts < 2:
        return np.full((integer("resamples", resamples, 1), *values.shape[1:]), np.nan)
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
