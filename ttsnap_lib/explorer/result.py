"""What the explorer shows, without any widget: a state in, a result out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.checks import choice, integer, real
from ttsnap_lib.costs import CostModel, StageCost
from ttsnap_lib.errors import BudgetError, ConfigError
from ttsnap_lib.explorer.pool import Job, Pool
from ttsnap_lib.schedule import METHODS, PUBLISHED_SCHEDULE, Schedule
from ttsnap_lib.simulation.metrics import Estimate, relative_gain_of
from ttsnap_lib.simulation.pruning import step_positions
from ttsnap_lib.simulation.simulate import check_n_steps

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class State:
    """Everything a person can set, apart from the tensor.

    Parameters
    ----------
    rewards : tuple of str
        Rewards that select jointly.
    shown : str
        The reward that is drawn; it need not select (reward hacking shows there).
    cost : CostModel
    budgets : tuple of float
        Range of the curves and of the relative gain, increasing, in the unit of `cost`.
    budget : float
        The one that the numbers are told for.
    method : {"best_of_n", "ttsp", "ttsnap"}
    schedule : Schedule
    pinned_method, pinned
        What the effect of a change is measured against.
    combine : {"rank_sum", "z_score"}

    Raises
    ------
    ConfigError, BudgetError
        Before anything is computed.
    """

    rewards: tuple[str, ...]
    shown: str
    cost: CostModel
    budgets: tuple[float, ...]
    budget: float
    method: str = "ttsnap"
    schedule: Schedule = PUBLISHED_SCHEDULE
    pinned_method: str = "ttsnap"
    pinned: Schedule = PUBLISHED_SCHEDULE
    combine: str = "rank_sum"

    def __post_init__(self) -> None:
        choice("method", self.method, METHODS)
        choice("pinned method", self.pinned_method, METHODS)
        choice("combine", self.combine, ("rank_sum", "z_score"))
        real("budget", self.budget, 0, error=BudgetError)
        if not self.rewards:
            raise ConfigError(f"rewards that select: got {()!r}, expected one or more. Choose a reward in the list.")
        if len(self.budgets) < 3 or any(b <= a for a, b in zip(self.budgets, self.budgets[1:], strict=False)):
            raise ConfigError(
                f"budgets: got {self.budgets!r}, expected three or more, increasing. Name a range of budgets."
            )

    @property
    def plan(self) -> Schedule:
        """The schedule that runs: none for Best-of-N."""
        return Schedule() if self.method == "best_of_n" else self.schedule

    @property
    def pinned_plan(self) -> Schedule:
        """The pinned schedule that runs."""
        return Schedule() if self.pinned_method == "best_of_n" else self.pinned


@dataclass(frozen=True)
class Curve:
    """One method over the budgets that it can run: budgets that buy no candidate, or too many, are left out.

    Attributes
    ----------
    method : str
    budgets, spent, mean, low, high : float64 (budget,)
    n : int64 (budget,)
    per_prompt : float64 (budget, prompt)
    boot : float64 (resample, budget)
    """

    method: str
    budgets: np.ndarray
    n: np.ndarray
    spent: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    per_prompt: np.ndarray
    boot: np.ndarray


@dataclass(frozen=True)
class Change:
    """A value with its 95% interval; floats or arrays (budget,)."""

    value: np.ndarray | Any
    low: np.ndarray | Any
    high: np.ndarray | Any


@dataclass(frozen=True)
class Result:
    """What is drawn and told.

    Attributes
    ----------
    state : State
    best_of_n, current : Curve
    pinned : Curve or None
        None when it cannot run at the chosen budget.
    at : dict of str to Curve
        The three at the chosen budget alone, arrays of one.
    over_best, over_pinned : Change or None
        Paired differences at the chosen budget, in reward.
    change : Change or None
        Paired difference to the pinned schedule at `change_budgets`, in reward.
    change_budgets : float64 (budget,)
    gain, pinned_gain : Change or None
        Relative gain over Best-of-N, percent, over the budgets that all can run.
    gain_change : Change or None
        Their paired difference, in points.
    stages : tuple of StageCost
        Of the chosen budget.
    tau : (Estimate, Estimate)
        Kendall tau per step of the base and the noise-aware reward.
    steps : tuple of int
    iterations, iterations_wanted : int
        Subsets per prompt so far, and in the end.
    notes : tuple of str
        What a reader should know, in plain words.
    """

    state: State
    best_of_n: Curve
    current: Curve
    pinned: Curve | None
    at: dict[str, Curve]
    over_best: Change
    over_pinned: Change | None
    change: Change | None
    change_budgets: np.ndarray
    gain: Change | None
    pinned_gain: Change | None
    gain_change: Change | None
    stages: tuple[StageCost, ...]
    tau: tuple[Estimate, Estimate]
    steps: tuple[int, ...]
    iterations: int
    iterations_wanted: int
    notes: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether all iterations are in."""
        return self.iterations >= self.iterations_wanted

    def frame(self) -> pd.DataFrame:
        """Return one row per curve and budget."""
        import pandas as pd

        curves = {"best_of_n": self.best_of_n, "schedule": self.current, "pinned": self.pinned}
        rows = [
            (name, curve.method, self.state.shown, *row)
            for name, curve in curves.items()
            if curve is not None
            for row in zip(curve.budgets, curve.n, curve.spent, curve.mean, curve.low, curve.high, strict=True)
        ]
        return pd.DataFrame(rows, columns=["curve", "method", "reward", "budget", "n", "spent", "mean", "low", "high"])


