"""The search loop of the optimiser: schedules are proposed, raced over prompts and iterations, and the best bred.

Every schedule starts on half of the prompts and few subsets. Those that keep up with the best of that round go on to
more; few reach the last round. What a round's score is worth is learned on the way from the schedules that went on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ._goals import Goals
from ._scoring import Scorer
from ._search_space import SearchSpace
from .schedule import Schedule

__all__ = ["Race", "Trial", "best_indices"]

_GENERATION = 32
_PROMOTED = (0.34, 0.34)  # at most this share of a generation goes on from each round
_MARGIN = 2.0  # standard deviations by which a schedule may trail the elite and still go on
_RANDOM = 0.1  # share of proposals that start afresh
_CROSSED = 0.15


@dataclass
class Trial:
    """One schedule and what is known of it.

    Attributes
    ----------
    schedule : Schedule
    counts : int64 (budget, stage + 1), rows of 0 or -1 where it is infeasible
    scores : list of float64 (goal,), one for each round it ran in
    sums : float64 (budget,), over prompts and iterations so far; NaN where infeasible
    draws : int, prompts x iterations so far
    """

    schedule: Schedule
    counts: np.ndarray
    scores: list[np.ndarray] = field(default_factory=list)
    sums: np.ndarray | float = 0.0
    draws: int = 0


class Race:
    """Searches a space of schedules; interrupted anywhere, it keeps what it knows.

    Parameters
    ----------
    space : SearchSpace
    scorer : Scorer
        Its iterations are those of the last round.
    goals : Goals
    rng : numpy.random.Generator
    threads : int
    """

    def __init__(
        self, space: SearchSpace, scorer: Scorer, goals: Goals, rng: np.random.Generator, threads: int
    ) -> None:
        self.space, self.scorer, self.goals, self.rng, self.threads = space, scorer, goals, rng, threads
        self.trials: list[Trial] = []
        self.infeasible = 0
        self.seconds_per_draw = 0.0
        self._seen: set[tuple[tuple[int, ...], bytes]] = set()
        self._spread: list[np.ndarray | float] = [np.inf, np.inf]  # of score at the last round minus score at a round
        self._gaps: list[list[np.ndarray]] = [[], []]
        top = scorer.iterations
        first, second = max(1, top // 8), max(1, top // 3)
        half, all_ = slice(0, max(1, scorer.n_prompts // 2)), slice(0, scorer.n_prompts)
        rest = slice(half.stop, scorer.n_prompts)
        # Blocks of (prompts, iterations) that a round adds to those before.
        self.rounds = [
            [(half, 0, first)],
            [(rest, 0, first), (all_, first, second)],
            [(all_, second, top)],
        ]
        scorer.sums(space.steps[:1], np.full((1, len(space.steps[:1]) + 1), 1), 0, 1)  # compiles, before time is taken
        self.baselines = [goals.baseline(scorer, self.rounds[: r + 1]) for r in range(3)]

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, n_trials: int, deadline: Callable[[], float], progress: Callable[[int, int], None] | None) -> bool:
        """Search until `n_trials` schedules were tried; False when the deadline or Ctrl-C came first."""
        try:
            with ThreadPoolExecutor(self.threads) as pool:
                while len(self.trials) < n_trials:
                    batch = self.propose(min(_GENERATION, n_trials - len(self.trials)))
                    if not batch:  # the space is exhausted
                        return True
                    if not self._run_generation(batch, pool, deadline):
                        return False
                    if progress is not None:
                        progress(len(self.trials), n_trials)
        except KeyboardInterrupt:
            if not self.finished():
                raise
            return False
        return True

    def _run_generation(self, batch: list[Trial], pool: ThreadPoolExecutor, deadline: Callable[[], float]) -> bool:
        running = batch
        for r in range(len(self.rounds)):
            started = time.monotonic()
            for start in range(0, len(running), 4 * self.threads):
                if time.monotonic() > deadline() and self.finished():
                    return False
                part = running[start : start + 4 * self.threads]
                for trial, sums in zip(part, pool.map(self.sums, part, [self.rounds[r]] * len(part)), strict=True):
                    trial.sums = trial.sums + sums
                    trial.draws += sum((b.stop - b.start) * (last - first) for b, first, last in self.rounds[r])
                    trial.scores.append(self.goals.score(trial.sums / trial.draws, self.baselines[r]))
                    if r == 0:
                        self.trials.append(trial)
            draws = sum((b.stop - b.start) * (last - first) for b, first, last in self.rounds[r])
            spent = (time.monotonic() - started) / (len(running) * draws)
            self.seconds_per_draw = (self.seconds_per_draw + spent) / 2 if self.seconds_per_draw else spent
            if r + 1 < len(self.rounds):
                running = self._promote(running, r)
                if not running:
                    return True
        self._learn(running)
        return True

    def map(self, work: Callable[[Trial], np.ndarray], trials: Sequence[Trial]) -> list[np.ndarray]:
        """Return ``[work(trial) for trial in trials]``, in threads."""
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(work, trials))

    def sums(self, trial: Trial, blocks: Sequence[tuple[slice, int, int]], scorer: Scorer | None = None) -> np.ndarray:
        """Return the sum of merit over some prompts and iterations at each budget, NaN where infeasible."""
        scorer = self.scorer if scorer is None else scorer
        fits = trial.counts[:, 0] > 0
        found = np.full(len(fits), np.nan)
        for prompts, first, last in blocks:
            part = scorer.sums(trial.schedule.steps, trial.counts[fits], first, last, prompts=prompts).sum(1)
            found[fits] = np.where(np.isnan(found[fits]), 0.0, found[fits]) + part
        return found

    # -- racing -------------------------------------------------------------------------------------------------

    def finished(self) -> list[Trial]:
        """Return the trials that ran in every round."""
        return [trial for trial in self.trials if len(trial.scores) == len(self.rounds)]

    def elites(self, each: int) -> list[list[Trial]]:
        """Return the best `each` trials of every goal, best first."""
        done = self.finished()
        if not done:
            return []
        table = np.array([trial.scores[-1] for trial in done])
        return [[done[k] for k in best_indices(table[:, g], each)] for g in range(table.shape[1])]

    def _promote(self, running: list[Trial], r: int) -> list[Trial]:
        scores = np.array([trial.scores[r] for trial in running])
        lead = np.full(scores.shape[1], -np.inf)
        for g, best in enumerate(self.elites(self.goals.elites)):
            lead[g] = np.median([trial.scores[r][g] for trial in best]) if best else -np.inf
        with np.errstate(invalid="ignore"):
            reach = (scores - lead) / np.maximum(self._spread[r], 1e-12)  # inf spread: all are equal, none is dropped
        reach = np.where(np.isnan(scores), -np.inf, np.where(np.isnan(reach), 0.0, reach))
        order = scores[:, 0] if scores.shape[1] == 1 else reach.max(1)
        keep = max(1, int(np.ceil(_PROMOTED[r] * len(running))))
        return [running[k] for k in best_indices(order, keep) if reach[k].max() >= -_MARGIN]

    def _learn(self, last_round: list[Trial]) -> None:
        for r in range(2):
            self._gaps[r] += [trial.scores[-1] - trial.scores[r] for trial in last_round]
            self._gaps[r] = self._gaps[r][-200:]
            if len(self._gaps[r]) >= 20:
                gaps = np.ma.masked_invalid(self._gaps[r])
                self._spread[r] = gaps.std(axis=0).filled(np.inf)

    # -- proposing ----------------------------------------------------------------------------------------------

    def propose(self, count: int) -> list[Trial]:
        """Return up to `count` schedules not seen before that are feasible where the goals need them."""
        batch: list[Trial] = []
        queue = self.space.first() if not self._seen else []
        elites = [best for best in self.elites(self.goals.elites) if best]
        fresh = len(self.trials) < 3 * _GENERATION
        for _ in range(200 * count):
            if len(batch) == count:
                break
            schedule = queue.pop(0) if queue else self._one(elites, fresh)
            counts = self.space.counts(schedule)
            key = (schedule.steps, counts.tobytes())  # ratios that round to the same counts are one schedule
            if key in self._seen:
                continue
            self._seen.add(key)
            if self.goals.admits(counts[:, 0] > 0):
                batch.append(Trial(schedule, counts))
            else:
                self.infeasible += 1
        return batch

    def _one(self, elites: list[list[Trial]], fresh: bool) -> Schedule:
        draw = self.rng.random()
        if not elites or fresh or draw < _RANDOM:
            return self.space.random(self.rng)
        # Better parents more often: the lower of two draws of the rank.
        # What is good over the whole range (the last goal) is a good start for every budget.
        best = elites[-1 if self.rng.random() < 0.4 else int(self.rng.integers(len(elites)))]
        parent = best[int(self.rng.integers(len(best), size=2).min())].schedule
        if draw < _RANDOM + _CROSSED:
            other = best[int(self.rng.integers(len(best)))].schedule
            return self.space.cross(parent, other, self.rng)
        return self.space.change(parent, self.rng)


def best_indices(values: np.ndarray, count: int) -> list[int]:
    """Return the positions of the highest values, best first, of equals the first; NaN never."""
    order = np.argsort(-values, kind="stable")
    return [int(k) for k in order[:count] if not np.isnan(values[k])]
