"""What a simulation returns: small frozen records that know how to become a tidy frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .metrics import relative_gain_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Curves", "Simulation"]


@dataclass(frozen=True)
class Curves:
    """Mean reward of several methods at several budgets, per prompt, on shared subsets.

    Attributes
    ----------
    methods, rewards : tuple of str, ``best_of_n`` always among the methods
    budgets : float64 (budget,), in the unit of the cost model
    n : int64 (method, budget), candidates per prompt
    spent : float64 (method, budget), cost per prompt, at most the budget
    per_prompt : float64 (method, budget, reward, prompt), mean over iterations of the winner's reward
    winners : int64 (method, budget, iteration, prompt) or None
    level : float, of the intervals
    boot : float64 (resample, method, budget, reward), bootstrap means over prompts, one resample for all
    """

    methods: tuple[str, ...]
    rewards: tuple[str, ...]
    budgets: np.ndarray
    n: np.ndarray
    spent: np.ndarray
    per_prompt: np.ndarray
    winners: np.ndarray | None
    level: float
    boot: np.ndarray

    def interval(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the percentile interval of `samples` (resample, ...)."""
        tail = (1 - self.level) / 2
        return tuple(np.quantile(samples, [tail, 1 - tail], axis=0))

    def frame(self) -> pd.DataFrame:
        """Return one row per method, reward and budget; ``gain`` is the paired difference to Best-of-N."""
        import pandas as pd

        mean = self.per_prompt.mean(-1)
        low, high = self.interval(self.boot)
        baseline = self.methods.index("best_of_n")
        gain = mean - mean[[baseline]]
        gain_low, gain_high = self.interval(self.boot - self.boot[:, [baseline]])
        rows = []
        for m, method in enumerate(self.methods):
            for r, reward in enumerate(self.rewards):
                for b, budget in enumerate(self.budgets):
                    at = (m, b, r)
                    cost = (budget, self.n[m, b], self.spent[m, b])
                    rows.append(
                        (method, reward, *cost, mean[at], low[at], high[at], gain[at], gain_low[at], gain_high[at])
                    )
        names = ["method", "reward", "budget", "n", "spent", "mean", "low", "high", "gain", "gain_low", "gain_high"]
        return pd.DataFrame(rows, columns=names)

    def relative_gains(self) -> pd.DataFrame:
        """Return the area metric of each method and reward against Best-of-N, in percent, with its interval.

        Raises
        ------
        ConfigError
            Where :func:`ttsnap_lib.metrics.relative_gain` raises.
        """
        import pandas as pd

        base = self.methods.index("best_of_n")
        mean = self.per_prompt.mean(-1)
        rows = []
        for m, method in enumerate(self.methods):
            if m == base:
                continue
            for r, reward in enumerate(self.rewards):
                gain = float(relative_gain_of(self.budgets, mean[m, :, r], mean[base, :, r]))
                samples = relative_gain_of(self.budgets, self.boot[:, m, :, r], self.boot[:, base, :, r], strict=False)
                low, high = self.interval(samples)
                rows.append((method, reward, gain, float(low), float(high)))
        return pd.DataFrame(rows, columns=["method", "reward", "relative_gain", "low", "high"])


@dataclass(frozen=True)
class Simulation:
    """One method at one budget; arrays have one row per reward.

    Attributes
    ----------
    method : str
    rewards : tuple of str
    mean, low, high : float64 (reward,), the mean over prompts and iterations with its bootstrap interval
    per_prompt : float64 (reward, prompt)
    winners : int64 (iteration, prompt), image indices
    n : int
    budget, spent : float, in the cost model's unit; NaN without a cost model
    """

    method: str
    rewards: tuple[str, ...]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    per_prompt: np.ndarray
    winners: np.ndarray
    n: int
    budget: float
    spent: float

    def frame(self) -> pd.DataFrame:
        """Return one row per reward."""
        import pandas as pd

        shared = {"method": self.method, "budget": self.budget, "n": self.n, "spent": self.spent}
        return pd.DataFrame(
            {**shared, "reward": name, "mean": self.mean[r], "low": self.low[r], "high": self.high[r]}
            for r, name in enumerate(self.rewards)
        )