_LEVEL = 0.95


_VARIABLE = {"best_of_n": "base", "ttsp": "base", "ttsnap": "noise_aware"}


def jobs(state: State, pool: Pool) -> tuple[list[Job], int]:
    """Return all that has to be pruned for `state`, and the iterations of a block."""
    selecting = tuple(pool.names.index(choice("reward", name, pool.names)) for name in state.rewards)
    found = []
    for method, plan in _plans(state):
        for budgets in (state.budgets, (state.budget,)):
            n = tuple(n for n in _candidates(state, plan, method, budgets) if 1 <= n <= pool.n_images)
            if n:
                found.append(Job(_VARIABLE[method] if plan.steps else "base", plan, selecting, state.combine, n))
    return found, pool.block(len(selecting), len(state.budgets))


def available_mark(state: State, pool: Pool) -> int:
    """Return the largest mark that all jobs of `state` have reached, at least the first."""
    found, block = jobs(state, pool)
    done = min((pool.done(job) for job in found), default=0)
    return max([mark for mark in pool.marks(block) if mark <= done], default=1)


def compute(state: State, pool: Pool, mark: int | None = None) -> Result:
    """Compute what the explorer shows after `mark` blocks of iterations; after all of them by default.

    Returns
    -------
    Result

    Raises
    ------
    BudgetError
        The chosen budget buys no candidate, or more than the pool holds.
    ConfigError, CostError, ScheduleError, TensorError
        As named by their messages.
    """
    check_n_steps(state.cost, np.array(pool.steps))
    for plan in (state.plan, state.pinned_plan):
        step_positions(plan, np.array(pool.steps))
    shown = pool.names.index(choice("reward shown", state.shown, pool.names))
    _check_budget(state, pool)
    _, block = jobs(state, pool)
    mark = pool.marks(block)[-1] if mark is None else integer("mark", mark, 1)

    names = ("best_of_n", "current", "pinned")
    wanted = [(method, plan, budgets) for budgets in ((state.budget,), state.budgets) for method, plan in _plans(state)]
    found = _curves(state, pool, wanted, shown, block, mark)
    at, curves = dict(zip(names, found[:3], strict=True)), dict(zip(names, found[3:], strict=True))
    pinned = curves["pinned"] if len(at["pinned"].n) else None
    change_budgets = np.intersect1d(curves["current"].budgets, curves["pinned"].budgets)
    gains = _gains(curves["best_of_n"], curves["current"], pinned)
    return Result(
        state=state,
        best_of_n=curves["best_of_n"],
        current=curves["current"],
        pinned=pinned,
        at=at,
        over_best=_scalar(_difference(at["current"], at["best_of_n"], at["current"].budgets)),
        over_pinned=None if pinned is None else _scalar(_difference(at["current"], at["pinned"], at["pinned"].budgets)),
        change=None if pinned is None else _difference(curves["current"], pinned, change_budgets),
        change_budgets=change_budgets,
        gain=gains[0],
        pinned_gain=gains[1],
        gain_change=gains[2],
        stages=state.cost.stages(int(at["current"].n[0]), _costed(state.method, state.plan)),
        tau=pool.tau(shown),
        steps=pool.steps,
        iterations=pool.iterations_at(block, mark),
        iterations_wanted=pool.iterations,
        notes=tuple(_notes(state, pool, curves, pinned)),
    )


# -- parts ----------------------------------------------------------------------------------------------------------


def _plans(state: State) -> list[tuple[str, Schedule]]:
    return [("best_of_n", Schedule()), (state.method, state.plan), (state.pinned_method, state.pinned_plan)]


def _costed(method: str, plan: Schedule) -> Schedule | None:
    return None if method == "best_of_n" else plan  # published accounting tells the two apart


def _candidates(state: State, plan: Schedule, method: str, budgets: Sequence[float]) -> list[int]:
    return [state.cost.candidates(budget, _costed(method, plan)) for budget in budgets]


def _check_budget(state: State, pool: Pool) -> None:
    for method, plan in _plans(state)[:2]:
        n = state.cost.candidates(state.budget, _costed(method, plan))
        unit, one = state.cost.unit, state.cost.total(1, _costed(method, plan))
        who = "Best-of-N" if method == "best_of_n" else "this schedule"
        if n < 1:
            raise BudgetError(
                f"budget for {who}: got {round(state.budget, 6)!r}, expected at least {one:.6g} {unit}, one candidate. "
                f"{'Raise the budget.' if method == 'best_of_n' else 'Raise the budget, or prune in fewer stages.'}"
            )
        if n > pool.n_images:
            most = state.cost.total(pool.n_images, _costed(method, plan))
            raise BudgetError(
                f"candidates that the budget buys for {who}: got {n!r}, expected at most {pool.n_images}, the images "
                f"in the pool ({most:.6g} {unit}). Lower the budget, prune later or keep more."
            )


