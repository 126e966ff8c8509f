"""What the explorer shows, without any widget: a state in, a result out."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.checks import choice
from ttsnap_lib.costs import CostModel, StageCost, check_n_steps
from ttsnap_lib.errors import ConfigError
from ttsnap_lib.explorer.pool import Job, Pool
from ttsnap_lib.schedule import PUBLISHED_SCHEDULE, Schedule
from ttsnap_lib.simulation.metrics import (
    Estimate,
    jackknife_interval,
    leave_one_out,
    mean_interval,
    relative_gain_of,
)
from ttsnap_lib.simulation.pruning import step_positions
from ttsnap_lib.simulation.simulate import candidates_table, falls_to_zero, rungs, tiny_checks

if TYPE_CHECKING:
    import pandas as pd

_VARIABLE = {"best_of_n": "base", "ttsp": "base", "ttsnap": "noise_aware"}
PINS = ("A", "B", "C")  # there is room for three


@dataclass(frozen=True)
class State:
    """Everything a person can set, apart from the tensor."""

    rewards: tuple[str, ...]  # that select jointly
    shown: str  # the reward that is drawn; it need not select (reward hacking shows there)
    cost: CostModel
    budgets: tuple[float, ...]  # range of the curves and of the relative gain, increasing, in the unit of `cost`
    budget: float  # the one that the numbers are told for
    method: str = "ttsnap"
    schedule: Schedule = PUBLISHED_SCHEDULE
    # Pin, method and schedule: what the effect of a change is measured against.
    pins: tuple[tuple[str, str, Schedule], ...] = (("A", "ttsnap", PUBLISHED_SCHEDULE),)
    combine: str = "rank_sum"

    @property
    def plans(self) -> dict[str, tuple[str, Schedule | None]]:
        """Method and schedule of each curve; Best-of-N has none (published accounting tells that from an empty one)."""
        wanted: dict[str, tuple[str, Schedule | None]] = {"best_of_n": ("best_of_n", None)}
        wanted["current"] = self.method, self.schedule
        wanted |= {pin: (method, plan) for pin, method, plan in self.pins}
        return {name: (method, None if method == "best_of_n" else plan) for name, (method, plan) in wanted.items()}


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; floats or arrays (budget,)."""

    value: Any
    low: Any
    high: Any

    @classmethod
    def of(cls, value: Any, samples: np.ndarray, n_prompts: int) -> Interval:
        """Take the interval of a mean over prompts from bootstrap samples (resample, ...)."""
        return cls(value, *mean_interval(value, samples, n_prompts))


@dataclass(frozen=True)
class Curve:
    """One method over the budgets that it can run: budgets that buy no candidate, or too many, are left out."""

    method: str
    budgets: np.ndarray  # (budget,), as n, spent and the reward
    n: np.ndarray
    spent: np.ndarray
    per_prompt: np.ndarray  # (budget, prompt)
    boot: np.ndarray  # (resample, budget)
    reward: Interval

    def minus(self, other: Curve) -> tuple[np.ndarray, Interval]:
        """Return the budgets that both can run, and the paired difference there."""
        budgets, a, b = np.intersect1d(self.budgets, other.budgets, return_indices=True)
        value = self.reward.value[a] - other.reward.value[b]
        return budgets, Interval.of(value, self.boot[:, a] - other.boot[:, b], self.per_prompt.shape[1])


@dataclass(frozen=True)
class Result:
    """What is drawn and told."""

    state: State
    curves: dict[str, Curve]  # best_of_n, current and those pins that can run at the chosen budget
    at: dict[str, Curve]  # the same at the chosen budget alone
    over: dict[str, Interval]  # paired differences of the schedule to the others at the chosen budget, in reward
    needs: float  # what Best-of-N needs for the reward of the schedule: infinite beyond the pool, 0 below one image
    most: float  # what it needs for the whole pool
    # Budgets that both can run, and the paired difference there: of each curve to Best-of-N, of the schedule to each pin.
    above: dict[str, tuple[np.ndarray, Interval]]
    changes: dict[str, tuple[np.ndarray, Interval]]
    gains: dict[str, Interval]  # relative gains of the schedule and of the pins, percent; may be empty
    gain_changes: dict[str, Interval]  # paired differences of the schedule's relative gain to that of each pin, points
    stages: tuple[StageCost, ...]  # of the chosen budget
    tau: tuple[Estimate, Estimate]  # Kendall tau per step of the base and the noise-aware reward
    steps: tuple[int, ...]
    iterations: int  # subsets per prompt so far
    iterations_wanted: int
    notes: tuple[str, ...]  # what a reader should know, in plain words

    @property
    def complete(self) -> bool:
        """Whether all iterations are in."""
        return self.iterations >= self.iterations_wanted

    def frame(self) -> pd.DataFrame:
        """Return one row per curve and budget."""
        import pandas as pd

        tables = [
            pd.DataFrame({
                "curve": "schedule" if name == "current" else name, "method": curve.method, "reward": self.state.shown,
                "budget": curve.budgets, "n": curve.n, "spent": curve.spent,
                "mean": curve.reward.value, "low": curve.reward.low, "high": curve.reward.high,
            })
            for name, curve in self.curves.items()
        ]  # fmt: skip
        return pd.concat(tables, ignore_index=True)


