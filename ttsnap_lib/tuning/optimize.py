"""Whether a tuned schedule carries over to other tensors, and how flat the optimum is."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.checks import choice, integer, real
from ttsnap_lib.costs import CostModel
from ttsnap_lib.errors import BudgetError, ConfigError, CostError, ScheduleError, TensorError
from ttsnap_lib.schedule import PUBLISHED_SCHEDULE, Schedule, selecting_rewards
from ttsnap_lib.simulation.metrics import bootstrap_means, percentile_interval
from ttsnap_lib.simulation.simulate import MOST_DRAWS, candidates_table, check_n_steps
from ttsnap_lib.tensors.tensor import COPIED, check_rewards, read_steps
from ttsnap_lib.tuning.race import OBJECTIVES, Goals, Race, Scorer, Selection, Trial, best_indices, check_budgets
from ttsnap_lib.tuning.space import SearchSpace

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


VARIABLE = {"ttsp": "base", "ttsnap": "noise_aware"}


_TRIALS = {"area": 3000, "single": 3000, "frontier": 10000}


@dataclass(frozen=True)
class Setup:
    """A tuning run, checked: values in memory, who tunes and who tests, what may be tried and what for."""

    checks: np.ndarray  # (prompt, image, step, reward), the rewards that a check reads
    steps: tuple[int, ...]  # of the third axis
    final: np.ndarray  # (prompt, image, reward)
    names: tuple[str, ...]
    tune: np.ndarray
    test: np.ndarray
    selection: Selection
    goals: Goals
    space: SearchSpace
    published: Schedule | None
    n_trials: int
    iterations: int

    def arrays(self, prompts: np.ndarray) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
        """Return what a :class:`~ttsnap_lib._scoring.Scorer` of some prompts takes."""
        return self.checks[prompts], self.steps, self.final[prompts]


def make_setup(
    dataset: Any,
    cost: CostModel,
    budgets: Sequence[float] | np.ndarray | float,
    method: str,
    *,
    tune: Sequence[int] | None,
    test: Sequence[int] | None,
    objective: str,
    n_trials: int | None,
    time_limit_s: float | None,
    max_stages: int,
    iterations: int,
    combine: str,
    weights: Mapping[str, float] | Sequence[float] | None,
    report: Sequence[str] | None,
    copied_steps: bool,
    prompts: np.ndarray | None = None,
) -> Setup:
    """Check the arguments of ``optimize_schedule`` and read the tensor once; `prompts` stand for tune and test both."""
    choice("method", method, VARIABLE)
    choice("objective", objective, OBJECTIVES)
    if not isinstance(cost, CostModel):
        raise CostError(f"cost: got {cost!r}, expected a CostModel. Pass CostModel.preset('flux-512+pickscore').")
    n_trials = integer("n_trials", _TRIALS[objective] if n_trials is None else n_trials, 1)
    if time_limit_s is not None:
        real("time_limit_s", time_limit_s, 0, open_low=True)
    iterations = integer("iterations", iterations, 1, MOST_DRAWS)
    max_stages = integer("max_stages", max_stages, 0)
    amounts = np.array([real("budget", b, 0, error=BudgetError) for b in np.atleast_1d(np.asarray(budgets, object))])
    check_budgets(objective, amounts)
    check_rewards(dataset)
    names = [str(name) for name in dataset["reward"].values]
    selecting, shares = selecting_rewards(names, report, combine, weights)
    scored = [int(step) for step in dataset["step"].values]
    check_n_steps(cost, dataset["step"].values)
    pool = dataset.sizes["image"]
    n = candidates_table(["best_of_n"], amounts, None, cost, None, pool)[0][0]
    if objective == "single" and n[0] < 2:
        raise BudgetError(
            f"budget for objective 'single': got {float(amounts[0])!r}, expected at least {cost.total(2):.6g} "
            f"{cost.unit}, two Best-of-N candidates. Raise the budget: the gain is told in percent of what Best-of-N "
            "gains over one candidate."
        )
    if prompts is None:
        tune_at, test_at = split_prompts(dataset.sizes["prompt"], tune, test)
    else:
        tune_at = test_at = prompts
    allowed = allowed_steps(dataset, method, selecting, copied_steps)
    space = SearchSpace(tuple(allowed), max_stages, cost, amounts, pool)
    published = _published(scored, space)

    wanted = sorted({*allowed, *(published.steps if published is not None else ())})
    checks = read_steps(dataset[VARIABLE[method]], [scored.index(step) for step in wanted])
    final = read_steps(dataset["base"], [-1])[:, :, 0, :]
    read = np.concatenate([tune_at, test_at])
    for name, values in (("final rewards", final[read]), (f"{method} rewards at the checks", checks[read])):
        if np.isnan(values).any():
            raise TensorError(
                f"{name} of prompt {int(read[np.argwhere(np.isnan(values))[0][0]])}: got {float('nan')!r}, expected a "
                "number for every image, at every step that a schedule may check. Score the missing images, or drop "
                "them with tensors.drop_missing()."
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
        published=published,
        n_trials=n_trials,
        iterations=iterations,
    )


def split_prompts(
    n_prompts: int, tune: Sequence[int] | None, test: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return positions that tune and positions that test; even and odd ones when nothing is named."""
    everyone = np.arange(n_prompts)
    if n_prompts < 2:
        raise ConfigError(
            f"prompts: got {n_prompts!r}, expected two or more, to tune on some and test on others. Score more."
        )
    named = {}
    for name, given in (("tune", tune), ("test", test)):
        if given is None:
            continue
        positions = [integer(f"{name} prompt", k, 0, n_prompts - 1) for k in np.asarray(given).ravel().tolist()]
        if not positions or len(set(positions)) != len(positions):
            raise ConfigError(
                f"{name}: got {positions!r}, expected prompt positions, each once. Name one prompt or more in {name}."
            )
        named[name] = np.array(positions)
    if not named:
        return everyone[::2], everyone[1::2]
    for name, other in (("tune", "test"), ("test", "tune")):
        if name not in named:
            named[name] = np.setdiff1d(everyone, named[other])
    shared = np.intersect1d(named["tune"], named["test"])
    if len(shared) or not len(named["tune"]) or not len(named["test"]):
        raise ConfigError(
            f"tune and test: got {shared.tolist() or 'all prompts in one of them'!r}, expected two groups of prompts "
            "without overlap, neither empty. Tune on some prompts and test on the others, for instance even and odd "
            "ones."
        )
    return named["tune"], named["test"]


