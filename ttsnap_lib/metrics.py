"""How well a reward at a step predicts the final one, and what a method gains: numbers with intervals.

NumPy in, NumPy or small records out. Metrics are computed per prompt and averaged; intervals are percentile
bootstraps over prompts, since prompts are what a result should carry over to.
"""

from __future__ import annotations

import numpy as np

from ._intervals import Estimate, bootstrap_means
from .checks import real
from .errors import ConfigError, TensorError

__all__ = [
    "TOP_SELECT_RATIOS",
    "Estimate",
    "bootstrap_means",
    "compute_saved",
    "effective_pool_size",
    "kendall_tau",
    "perfect_verifier",
    "relative_gain",
    "relative_gain_of",
    "top_select",
]

TOP_SELECT_RATIOS = tuple(round(0.05 * k, 2) for k in range(1, 20))
"""0.05 to 0.95, the ratios that the released evaluation averages over."""


def relative_gain(budgets: np.ndarray, rewards: np.ndarray, baseline: np.ndarray) -> float:
    """Return how much more area a method gains over a budget range than the baseline does, in percent.

    The paper's metric: Simpson's rule over the budgets of the mean reward above the baseline's first point,
    relative to the same area of the baseline (Best-of-N).

    Parameters
    ----------
    budgets : (budget,)
        Strictly increasing.
    rewards, baseline : (..., budget)
        Other axes (iterations, prompts) are averaged first.

    Raises
    ------
    ConfigError
        Shapes that do not fit, budgets that do not increase, NaN, or a baseline that gains no area.
    """
    rewards, baseline = np.asarray(rewards, np.float64), np.asarray(baseline, np.float64)
    budgets = np.asarray(budgets, np.float64)
    if budgets.ndim != 1 or len(budgets) < 2 or not (np.diff(budgets) > 0).all():
        raise ConfigError(
            "budgets",
            value=budgets.tolist(),
            bound="two or more numbers in strictly increasing order",
            remedy="Sort the budgets and name each once.",
        )
    for name, curve in (("rewards", rewards), ("baseline", baseline)):
        if curve.ndim == 0 or curve.shape[-1] != len(budgets) or np.isnan(curve).any():
            raise ConfigError(
                name,
                value=f"shape {curve.shape}" + (" with NaN" if curve.ndim and np.isnan(curve).any() else ""),
                bound=f"numbers with {len(budgets)} on the last axis, one per budget",
                remedy="Put the budgets on the last axis and score what is missing.",
            )
    return float(
        relative_gain_of(budgets, rewards.reshape(-1, len(budgets)).mean(0), baseline.reshape(-1, len(budgets)).mean(0))
    )


