"""Who wins on plain arrays: Best-of-N in closed form, and the pruning of given subsets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ttsnap_lib.checks import integer
from ttsnap_lib.errors import BudgetError, ScheduleError, TensorError
from ttsnap_lib.schedule import Schedule, check_combine
from ttsnap_lib.tensors.tensor import numbers_array

if TYPE_CHECKING:
    import xarray as xr

_CHUNK = 64  # prompts ranked at a time: bounds the memory beside the tensor


def best_of_n(final: np.ndarray, n: int) -> np.ndarray:
    """Return the expected maximum over random n-subsets, exactly (no sampling).

    With the rewards of a prompt sorted in ascending order, the k-th of M is the maximum with probability
    C(k-1, n-1) / C(M, n).

    Parameters
    ----------
    final : (prompt, image)
        Clean-image rewards.
    n : int
        Candidates, 1 to the number of images.

    Returns
    -------
    float64 (prompt,)

    Raises
    ------
    BudgetError
        `n` is not within the pool.
    TensorError
        A NaN among the rewards.
    """
    values = numbers_array("final rewards", final, TensorError).astype(np.float64)
    if values.ndim != 2 or values.size == 0:
        raise TensorError(f"final rewards: got {values.shape!r}, expected shape (prompt, image). Pass one reward.")
    pool = values.shape[1]
    n = integer("n", n, 1, pool, error=BudgetError)
    if not np.isfinite(values).all():
        prompt, image = np.argwhere(~np.isfinite(values))[0]
        raise TensorError(
            f"final reward of prompt {prompt}, image {image}: got {float(values[prompt, image])!r}, expected a finite "
            "number. Score the image, or drop it with tensors.drop_missing()."
        )
    return np.sort(values, axis=1) @ best_of_n_weights(pool, n)


def best_of_n_weights(pool: int, n: int) -> np.ndarray:
    """Return the chance of each sorted position (worst first) of a pool to be the best of a random n-subset."""
    k = np.arange(n, pool)  # weights[k] / weights[k + 1] for sorted positions counted from 1
    weights = np.zeros(pool)
    weights[n - 1 :] = np.append(np.cumprod(((k + 1 - n) / k)[::-1])[::-1], 1.0) * (n / pool)
    return weights


def prune(
    rewards: np.ndarray | xr.DataArray,
    subsets: np.ndarray,
    schedule: Schedule,
    final: np.ndarray | xr.DataArray | None = None,
    combine: str = "rank_sum",
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """Prune given subsets and return the winners.

    Parameters
    ----------
    rewards : (prompt, image, step) or (prompt, image, step, reward), or a DataArray with those dims in any order
        Rewards at the checks. With a ``step`` coordinate the schedule's steps are looked up in it.
    subsets : int64 (iteration, n)
        Candidates of each iteration: distinct image indices, in any order.
    schedule : Schedule
        Empty for Best-of-N.
    final : (prompt, image[, reward]), optional
        Rewards of the clean images; the last step of `rewards` by default.
    combine : {"rank_sum", "z_score", "weighted_sum"}
        How several rewards select jointly: the sum of ranks within the set (as released), the mean of z-scores
        within the set, or a weighted sum.
    weights : (reward,), optional
        For ``"weighted_sum"``.

    Returns
    -------
    int64 (iteration, prompt)
        Image indices into the pool. Of equal candidates the lower index wins, at every stage.

    Raises
    ------
    ScheduleError, BudgetError, TensorError, ConfigError
        A step that the rewards do not hold, subsets that are not distinct indices of the pool, wrong shapes, NaN
        where it would be read.
    """
    array = _ordered("rewards", rewards, ("prompt", "image", "step", "reward"))
    shape = (array.shape[0], array.shape[1], array.shape[3])
    last = array[:, :, -1] if final is None else _ordered("final", final, ("prompt", "image", "reward"))
    if last.shape != shape:
        raise TensorError(
            f"final: got {last.shape!r}, expected shape {shape[:2]} or {shape}. Pass the clean images' rewards."
        )
    steps = np.arange(array.shape[2])
    if hasattr(rewards, "coords") and "step" in rewards.coords:
        steps = cast("xr.DataArray", rewards)["step"].values
    columns = [array[:, :, k] for k in step_positions(schedule, steps)]
    shares = check_combine(combine, weights, array.shape[3])
    subsets = _check_subsets(subsets, array.shape[1])
    counts = np.array([schedule.survivors(subsets.shape[1])], np.int64)

    no_values = np.empty((array.shape[0], array.shape[1], 0))
    _, winners = prune_columns(
        [*columns, last], no_values, subsets, counts, combine=combine, weights=shares, keep_winners=True
    )
    return cast("np.ndarray", winners)[0].astype(np.int64)


def step_positions(schedule: Schedule, steps: np.ndarray) -> list[int]:
    """Return where the schedule's steps stand on the step axis."""
    schedule.check(int(steps[-1]) + 1)
    where = {int(step): position for position, step in enumerate(steps)}
    for step in schedule.steps:
        if step not in where:
            raise ScheduleError(
                f"schedule.steps: got {step!r}, expected one of the scored steps {sorted(where)}. Prune at one of them."
            )
    return [where[step] for step in schedule.steps]