def compute(state: State, pool: Pool, iterations: int | None = None) -> Result:
    """Compute what the explorer shows, with all iterations of the pool by default; a state that cannot run raises."""
    iterations = iterations or pool.iterations
    shown = pool.names.index(choice("reward shown", state.shown, pool.names))
    _check(state, pool)
    at, curves = _curves(state, pool, shown, iterations)
    gains, gain_changes = _gains(curves)
    current, best_of_n = curves["current"], curves["best_of_n"]
    spent, ladder = _ladder(state, pool, shown, iterations)
    return Result(
        state=state,
        curves=curves,
        at=at,
        over={name: _over(at["current"], other) for name, other in at.items() if name != "current"},
        needs=falls_to_zero(spent, at["current"].reward.value[0] - ladder),
        most=float(spent[-1]),
        above={name: curve.minus(best_of_n) for name, curve in curves.items() if curve is not best_of_n},
        changes={name: current.minus(curve) for name, curve in curves.items() if name in PINS},
        gains=gains,
        gain_changes=gain_changes,
        stages=state.cost.stages(int(at["current"].n[0]), state.plans["current"][1]),
        tau=pool.tau(shown),
        steps=pool.steps,
        iterations=iterations,
        iterations_wanted=pool.iterations,
        notes=tuple(_notes(state, pool, curves)),
    )


def lacking(state: State, pool: Pool) -> list[tuple[Job, int]]:
    """Return what has to be pruned yet before `compute` has all iterations of `state` at once."""
    wanted = [(_job(state, pool, name), n) for name in state.plans for _, n in _affordable(state, pool, name)]
    wanted += [(_job(state, pool, "best_of_n"), n) for n in _rungs(state, pool)]
    return [(job, n) for job, n in dict.fromkeys(wanted) if not pool.has(job, n)]


def _check(state: State, pool: Pool) -> None:
    if not state.rewards:
        raise ConfigError("rewards that select: got none, expected one or more. Choose a reward in the list.")
    if len(state.budgets) < 3:
        raise ConfigError(f"budgets: got {len(state.budgets)} different ones, expected three or more. Name a range.")
    check_n_steps(state.cost, int(pool.steps[-1]) + 1)
    for _, plan in state.plans.values():
        step_positions(plan or Schedule(), np.array(pool.steps))
    methods = list(dict.fromkeys(["best_of_n", state.method]))
    candidates_table(methods, [state.budget], None, state.cost, state.schedule, pool.n_images)  # it raises


def _job(state: State, pool: Pool, name: str) -> Job:
    method, plan = state.plans[name]
    selecting = tuple(pool.names.index(choice("reward", reward, pool.names)) for reward in state.rewards)
    return Job(_VARIABLE[method] if plan else "base", plan or Schedule(), selecting, state.combine)


def _affordable(state: State, pool: Pool, name: str) -> list[tuple[float, int]]:
    """Return the chosen budget and those of the range, with their candidates, as far as they buy some, not too many."""
    plan = state.plans[name][1]
    wanted = [(budget, state.cost.candidates(budget, plan)) for budget in (state.budget, *state.budgets)]
    return [(budget, n) for budget, n in wanted if 1 <= n <= pool.n_images]


