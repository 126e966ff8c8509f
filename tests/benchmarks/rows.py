"""One row of a benchmark: what was measured, what it should be, and whether it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A measured value; `at_least` and `at_most` are the project's promises, checked when the row is shown."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def kept(self) -> bool:
        """Whether the promise is kept."""
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


def interleaved(
    *functions: Callable[[], object], repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Time several functions in turns, so that a noisy machine disturbs all alike; seconds per function and repeat.

    With ``time.process_time`` as the clock, the seconds of all threads that worked, whatever else the machine did.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for k, function in enumerate(functions):
            start = clock()
            function()
            seconds[k].append(clock() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> tuple[float, str]:
    """Return the ratio of medians and the spread of the paired ratios as text."""
    paired = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(slow) / statistics.median(fast), f"runs {min(paired):.1f} to {max(paired):.1f}"


def show(rows: list[Row]) -> int:
    """Print rows as a table; return how many promises were not kept."""
    for row in rows:
        bounds = [f">= {row.at_least:g}"] if row.at_least is not None else []
        bounds += [f"<= {row.at_most:g}"] if row.at_most is not None else []
        verdict = "" if not bounds else "  ok" if row.kept else "  MISSED"
        print(
            f"{row.name:<72} {row.value:>10.4g} {row.unit:<12} {' '.join(bounds):<10}{verdict}  {row.note}", flush=True
        )
    return sum(not row.kept for row in rows)
