"""The explorer's records: what a person can set, and what is shown for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .checks import choice, real
from .costs import CostModel, StageCost
from .errors import BudgetError, ConfigError
from .metrics import Estimate
from .schedule import PUBLISHED_SCHEDULE, Schedule
from .simulate import METHODS

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Change", "Curve", "Result", "State"]


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
            raise ConfigError(
                "rewards that select", value=(), bound="one or more", remedy="Choose a reward in the list."
            )
        if len(self.budgets) < 3 or any(b <= a for a, b in zip(self.budgets, self.budgets[1:], strict=False)):
            raise ConfigError(
                "budgets", value=self.budgets, bound="three or more, increasing", remedy="Name a range of budgets."
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
