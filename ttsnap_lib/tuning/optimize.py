"""The best schedule for a budget or a range of budgets, told on prompts it was not tuned on; and how flat the optimum is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.checks import choice, integer, real
from ttsnap_lib.costs import CostModel, check_n_steps
from ttsnap_lib.errors import BudgetError, ConfigError, ScheduleError, TensorError
from ttsnap_lib.schedule import PUBLISHED_SCHEDULE, Schedule, selecting_rewards
from ttsnap_lib.simulation.metrics import (
    against_best,
    bootstrap_means,
    jackknife_interval,
    leave_one_out,
    mean_interval,
)
from ttsnap_lib.simulation.pruning import n_threads
from ttsnap_lib.simulation.simulate import (
    MOST_DRAWS,
    VARIABLE,
    candidates_table,
    tell_repeats,
    tell_tiny_checks,
)
from ttsnap_lib.tensors.spread import tell_spreads
from ttsnap_lib.tensors.tensor import check_rewards, drop_repeats, noise_aware_steps, read_steps
from ttsnap_lib.tuning.race import Goals, Race, Scorer, Selection, Trial, best_indices
from ttsnap_lib.tuning.space import SearchSpace

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_TRIALS = {"area": 3000, "single": 3000, "frontier": 10000}
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
    test_interval : (float, float), of `test_gain`, by a jackknife over test prompts, paired with Best-of-N
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
    complete : bool, False when a time limit or Ctrl-C ended the search before `n_trials`
    budgets : float64 (budget,)
    tune, test : int64, prompt positions
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
    objective: str
    method: str
    cost: CostModel
    budgets: np.ndarray
    tune: np.ndarray
    test: np.ndarray
    elapsed_s: float

    def flatness(
        self, dataset: xr.Dataset, *, top: int = 50, also: Sequence[Schedule] = (), **options: Any
    ) -> pd.DataFrame:
        """Tell which of the schedules tried are as good as the chosen one on the test prompts, within the interval.

        `dataset` is the tensor that it was tuned on. Compared are the `top` schedules that scored best in the last round
        of the search, and those of `also`, such as the one in use so far. `options` are further ones of
        :func:`compare_schedules`, whose table it returns: the chosen schedule first, then `also`.
        """
        tried = self.trials[self.trials["rounds"] == self.trials["rounds"].max()]
        best = tried.iloc[best_indices(tried["score"].to_numpy(), integer("top", top, 1))]
        tried_best = [Schedule(*pair) for pair in zip(best["steps"], best["keep_ratios"], strict=True)]
        schedules = list(dict.fromkeys([self.schedule, *also, *tried_best]))
        return compare_schedules(dataset, self.cost, self.budgets, schedules, self.method, prompts=self.test, **options)

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
    distinct: bool = False,
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
        How several rewards select, as in :func:`ttsnap_lib.simulate`. What is tuned for is the weighted sum
        of rewards for ``"weighted_sum"``, else the mean of the rewards in units of their spread within a prompt.
    copied_steps : bool
        Admit, for ttsnap, checks where the noise-aware reward is a copy of the base reward.
    distinct : bool
        Leave out repeated trajectories, as :func:`ttsnap_lib.simulate` does.
    level : float
        Of the intervals over test prompts.
    resamples : int
        Of the bootstrap behind the intervals of mean rewards (`frontier`).
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
        dataset, cost, budgets, method, objective, tune=tune, test=test, max_stages=max_stages, combine=combine,
        weights=weights, report=report, copied_steps=copied_steps, distinct=distinct,
    )  # fmt: skip
    n_trials = integer("n_trials", _TRIALS[objective] if n_trials is None else n_trials, 1)
    if time_limit_s is not None:
        real("time_limit_s", time_limit_s, 0, open_low=True)
    iterations = integer("iterations", iterations, 1, MOST_DRAWS)
    level = real("level", level, 0, 1, open_low=True)
    resamples = integer("resamples", resamples, 1, MOST_DRAWS)
    goals = setup.goals
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(integer("seed", seed, 0)).spawn(5)]
    # In random order: the first round of the race takes the first half of the tune prompts.
    tuning = setup.scorer(streams[0].permutation(setup.tune), iterations, streams[0])
    race = Race(setup.space, tuning, goals, streams[1], n_threads())
    if np.isnan(goals.overall(race.baselines[-1][1:], race.baselines[-1])):
        raise BudgetError(
            "gain of Best-of-N over these budgets on the tune prompts: got 0.0, expected above 0, since every gain is "
            "told in percent of it. Raise the budgets or widen their range, or use more prompts."
        )

    def until(draws: float) -> float:
        """Return when the work before must end so that `draws` of a schedule still fit into the time limit."""
        limit = np.inf if time_limit_s is None else started + time_limit_s
        return limit - 1.3 * draws * race.seconds_per_draw - 0.3

    final_iterations = _FINAL_ITERATIONS * iterations
    finalists = _FINALISTS * (len(goals.n) ** 0.5 if objective == "frontier" else 1)
    report_draws = final_iterations * 5 * race.threads * len(setup.test)
    final_draws = report_draws + final_iterations * finalists * len(setup.tune)
    complete = race.run(n_trials, lambda: until(final_draws), progress)
    if not race.finished():
        raise _infeasible("schedules that the budgets can run", setup.space.pool)
    final = tuning.redrawn(final_iterations, streams[2])
    single, chosen, tuned = choose_best(race, final, goals, lambda: until(report_draws))
    scorer = setup.scorer(setup.test, final_iterations, streams[3])
    return OptimizedSchedule(
        schedule=single.schedule,
        tuned_gain=float(tuned[-1]),
        **_told_on(scorer, setup, chosen, single, tuned[:-1], streams[4], level, resamples),
        trials=_trials_table(race.trials),
        complete=complete,
        objective=objective,
        method=method,
        cost=cost,
        budgets=goals.budgets,
        tune=setup.tune,
        test=setup.test,
        elapsed_s=time.monotonic() - started,
    )


def compare_schedules(
    dataset: xr.Dataset,
    cost: CostModel,
    budgets: Sequence[float] | np.ndarray | float,
    schedules: Sequence[Schedule],
    method: str = "ttsnap",
    *,
    prompts: Sequence[int] | np.ndarray | None = None,
    iterations: int = 200,
    seed: int = 0,
    combine: str = "rank_sum",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    report: Sequence[str] | None = None,
    distinct: bool = False,
    level: float = 0.95,
    best_first: bool = False,
) -> pd.DataFrame:
    """Score schedules on the same prompts and subsets, `iterations` a prompt, paired with the first of them.

    `prompts` are positions along the prompt axis, all by default; with `best_first` the schedule that gains most stands first;
    the other options are as in :func:`optimize_schedule`.
    Returns a row per schedule, indexed by its place in `schedules`: schedule, gain (percent over Best-of-N; the paper's relative gain over several budgets,
    for one budget as for objective ``"single"``), low, high, behind (points behind the first schedule), behind_low,
    behind_high, as_good: ``"yes"`` where the interval of `behind` ends below :data:`~ttsnap_lib.simulation.metrics.AS_GOOD` points, ``"no"`` where it
    begins above, else ``"undecided"``. NaN where a schedule cannot run.
    """
    if not schedules or not all(isinstance(schedule, Schedule) for schedule in schedules):
        raise ScheduleError(f"schedules: got {schedules!r}, expected one Schedule or more. Pass a list of them.")
    level = real("level", level, 0, 1, open_low=True)
    n_prompts = dataset.sizes["prompt"]
    wanted = _positions("prompts", range(n_prompts) if prompts is None else prompts, n_prompts)
    setup = make_setup(
        dataset, cost, budgets, method, "area" if np.size(budgets) > 1 else "single", prompts=wanted,
        max_stages=cost.n_steps, combine=combine, weights=weights, report=report, copied_steps=True, distinct=distinct,
    )  # fmt: skip
    rng = np.random.default_rng(integer("seed", seed, 0))
    scorer = setup.scorer(wanted, integer("iterations", iterations, 1, MOST_DRAWS), rng)
    curves = [scorer.best_of_n(setup.goals.n)[:, :, 0]]
    for schedule in schedules:
        runs = set(schedule.steps) <= set(setup.steps) and setup.space.feasible(schedule).all()
        blank = np.full((len(setup.goals.n), len(wanted)), np.nan)
        curves.append(scorer.per_prompt(schedule.steps, setup.space.counts(schedule))[:, :, 0] if runs else blank)
    mean, without = [curve.mean(1) for curve in curves], [leave_one_out(curve.T) for curve in curves]
    gains = [float(setup.goals.overall(curve, mean[0])) for curve in mean[1:]]
    others = [setup.goals.overall(curve, without[0]) for curve in without[1:]]
    table = against_best(gains, others, level, sort=best_first)
    table.insert(0, "schedule", [schedules[k] for k in table.index])
    return table


# What a search starts from


@dataclass(frozen=True)
class Setup:
    """Checked arguments: values in memory, who tunes and who tests, what may be tried and what for."""

    checks: np.ndarray  # (prompt, image, step, reward), the rewards that a check reads
    steps: tuple[int, ...]  # of the third axis
    final: np.ndarray  # (prompt, image, reward)
    names: tuple[str, ...]
    tune: np.ndarray
    test: np.ndarray
    selection: Selection
    goals: Goals
    space: SearchSpace
    published: Schedule | None  # where the tensor and the budgets can run it

    def scorer(self, prompts: np.ndarray, iterations: int, rng: np.random.Generator) -> Scorer:
        """Return a scorer of some prompts."""
        return Scorer(self.checks[prompts], self.steps, self.final[prompts], self.selection, iterations, rng)


def make_setup(
    dataset: Any,
    cost: CostModel,
    budgets: Sequence[float] | np.ndarray | float,
    method: str,
    objective: str,
    *,
    tune: Sequence[int] | None = None,
    test: Sequence[int] | None = None,
    prompts: np.ndarray | None = None,
    max_stages: int = 4,
    combine: str = "rank_sum",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    report: Sequence[str] | None = None,
    copied_steps: bool = False,
    distinct: bool = False,
) -> Setup:
    """Check the arguments of `optimize_schedule` and read the tensor once; `prompts` stand for tune and test both."""
    choice("method", method, VARIABLE)
    choice("objective", objective, _TRIALS)
    check_rewards(dataset)
    dataset = drop_repeats(dataset) if distinct else dataset
    check_n_steps(cost, int(dataset["step"][-1]) + 1)
    max_stages = integer("max_stages", max_stages, 0)
    names = [str(name) for name in dataset["reward"].values]
    selecting, shares = selecting_rewards(names, report, combine, weights)
    pool = dataset.sizes["image"]
    amounts = _budgets(budgets, objective)
    n = candidates_table(["best_of_n"], amounts, None, cost, None, pool)[0][0]
    if objective == "single" and n[0] < 2:
        raise BudgetError(
            f"budget for objective 'single': got {float(amounts[0])!r}, expected at least {cost.total(2):.6g} "
            f"{cost.unit}, two Best-of-N candidates: what they gain over one is the yardstick. Raise the budget."
        )
    tune_at, test_at = (prompts, prompts) if prompts is not None else _split(dataset.sizes["prompt"], tune, test)
    space = SearchSpace(_allowed_steps(dataset, method, selecting, copied_steps), max_stages, cost, amounts, pool)
    scored = [int(step) for step in dataset["step"].values]
    published = set(PUBLISHED_SCHEDULE.steps) <= set(scored[:-1]) and space.feasible(PUBLISHED_SCHEDULE).all()

    wanted = sorted({*space.steps, *(PUBLISHED_SCHEDULE.steps if published else ())})
    checks = read_steps(dataset[VARIABLE[method]], [scored.index(step) for step in wanted])
    final = read_steps(dataset["base"], [-1])[:, :, 0, :]
    tell_repeats(dataset, final)
    tell_spreads(final, names, selecting, shares)
    tell_tiny_checks(dataset, cost)
    read = np.concatenate([tune_at, test_at])
    for name, values in (("final rewards", final[read]), (f"{method} rewards at the checks", checks[read])):
        if np.isnan(values).any():
            raise TensorError(
                f"{name} of prompt {int(read[np.argwhere(np.isnan(values))[0][0]])}: got NaN, expected a number at "
                "every step that a schedule may check. Score what is missing, or drop it: tensors.drop_missing()."
            )
    merit = np.zeros(len(names))
    if shares is not None:
        merit[selecting] = shares
    else:  # in units of the spread within a prompt, so that no reward counts for more by its scale
        spread = final[tune_at].std(axis=1).mean(0)[selecting]
        merit[selecting] = 1 / np.where(spread > 0, spread, 1.0) / len(selecting) if len(selecting) > 1 else 1.0
    return Setup(
        checks=checks,
        steps=tuple(wanted),
        final=final,
        names=tuple(names),
        tune=tune_at,
        test=test_at,
        selection=Selection(tuple(selecting), combine, shares, merit),
        goals=Goals(objective, amounts, n),
        space=space,
        published=PUBLISHED_SCHEDULE if published else None,
    )


def _budgets(budgets: Any, objective: str) -> np.ndarray:
    """Return budgets that the objective can use."""
    amounts = np.array([real("budget", b, 0, error=BudgetError) for b in np.atleast_1d(np.asarray(budgets, object))])
    wanted = {"single": "one budget", "area": "two or more numbers in strictly increasing order"}
    fits = {"single": len(amounts) == 1, "area": len(amounts) > 1}.get(objective, True)
    if not fits or (np.diff(amounts) <= 0).any():
        raise BudgetError(
            f"budgets for objective {objective!r}: got {amounts.tolist()!r}, expected "
            f"{wanted.get(objective, 'increasing numbers')}. Sort the budgets and name each once."
        )
    return amounts


def _split(n_prompts: int, tune: Sequence[int] | None, test: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return positions that tune and positions that test; even and odd ones when nothing is named."""
    everyone = np.arange(n_prompts)
    if n_prompts < 2:
        raise ConfigError(
            f"prompts: got {n_prompts!r}, expected two or more, to tune on some and test on others. Score more."
        )
    groups = (("tune", tune), ("test", test))
    named = {name: _positions(name, given, n_prompts) for name, given in groups if given is not None}
    if not named:
        return everyone[::2], everyone[1::2]
    tunes = named["tune"] if "tune" in named else np.setdiff1d(everyone, named["test"])
    tests = named["test"] if "test" in named else np.setdiff1d(everyone, tunes)
    shared = np.intersect1d(tunes, tests)
    if len(shared) or not len(tunes) or not len(tests):
        raise ConfigError(
            f"tune and test: got {shared.tolist() or 'all prompts in one of them'!r}, expected two groups of prompts "
            "without overlap, neither empty. Tune on some prompts and test on the others."
        )
    return tunes, tests


