"""Who wins on plain arrays: Best-of-N in closed form, and the pruning of given subsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from ._inputs import check_combine, check_subsets, checks_array, final_array, numbers_array, step_positions
from .checks import integer
from .errors import BudgetError, TensorError
from .schedule import Schedule

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["best_of_n", "best_of_n_weights", "prune"]


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
        raise TensorError("final rewards", value=values.shape, bound="shape (prompt, image)", remedy="Pass one reward.")
    pool = values.shape[1]
    n = integer("n", n, 1, pool, error=BudgetError)
    if not np.isfinite(values).all():
        prompt, image = np.argwhere(~np.isfinite(values))[0]
        raise TensorError(
            f"final reward of prompt {prompt}, image {image}",
            value=float(values[prompt, image]),
            bound="a finite number",
            remedy="Score the image, or drop it with tensors.drop_missing().",
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
    array, steps = checks_array(rewards)
    columns = [array[:, :, k] for k in step_positions(schedule, steps)]
    last = array[:, :, -1] if final is None else final_array(final, array.shape)
    shares = check_combine(combine, weights, array.shape[3])
    subsets = check_subsets(subsets, array.shape[1])
    counts = np.array([schedule.survivors(subsets.shape[1])], np.int64)
    from ._pruning import prune_columns

    no_values = np.empty((array.shape[0], array.shape[1], 0))
    _, winners = prune_columns(
        [*columns, last], no_values, subsets, counts, combine=combine, weights=shares, keep_winners=True
    )
    return cast("np.ndarray", winners)[0].astype(np.int64)
