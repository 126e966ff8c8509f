"""How well a reward at a step predicts the final one, and what a method gains: numbers with intervals.

NumPy in, NumPy or small records out. Metrics are computed per prompt and averaged; intervals are over prompts, since
prompts are what a result should carry over to: :func:`mean_interval` of means and of their differences,
:func:`jackknife_interval` of ratios such as the relative gain (docs/numbers.md tells how often they cover).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.checks import integer, real
from ttsnap_lib.errors import ConfigError, TensorError
from ttsnap_lib.schedule import kept
from ttsnap_lib.simulation.pruning import best_of_n, run_threads

if TYPE_CHECKING:
    import pandas as pd

# 0.05 to 0.95, the ratios that the released evaluation averages over.
TOP_SELECT_RATIOS = tuple(round(0.05 * k, 2) for k in range(1, 20))
AS_GOOD = 0.5
"""Points of relative gain for which nobody would change a schedule: the margin of practical equivalence."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its interval; fields are floats or equally shaped arrays."""

    mean: np.ndarray | Any
    low: np.ndarray | Any
    high: np.ndarray | Any
    per_prompt: np.ndarray  # (prompt, ...)

    @classmethod
    def over_prompts(
        cls,
        per_prompt: np.ndarray,
        rng: np.random.Generator | int | None = None,
        *,
        level: float = 0.95,
        resamples: int = 1000,
    ) -> Estimate:
        """Average over the first axis, with its interval; prompts that are NaN throughout a cell drop out."""
        values = np.asarray(per_prompt, dtype=np.float64)
        valid = ~np.isnan(values)
        # A ratio of bootstrap sums keeps the mean right where prompts drop out (a constant reward has no tau).
        stacked = np.stack([np.where(valid, values, 0.0), valid.astype(np.float64)], axis=-1)
        boot = bootstrap_means(stacked, rng, resamples)
        with np.errstate(invalid="ignore", divide="ignore"):
            samples = boot[..., 0] / boot[..., 1]
            mean = stacked[..., 0].sum(0) / stacked[..., 1].sum(0)
        low, high = mean_interval(mean, samples, valid.sum(0), real("level", level, 0, 1, open_low=True))
        return cls(mean, low, high, values)


def mean_interval(mean: Any, samples: np.ndarray, n_prompts: Any, level: float = 0.95) -> np.ndarray:
    """Return (low, high) of means over prompts: the percentile bootstrap, widened around the mean for few prompts.

    `samples` are bootstrap means (resample, ...), `mean` and `n_prompts` fit their cells. Resampled prompts spread less
    than prompts do, by ``sqrt((P - 1) / P)``, and as a normal variable does where Student's t is due: both are made good.
    """
    low, high = percentile_interval(samples, level)
    with np.errstate(invalid="ignore", divide="ignore"):
        n_prompts = np.asarray(n_prompts, np.float64)
        wider = _student(n_prompts, level) / _student(np.inf, level) * np.sqrt(n_prompts / (n_prompts - 1))
        return np.stack([mean - wider * (mean - low), mean + wider * (high - mean)])


