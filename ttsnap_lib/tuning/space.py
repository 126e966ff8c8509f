"""The schedules that the optimiser may try: drawn at random, changed a little, crossed; and what they buy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ttsnap_lib.costs import CostModel
from ttsnap_lib.schedule import PUBLISHED_SCHEDULE, Schedule

_TOLERANCE = 1e-9  # relative, as in CostModel.candidates
_LOW, _HIGH = 0.02, 0.98  # a ratio of 1 would pay for a check and drop nothing
_DIGITS = 3  # of a keep ratio: finer than any count it rounds to in a pool of a few hundred


@dataclass(frozen=True)
class SearchSpace:
    """Schedules of up to `max_stages` stages on the `steps` allowed, under a cost model."""

    steps: tuple[int, ...]  # at which a check may stand
    max_stages: int
    cost: CostModel
    budgets: np.ndarray  # float64 (budget,), ascending
    pool: int  # images per prompt: no schedule may start with more candidates

    def counts(self, schedule: Schedule) -> np.ndarray:
        """Return the candidates at work in each stage at each budget, int64 (budget, stage + 1).

        The first column equals :meth:`CostModel.candidates`, computed for all budgets at once. Rows are 0 where the
        budget buys no candidate, -1 where it buys more than the pool.
        """
        survivors, totals = self._table(schedule)
        n = np.searchsorted(totals, self.budgets * (1 + _TOLERANCE), side="right")
        counts = np.zeros((len(n), survivors.shape[1]), np.int64)
        fits = (n >= 1) & (n <= self.pool)
        counts[fits] = survivors[n[fits] - 1]
        counts[n > self.pool] = -1
        return counts

    def feasible(self, schedule: Schedule) -> np.ndarray:
        """Return at which budgets the schedule can run, bool (budget,)."""
        return self.counts(schedule)[:, 0] > 0

    def _table(self, schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
        """Return survivors (n, stage + 1) and the cost (n,) of 1 to pool + 1 candidates."""
        n = np.arange(1, self.pool + 2 + self.cost.beyond(schedule))
        survivors = schedule.survivors_of(n)
        at_work = survivors
        if self.cost.accounting == "published":
            at_work = survivors.astype(float)
            for k, ratio in enumerate(schedule.keep_ratios):
                at_work[:, k + 1] = at_work[:, k] * ratio
        totals = self.cost.totals(at_work, schedule)
        if self.cost.batch_size is not None:  # a few more candidates may cost less: ascending for searchsorted
            totals = np.minimum.accumulate(totals[::-1])[::-1]
        return survivors, totals

    def first(self) -> list[Schedule]:
        """Return what every search starts with: no pruning, the published schedule, evenly spread checks."""
        found = [Schedule()]
        if set(PUBLISHED_SCHEDULE.steps) <= set(self.steps) and len(PUBLISHED_SCHEDULE) <= self.max_stages:
            found.append(PUBLISHED_SCHEDULE)
        for stages in range(1, min(self.max_stages, len(self.steps), 4) + 1):
            at = [round((k + 1) / (stages + 1) * 0.8 * (len(self.steps) - 1)) for k in range(stages)]
            if len(set(at)) == stages:
                found += [_make([self.steps[k] for k in at], [ratio] * stages) for ratio in (0.4, 0.55)]
        return found

    def random(self, rng: np.random.Generator) -> Schedule:
        """Draw a schedule: any number of stages, any steps, ratios uniform on the log scale."""
        if not self.steps or not self.max_stages:
            return Schedule()
        stages = int(rng.integers(1, min(self.max_stages, len(self.steps)) + 1))
        steps = np.sort(rng.choice(self.steps, stages, replace=False))
        # Deep schedules keep more at each stage, else nothing is left to choose from.
        ratios = np.exp(rng.uniform(np.log(0.1), np.log(0.95), stages) * 2 / (stages + 1))
        return _make(steps, ratios)

    def change(self, parent: Schedule, rng: np.random.Generator) -> Schedule:
        """Return a neighbour: a step moved, ratios scaled, a stage added, merged or dropped."""
        steps, ratios = list(parent.steps), list(parent.keep_ratios)
        if not steps:
            return self.random(rng)
        for _ in range(1 + int(rng.random() < 0.35)):
            move = rng.random()
            k = int(rng.integers(len(steps)))
            if move < 0.35:  # one step, to a place between its neighbours
                left = steps[k - 1] if k else -1
                right = steps[k + 1] if k + 1 < len(steps) else self.steps[-1] + 1
                here = self.steps.index(steps[k])
                there = here + int(rng.choice([-2, -1, 1, 2]))
                if 0 <= there < len(self.steps) and left < self.steps[there] < right:
                    steps[k] = self.steps[there]
            elif move < 0.65:  # one ratio; half of the time the next one makes up for it
                factor = float(np.exp(rng.normal(0, 0.25)))
                ratios[k] *= factor
                if k + 1 < len(ratios) and rng.random() < 0.5:
                    ratios[k + 1] /= factor
            elif move < 0.82:  # all ratios a little
                ratios = list(np.array(ratios) * np.exp(rng.normal(0, 0.08, len(ratios))))
            elif move < 0.91:
                free = [step for step in self.steps if step not in steps]
                if len(steps) < self.max_stages and free:
                    step = int(rng.choice(free))
                    at = int(np.searchsorted(steps, step))
                    share = float(rng.uniform(0.2, 0.8))
                    if at < len(ratios):  # share what the next stage drops
                        ratios.insert(at, ratios[at] ** share)
                        ratios[at + 1] **= 1 - share
                    else:
                        ratios.append(float(rng.uniform(0.3, 0.8)))
                    steps.insert(at, step)
            elif len(steps) > 1:
                ratio = ratios.pop(k)
                steps.pop(k)
                if rng.random() < 0.5:
                    ratios[min(k, len(ratios) - 1)] *= ratio
        return _make(steps, ratios)

    def cross(self, one: Schedule, other: Schedule, rng: np.random.Generator) -> Schedule:
        """Return the early stages of one schedule followed by the late stages of the other."""
        if not self.steps:
            return one
        cut = int(rng.choice(self.steps))
        pairs = [pair for pair in zip(one.steps, one.keep_ratios, strict=True) if pair[0] <= cut]
        pairs += [pair for pair in zip(other.steps, other.keep_ratios, strict=True) if pair[0] > cut]
        pairs = pairs[: self.max_stages]
        return _make([step for step, _ in pairs], [ratio for _, ratio in pairs])


def _make(steps: Iterable[int], ratios: Iterable[float]) -> Schedule:
    """Return a schedule whose ratios are within bounds and of few digits."""
    return Schedule(
        tuple(int(step) for step in steps), tuple(round(float(min(max(r, _LOW), _HIGH)), _DIGITS) for r in ratios)
    )