def _ordered(name: str, rewards: Any, dims: tuple[str, ...]) -> np.ndarray:
    """Return rewards with their axes in the order of `dims`; the last one, ``reward``, may be missing."""
    wanted = f"expected {', '.join(dims[:-1])} and perhaps reward"
    if hasattr(rewards, "dims"):
        if {*rewards.dims, "reward"} != set(dims):
            raise TensorError(f"dims of {name}: got {rewards.dims!r}, {wanted}. Select a variable, as dataset['base'].")
        rewards = rewards.transpose(*(dim for dim in dims if dim in rewards.dims)).values
    array = numbers_array(name, rewards, TensorError)
    array = array[..., None] if array.ndim == len(dims) - 1 else array
    if array.ndim != len(dims) or 0 in array.shape:
        raise TensorError(
            f"{name}: got shape {array.shape} of {array.dtype}, {wanted} for axes. Order them, or pass a DataArray."
        )
    return array


def _check_subsets(subsets: Any, pool: int) -> np.ndarray:
    """Return subsets as int64 (iteration, n)."""
    array = numbers_array("subsets", subsets, BudgetError)
    bad, where = array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "iu", ""
    got = f"shape {array.shape} of {array.dtype}"
    if not bad:
        ordered = np.sort(array, axis=1)
        rows = (ordered[:, 0] < 0) | (ordered[:, -1] >= pool) | (ordered[:, 1:] == ordered[:, :-1]).any(1)
        bad, row = rows.any(), int(np.argmax(rows))
        where, got = f", row {row}", f"{array[row].tolist()}"
    if bad:
        raise BudgetError(
            f"subsets{where}: got {got}, expected integers of shape (iteration, n), distinct within a row, in "
            f"[0, {pool - 1}]. Draw them with rng.permuted(np.tile(np.arange(pool), (iterations, 1)), axis=1)[:, :n]."
        )
    return np.ascontiguousarray(array, np.int64)


# The rule itself stands in the kernels; here it is handed ranks


class NaNRead(TensorError):
    """A NaN that a pruning run would have read; ``.prompt`` and ``.stage`` say where."""

    def __init__(self, prompt: int, stage: int, missing: Sequence[str] = ()) -> None:
        self.prompt, self.stage = prompt, stage
        listed = f"; {len(missing)} scores are missing in all" if missing else ""
        super().__init__(
            f"reward of prompt {prompt} at stage {stage} of the schedule: got {list(missing[:8]) or 'NaN'}{listed}, expected a "
            "number for every candidate that is scored there. Score the missing images, or drop them: "
            "tensors.drop_missing(), or `-p missing drop` of simulate.ipynb."
        )


@dataclass(frozen=True)
class Level:
    """Order of the pool at one stage: best first, ties by the lower image index, NaN last."""

    rank: np.ndarray  # int32 (prompt, image)
    order: np.ndarray  # int32 (prompt, image), the inverse of rank
    valid: np.ndarray  # int32 (prompt,), how many images have a value

    def of(self, prompts: slice) -> Level:
        """Return the level of some prompts."""
        return Level(self.rank[prompts], self.order[prompts], self.valid[prompts])


