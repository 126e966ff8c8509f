"""Choosing among candidates by one or several rewards: the rule of :func:`ttsnap_lib.prune` for one set."""

from __future__ import annotations

import numpy as np

__all__ = ["Z_GRID", "choose"]

# Compiled into _kernels.py, whose cache looks at that file alone: whoever changes this number has to touch it.
Z_GRID = 2.0**24
"""Sums of z-scores are compared in whole multiples of 1 / Z_GRID, the resolution of float32: candidates that are equal
on paper (two of them, two rewards that disagree) differ by 1e-15 in their sums, and rounding would choose for us."""


def choose(scores: np.ndarray, keep: int, combine: str = "rank_sum", weights: np.ndarray | None = None) -> np.ndarray:
    """Return which candidates stay.

    Parameters
    ----------
    scores : (candidate, reward)
        Without NaN, candidates in the order of their image index.
    keep : int
        How many stay.
    combine : {"rank_sum", "z_score", "weighted_sum"}
    weights : (reward,), optional
        For ``"weighted_sum"``.

    Returns
    -------
    int64 (keep,)
        Positions, ascending. Of equal candidates the first ones stay; of equal values the first ranks higher.
    """
    scores = np.asarray(scores, np.float64)
    if combine == "weighted_sum":
        cost = -(scores @ np.asarray(weights, np.float64))
    elif combine == "z_score" and scores.shape[1] > 1:
        cost = -np.rint(_z_scores(scores).cumsum(1)[:, -1] * Z_GRID)
    else:
        order = np.argsort(-scores, axis=0, kind="stable")
        cost = np.argsort(order, axis=0, kind="stable").sum(1)
    return np.sort(np.argsort(cost, kind="stable")[:keep])


def _z_scores(scores: np.ndarray) -> np.ndarray:
    """Return z-scores within the set; a reward that says nothing about it has no vote."""
    # Summed one by one as the compiled loop of `prune` does: another order of additions gives other last bits.
    n = len(scores)
    centered = scores - scores.cumsum(0)[-1] / n
    variance = (centered * centered).cumsum(0)[-1] / n
    scale = 1.0 / np.sqrt(np.where(variance > 0, variance, 1.0))
    return np.where(variance > 0, centered * scale, 0.0)