def _curves(state: State, pool: Pool, shown: int, iterations: int) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Return the curves at the chosen budget and over the range; all are resampled together, so they pair."""
    at, curves = dict[str, Curve](), dict[str, Curve]()
    points = {name: _affordable(state, pool, name) for name in state.plans}
    points = {name: found for name, found in points.items() if found and found[0][0] == state.budget}
    rewards = {
        name: pool.per_prompt(_job(state, pool, name), [n for _, n in found], iterations)[:, :, shown]
        for name, found in points.items()
    }
    boot = pool.resample(np.concatenate(list(rewards.values())))
    for name, found in points.items():
        method, plan = state.plans[name]
        budgets, n = (np.array(column) for column in zip(*found, strict=True))
        spent = np.array([state.cost.total(int(k), plan) for k in n])
        samples, boot = boot[:, : len(n)], boot[:, len(n) :]
        for into, part in ((at, slice(0, 1)), (curves, slice(1, None))):
            reward = Interval.of(rewards[name][part].mean(1), samples[:, part], pool.n_prompts)
            into[name] = Curve(
                method, budgets[part], n[part], spent[part], rewards[name][part], samples[:, part], reward
            )
    return at, curves


def _rungs(state: State, pool: Pool) -> list[int]:
    """Return the numbers of candidates of Best-of-N's curve; of a pool that lacks scores as far as the budgets go."""
    known = rungs(pool.n_images).tolist() if pool.is_whole else []
    return sorted({*known, *(n for _, n in _affordable(state, pool, "best_of_n"))})


def _ladder(state: State, pool: Pool, shown: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cost and mean reward of Best-of-N, from one candidate to the whole pool."""
    numbers = _rungs(state, pool)
    # By seconds of batches a larger number may cost less than a smaller one, which then nobody runs.
    spent = np.minimum.accumulate([state.cost.total(n) for n in numbers[::-1]])[::-1]
    return spent, pool.per_prompt(_job(state, pool, "best_of_n"), numbers, iterations)[:, :, shown].mean(1)


def _over(one: Curve, other: Curve) -> Interval:
    _, found = one.minus(other)
    return Interval(float(found.value[0]), float(found.low[0]), float(found.high[0]))


def _common(curves: dict[str, Curve]) -> np.ndarray:
    return functools.reduce(np.intersect1d, [curve.budgets for curve in curves.values()])


def _gains(curves: dict[str, Curve]) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Return the relative gains of the schedule and of the pins on common budgets, and what it has over each pin."""
    budgets = _common(curves)
    if len(budgets) < 3:
        return {}, {}
    rows = {name: np.searchsorted(curve.budgets, budgets) for name, curve in curves.items()}
    means = {name: curve.reward.value[rows[name]] for name, curve in curves.items()}
    without = {name: leave_one_out(curve.per_prompt[rows[name]].T) for name, curve in curves.items()}
    found = {
        name: tuple(
            relative_gain_of(budgets, given[name], given["best_of_n"], strict=False) for given in (means, without)
        )
        for name in curves
        if name != "best_of_n"
    }
    if any(np.isnan(value) for value, _ in found.values()):
        return {}, {}
    changes = {
        name: tuple(a - b for a, b in zip(found["current"], found[name], strict=True))
        for name in found
        if name != "current"
    }
    gains, over = (
        {name: Interval(float(value), *jackknife_interval(value, others)) for name, (value, others) in told.items()}
        for told in (found, changes)
    )
    return gains, over


def _notes(state: State, pool: Pool, curves: dict[str, Curve]) -> list[str]:
    notes = []
    if pool.dataset.attrs.get("source") == "synthetic":
        notes.append("Statistical stand-in, not a diffusion model.")
    charged = state.cost.preview_decode is not None and not pool.dataset.attrs.get("decoder")
    tiny = tiny_checks(state.cost) if charged and state.method != "best_of_n" else ""
    notes += [f"{told[0].upper()}{told[1:]}." for told in (pool.repeats, tiny) if told]
    missing = len(state.budgets) - len(curves["current"].budgets)
    if missing:
        notes.append(
            f"{missing} of the {len(state.budgets)} budgets of the range buy this schedule no candidate, or more than "
            f"the pool's {pool.n_images}: they are left out of the curve and of the relative gain."
        )
    notes += [f"{pin} cannot run at this budget." for pin, _, _ in state.pins if pin not in curves]
    common = len(_common(curves))
    if common < len(np.intersect1d(curves["current"].budgets, curves["best_of_n"].budgets)):
        notes.append(f"The relative gains are over the {common} budgets that all schedules can run.")
    if state.method == "ttsnap":
        selecting = [pool.names.index(name) for name in state.rewards]
        for step in state.schedule.steps:
            if pool.copied[selecting, pool.steps.index(step)].any():
                notes.append(f"At step {step} the noise-aware reward is a copy of the base reward.")
    return notes