def jackknife_interval(value: Any, without: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Return (low, high) of a smooth function of means over prompts, by the jackknife with Student's t.

    `value` is the function of all prompts, `without` (prompt, ...) that of all prompts but one, from
    :func:`leave_one_out`. Resampled areas in the denominator of a relative gain stray far with few prompts; these do not.
    """
    n_prompts = len(without)
    if n_prompts < 2:
        return np.full((2, *np.shape(value)), np.nan)
    half = _student(n_prompts, level) * np.sqrt((n_prompts - 1) * without.var(0))
    return np.stack([value - half, value + half])


def against_best(
    gains: Sequence[float], without: Sequence[np.ndarray], level: float = 0.95, *, sort: bool = True
) -> pd.DataFrame:
    """Return relative gains with their intervals, and how far each trails the best, paired over prompts.

    `gains` are those of all prompts, in percent, `without` (prompt,) those of all prompts but one. A row each, the best first
    (with `sort` false in the order given, against the first), indexed by its place in `gains`: gain, low, high, behind (points),
    behind_low, behind_high, as_good: ``"yes"`` where the interval of `behind` ends below :data:`AS_GOOD` points, ``"no"`` where
    it begins above, else ``"undecided"``, and nothing where the gain is NaN.
    """
    import pandas as pd

    values = np.asarray(gains, np.float64)
    order = np.argsort(-values, kind="stable") if sort else np.arange(len(values))  # NaN comes last
    first = order[0]
    rows = [
        (
            values[k], *jackknife_interval(values[k], without[k], level), values[first] - values[k],
            *jackknife_interval(values[first] - values[k], without[first] - without[k], level),
        )
        for k in order
    ]  # fmt: skip
    names = ["gain", "low", "high", "behind", "behind_low", "behind_high"]
    table = pd.DataFrame(rows, columns=names, index=order)
    table["as_good"] = "undecided"
    table.loc[table["behind_high"] < AS_GOOD, "as_good"] = "yes"
    table.loc[table["behind_low"] > AS_GOOD, "as_good"] = "no"
    table.loc[table["gain"].isna(), "as_good"] = ""
    return table


def leave_one_out(values: np.ndarray) -> np.ndarray:
    """Return the means of values (prompt, ...) over all prompts but one, in the same shape."""
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (values.sum(0) - values) / (len(values) - 1)


def _student(n_prompts: Any, level: float) -> Any:
    """Return the half-width of Student's t in standard errors; of infinitely many prompts it is 1.96."""
    from scipy.special import stdtrit

    return stdtrit(n_prompts - 1, (1 + level) / 2)


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Return (low, high) over the first axis. Resamples that are NaN (of dropped prompts alone) are left out."""
    tail = (1 - level) / 2
    if not np.isnan(samples).any():
        return np.quantile(samples, [tail, 1 - tail], axis=0)  # the same numbers, several times quicker
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a cell without any value stays NaN
        return np.nanquantile(samples, [tail, 1 - tail], axis=0)


def bootstrap_means(
    values: np.ndarray, rng: np.random.Generator | int | None = None, resamples: int = 1000
) -> np.ndarray:
    """Return means over resampled prompts, float64 (resample, ...), of values (prompt, ...); `rng` is 0 by default.

    All cells of a resample share its prompts, so that differences are paired. All NaN for a single prompt: how prompts
    differ is then unknown, not zero.
    """
    resamples = integer("resamples", resamples, 1)
    values = np.asarray(values, dtype=np.float64)
    n_prompts = values.shape[0]
    if n_prompts < 2:
        return np.full((resamples, *values.shape[1:]), np.nan)
    rng = np.random.default_rng(0 if rng is None else rng)
    flat = values.reshape(n_prompts, -1)
    means = np.empty((resamples, flat.shape[1]))
    block = max(1, 1_000_000 // n_prompts)  # bounds the matrix of counts
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(0, n_prompts, (rows, n_prompts))
        drawn += np.arange(rows)[:, None] * n_prompts
        counts = np.bincount(drawn.ravel(), minlength=rows * n_prompts).reshape(rows, n_prompts)
        means[start : start + rows] = counts @ flat / n_prompts
    return means.reshape(resamples, *values.shape[1:])


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
            f"budgets: got {budgets.tolist()!r}, expected two or more in strictly increasing order. Name each once."
        )
    for name, curve in (("rewards", rewards), ("baseline", baseline)):
        if curve.ndim == 0 or curve.shape[-1] != len(budgets) or np.isnan(curve).any():
            raise ConfigError(
                f"{name}: got shape {curve.shape}{' with NaN' if np.isnan(curve).any() else ''}, expected numbers with "
                f"{len(budgets)} on the last axis, one per budget. Turn the axes, or score what is missing."
            )
    return float(
        relative_gain_of(budgets, rewards.reshape(-1, len(budgets)).mean(0), baseline.reshape(-1, len(budgets)).mean(0))
    )


def relative_gain_of(
    budgets: np.ndarray, rewards: np.ndarray, baseline: np.ndarray, *, strict: bool = True
) -> np.ndarray:
    """Return :func:`relative_gain` of each curve of a stack, (..., budget) to (...).

    With ``strict=False`` a baseline without area gives NaN instead of an error.
    """
    from scipy.integrate import simpson

    start = baseline[..., :1]
    area = simpson(rewards - start, x=budgets, axis=-1)
    base = simpson(baseline - start, x=budgets, axis=-1)
    if strict and np.any(base <= 0):
        raise ConfigError(
            f"area of the baseline above its first point: got {float(np.min(base))!r}, expected more than 0. Use a "
            "wider range of budgets: over this one the baseline does not improve."
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(base > 0, 100 * (area / base - 1), np.nan)


def kendall_tau(
    scores: np.ndarray, final: np.ndarray, rng: np.random.Generator | int | None = None, **options
) -> Estimate:
    """Return Kendall's tau-b between each step's rewards (prompt, image, step) and the `final` ones (prompt, image).

    Over the images of each prompt; the means are (step,), ``per_prompt`` is (prompt, step), NaN where a reward is
    constant or missing. `rng` and `options` as in :meth:`Estimate.over_prompts`.
    """
    from ttsnap_lib.simulation.kernels import tau_b

    scores, final = _scores(scores, final)
    out = np.empty((scores.shape[0], scores.shape[2]))

    def work(part: slice) -> None:
        x, y = np.ascontiguousarray(scores[part], np.float64), np.ascontiguousarray(final[part], np.float64)
        tau_b(x, y, out[part])

    run_threads(work, [slice(start, start + 16) for start in range(0, len(scores), 16)])
    return Estimate.over_prompts(out, rng, **options)


def top_select(
    scores: np.ndarray,
    final: np.ndarray,
    ratios: float | tuple[float, ...] = TOP_SELECT_RATIOS,
    rng: np.random.Generator | int | None = None,
    **options,
) -> tuple[Estimate, Estimate]:
    """Return accuracy and gap, each (step,), of keeping the top fraction by each step's reward.

    `scores` are (prompt, image, step), `final` (prompt, image); `rng` and `options` as in :meth:`Estimate.over_prompts`.
    Accuracy: how often the best final image (or one as good) is among the kept ``max(1, round(n * ratio))``.
    Gap: by how much the best kept final reward falls short. Several ratios, each in (0, 1], are averaged, as in the
    released evaluation; ties break by the lower image index (the released one keeps all of a tie).
    """
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

    A perfect verifier knows the final reward, (prompt, image), at every check, so it ends with Best-of-n at the price
    of the schedule.
    """
    return Estimate.over_prompts(best_of_n(final, n), rng, **options)


def compute_saved(budgets: np.ndarray, mean: np.ndarray, final: np.ndarray, candidate_cost: float) -> np.ndarray:
    """Return the share of compute that Best-of-N would need more for the same mean reward: ``1 - budget / needed``.

    `budgets` and `mean` are what a method spent and reached; the yardstick is the exact Best-of-N curve of `final`
    (prompt, image) over whole candidates of `candidate_cost`, linear in between. Negative where the method is worse;
    NaN where even the whole pool does not reach the reward. :meth:`Curves.needs` tells it with intervals.
    """
    pool = np.asarray(final).shape[1]
    curve = np.maximum.accumulate([best_of_n(final, n).mean() for n in range(1, pool + 1)])
    needed = np.interp(mean, curve, np.arange(1, pool + 1), left=np.nan, right=np.nan) * candidate_cost
    return 1 - np.asarray(budgets) / needed


def _scores(scores: np.ndarray, final: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays of shapes that go together."""
    scores, final = np.asarray(scores), np.asarray(final)
    if scores.ndim != 3 or final.shape != scores.shape[:2] or final.shape[-1] < 2:
        raise TensorError(
            f"scores and final rewards: got {(scores.shape, final.shape)!r}, expected shapes (prompt, image, step) and "
            "(prompt, image) with two images or more. Select one reward and one variable of the tensor."
        )
    return scores, final