def allowed_steps(dataset: Any, method: str, selecting: Sequence[int], copied_steps: bool) -> list[int]:
    """Return the steps at which a check may stand: scored, not the last, for ttsnap with a noise-aware reward."""
    steps = [int(step) for step in dataset["step"].values[:-1]]
    if method == "ttsnap" and not copied_steps and "noise_aware_source" in dataset:
        source = dataset["noise_aware_source"].transpose("reward", "step").values[list(selecting), :-1]
        steps = [step for step, names in zip(steps, source.T, strict=True) if not (names == COPIED).any()]
        if not steps:
            raise ScheduleError(
                f"steps with a noise-aware reward: got {[]!r}, expected one or more of a finetuned reward. Score with "
                "a noise-aware checkpoint, or tune method 'ttsp' on the base reward."
            )
    return steps


def _published(scored: Sequence[int], space: SearchSpace) -> Schedule | None:
    if not set(PUBLISHED_SCHEDULE.steps) <= set(scored[:-1]) or not space.feasible(PUBLISHED_SCHEDULE).all():
        return None
    return PUBLISHED_SCHEDULE


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
            "gain of Best-of-N over these budgets on the tune prompts: got 0.0, expected above 0, since every gain is "
            "told in percent of it. Raise the budgets or widen their range, or use more prompts."
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
        f"{what}: got 0, expected one or more; the pool holds {pool} images. Lower the largest budget, or score more "
        "images per prompt."
    )