def _curves(state: State, pool: Pool, wanted, shown: int, block: int, mark: int) -> list[Curve]:
    """Return a curve for each (method, plan, budgets); resampled together: one product is quicker than six."""
    selecting = tuple(pool.names.index(name) for name in state.rewards)
    parts = []
    for method, plan, budgets in wanted:
        table = _candidates(state, plan, method, budgets)
        fits = [k for k, n in enumerate(table) if 1 <= n <= pool.n_images]
        n = tuple(table[k] for k in fits)
        per_prompt = np.empty((0, pool.n_prompts))
        if n:
            job = Job(_VARIABLE[method] if plan.steps else "base", plan, selecting, state.combine, n)
            per_prompt = pool.per_prompt(job, block, mark)[:, :, shown]
        spent = np.array([state.cost.total(k, _costed(method, plan)) for k in n])
        parts.append((method, np.array([budgets[k] for k in fits]), np.array(n, np.int64), spent, per_prompt))
    boot = pool.resample(np.concatenate([part[-1] for part in parts]))
    bounds = _interval(boot)
    ends = np.cumsum([len(part[2]) for part in parts])[:-1]
    split = [np.split(table, ends, axis=-1) for table in (*bounds, boot)]
    return [
        Curve(method, at, n, spent, per_prompt.mean(1), low, high, per_prompt, samples)
        for (method, at, n, spent, per_prompt), low, high, samples in zip(parts, *split, strict=True)
    ]


def _interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval over the first axis; by sorting, which is quicker than np.quantile here."""
    ordered = np.sort(samples, axis=0)
    tail = (1 - _LEVEL) / 2 * (len(ordered) - 1)
    first = int(tail)
    part = tail - first
    low = ordered[first] * (1 - part) + ordered[min(first + 1, len(ordered) - 1)] * part
    high = ordered[-1 - first] * (1 - part) + ordered[max(-2 - first, -len(ordered))] * part
    return low, high


def _rows(curve: Curve, budgets: np.ndarray) -> np.ndarray:
    return np.searchsorted(curve.budgets, budgets)


def _difference(one: Curve, other: Curve, budgets: np.ndarray) -> Change:
    a, b = _rows(one, budgets), _rows(other, budgets)
    low, high = _interval(one.boot[:, a] - other.boot[:, b])
    return Change(one.mean[a] - other.mean[b], low, high)


def _scalar(change: Change) -> Change:
    return Change(float(change.value[0]), float(change.low[0]), float(change.high[0]))


def _gains(best: Curve, current: Curve, pinned: Curve | None) -> tuple[Change | None, Change | None, Change | None]:
    """Return the relative gains of the schedule and of the pinned one, and their difference, on common budgets."""
    others = [curve for curve in (current, pinned) if curve is not None]
    budgets = best.budgets
    for curve in others:
        budgets = np.intersect1d(budgets, curve.budgets)
    if len(budgets) < 3:
        return None, None, None
    base = _rows(best, budgets)
    found = []
    for curve in others:
        rows = _rows(curve, budgets)
        value = relative_gain_of(budgets, curve.mean[rows], best.mean[base], strict=False)
        samples = relative_gain_of(budgets, curve.boot[:, rows], best.boot[:, base], strict=False)
        found.append((float(value), samples))
    if any(np.isnan(value) or np.isnan(samples).any() for value, samples in found):
        return None, None, None

    def told(value: float, samples: np.ndarray) -> Change:
        return Change(value, *(float(bound) for bound in _interval(samples)))

    gains = [told(*one) for one in found]
    if pinned is None:
        return gains[0], None, None
    return gains[0], gains[1], told(found[0][0] - found[1][0], found[0][1] - found[1][1])


def _notes(state: State, pool: Pool, curves: dict[str, Curve], pinned: Curve | None) -> list[str]:
    notes = []
    if pool.dataset.attrs.get("source") == "synthetic":
        notes.append("Statistical stand-in, not a diffusion model.")
    missing = len(state.budgets) - len(curves["current"].budgets)
    if missing:
        notes.append(
            f"{missing} of the {len(state.budgets)} budgets of the range buy this schedule no candidate, or more than "
            f"the pool's {pool.n_images}: they are left out of the curve and of the relative gain."
        )
    if pinned is None:
        notes.append("The pinned schedule cannot run at this budget.")
    if state.method == "ttsnap":
        selecting = [pool.names.index(name) for name in state.rewards]
        for step in state.plan.steps:
            if pool.copied[selecting, pool.steps.index(step)].any():
                notes.append(f"At step {step} the noise-aware reward is a copy of the base reward.")
    return notes
