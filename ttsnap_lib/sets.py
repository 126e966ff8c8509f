"""The best few images instead of one: quality and difference together, chosen one after the other.

A set S of k candidates is worth the mean of the z-scores of its rewards plus ``diversity`` times its mean pairwise
distance, in units of the mean distance between all candidates; the distance of two images is 1 minus the cosine of what
the reward's image tower says of them. The best candidate comes first, then again and again the one that adds most: its
z-score plus twice ``diversity`` times its mean distance to those chosen (twice, as a distance counts for both ends). Choosing
greedily is what maximal marginal relevance does (Carbonell and Goldstein 1998); for sums of rewards and distances it is
within a factor of two of the best set where distances are a metric (Borodin, Lee and Ye 2012).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ttsnap_lib.checks import integer, real
from ttsnap_lib.errors import BudgetError, ConfigError
from ttsnap_lib.schedule import Schedule, costs_of


def check_set(keep: int, diversity: float, n: int, schedule: Schedule) -> tuple[int, float]:
    """Return `keep` and `diversity` when `schedule` leaves so many of `n` candidates, or raise."""
    keep = integer("keep", keep, 1, error=BudgetError)
    diversity = real("diversity", diversity, 0)
    left = schedule.survivors(n)[-1]
    if keep > left:
        who = f"those that the schedule ({schedule}) leaves of {n}" if len(schedule) else "as many as are started"
        raise BudgetError(
            f"keep: got {keep}, expected at most {left} candidates, {who}. Start more, prune less, or keep fewer."
        )
    if diversity and keep == 1:
        raise ConfigError(
            f"diversity: got {diversity:g} with keep=1, expected 0: one image differs from nothing. Keep two or more."
        )
    return keep, diversity


def pairwise_distances(embeddings: Any) -> np.ndarray:
    """Return 1 minus the cosine of embeddings (..., n, d) of length 1, float64 (..., n, n), 0 on the diagonal."""
    embeddings = np.asarray(embeddings, np.float64)
    embeddings = embeddings / np.maximum(np.linalg.norm(embeddings, axis=-1, keepdims=True), 1e-12)
    distances = 1.0 - embeddings @ np.swapaxes(embeddings, -1, -2)
    distances[..., np.arange(distances.shape[-1]), np.arange(distances.shape[-1])] = 0.0
    return distances


def mean_distance(distances: np.ndarray) -> np.ndarray:
    """Return the mean over the pairs of `distances` (..., n, n); NaN for a single image."""
    n = distances.shape[-1]
    with np.errstate(invalid="ignore"):
        return distances.sum((-1, -2)) / np.float64(n * (n - 1))


def choose_set(
    scores: np.ndarray,
    keep: int,
    diversity: float = 0.0,
    distances: np.ndarray | None = None,
    combine: str = "rank_sum",
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Return which candidates make the set, in the order in which they are chosen: the winner first.

    Parameters
    ----------
    scores : (..., candidate, reward)
        Without NaN, candidates in the order of their image index; leading axes are sets of candidates by themselves.
    keep : int
        How many are chosen, at most as many as there are.
    diversity : float
        What difference weighs against quality. 0 takes the best scores.
    distances : (..., candidate, candidate), optional
        What :func:`pairwise_distances` returns; read when `diversity` is above 0.
    combine : {"rank_sum", "z_score", "weighted_sum"}
        Several rewards are combined first; the z-score is that of what they give together.
    weights : (reward,), optional
        For ``"weighted_sum"``.

    Returns
    -------
    int64 (..., keep)
        Positions. Of equal candidates the first one is chosen; of equal values the first ranks higher.
    """
    scores = np.asarray(scores, np.float64)
    costs = costs_of(scores, combine, weights)
    order = np.argsort(costs, axis=-1, kind="stable")
    if not diversity or keep == 1:
        return order[..., :keep]
    if distances is None:
        raise ConfigError("diversity without distances. Pass pairwise_distances() of the candidates' embeddings.")
    quality = scores[..., 0] if scores.shape[-1] == 1 and combine != "weighted_sum" else -costs
    quality = _standard(quality)
    scale = mean_distance(distances)[..., None]
    unit = 2.0 * diversity / np.where(scale > 0, scale, np.inf)  # images that are all alike: by their rewards alone
    chosen = np.empty((*order.shape[:-1], keep), np.int64)
    chosen[..., 0] = order[..., 0]
    total = np.zeros_like(quality)
    for k in range(1, keep):
        last = chosen[..., k - 1, None]
        np.put_along_axis(quality, last, -np.inf, axis=-1)  # it cannot be chosen again
        total += np.take_along_axis(distances, last[..., None], axis=-2)[..., 0, :]
        chosen[..., k] = np.argmax(quality + unit * (total / k), axis=-1)
    return chosen


def _standard(values: np.ndarray) -> np.ndarray:
    """Return z-scores along the last axis; zeros where all are alike."""
    centered = values - values.mean(-1, keepdims=True)
    spread = values.std(-1, keepdims=True)
    return np.where(spread > 0, centered / np.where(spread > 0, spread, 1.0), 0.0)
