"""Pruning on plain arrays: ranks of every stage, then the compiled loops, over prompts in threads.

The layer between :mod:`ttsnap_lib.simulate`, which knows tensors and costs, and :mod:`ttsnap_lib._kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import TensorError

__all__ = ["Level", "NaNRead", "prune_columns", "prune_levels", "rank_level", "run_threads"]

_CHUNK = 64  # prompts ranked at a time: bounds the memory beside the tensor


class NaNRead(TensorError):
    """A NaN that a pruning run would have read; ``.prompt`` and ``.stage`` say where."""

    def __init__(self, prompt: int, stage: int, missing: Sequence[str] = ()) -> None:
        self.prompt, self.stage = prompt, stage
        listed = f"; {len(missing)} scores are missing in all" if missing else ""
        super().__init__(
            f"reward of prompt {prompt} at stage {stage} of the schedule{listed}",
            value=list(missing) or float("nan"),
            bound="a number for every candidate that is scored there",
            remedy="Score the missing images, or drop them: tensors.drop_missing(), or `-p missing drop` of simulate.ipynb.",
        )


@dataclass(frozen=True)
class Level:
    """Order of the pool at one stage: best first, ties by the lower image index, NaN last.

    Attributes
    ----------
    rank : int32 (prompt, image)
    order : int32 (prompt, image), the inverse of `rank`
    valid : int32 (prompt,), how many images have a value
    """

    rank: np.ndarray
    order: np.ndarray
    valid: np.ndarray

    def take(self, prompts: slice | np.ndarray) -> Level:
        """Return the level of some prompts."""
        return Level(self.rank[prompts], self.order[prompts], self.valid[prompts])


def rank_level(column: np.ndarray) -> Level:
    """Rank the images of each prompt by one reward; `column` is (prompt, image)."""
    order = np.argsort(-column, axis=-1, kind="stable").astype(np.int32)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(column.shape[-1], dtype=np.int32)[None, :], axis=-1)
    return Level(rank, order, (~np.isnan(column)).sum(-1, dtype=np.int32))


def prune_levels(
    levels: Sequence[Level],
    values: np.ndarray,
    subsets: np.ndarray,
    counts: np.ndarray,
    winners: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """Prune by one reward on ranks made before; single-threaded, releases the GIL.

    Parameters
    ----------
    levels : sequence of Level
        One per pruning step, then the final choice.
    values : float64 (prompt, image, reward)
        What is summed for the winners.
    subsets : int64 (iteration, n)
        Distinct image indices; budgets take prefixes of a row.
    counts : int64 (budget, stage + 1)
        Candidates at work in each stage, rows in ascending order of the first column.
    winners : int32 (budget, iteration, prompt), optional
        Filled with the winning image indices.
    labels : int64 (prompt, image), optional
        A permutation of the images for each prompt, applied to the subsets: with random ones every prompt has
        subsets of its own although one table is drawn.

    Returns
    -------
    float64 (budget, prompt, reward)
        Sum over iterations of the winners' values.

    Raises
    ------
    NaNRead
        When a candidate that is scored somewhere has no value there.
    """
    from ._kernels import single_reward

    n_prompts, pool = levels[0].rank.shape
    moves = np.empty((n_prompts, len(levels) - 1, pool), np.int32)
    for k in range(len(levels) - 1):
        moves[:, k] = np.take_along_axis(levels[k + 1].rank, levels[k].order, axis=1)
    first = levels[0].rank if labels is None else np.take_along_axis(levels[0].rank, labels, axis=1)
    valid = np.stack([level.valid for level in levels], axis=1)
    return _run(single_reward, (first, moves, levels[-1].order, valid), values, subsets, counts, winners)


def prune_columns(
    columns: Sequence[np.ndarray],
    values: np.ndarray,
    subsets: np.ndarray,
    counts: np.ndarray,
    *,
    combine: str = "rank_sum",
    weights: np.ndarray | None = None,
    keep_winners: bool = False,
    labels: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Prune every prompt, chunk by chunk, in threads.

    Parameters
    ----------
    columns : sequence of float (prompt, image, reward)
        The rewards that select, at each pruning step and at the end.
    values, subsets, counts, labels
        As in :func:`prune_levels`.
    combine : {"rank_sum", "z_score", "weighted_sum"}
        How several rewards select jointly.
    weights : float (reward,), optional
        For ``"weighted_sum"``.

    Returns
    -------
    sums : float64 (budget, prompt, reward)
    winners : int32 (budget, iteration, prompt) or None
    """
    n_prompts = columns[0].shape[0]
    sums = np.empty((len(counts), n_prompts, values.shape[2]))
    winners = np.empty((len(counts), len(subsets), n_prompts), np.int32) if keep_winners else None

    def work(part: slice) -> None:
        chunk = [column[part] for column in columns]
        # A chunk of its own: the kernel writes contiguous arrays.
        part_labels = None if labels is None else labels[part]
        won = None if winners is None else np.empty((len(counts), len(subsets), chunk[0].shape[0]), np.int32)
        part_values = np.ascontiguousarray(values[part], dtype=np.float64)
        try:
            if chunk[0].shape[2] == 1 or combine == "weighted_sum":
                if combine == "weighted_sum" and weights is not None:
                    chunk = [(column.astype(np.float64) @ weights)[:, :, None] for column in chunk]
                levels = [rank_level(column[:, :, 0]) for column in chunk]
                sums[:, part] = prune_levels(levels, part_values, subsets, counts, won, part_labels)
            else:
                sums[:, part] = _prune_multi(chunk, part_values, subsets, counts, combine, won, part_labels)
        except NaNRead as error:
            raise NaNRead(error.prompt + part.start, error.stage) from None
        if winners is not None and won is not None:
            winners[:, :, part] = won

    parts = [slice(start, min(start + _CHUNK, n_prompts)) for start in range(0, n_prompts, _CHUNK)]
    run_threads(work, parts)
    return sums, winners