def rank_level(column: np.ndarray) -> Level:
    """Rank the images of each prompt by one reward; `column` is (prompt, image)."""
    order = np.argsort(-column, axis=-1, kind="stable").astype(np.int32)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(column.shape[-1], dtype=np.int32)[None, :], axis=-1)
    return Level(rank, order, (~np.isnan(column)).sum(-1, dtype=np.int32))


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
    levels: Sequence[Sequence[Level]] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Prune every prompt, chunk by chunk, in threads; return sums and winners.

    `columns` are the rewards that select, (prompt, image, reward), at each pruning step and at the end; `values`
    (prompt, image, reward) what is summed for the winners; `subsets` int64 (iteration, n), of which budgets take
    prefixes; `counts` int64 (budget, stage + 1), the candidates at work in each stage, ascending in the first column.
    `labels` (prompt, image) is a permutation of the images for each prompt, applied to the subsets: with random ones
    every prompt has subsets of its own although one table is drawn. `levels` are those of the columns, one for each
    reward of each stage, where they are at hand. The sums over iterations are float64 (budget, prompt, reward), the
    winners int32 (budget, iteration, prompt) where they are to be kept.
    """
    n_prompts, pool, _ = columns[0].shape
    labels = np.broadcast_to(np.arange(pool), (n_prompts, pool)) if labels is None else labels
    sums = np.empty((len(counts), n_prompts, values.shape[2]))
    winners = np.empty((len(counts), len(subsets), n_prompts), np.int32) if keep_winners else None

    def work(part: slice) -> None:
        chunk = [column[part] for column in columns]
        if weights is not None:
            chunk = [(column.astype(np.float64) @ weights)[:, :, None] for column in chunk]
        if levels is None:
            ranked = [[rank_level(column[:, :, r]) for r in range(column.shape[2])] for column in chunk]
        else:
            ranked = [[level.of(part) for level in stage] for stage in levels]
        if len(ranked[0]) == 1:
            run = _by_one([level for (level,) in ranked], labels[part])
        else:
            run = _jointly(ranked, chunk, combine, labels[part])
        # Arrays of the chunk's own: the kernel wants them contiguous.
        part_values = np.ascontiguousarray(values[part], dtype=np.float64)
        part_sums, fault = np.zeros((len(counts), len(part_values), values.shape[2])), np.full(2, -1, np.int64)
        won = np.empty((len(counts), len(subsets), len(part_values)) if keep_winners else (0, 0, 0), np.int32)
        run(subsets, counts, part_values, won, part_sums, fault)
        if fault[0] >= 0:
            raise NaNRead(int(fault[0]) + part.start, int(fault[1]))
        sums[:, part] = part_sums
        if winners is not None:
            winners[:, :, part] = won

    run_threads(work, [slice(start, min(start + _CHUNK, n_prompts)) for start in range(0, n_prompts, _CHUNK)])
    return sums, winners


def _by_one(levels: Sequence[Level], labels: np.ndarray) -> Callable:
    """Return the kernel that prunes by one reward, given the level of each stage."""
    from ttsnap_lib.simulation.kernels import single_reward

    moves = np.empty((len(labels), len(levels) - 1, labels.shape[1]), np.int32)
    for k in range(len(levels) - 1):
        moves[:, k] = np.take_along_axis(levels[k + 1].rank, levels[k].order, axis=1)
    first = np.take_along_axis(levels[0].rank, labels, axis=1)
    return partial(single_reward, first, moves, levels[-1].order, np.stack([level.valid for level in levels], axis=1))


def _jointly(
    levels: Sequence[Sequence[Level]], columns: Sequence[np.ndarray], combine: str, labels: np.ndarray
) -> Callable:
    """Return the kernel that prunes by several rewards, given levels and (prompt, image, reward) of each stage."""
    from ttsnap_lib.simulation.kernels import RANK_SUM, Z_SCORE, multi_reward

    ranks = np.stack([np.stack([level.rank for level in stage], 1) for stage in levels], 1)
    valid = np.stack([np.stack([level.valid for level in stage], 1) for stage in levels], 1)
    mode, scores = RANK_SUM, np.empty((0, 0, 0, 0))  # ranks alone are read
    if combine == "z_score":
        mode, scores = Z_SCORE, np.stack([np.moveaxis(column, 2, 1) for column in columns], 1).astype(np.float64)
    return partial(multi_reward, mode, ranks, scores, valid, np.ascontiguousarray(labels, np.int32))


def run_threads(work: Callable[[Any], Any], items: Sequence) -> list:
    """Return ``[work(item) for item in items]``, in threads when there is more than one core."""
    threads = min(n_threads(), len(items))
    if threads <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def n_threads() -> int:
    """Return how many threads numba would take: that honours CPU affinity and NUMBA_NUM_THREADS."""
    from numba import config

    return max(1, config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]  # set when numba is imported