def relative_gain_of(
    budgets: np.ndarray, rewards: np.ndarray, baseline: np.ndarray, *, strict: bool = True
) -> np.ndarray:
    """Return :func:`relative_gain` of each curve of a stack, (..., budget) to (...).

    With ``strict=False`` a baseline without area gives NaN instead of an error.

    Parameters
    ----------
    budgets : (budget,)
    rewards, baseline : (..., budget)
    strict : bool

    Raises
    ------
    ConfigError
        Shapes or budgets that do not fit, or, when `strict`, a baseline without area.
    """
    from scipy.integrate import simpson

    start = baseline[..., :1]
    area = simpson(rewards - start, x=budgets, axis=-1)
    base = simpson(baseline - start, x=budgets, axis=-1)
    if strict and np.any(base <= 0):
        raise ConfigError(
            "area of the baseline above its first point",
            value=float(np.min(base)),
            bound="more than 0",
            remedy="Use a wider range of budgets: over this one the baseline does not improve.",
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(base > 0, 100 * (area / base - 1), np.nan)


def kendall_tau(
    scores: np.ndarray, final: np.ndarray, rng: np.random.Generator | int | None = None, **options
) -> Estimate:
    """Return Kendall's tau-b between each step's reward and the final reward, over the images of each prompt.

    Parameters
    ----------
    scores : (prompt, image, step)
    final : (prompt, image)
    rng, options
        As in :meth:`Estimate.over_prompts`.

    Returns
    -------
    Estimate
        Arrays (step,); ``per_prompt`` is (prompt, step), NaN where a reward is constant or missing.
    """
    from . import _kernels
    from ._pruning import run_threads

    scores, final = _scores(scores, final)
    out = np.empty((scores.shape[0], scores.shape[2]))
    parts = [slice(start, start + 16) for start in range(0, len(scores), 16)]
    run_threads(
        lambda part: _kernels.tau_b(
            np.ascontiguousarray(scores[part], np.float64), np.ascontiguousarray(final[part], np.float64), out[part]
        ),
        parts,
    )
    return Estimate.over_prompts(out, rng, **options)


def top_select(
    scores: np.ndarray,
    final: np.ndarray,
    ratios: float | tuple[float, ...] = TOP_SELECT_RATIOS,
    rng: np.random.Generator | int | None = None,
    **options,
) -> tuple[Estimate, Estimate]:
    """Return accuracy and gap of keeping the top fraction by each step's reward.

    Accuracy: how often the best final image (or one as good) is among the kept ``max(1, round(n * ratio))``.
    Gap: by how much the best kept final reward falls short. Several ratios are averaged, as in the released
    evaluation; ties break by the lower image index (the released one keeps all of a tie).

    Parameters
    ----------
    scores : (prompt, image, step)
    final : (prompt, image)
    ratios : float or tuple of float, each in (0, 1]
    rng, options
        Of the intervals, see :meth:`Estimate.over_prompts`.

    Returns
    -------
    accuracy, gap : Estimate
        Arrays (step,).
    """
    from .schedule import kept

    scores, final = _scores(scores, final)
    shares = np.atleast_1d(np.asarray(ratios, object))
    keeps = [kept(final.shape[1], real("ratio", share, 0, 1, open_low=True)) for share in shares]
    order = np.argsort(-scores, axis=1, kind="stable")
    running = np.maximum.accumulate(np.take_along_axis(final[:, :, None], order, axis=1), axis=1)
    best = final.max(1)[:, None]
    gaps = np.stack([best - running[:, keep - 1] for keep in keeps])  # (ratio, prompt, step)
    return (
        Estimate.over_prompts((gaps <= 0).mean(0), rng, **options),
        Estimate.over_prompts(gaps.mean(0), rng, **options),
    )


def perfect_verifier(final: np.ndarray, n: int, rng: np.random.Generator | int | None = None, **options) -> Estimate:
    """Return the ceiling of a schedule that starts with `n` candidates: no check ever drops the best one.

    A perfect verifier knows the final reward at every check, so it ends with Best-of-n at the price of the schedule.

    Parameters
    ----------
    final : (prompt, image)
    n : int
        Candidates at the start.
    rng, options
        Of the interval, see :meth:`Estimate.over_prompts`.
    """
    from .simulate import best_of_n

    return Estimate.over_prompts(best_of_n(final, n), rng, **options)


def compute_saved(budgets: np.ndarray, mean: np.ndarray, final: np.ndarray, candidate_cost: float) -> np.ndarray:
    """Return the share of compute that Best-of-N would need more for the same mean reward: ``1 - budget / needed``.

    Parameters
    ----------
    budgets, mean : (budget,)
        What a method spent and reached.
    final : (prompt, image)
        Clean-image rewards; the exact Best-of-N curve over whole candidates, linear in between, is the yardstick.
    candidate_cost : float
        Cost of one Best-of-N candidate in the budgets' unit.

    Returns
    -------
    float64 (budget,)
        Negative where the method is worse; NaN where even the whole pool does not reach the reward.
    """
    from .simulate import best_of_n

    pool = np.asarray(final).shape[1]
    curve = np.maximum.accumulate([best_of_n(final, n).mean() for n in range(1, pool + 1)])
    needed = np.interp(mean, curve, np.arange(1, pool + 1), left=np.nan, right=np.nan) * candidate_cost
    return 1 - np.asarray(budgets) / needed


def effective_pool_size(final: np.ndarray) -> np.ndarray:
    """Return how many equally likely, distinct images the pool of each prompt is worth: ``1 / sum(share ** 2)``.

    Images of one prompt with equal rewards count as repeats of one. A pool without repeats has its own size.

    Parameters
    ----------
    final : (prompt, image), or (prompt, image, step) to compare whole trajectories

    Returns
    -------
    float64 (prompt,)
    """
    values = np.asarray(final)
    values = values[:, :, None] if values.ndim == 2 else values
    sizes = []
    for rows in values:
        _, counts = np.unique(rows, axis=0, return_counts=True)
        sizes.append(1 / ((counts / counts.sum()) ** 2).sum())
    return np.array(sizes)


def _scores(scores: np.ndarray, final: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, final = np.asarray(scores), np.asarray(final)
    if scores.ndim != 3 or final.shape != scores.shape[:2] or final.shape[-1] < 2:
        raise TensorError(
            "scores and final rewards",
            value=(scores.shape, final.shape),
            bound="shapes (prompt, image, step) and (prompt, image) with two images or more",
            remedy="Select one reward and one variable of the tensor.",
        )
    return scores, final
