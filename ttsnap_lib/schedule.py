"""The pruning schedule, the draft, the names of the methods, and how one set of candidates is pruned."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ttsnap_lib.checks import Plain, choice, integer, real, text
from ttsnap_lib.errors import ConfigError, ScheduleError
from ttsnap_lib.files import parse_yaml, read_yaml

METHODS = ("best_of_n", "ttsp", "ttsnap")
COMBINE = ("rank_sum", "z_score", "weighted_sum")
# Compiled into simulation/kernels.py, whose cache looks at that file alone: whoever changes this number has to touch it.
Z_GRID = 2.0**24
"""Sums of z-scores are compared in whole multiples of 1 / Z_GRID, the resolution of float32: candidates that are equal
on paper (two of them, two rewards that disagree) differ by 1e-15 in their sums, and rounding would choose for us."""


def kept(n: int, keep_ratio: float) -> int:
    """Return how many of `n` candidates survive a stage: ``max(1, round(n * keep_ratio))``, Python's round.

    Python rounds halves to even, so 5 candidates at 0.5 leave 2. Same rule as the released code.
    """
    return max(1, round(n * keep_ratio))


@dataclass(frozen=True)
class Schedule(Plain):
    """Pruning steps and the fraction of candidates kept at each (the paper's alpha).

    ``Schedule()`` is empty: no pruning, that is Best-of-N.

    Parameters
    ----------
    steps : sequence of int
        0-based indices of the denoising loop, strictly increasing. At step ``s`` the x0 estimate that
        forward number ``s + 1`` gives is scored.
    keep_ratios : sequence of float
        One per step, each in (0, 1].

    Raises
    ------
    ScheduleError
        Steps negative, repeated or unsorted; ratios out of (0, 1] or of another length.

    Examples
    --------
    >>> Schedule(steps=(2, 6, 11), keep_ratios=(0.4, 0.4, 0.5)).survivors(50)
    (50, 20, 8, 4)
    """

    steps: tuple[int, ...] = ()
    keep_ratios: tuple[float, ...] = ()
    _what = "schedule"
    _error = ScheduleError

    def __post_init__(self) -> None:
        steps = _sequence("schedule.steps", self.steps)
        ratios = _sequence("schedule.keep_ratios", self.keep_ratios)
        steps = tuple(integer("schedule.steps", step, 0, error=ScheduleError) for step in steps)
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ScheduleError(
                f"schedule.steps: got {steps!r}, expected strictly increasing integers. Sort them and name each once."
            )
        if len(steps) != len(ratios):
            raise ScheduleError(
                f"schedule.keep_ratios: got {ratios!r}, expected {len(steps)} of them. Give one keep ratio per step."
            )
        for ratio in ratios:
            real("schedule.keep_ratios", ratio, 0, 1, open_low=True, error=ScheduleError)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "keep_ratios", tuple(float(ratio) for ratio in ratios))

    def __len__(self) -> int:
        return len(self.steps)

    def check(self, n_steps: int) -> None:
        """Refuse a pruning step at or past the last step of a loop of `n_steps`."""
        if self.steps and self.steps[-1] >= n_steps - 1:
            raise ScheduleError(
                f"schedule.steps: got {self.steps[-1]}, expected at most {n_steps - 2} of {n_steps} denoising steps. "
                "Prune before the last step: there the clean image itself is scored."
            )

    def survivors(self, n: int) -> tuple[int, ...]:
        """Return the number of candidates at work in each stage, `n` first, the finalists last."""
        counts = [n]
        for ratio in self.keep_ratios:
            counts.append(kept(counts[-1], ratio))
        return tuple(counts)

    def survivors_of(self, n: np.ndarray) -> np.ndarray:
        """Return :meth:`survivors` for each of the numbers `n`, int64 (n, stage + 1)."""
        counts = np.empty((len(n), len(self) + 1), np.int64)
        counts[:, 0] = n
        for k, ratio in enumerate(self.keep_ratios):
            counts[:, k + 1] = np.maximum(1, np.rint(counts[:, k] * ratio))
        return counts

    def to_yaml(self) -> str:
        """Return the schedule as two lines of YAML."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)

    @classmethod
    def from_yaml(cls, source: str | Path) -> Schedule:
        """Read from a YAML file (a ``Path``) or from YAML text (a ``str``)."""
        options: dict[str, Any] = {
            "error": ScheduleError,
            "remedy": "Write it with `ttsnap optimize --out` or Schedule.to_yaml().",
        }
        if isinstance(source, Path):
            return cls.from_dict(read_yaml(source, "schedule file", **options))
        return cls.from_dict(parse_yaml(text("schedule", source, error=ScheduleError), "schedule", **options))

    def __str__(self) -> str:
        if not self.steps:
            return "no pruning"
        return ", ".join(f"step {s} keep {r:g}" for s, r in zip(self.steps, self.keep_ratios, strict=True))


@dataclass(frozen=True)
class Draft(Plain):
    """Every candidate in a few steps, and the best of them in full, from the same seeds.

    Fewer steps are another trajectory from the same noise, so a draft is thrown away once it has been scored.

    Parameters
    ----------
    steps : int
        Denoising steps of a draft, fewer than those of the full run.
    finish : int
        How many of the candidates run in full; the best picture of these is chosen.

    Raises
    ------
    ConfigError
        A number below 1.
    """

    steps: int
    finish: int
    _what = "draft"

    def __post_init__(self) -> None:
        for name in ("steps", "finish"):
            object.__setattr__(self, name, integer(f"draft.{name}", getattr(self, name), 1))

    def check(self, n_steps: int) -> None:
        """Refuse a draft that takes as many steps as the full run of `n_steps`, or more."""
        integer("steps of a draft", self.steps, 1, n_steps - 1)

    def survivors(self, n: int) -> tuple[int, ...]:
        """Return how many are drafted and how many run in full, of `n` candidates."""
        return n, min(n, self.finish)

    def __str__(self) -> str:
        return f"draft {self.steps}, finish {self.finish}"


def _sequence(name: str, value: Any) -> tuple:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise ScheduleError(
            f"{name}: got {value!r}, expected a list or tuple of numbers. Write {name} as a list, even of one."
        )
    return tuple(value)


PUBLISHED_SCHEDULE = Schedule(steps=(2, 6, 11), keep_ratios=(0.4, 0.4, 0.5))
"""The schedule of the paper's main results (arXiv 2511.22242)."""


def selecting_rewards(names, report, combine, weights) -> tuple[list[int], np.ndarray | None]:
    """Return the positions of the rewards that select, and their weights in that order."""
    report = [] if report is None else [report] if isinstance(report, str) else list(report)
    for name in report:
        choice("report", name, names)
    selecting = [k for k, name in enumerate(names) if name not in report]
    if not selecting:
        raise ConfigError(f"report: got {report!r}, expected fewer than all of {names}. Leave one reward to select by.")
    if isinstance(weights, Mapping):
        chosen = [names[k] for k in selecting]
        for name in (*weights, *chosen):
            choice("weights", name, chosen)
            choice("reward with a weight", name, list(weights))
        weights = [weights[name] for name in chosen]
    return selecting, check_combine(combine, weights, len(selecting))


def check_combine(combine: str, weights: Sequence[float] | None, n_rewards: int) -> np.ndarray | None:
    """Return the weights as an array; None for a rule that takes none."""
    choice("combine", combine, COMBINE)
    if (weights is not None) != (combine == "weighted_sum"):
        raise ConfigError(
            f"weights with combine={combine!r}: got {weights!r}, expected weights for weighted_sum, none otherwise. "
            "Set combine='weighted_sum' and give one weight per selecting reward."
        )
    if weights is None:
        return None
    checked = np.array([real("weights", weight) for weight in weights])
    if len(checked) != n_rewards:
        raise ConfigError(
            f"weights: got {list(weights)!r}, expected {n_rewards} numbers. Give one weight per selecting reward."
        )
    return checked


def costs_of(scores: np.ndarray, combine: str, weights: np.ndarray | None) -> np.ndarray:
    """Return what candidates are chosen by, the lowest first, (..., candidate), of float64 `scores` (..., candidate, reward)."""
    if combine == "weighted_sum":
        return -(scores @ np.asarray(weights, np.float64))
    if combine == "z_score" and scores.shape[-1] > 1:
        return -np.rint(_z_scores(scores).cumsum(-1)[..., -1] * Z_GRID)
    order = np.argsort(-scores, axis=-2, kind="stable")
    return np.argsort(order, axis=-2, kind="stable").sum(-1)


def _z_scores(scores: np.ndarray) -> np.ndarray:
    """Return z-scores within the set; a reward that says nothing about it has no vote."""
    # Summed one by one as the compiled loop of `prune` does: another order of additions gives other last bits.
    n = scores.shape[-2]
    centered = scores - scores.cumsum(-2)[..., -1:, :] / n
    variance = (centered * centered).cumsum(-2)[..., -1:, :] / n
    scale = 1.0 / np.sqrt(np.where(variance > 0, variance, 1.0))
    return np.where(variance > 0, centered * scale, 0.0)