def _positions(name: str, given: Any, n_prompts: int) -> np.ndarray:
    """Return prompt positions, each once."""
    positions = [integer(f"{name} prompt", k, 0, n_prompts - 1) for k in np.asarray(given).ravel().tolist()]
    if not positions or len(set(positions)) != len(positions):
        raise ConfigError(
            f"{name}: got {positions!r}, expected prompt positions, each once. Name one prompt or more in {name}."
        )
    return np.array(positions)


def _allowed_steps(dataset: Any, method: str, selecting: Sequence[int], copied_steps: bool) -> tuple[int, ...]:
    """Return the steps at which a check may stand: scored, not the last, for ttsnap with a noise-aware reward."""
    steps = [int(step) for step in dataset["step"].values[:-1]]
    if method == "ttsnap" and not copied_steps:
        finetuned = list(noise_aware_steps(dataset).values())
        steps = [step for step in steps if all(step in finetuned[reward] for reward in selecting)]
        if not steps:
            raise ScheduleError(
                "steps with a noise-aware reward: got [], expected one or more of a finetuned reward. Score with "
                "a noise-aware checkpoint, or tune method 'ttsp' on the base reward."
            )
    return tuple(steps)


# What it ends in


def choose_best(
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
    with ThreadPoolExecutor(race.threads) as pool:
        for first in range(0, final.iterations, size):
            block = (slice(0, final.n_prompts), first, min(final.iterations, first + size))
            sums = sums + np.array(list(pool.map(partial(race.sums, blocks=[block], scorer=final), finalists)))
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
    tuned = np.append(per_budget[rows, each], goals.overall(curves[rows, each], baseline))
    return finalists[one], [finalists[k] for k in rows], tuned


def _infeasible(what: str, pool: int) -> BudgetError:
    return BudgetError(
        f"{what}: got 0, expected one or more in a pool of {pool} images. Lower the largest budget, or score more."
    )


def _told_on(
    scorer: Scorer, setup: Setup, chosen: Sequence[Trial], single: Trial, tuned: np.ndarray, rng: np.random.Generator,
    level: float, resamples: int,
) -> dict[str, Any]:  # fmt: skip
    """Return what is told of the prompts of `scorer`, by field of :class:`OptimizedSchedule`.

    That is the schedule chosen at each budget, the single one, the published one and Best-of-N, paired.
    """
    import pandas as pd

    goals, space = setup.goals, setup.space
    pruned, alone = np.full((2, len(goals.n), scorer.n_prompts, 1 + scorer.n_rewards), np.nan)
    for trial in {id(trial): trial for trial in chosen}.values():
        rows = [b for b, other in enumerate(chosen) if other is trial]
        pruned[rows] = scorer.per_prompt(trial.schedule.steps, trial.counts[rows])
    if all(trial is single for trial in chosen):
        alone = pruned
    else:
        runs = single.counts[:, 0] > 0
        alone[runs] = scorer.per_prompt(single.schedule.steps, single.counts[runs])
    curves = [scorer.best_of_n(goals.n), pruned, alone]
    if setup.published is not None:
        curves.append(scorer.per_prompt(setup.published.steps, space.counts(setup.published)))
    mean = [curve.mean(1) for curve in curves]
    without = [leave_one_out(np.moveaxis(curve, 1, 0)) for curve in curves]

    def gains(k: int, column: int) -> tuple[float, np.ndarray]:
        """Return the gain of a curve by a column, and that without each prompt."""
        point = goals.overall(mean[k][:, column], mean[0][:, column])
        return float(point), goals.overall(without[k][:, :, column], without[0][:, :, column])

    def pair(point: float, others: np.ndarray) -> tuple[float, float]:
        low, high = jackknife_interval(point, others, level)
        return float(low), float(high)

    gain, others = gains(1, 0)
    published_gain = over_published = over_interval = None
    if setup.published is not None:
        published_gain, published_others = gains(3, 0)
        over_published = gain - published_gain
        over_interval = pair(over_published, others - published_others)
    rewards: list[tuple] = []
    for r, name in enumerate(setup.names):
        point, spread = gains(1, 1 + r)
        rewards.append((name, r in setup.selection.selecting, point, *pair(point, spread)))
    best_of_n, own, one = mean[0][1:, 0], mean[1][:, 0], mean[2][:, 0]
    # Differences in reward at each budget, to Best-of-N and to the single schedule, on the same resampled prompts.
    apart = np.stack([curves[1][:, :, 0] - curves[0][1:, :, 0], curves[1][:, :, 0] - curves[2][:, :, 0]])
    boot = bootstrap_means(np.moveaxis(apart, -1, 0), rng, resamples)
    (low, single_low), (high, single_high) = mean_interval(apart.mean(-1), boot, scorer.n_prompts, level)
    n = [int(trial.counts[b, 0]) for b, trial in enumerate(chosen)]
    frontier = pd.DataFrame(
        {
            "budget": goals.budgets,
            "n": n,
            "spent": [space.cost.total(k, trial.schedule) for k, trial in zip(n, chosen, strict=True)],
            "schedule": [trial.schedule for trial in chosen],
            "steps": [trial.schedule.steps for trial in chosen],
            "keep_ratios": [trial.schedule.keep_ratios for trial in chosen],
            "mean": own,
            "best_of_n": best_of_n,
            "gain": own - best_of_n,
            "low": low,
            "high": high,
            "gain_percent": goals.per_budget(own, mean[0][:, 0]),
            "tuned_gain_percent": tuned,
            "single": one,
            "over_single": own - one,
            "over_single_low": single_low,
            "over_single_high": single_high,
        }
    )
    return {
        "test_gain": gain,
        "test_interval": pair(gain, others),
        "published_gain": published_gain,
        "over_published": over_published,
        "over_published_interval": over_interval,
        "frontier": frontier,
        "rewards": pd.DataFrame(rewards, columns=["reward", "selects", "gain", "low", "high"]),
    }


def _trials_table(trials: Sequence[Trial]) -> pd.DataFrame:
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
