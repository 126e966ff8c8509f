"""Whether a tuned schedule carries over to other tensors, and how flat the optimum is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ._race import best_indices
from ._scoring import Scorer
from ._tune_report import best_of_n_per_prompt, per_prompt
from ._tune_setup import make_setup
from .checks import integer, real
from .costs import CostModel
from .errors import ConfigError, ScheduleError
from .metrics import bootstrap_means
from .optimize import OptimizedSchedule, optimize_schedule
from .schedule import PUBLISHED_SCHEDULE, Schedule

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Case", "Transfer", "cases_by_reward", "compare_schedules", "flatness", "transfer"]


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
        raise ScheduleError("schedules", value=schedules, bound="one Schedule or more", remedy="Pass a list of them.")
    level = real("level", level, 0, 1, open_low=True)
    n_prompts = dataset.sizes["prompt"]
    wanted = np.arange(n_prompts) if prompts is None else np.asarray(prompts)
    wanted = np.array([integer("prompt", k, 0, n_prompts - 1) for k in wanted.ravel().tolist()])
    if not len(wanted):
        raise ConfigError("prompts", value=[], bound="one or more", remedy="Name the prompts to compare on.")
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

    from ._tune_setup import split_prompts

    if not cases:
        raise ConfigError("cases", value={}, bound="one Case or more", remedy="Name the tensors to compare.")
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