def run_threads(work, items: Sequence) -> list:
    """Return ``[work(item) for item in items]``, in threads when there is more than one core."""
    from numba import config  # honours CPU affinity and NUMBA_NUM_THREADS

    threads = min(config.NUMBA_NUM_THREADS, len(items))  # type: ignore[attr-defined]  # set when numba is imported
    if threads <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def _prune_multi(columns, values, subsets, counts, combine, winners, labels) -> np.ndarray:
    from . import _kernels

    scores = np.stack([np.moveaxis(column, 2, 1) for column in columns], axis=1).astype(np.float64)
    n_prompts, n_levels, n_rewards, pool = scores.shape
    flat = rank_level(scores.reshape(-1, pool))
    if labels is None:
        labels = np.broadcast_to(np.arange(pool), (n_prompts, pool))
    mode = _kernels.RANK_SUM if combine == "rank_sum" else _kernels.Z_SCORE
    valid = flat.valid.reshape(n_prompts, n_levels, n_rewards)
    ranks, labels = flat.rank.reshape(scores.shape), np.ascontiguousarray(labels, np.int32)
    return _run(_kernels.multi_reward, (mode, ranks, scores, valid, labels), values, subsets, counts, winners)


def _run(kernel: Any, given: tuple, values, subsets, counts, winners) -> np.ndarray:
    """Return the sums that a kernel fills in from what is `given` to it alone and what all take."""
    sums = np.zeros((len(counts), len(values), values.shape[2]))
    fault = np.full(2, -1, np.int64)
    winners = np.empty((0, 0, 0), np.int32) if winners is None else winners
    kernel(*given, subsets, counts, values, winners, sums, fault)
    if fault[0] >= 0:
        raise NaNRead(int(fault[0]), int(fault[1]))
    return sums
