"""Plain, slow statements of the pruning rules, to hold the fast ones to."""

from __future__ import annotations

import numpy as np

from ttsnap_lib import Schedule


def top(scores: np.ndarray, k: int) -> list[int]:
    """Positions of the k highest scores, ties by the lower position, in ascending order."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return sorted(order[:k])


def joint(values: np.ndarray, combine: str, weights=None) -> np.ndarray:
    """Return one score per candidate from (candidate, reward); candidates stand in the order of their image index."""
    if combine == "weighted_sum":
        return values.astype(float) @ np.asarray(weights, float)
    if combine == "z_score":
        total = np.zeros(len(values))
        for column in values.T.astype(float):
            if column.std() > 0:
                total += (column - column.mean()) / column.std()
        return np.rint(total * 2.0**24)  # what differs by less is a tie
    total = np.zeros(len(values))
    for column in values.T:
        order = sorted(range(len(column)), key=lambda j: (-column[j], j))
        for rank, j in enumerate(order):
            total[j] -= rank
    return total


def prune(rewards, subset, schedule: Schedule, final, combine="rank_sum", weights=None) -> int:
    """Winner of one prompt: rewards (image, step, reward), final (image, reward)."""
    alive = sorted(int(image) for image in subset)
    for step, ratio in zip(schedule.steps, schedule.keep_ratios, strict=True):
        keep = max(1, round(len(alive) * ratio))
        alive = [alive[j] for j in top(joint(rewards[alive, step], combine, weights), keep)]
    return alive[top(joint(final[alive], combine, weights), 1)[0]]