@dataclass(frozen=True)
class Case:
    """A tensor with what its candidates cost: one row and column of a transfer matrix.

    Parameters
    ----------
    dataset : xarray.Dataset
        One reward, model and prompt set, e.g. ``ds.sel(reward=["pickscore"])``.
    cost : CostModel
    budgets : sequence of float
    """

    dataset: xr.Dataset
    cost: CostModel
    budgets: Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Transfer:
    """Gains of schedules tuned on one case and used on another.

    Attributes
    ----------
    gain : pandas.DataFrame
        Percent over Best-of-N on the test prompts; rows: tuned on (and ``published``), columns: used on. NaN where
        the schedule cannot run: a step is not scored, or a budget buys none or more than the pool.
    low, high : pandas.DataFrame, its interval
    behind, behind_low, behind_high : pandas.DataFrame
        Points by which the schedule trails the one tuned on the column's own case, paired.
    schedules : dict of str to Schedule
    """

    gain: pd.DataFrame
    low: pd.DataFrame
    high: pd.DataFrame
    behind: pd.DataFrame
    behind_low: pd.DataFrame
    behind_high: pd.DataFrame
    schedules: dict[str, Schedule]


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
    level: float = 0.95,
    resamples: int = 1000,
) -> pd.DataFrame:
    """Score schedules on the same prompts and subsets, paired with the first of them.

    Parameters
    ----------
    dataset, cost, budgets, method, combine, weights, report, level, resamples
        As in :func:`~ttsnap_lib.optimize.optimize_schedule`.
    schedules : sequence of Schedule
    prompts : sequence of int, optional
        Positions along the prompt axis; all by default.
    iterations : int
        Subsets per prompt.
    seed : int
        Of the subsets and of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        One row per schedule: schedule, gain (percent over Best-of-N; the paper's relative gain over several budgets,
        for one budget as for objective ``"single"``), low, high, behind (points behind the first schedule),
        behind_low, behind_high. NaN where a schedule cannot run.

    Raises
    ------
    TTSnapError
        As :func:`~ttsnap_lib.optimize.optimize_schedule` for its arguments.
    """
    import pandas as pd

    if not schedules or not all(isinstance(schedule, Schedule) for schedule in schedules):
        raise ScheduleError(f"schedules: got {schedules!r}, expected one Schedule or more. Pass a list of them.")
    level = real("level", level, 0, 1, open_low=True)
    n_prompts = dataset.sizes["prompt"]
    wanted = np.arange(n_prompts) if prompts is None else np.asarray(prompts)
    wanted = np.array([integer("prompt", k, 0, n_prompts - 1) for k in wanted.ravel().tolist()])
    if not len(wanted):
        raise ConfigError(f"prompts: got {[]!r}, expected one or more. Name the prompts to compare on.")
    setup = make_setup(
        dataset, cost, budgets, method, tune=None, test=None, objective="area" if np.size(budgets) > 1 else "single",
        n_trials=1, time_limit_s=None, max_stages=cost.n_steps, iterations=iterations, combine=combine,
        weights=weights, report=report, copied_steps=True, prompts=wanted,
    )  # fmt: skip
    rng = np.random.default_rng(integer("seed", seed, 0))
    scorer = Scorer(*setup.arrays(wanted), setup.selection, setup.iterations, rng)
    curves = [best_of_n_per_prompt(scorer, setup.goals.n)[:, :, 0]]
    for schedule in schedules:
        runs = set(schedule.steps) <= set(setup.steps) and setup.space.feasible(schedule).all()
        blank = np.full((len(setup.goals.n), len(wanted)), np.nan)
        curves.append(per_prompt(scorer, schedule.steps, setup.space.counts(schedule))[:, :, 0] if runs else blank)
    sizes = np.cumsum([len(curve) for curve in curves])[:-1]
    stacked = np.concatenate(curves).T  # (prompt, curve and budget)
    mean = np.split(stacked.mean(0), sizes)
    boot = np.split(bootstrap_means(stacked, rng, resamples), sizes, axis=1)
    tail = [(1 - level) / 2, (1 + level) / 2]
    first, rows = None, []
    for k, schedule in enumerate(schedules, start=1):
        gain, samples = setup.goals.overall(mean[k], mean[0]), setup.goals.overall(boot[k], boot[0])
        first = (gain, samples) if first is None else first
        interval = np.quantile(samples, tail)
        behind = np.quantile(first[1] - samples, tail)
        rows.append((schedule, float(gain), *interval, float(first[0] - gain), *behind))
    names = ["schedule", "gain", "low", "high", "behind", "behind_low", "behind_high"]
    return pd.DataFrame(rows, columns=names)


