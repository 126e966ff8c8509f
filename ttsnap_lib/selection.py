"""Choosing among candidates by one or several rewards: the rule of :func:`ttsnap_lib.prune` for one set."""

from __future__ import annotations

import numpy as np

__all__ = ["choose"]


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
        total = scores @ np.asarray(weights, np.float64)
    elif combine == "z_score" and scores.shape[1] > 1:
        spread = scores.std(0)
        safe = np.where(spread > 0, spread, 1)  # a reward that says nothing about this set has no vote
        total = np.where(spread > 0, (scores - scores.mean(0)) / safe, 0).sum(1)
    else:
        order = np.argsort(-scores, axis=0, kind="stable")
        total = -np.argsort(order, axis=0, kind="stable").sum(1)
    return np.sort(np.argsort(-total, kind="stable")[:keep])
