"""The pruning schedule: at which steps candidates are dropped, and what fraction stays."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._reading import parse_yaml, read_yaml
from .checks import known_keys, real, text
from .errors import ScheduleError

__all__ = ["PUBLISHED_SCHEDULE", "Schedule", "kept"]


def kept(n: int, keep_ratio: float) -> int:
    """Return how many of `n` candidates survive a stage: ``max(1, round(n * keep_ratio))``, Python's round.

    Python rounds halves to even, so 5 candidates at 0.5 leave 2. Same rule as the released code.
    """
    return max(1, round(n * keep_ratio))


@dataclass(frozen=True)
class Schedule:
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

    def __post_init__(self) -> None:
        steps = _sequence("schedule.steps", self.steps)
        ratios = _sequence("schedule.keep_ratios", self.keep_ratios)
        for step in steps:
            try:
                wrong = isinstance(step, bool) or operator.index(step) < 0
            except TypeError:
                wrong = True
            if wrong:
                raise ScheduleError(
                    "schedule.steps",
                    value=step,
                    bound="integers of at least 0",
                    remedy="Count steps from 0: the first pruning can come after the first forward.",
                )
        steps = tuple(operator.index(step) for step in steps)
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ScheduleError(
                "schedule.steps",
                value=steps,
                bound="strictly increasing integers",
                remedy="Sort the steps and name each once (keep_ratios go along with them).",
            )
        if len(steps) != len(ratios):
            raise ScheduleError(
                "schedule.keep_ratios",
                value=ratios,
                bound=f"one ratio per step, {len(steps)} in all",
                remedy=f"Give as many keep ratios as steps {steps}.",
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
                "schedule.steps",
                value=self.steps[-1],
                bound=f"at most {n_steps - 2} for {n_steps} denoising steps",
                remedy="Prune before the last step: there the clean image itself is scored.",
            )

    def survivors(self, n: int) -> tuple[int, ...]:
        """Return the number of candidates at work in each stage, `n` first, the finalists last."""
        counts = [n]
        for ratio in self.keep_ratios:
            counts.append(kept(counts[-1], ratio))
        return tuple(counts)

    def to_dict(self) -> dict[str, list]:
        """Return ``{"steps": [...], "keep_ratios": [...]}``, ready for JSON or YAML."""
        return {"steps": list(self.steps), "keep_ratios": list(self.keep_ratios)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Schedule:
        """Build from :meth:`to_dict`'s form; unknown keys are an error."""
        if not isinstance(content, Mapping):
            raise ScheduleError(
                "schedule",
                value=content,
                bound="a mapping with steps and keep_ratios",
                remedy="Write for example {steps: [2, 6, 11], keep_ratios: [0.4, 0.4, 0.5]}.",
            )
        known_keys("schedule", content, ("steps", "keep_ratios"), error=ScheduleError)
        return cls(**content)

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


def _sequence(name: str, value: Any) -> tuple:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise ScheduleError(
            name, value=value, bound="a list or tuple of numbers", remedy=f"Write {name} as a list, even of one."
        )
    return tuple(value)


PUBLISHED_SCHEDULE = Schedule(steps=(2, 6, 11), keep_ratios=(0.4, 0.4, 0.5))
"""The schedule of the paper's main results (arXiv 2511.22242)."""