def cases_by_reward(
    tensors: Mapping[str, xr.Dataset], cost: CostModel, budgets: Sequence[float] | np.ndarray
) -> dict[str, Case]:
    """Return a case for each reward of each tensor, under the same costs: ``name`` or ``name/reward`` where it has several.

    Parameters
    ----------
    tensors : mapping of name to xarray.Dataset
    cost, budgets
        As in :class:`Case`.
    """
    return {
        name if dataset.sizes["reward"] == 1 else f"{name}/{reward}": Case(dataset.sel(reward=[reward]), cost, budgets)
        for name, dataset in tensors.items()
        for reward in map(str, dataset["reward"].values)
    }


def transfer(
    cases: Mapping[str, Case],
    method: str = "ttsnap",
    *,
    tune: Sequence[int] | None = None,
    test: Sequence[int] | None = None,
    schedules: Mapping[str, Schedule] | None = None,
    seed: int = 0,
    **options,
) -> Transfer:
    """Tune a schedule on each case and use it on every other: rewards, models or prompt sets.

    Parameters
    ----------
    cases : mapping of name to Case
    method : {"ttsnap", "ttsp"}
    tune, test : sequence of int, optional
        As in :func:`~ttsnap_lib.optimize.optimize_schedule`; even and odd prompts by default.
    schedules : mapping of name to Schedule, optional
        Schedules tuned before, by case; the others are tuned here.
    seed : int
    options
        Further ones of ``optimize_schedule``, such as ``n_trials`` or ``max_stages``.

    Returns
    -------
    Transfer

    Raises
    ------
    ConfigError
        No case.
    """
    import pandas as pd

    if not cases:
        raise ConfigError(f"cases: got { {}!r}, expected one Case or more. Name the tensors to compare.")
    known = dict(schedules or {})
    for name, case in cases.items():
        if name not in known:
            known[name] = optimize_schedule(
                case.dataset, case.cost, case.budgets, method, tune=tune, test=test, seed=seed, **options
            ).schedule
    rows = {**{name: known[name] for name in cases}, "published": PUBLISHED_SCHEDULE}
    shared = {key: options[key] for key in ("combine", "weights", "report", "level", "resamples") if key in options}
    parts: dict[str, dict[str, pd.Series]] = {}
    for name, case in cases.items():
        order = [name, *(other for other in rows if other != name)]
        prompts = split_prompts(case.dataset.sizes["prompt"], tune, test)[1]
        table = compare_schedules(
            case.dataset, case.cost, case.budgets, [rows[other] for other in order], method,
            prompts=prompts, seed=seed + 1, **shared,
        )  # fmt: skip
        table.index = order
        for column in table.columns[1:]:
            parts.setdefault(column, {})[name] = table[column].reindex(list(rows))
    return Transfer(schedules=rows, **{column: pd.DataFrame(series) for column, series in parts.items()})


def flatness(
    result: OptimizedSchedule,
    dataset: xr.Dataset,
    *,
    top: int = 50,
    also: Sequence[Schedule] = (),
    prompts: Sequence[int] | np.ndarray | None = None,
    iterations: int = 200,
    seed: int = 0,
    **options,
) -> pd.DataFrame:
    """Tell which of the schedules tried are as good as the chosen one, within the paired interval.

    Parameters
    ----------
    result : OptimizedSchedule
    dataset : xarray.Dataset
        The tensor that it was tuned on.
    top : int
        Schedules compared: those that scored best in the last round of the search.
    also : sequence of Schedule
        Others to compare, such as the one in use so far.
    prompts : sequence of int, optional
        The result's test prompts by default.
    iterations, seed, options
        As in :func:`compare_schedules`.

    Returns
    -------
    pandas.DataFrame
        As :func:`compare_schedules`, the chosen schedule first, then `also`, with ``within``: the interval of the points by which
        it trails holds 0.
    """
    tried = result.trials[result.trials["rounds"] == result.trials["rounds"].max()]
    best = tried.iloc[best_indices(tried["score"].to_numpy(), integer("top", top, 1))]
    tried_best = [Schedule(*pair) for pair in zip(best["steps"], best["keep_ratios"], strict=True)]
    schedules = list(dict.fromkeys([result.schedule, *also, *tried_best]))
    table = compare_schedules(
        dataset, result.cost, result.budgets, schedules, result.method,
        prompts=result.test if prompts is None else prompts, iterations=iterations, seed=seed, **options,
    )  # fmt: skip
    table["within"] = (table["behind_low"] <= 0) & (table["behind_high"] >= 0)
    return table
