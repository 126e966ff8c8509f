"""The best pruning schedule for a budget, a range of budgets or every budget: tuned on some prompts, told on others.

The search is a race (:mod:`ttsnap_lib._race`) over schedules scored by simulation (:mod:`ttsnap_lib._scoring`). The
finalists are scored again on fresh subsets of the tune prompts, and the one that is chosen is reported on the test
prompts, which nothing before has read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ._goals import Goals
from ._race import Race, Trial, best_indices
from ._scoring import Scorer
from ._tune_report import frontier_table, held_out, trials_table
from ._tune_setup import make_setup
from .checks import integer, real
from .costs import CostModel
from .errors import BudgetError
from .schedule import Schedule
from .simulate import MOST_DRAWS

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["OptimizedSchedule", "optimize_schedule"]

_FINALISTS = 16
_FINAL_ITERATIONS = 4  # times those of the last round


@dataclass(frozen=True)
class OptimizedSchedule:
    """What the optimiser found.

    Attributes
    ----------
    schedule : Schedule
        The best single schedule (of objective ``"frontier"`` too, where every budget also has its own).
    tuned_gain, test_gain : float
        Gain over Best-of-N in percent, on the tune prompts (fresh subsets) and on the test prompts. For ``"area"`` and
        ``"frontier"`` the paper's relative gain over the range of budgets; for ``"single"``
        ``100 * (pruned - best_of_n) / (best_of_n - one candidate)`` in mean reward at that budget. With objective
        ``"frontier"`` the curve that takes the best schedule at every budget.
    test_interval : (float, float)
        Of `test_gain`, by a bootstrap over test prompts, paired with Best-of-N.
    published_gain, over_published : float or None
    over_published_interval : (float, float) or None
        The published schedule on the test prompts, and `test_gain` minus that, paired; None when the tensor lacks its
        steps or a budget cannot run it.
    frontier : pandas.DataFrame
        One row per budget: budget, n (candidates), spent, schedule, steps, keep_ratios, then on the test prompts
        mean, best_of_n, gain (in reward), low, high, gain_percent, and tuned_gain_percent; then single (the mean of
        `schedule`, the same for every budget) and over_single, the difference to it, with its paired interval.
    rewards : pandas.DataFrame
        Per reward of the tensor: whether it selects, and the gain on the test prompts with its interval.
    trials : pandas.DataFrame
        Every schedule tried: steps, keep_ratios, rounds it ran in, draws (prompts x iterations), score in percent
        (of the last round it ran in; the best over budgets for ``"frontier"``).
    complete : bool
        False when a time limit or Ctrl-C ended the search before `n_trials`.
    infeasible : int
        Schedules dropped because a budget buys none of their candidates, or more than the pool.
    objective, method : str
    cost : CostModel
    budgets : float64 (budget,)
    tune, test : int64, prompt positions
    elapsed_s : float
    """

    schedule: Schedule
    tuned_gain: float
    test_gain: float
    test_interval: tuple[float, float]
    published_gain: float | None
    over_published: float | None
    over_published_interval: tuple[float, float] | None
    frontier: pd.DataFrame
    rewards: pd.DataFrame
    trials: pd.DataFrame
    complete: bool
    infeasible: int
    objective: str
    method: str
    cost: CostModel
    budgets: np.ndarray
    tune: np.ndarray
    test: np.ndarray
    elapsed_s: float

    def __str__(self) -> str:
        low, high = self.test_interval
        text = f"{self.schedule}: {self.test_gain:+.1f}% over Best-of-N on test prompts [{low:+.1f}, {high:+.1f}]"
        if self.over_published is not None and self.over_published_interval is not None:
            low, high = self.over_published_interval
            text += f", {self.over_published:+.1f} points over the published schedule [{low:+.1f}, {high:+.1f}]"
        return text + ("" if self.complete else " (search cut short)")


def optimize_schedule(
    dataset: xr.Dataset,
    cost: CostModel,
    budgets: Sequence[float] | np.ndarray | float,
    method: str = "ttsnap",
    *,
    tune: Sequence[int] | None = None,
    test: Sequence[int] | None = None,
    objective: str = "area",
    n_trials: int | None = None,
    time_limit_s: float | None = None,
    seed: int = 0,
    max_stages: int = 4,
    iterations: int = 48,
    combine: str = "rank_sum",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    report: Sequence[str] | None = None,
    copied_steps: bool = False,
    level: float = 0.95,
    resamples: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> OptimizedSchedule:
    """Search for the schedule that gains most over Best-of-N at the same compute.

    Parameters
    ----------
    dataset : xarray.Dataset
        A reward tensor.
    cost : CostModel
    budgets : sequence of float, or float
        Compute per prompt in the unit of `cost`, increasing; one for objective ``"single"``.
    method : {"ttsnap", "ttsp"}
    tune, test : sequence of int, optional
        Positions along the prompt axis, without overlap. When one is missing it is the rest; when both are, the even
        positions tune and the odd ones test.
    objective : {"area", "single", "frontier"}
        One schedule for the whole range, one for one budget, or one for every budget.
    n_trials : int, optional
        Schedules to try; 3000 by default, 10000 for a frontier.
    time_limit_s : float, optional
        For everything, the final comparison and the report included.
    seed : int
        With equal `n_trials` and no time limit, equal seeds give equal results, bit for bit.
    max_stages : int
        Pruning steps at most.
    iterations : int
        Subsets per prompt in the last round of the race; the finalists and the report use four times as many.
    combine, weights, report
        How several rewards select, as in :func:`ttsnap_lib.simulate.simulate`. What is tuned for is the weighted sum
        of rewards for ``"weighted_sum"``, else the mean of the rewards in units of their spread within a prompt.
    copied_steps : bool
        Admit, for ttsnap, checks where the noise-aware reward is a copy of the base reward.
    level, resamples
        Of the bootstrap over test prompts.
    progress : callable, optional
        Called with (schedules tried, schedules in all).

    Returns
    -------
    OptimizedSchedule

    Raises
    ------
    ConfigError, BudgetError, CostError, ScheduleError, TensorError
        As named by their messages, before the search; also when every schedule is infeasible.
    """
    started = time.monotonic()
    setup = make_setup(
        dataset, cost, budgets, method, tune=tune, test=test, objective=objective, n_trials=n_trials,
        time_limit_s=time_limit_s, max_stages=max_stages, iterations=iterations, combine=combine, weights=weights,
        report=report, copied_steps=copied_steps,
    )  # fmt: skip
    level = real("level", level, 0, 1, open_low=True)
    resamples = integer("resamples", resamples, 1, MOST_DRAWS)
    goals, space = setup.goals, setup.space
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(integer("seed", seed, 0)).spawn(5)]
    # In random order: the first round of the race takes the first half of the tune prompts.
    tuning = Scorer(*setup.arrays(streams[0].permutation(setup.tune)), setup.selection, setup.iterations, streams[0])
    from numba import config

    threads = max(1, config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]  # set when numba is imported
    race = Race(space, tuning, goals, streams[1], threads)
    if np.isnan(goals.overall(race.baselines[-1][1:], race.baselines[-1])):
        raise BudgetError(
            "gain of Best-of-N over these budgets on the tune prompts",
            value=0.0,
            bound="above 0, since every gain is told in percent of it",
            remedy="Raise the budgets or widen their range, or use more prompts.",
        )
    final_iterations = _FINAL_ITERATIONS * setup.iterations

    def until(draws: float) -> float:
        """Return when the work before must end so that `draws` of a schedule still fit into the time limit."""
        limit = np.inf if time_limit_s is None else started + time_limit_s
        return limit - 1.3 * draws * race.seconds_per_draw - 0.3

    finalists = _FINALISTS * (len(goals.n) ** 0.5 if objective == "frontier" else 1)
    report_draws = final_iterations * 5 * race.threads * len(setup.test)
    final_draws = report_draws + final_iterations * finalists * len(setup.tune)
    complete = race.run(setup.n_trials, lambda: until(final_draws), progress)
    if not race.finished():
        raise _infeasible("schedules that the budgets can run", space.pool)
    final = tuning.redrawn(final_iterations, streams[2])
    single, chosen, tuned = _choose(race, final, goals, lambda: until(report_draws))
    test_scorer = Scorer(*setup.arrays(setup.test), setup.selection, final_iterations, streams[3])
    outcome = held_out(
        test_scorer, goals, space, chosen, single, setup.published, setup.names, setup.selection, streams[4], level,
        resamples,
    )  # fmt: skip
    return OptimizedSchedule(
        schedule=single.schedule,
        tuned_gain=float(tuned[-1]),
        test_gain=outcome.gain,
        test_interval=outcome.interval,
        published_gain=outcome.published_gain,
        over_published=outcome.over_published,
        over_published_interval=outcome.over_published_interval,
        frontier=frontier_table(outcome, goals, space, chosen, tuned[:-1]),
        rewards=outcome.rewards,
        trials=trials_table(race.trials),
        complete=complete,
        infeasible=race.infeasible,
        objective=objective,
        method=method,
        cost=cost,
        budgets=goals.budgets,
        tune=setup.tune,
        test=setup.test,
        elapsed_s=time.monotonic() - started,
    )


def _choose(
    race: Race, final: Scorer, goals: Goals, deadline: Callable[[], float]
) -> tuple[Trial, list[Trial], np.ndarray]:
    """Return the best single schedule, the one for every budget, and the tuned gain (all last, then per budget).

    The finalists are compared on subsets that the search has not seen.
    """
    *others, overall_best = race.elites(_FINALISTS)
    elites = [*(best[:3] for best in others), overall_best]
    finalists = list({id(trial): trial for best in elites for trial in best}.values())
    sums: np.ndarray | float = 0.0
    done, size = [], -(-final.iterations // _FINAL_ITERATIONS)
    for first in range(0, final.iterations, size):
        block = (slice(0, final.n_prompts), first, min(final.iterations, first + size))
        sums = sums + np.array(race.map(partial(race.sums, blocks=[block], scorer=final), finalists))
        done.append([block])
        if time.monotonic() > deadline():
            break
    curves = sums / (final.n_prompts * block[2])
    baseline = goals.baseline(final, done)
    per_budget = goals.per_budget(curves, baseline)
    overall = goals.overall(curves, baseline)
    # A range of budgets that no schedule runs throughout has no single best one: take that of the largest budget.
    one = (best_indices(overall, 1) or best_indices(curves[:, -1], 1) or [0])[0]
    if goals.objective != "frontier":
        return finalists[one], [finalists[one]] * len(goals.budgets), np.append(per_budget[one], overall[one])
    rows = []
    for b, budget in enumerate(goals.budgets):
        best = best_indices(curves[:, b], 1)
        if not best:
            raise _infeasible(f"schedules that budget {budget:.6g} can run", final.pool)
        rows += best
    each = np.arange(len(rows))
    curve = curves[rows, each]
    tuned = np.append(per_budget[rows, each], goals.overall(curve, baseline))
    return finalists[one], [finalists[k] for k in rows], tuned


def _infeasible(what: str, pool: int) -> BudgetError:
    return BudgetError(
        what,
        value=0,
        bound=f"one or more; the pool holds {pool} images",
        remedy="Lower the largest budget, or score more images per prompt.",
    )
