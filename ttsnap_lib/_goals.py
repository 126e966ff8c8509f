"""What a schedule is tuned for: one number (an area, one budget) or one number per budget (a frontier)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._scoring import Scorer
from .errors import BudgetError, ConfigError

__all__ = ["OBJECTIVES", "Goals", "check_budgets"]

OBJECTIVES = ("area", "single", "frontier")


@dataclass(frozen=True)
class Goals:
    """Turns a curve of mean merit over budgets into scores in percent.

    Parameters
    ----------
    objective : {"area", "single", "frontier"}
    budgets : float64 (budget,)
    n : int64 (budget,)
        Best-of-N candidates at each budget.
    """

    objective: str
    budgets: np.ndarray
    n: np.ndarray

    @property
    def elites(self) -> int:
        """How many of the best schedules of each goal are bred."""
        return 4 if self.objective == "frontier" else 16

    def admits(self, feasible: np.ndarray) -> bool:
        """Return whether a schedule that is feasible at these budgets can take part."""
        return bool(feasible.any() if self.objective == "frontier" else feasible.all())

    def baseline(self, scorer: Scorer, rounds: Sequence[Sequence[tuple[slice, int, int]]]) -> np.ndarray:
        """Return mean merit of Best-of-N, (1 + budget,): of one candidate, then at each budget.

        Exact where there is a closed form, else on the subsets of the rounds (paired).
        """
        n = np.concatenate([[1], self.n])
        if scorer.exact is not None:
            stop = max(prompts.stop for blocks in rounds for prompts, _, _ in blocks)
            return scorer.exact[n - 1, :stop, 0].mean(1)
        sums, draws = np.zeros(len(n)), 0
        for blocks in rounds:
            for prompts, first, last in blocks:
                sums += scorer.sums((), n[:, None], first, last, prompts=prompts).sum(1)
                draws += (prompts.stop - prompts.start) * (last - first)
        return sums / draws

    def score(self, curve: np.ndarray, baseline: np.ndarray) -> np.ndarray:
        """Return (..., goal) scores of curves (..., budget) against `baseline` (..., 1 + budget).

        The last goal is the whole range; a frontier has every budget before it.
        """
        overall = np.asarray(self.overall(curve, baseline))[..., None]
        if self.objective != "frontier":
            return overall
        return np.concatenate([self.per_budget(curve, baseline), overall], axis=-1)

    def overall(self, curve: np.ndarray, baseline: np.ndarray) -> np.ndarray:
        """Return one gain in percent for each curve, (..., budget) to (...); NaN where it is not defined.

        The paper's relative gain over several budgets, :meth:`per_budget` for one.
        """
        if len(self.budgets) == 1:
            return self.per_budget(curve, baseline)[..., 0]
        from .metrics import relative_gain_of

        return relative_gain_of(self.budgets, curve, baseline[..., 1:], strict=False)

    def per_budget(self, curve: np.ndarray, baseline: np.ndarray) -> np.ndarray:
        """Return, per budget, the gain over Best-of-N in percent of what Best-of-N gains over a single candidate.

        Where Best-of-N has a single candidate itself, its gain at the largest budget is the yardstick.
        """
        over_one = baseline[..., 1:] - baseline[..., :1]
        yardstick = np.where(self.n > 1, over_one, over_one[..., -1:])
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(yardstick > 0, 100 * (curve - baseline[..., 1:]) / yardstick, np.nan)


def check_budgets(objective: str, budgets: np.ndarray) -> None:
    """Refuse budgets that the objective cannot use."""
    if objective == "single" and len(budgets) != 1:
        raise BudgetError(
            "budgets for objective 'single'", value=budgets.tolist(), bound="one budget", remedy="Name one budget."
        )
    increasing = (np.diff(budgets) > 0).all()
    if not increasing or (objective == "area" and len(budgets) < 2):
        raise ConfigError(
            f"budgets for objective {objective!r}",
            value=budgets.tolist(),
            bound="two or more numbers in strictly increasing order" if objective == "area" else "increasing numbers",
            remedy="Sort the budgets and name each once; objective='single' takes one.",
        )
