"""What a tuned schedule gains on prompts that it was not tuned on, as numbers with intervals and as tables."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ._goals import Goals
from ._intervals import bootstrap_means, percentile_interval
from ._race import Trial
from ._scoring import Scorer, Selection
from ._search_space import SearchSpace
from .schedule import Schedule

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HeldOut", "best_of_n_per_prompt", "frontier_table", "held_out", "per_prompt", "trials_table"]


@dataclass(frozen=True)
class HeldOut:
    """Gains on the test prompts.

    Attributes
    ----------
    gain, interval : of the chosen schedules, in percent
    published_gain, over_published, over_published_interval : None without a published schedule
    rewards : pandas.DataFrame, one row per reward
    mean, best_of_n, low, high : float64 (budget,)
        Mean merit, that of Best-of-N, and the interval of their difference.
    percent : float64 (budget,), gain per budget
    single, over_single_low, over_single_high : float64 (budget,)
        Mean merit of the best single schedule, and the interval of `mean` minus that, paired; NaN where it cannot run.
    """

    gain: float
    interval: tuple[float, float]
    published_gain: float | None
    over_published: float | None
    over_published_interval: tuple[float, float] | None
    rewards: pd.DataFrame
    mean: np.ndarray
    best_of_n: np.ndarray
    low: np.ndarray
    high: np.ndarray
    percent: np.ndarray
    single: np.ndarray
    over_single_low: np.ndarray
    over_single_high: np.ndarray


def per_prompt(scorer: Scorer, steps: tuple[int, ...], counts: np.ndarray) -> np.ndarray:
    """Return the mean of merit and of every reward, (budget, prompt, 1 + reward), over all iterations."""
    return scorer.sums(steps, counts, 0, scorer.iterations, every_reward=True) / scorer.iterations


def best_of_n_per_prompt(scorer: Scorer, n: np.ndarray) -> np.ndarray:
    """Return Best-of-N's, exactly or on the scorer's own subsets: (1 + budget, prompt, 1 + reward), one candidate first."""
    n = np.concatenate([[1], n])
    return per_prompt(scorer, (), n[:, None]) if scorer.exact is None else scorer.exact[n - 1]


def held_out(
    scorer: Scorer,
    goals: Goals,
    space: SearchSpace,
    chosen: Sequence[Trial],
    single: Trial,
    published: Schedule | None,
    names: Sequence[str],
    selection: Selection,
    rng: np.random.Generator,
    level: float,
    resamples: int,
) -> HeldOut:
    """Score the schedule chosen at each budget, the single one, the published one and Best-of-N, paired.

    All on the test prompts, that is, those of `scorer`.
    """
    import pandas as pd

    pruned, alone = np.full((2, len(goals.n), scorer.n_prompts, 1 + scorer.n_rewards), np.nan)
    for trial in {id(trial): trial for trial in chosen}.values():
        rows = [b for b, other in enumerate(chosen) if other is trial]
        pruned[rows] = per_prompt(scorer, trial.schedule.steps, trial.counts[rows])
    if all(trial is single for trial in chosen):
        alone = pruned
    else:
        runs = single.counts[:, 0] > 0
        alone[runs] = per_prompt(scorer, single.schedule.steps, single.counts[runs])
    curves = [best_of_n_per_prompt(scorer, goals.n), pruned, alone]
    if published is not None:
        curves.append(per_prompt(scorer, published.steps, space.counts(published)))
    sizes = np.cumsum([len(curve) for curve in curves])[:-1]
    stacked = np.moveaxis(np.concatenate(curves), 1, 0)  # (prompt, curve and budget, column)
    boot = np.split(bootstrap_means(stacked, rng, resamples), sizes, axis=1)
    mean = np.split(stacked.mean(0), sizes, axis=0)

    def interval(samples: np.ndarray) -> np.ndarray:
        return percentile_interval(samples, level)

    def pair(samples: np.ndarray) -> tuple[float, float]:
        low, high = interval(samples)
        return float(low), float(high)

    def gains(k: int, column: int) -> tuple[float, np.ndarray]:
        point = goals.overall(mean[k][:, column], mean[0][:, column])
        return float(point), goals.overall(boot[k][:, :, column], boot[0][:, :, column])

    gain, samples = gains(1, 0)
    published_gain = over = over_interval = None
    if published is not None:
        published_gain, published_samples = gains(3, 0)
        over = gain - published_gain
        over_interval = pair(samples - published_samples)
    table: list[tuple] = []
    for r, name in enumerate(names):
        point, spread = gains(1, 1 + r)
        table.append((name, r in selection.selecting, point, *pair(spread)))
    low, high = interval(boot[1][:, :, 0] - boot[0][:, 1:, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a budget that the single schedule cannot run has no interval
        single_low, single_high = interval(boot[1][:, :, 0] - boot[2][:, :, 0])
    return HeldOut(
        gain=gain,
        interval=pair(samples),
        published_gain=published_gain,
        over_published=over,
        over_published_interval=over_interval,
        rewards=pd.DataFrame(table, columns=["reward", "selects", "gain", "low", "high"]),
        mean=mean[1][:, 0],
        best_of_n=mean[0][1:, 0],
        low=low,
        high=high,
        percent=goals.per_budget(mean[1][:, 0], mean[0][:, 0]),
        single=mean[2][:, 0],
        over_single_low=single_low,
        over_single_high=single_high,
    )


def frontier_table(
    outcome: HeldOut, goals: Goals, space: SearchSpace, chosen: Sequence[Trial], tuned: np.ndarray
) -> pd.DataFrame:
    """Return one row per budget: the schedule that runs there and what it gives on the test prompts."""
    import pandas as pd

    n = [int(trial.counts[b, 0]) for b, trial in enumerate(chosen)]
    return pd.DataFrame(
        {
            "budget": goals.budgets,
            "n": n,
            "spent": [space.cost.total(k, trial.schedule) for k, trial in zip(n, chosen, strict=True)],
            "schedule": [trial.schedule for trial in chosen],
            "steps": [trial.schedule.steps for trial in chosen],
            "keep_ratios": [trial.schedule.keep_ratios for trial in chosen],
            "mean": outcome.mean,
            "best_of_n": outcome.best_of_n,
            "gain": outcome.mean - outcome.best_of_n,
            "low": outcome.low,
            "high": outcome.high,
            "gain_percent": outcome.percent,
            "tuned_gain_percent": tuned,
            "single": outcome.single,
            "over_single": outcome.mean - outcome.single,
            "over_single_low": outcome.over_single_low,
            "over_single_high": outcome.over_single_high,
        }
    )


def trials_table(trials: Sequence[Trial]) -> pd.DataFrame:
    """Return every schedule tried, in the order of trying."""
    import pandas as pd

    return pd.DataFrame(
        {
            "steps": [trial.schedule.steps for trial in trials],
            "keep_ratios": [trial.schedule.keep_ratios for trial in trials],
            "rounds": [len(trial.scores) for trial in trials],
            "draws": [trial.draws for trial in trials],
            "score": [float(np.nanmax(trial.scores[-1])) for trial in trials],
        }
    )
