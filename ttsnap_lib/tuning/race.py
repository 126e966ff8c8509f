"""The search loop of the optimiser: schedules are proposed, raced over prompts and iterations, and the best bred.

Every schedule starts on half of the prompts and few subsets. Those that keep up with the best of that round go on to
more; few reach the last round. What a round's score is worth is learned on the way from the schedules that went on.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ttsnap_lib.schedule import Schedule
from ttsnap_lib.simulation.metrics import relative_gain_of
from ttsnap_lib.simulation.pruning import Level, best_of_n_weights, rank_level
from ttsnap_lib.tuning.space import SearchSpace

CONTROL = 0.8  # share of the control that is taken off; the best share lies between 0.7 and 1 on the published data
_BLOCK = 8  # rotations of one order
_NARROWEST = 64  # candidates of the narrowest table: one machine word

_GENERATION = 32
_PROMOTED = (0.34, 0.34)  # at most this share of a generation goes on from each round
_MARGIN = 2.0  # standard deviations by which a schedule may trail the elite and still go on
_RANDOM = 0.1  # share of proposals that start afresh
_CROSSED = 0.15


@dataclass(frozen=True)
class Selection:
    """How the rewards of a tensor select, and what is to be gained."""

    selecting: tuple[int, ...]  # positions of the rewards that select
    combine: str
    weights: np.ndarray | None  # (selecting,), for weighted_sum
    merit: np.ndarray  # (reward,): what is optimised is rewards @ merit; 0 for rewards that are reported only

    @property
    def joint(self) -> bool:
        """Whether several rewards select by ranks or z-scores within the set."""
        return len(self.selecting) > 1 and self.combine != "weighted_sum"


class Scorer:
    """Scores schedules on fixed prompts and subsets.

    `checks` is (prompt, image, step, reward) at the steps of `steps`, `final` is (prompt, image, reward), both without
    NaN; `iterations` subsets are drawn for each prompt. ``exact`` is the closed form of Best-of-n where there is one,
    (n, prompt, 1 + reward), the merit first.
    """

    def __init__(
        self,
        checks: np.ndarray,
        steps: tuple[int, ...],
        final: np.ndarray,
        selection: Selection,
        iterations: int,
        rng: np.random.Generator,
    ) -> None:
        self.n_prompts, self.pool, self.n_rewards = final.shape
        self._selection = selection
        rewards = np.ascontiguousarray(final, np.float64)
        # Merit first, then every reward: a search sums one column only.
        self._values = np.concatenate([(rewards @ selection.merit)[:, :, None], rewards], axis=2)
        self._merit = np.ascontiguousarray(self._values[:, :, :1])
        self._draw(iterations, rng)
        chosen = list(selection.selecting)
        columns = {step: checks[:, :, k][:, :, chosen] for k, step in enumerate(steps)}
        columns[-1] = rewards[:, :, chosen]  # the final choice
        self.exact: Any = None
        if selection.joint:
            self._scores, self._ranks, self._valid = {}, {}, {}
            for step, column in columns.items():
                score = np.ascontiguousarray(np.moveaxis(column, 2, 1), dtype=np.float64)
                flat = rank_level(score.reshape(-1, self.pool))
                self._scores[step] = score
                self._ranks[step] = flat.rank.reshape(score.shape)
                self._valid[step] = flat.valid.reshape(score.shape[:2])
            return
        weights = np.ones(1) if selection.weights is None else selection.weights
        scores = {step: column.astype(np.float64) @ weights for step, column in columns.items()}
        self._levels: dict[int, Level] = {step: rank_level(score) for step, score in scores.items()}
        # Best-of-n of every n, exactly: sorted by what selects, weighted by the chance of being the best of n.
        order = self._levels[-1].order[:, ::-1]
        ordered = np.take_along_axis(self._values, order[:, :, None], axis=1)
        by_n = np.stack([best_of_n_weights(self.pool, n) for n in range(1, self.pool + 1)])
        self.exact = np.moveaxis(np.tensordot(ordered, by_n, axes=(1, 1)), 2, 0)

    def redrawn(self, iterations: int, rng: np.random.Generator) -> Scorer:
        """Return a scorer of the same prompts on fresh subsets."""
        other = copy.copy(self)
        other._draw(iterations, rng)
        return other

    def _draw(self, iterations: int, rng: np.random.Generator) -> None:
        self.iterations = iterations
        self.subsets = balanced_subsets(self.pool, iterations, rng)
        # Images in another order for each prompt, so that prompts have subsets of their own.
        self.labels = rng.permuted(np.tile(np.arange(self.pool), (self.n_prompts, 1)), axis=1).astype(np.int32)
        self._orders: dict[int, np.ndarray] = {}
        self._ordered: set[tuple[int, int]] = set()
        self._controls: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def per_prompt(self, steps: tuple[int, ...], counts: np.ndarray) -> np.ndarray:
        """Return the mean of merit and of every reward, (budget, prompt, 1 + reward), over all iterations."""
        return self.sums(steps, counts, 0, self.iterations, every_reward=True) / self.iterations

    def best_of_n(self, n: np.ndarray) -> np.ndarray:
        """Return the same of Best-of-N, exactly where that goes: of one candidate, then of each `n`."""
        n = np.concatenate([[1], n])
        return self.per_prompt((), n[:, None]) if self.exact is None else self.exact[n - 1]

    def sums(
        self, steps: tuple[int, ...], counts: np.ndarray, first: int, last: int, *, every_reward: bool = False,
        prompts: slice = slice(None),
    ) -> np.ndarray:  # fmt: skip
        """Return the sum over iterations [first, last) of the winners' merit, (budget, prompt[, 1 + reward]).

        The control is taken off, where there is one. `counts` is (budget, stage + 1), ascending, all above 0.
        """
        values = self._values if every_reward else self._merit
        start, stop, _ = prompts.indices(self.n_prompts)
        sums = np.zeros((len(counts), stop - start, values.shape[2]))
        if self._selection.joint:
            self._add_joint(steps, counts, slice(first, last), prompts, values, sums)
        else:
            self._add(steps, counts, (first, last), (start, stop), values, sums)
            share = CONTROL if steps else 1.0  # without a check the control is the thing itself
            sums -= share * self._control(first, last, every_reward)[counts[:, 0] - 1][:, prompts]
        return sums if every_reward else sums[:, :, 0]

    def _add(self, steps, counts, iterations, prompts, values, sums) -> None:
        from ttsnap_lib.simulation.kernels import prefix_sums  # numba: paid for where it is used

        done, width = 0, _NARROWEST  # small budgets in narrow tables: a search over fewer candidates, in fewer words
        while done < len(counts):
            width = min(width, self.pool)
            rows = slice(done, int(np.searchsorted(counts[:, 0], width, side="right")))
            if rows.stop > rows.start:
                path = np.array([self._table(step, width) for step in (*steps, -1)])
                prefix_sums(
                    self._orders[width], path, self.labels, self.subsets, prompts, iterations, counts[rows], values,
                    sums[rows],
                )  # fmt: skip
            done, width = rows.stop, 2 * width

    def _add_joint(self, steps, counts, iterations, prompts, values, sums) -> None:
        from ttsnap_lib.simulation.kernels import RANK_SUM, Z_SCORE, multi_reward

        mode = RANK_SUM if self._selection.combine == "rank_sum" else Z_SCORE
        ranks, scores, valid = (
            np.stack([table[s][prompts] for s in (*steps, -1)], 1) for table in (self._ranks, self._scores, self._valid)
        )
        multi_reward(
            mode, ranks, scores, valid, self.labels[prompts], self.subsets[iterations], counts, values[prompts],
            np.empty((0, 0, 0), np.int32), sums, np.full(2, -1, np.int64),
        )  # fmt: skip

    def _table(self, step: int, width: int) -> int:
        """Return where the order of the first `width` positions at a step stands among the tables of that width."""
        from ttsnap_lib.simulation.kernels import ordered_positions

        k = list(self._levels).index(step)
        if (step, width) not in self._ordered:
            with self._lock:
                if width not in self._orders:  # takes memory only where it is filled
                    shape = (len(self._levels), self.n_prompts, self.iterations, width)
                    self._orders[width] = np.empty(shape, np.uint8 if width <= 256 else np.uint16)
            # Two threads may both fill it: with the same.
            ordered_positions(self._levels[step].rank, self.labels, self.subsets, self._orders[width][k])
            self._ordered.add((step, width))
        return k

    def _control(self, first: int, last: int, every_reward: bool) -> np.ndarray:
        """Return by how much the subsets flatter Best-of-n, summed over iterations: (n, prompt, column)."""
        key = (first, last)
        with self._lock:
            if key not in self._controls:
                rank = np.take_along_axis(self._levels[-1].rank, self.labels, axis=1)
                total = np.zeros_like(self.exact)
                prompts = np.arange(self.n_prompts)
                for row in self.subsets[first:last]:
                    best = np.minimum.accumulate(rank[:, row], axis=1).T  # (n, prompt)
                    total += self._values[prompts, self._levels[-1].order[prompts, best]]
                self._controls[key] = total - (last - first) * self.exact
        return self._controls[key] if every_reward else self._controls[key][:, :, :1]


def balanced_subsets(pool: int, iterations: int, rng: np.random.Generator) -> np.ndarray:
    """Return permutations of the pool, int64 (iteration, pool), in blocks of rotations of one random order."""
    rows: list[np.ndarray] = []
    while len(rows) < iterations:
        order = rng.permutation(pool)
        turns = min(_BLOCK, iterations - len(rows))
        rows += [np.roll(order, -(k * pool // turns)) for k in range(turns)]
    return np.array(rows, np.int64)


@dataclass(frozen=True)
class Goals:
    """Turns a curve of mean merit over budgets into scores in percent."""

    objective: str  # area, single or frontier
    budgets: np.ndarray  # float64 (budget,)
    n: np.ndarray  # int64 (budget,), Best-of-N candidates at each

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
        blocks = [block for blocks in rounds for block in blocks]
        sums = np.zeros(len(n))
        for prompts, first, last in blocks:
            sums += scorer.sums((), n[:, None], first, last, prompts=prompts).sum(1)
        return sums / draws(blocks)

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
        return relative_gain_of(self.budgets, curve, baseline[..., 1:], strict=False)

    def per_budget(self, curve: np.ndarray, baseline: np.ndarray) -> np.ndarray:
        """Return, per budget, the gain over Best-of-N in percent of what Best-of-N gains over a single candidate.

        Where Best-of-N has a single candidate itself, its gain at the largest budget is the yardstick.
        """
        over_one = baseline[..., 1:] - baseline[..., :1]
        yardstick = np.where(self.n > 1, over_one, over_one[..., -1:])
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(yardstick > 0, 100 * (curve - baseline[..., 1:]) / yardstick, np.nan)


@dataclass
class Trial:
    """One schedule and what is known of it."""

    schedule: Schedule
    counts: np.ndarray  # int64 (budget, stage + 1), rows of 0 or -1 where it is infeasible
    scores: list[np.ndarray] = field(default_factory=list)  # float64 (goal,), one for each round it ran in
    sums: np.ndarray | float = 0.0  # (budget,), over prompts and iterations so far; NaN where infeasible
    draws: int = 0  # prompts x iterations so far


def draws(blocks: Sequence[tuple[slice, int, int]]) -> int:
    """Return the prompts x iterations of some blocks (prompts, first iteration, one past the last)."""
    return sum((prompts.stop - prompts.start) * (last - first) for prompts, first, last in blocks)


class Race:
    """Searches a space of schedules; interrupted anywhere, it keeps what it knows.

    The iterations of `scorer` are those of the last round.
    """

    def __init__(
        self, space: SearchSpace, scorer: Scorer, goals: Goals, rng: np.random.Generator, threads: int
    ) -> None:
        self.space, self.scorer, self.goals, self.rng, self.threads = space, scorer, goals, rng, threads
        self.trials: list[Trial] = []
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
        for r, blocks in enumerate(self.rounds):
            started = time.monotonic()
            for start in range(0, len(running), 4 * self.threads):
                if time.monotonic() > deadline() and self.finished():
                    return False
                part = running[start : start + 4 * self.threads]
                for trial, sums in zip(part, pool.map(self.sums, part, [blocks] * len(part)), strict=True):
                    trial.sums = trial.sums + sums
                    trial.draws += draws(blocks)
                    trial.scores.append(self.goals.score(trial.sums / trial.draws, self.baselines[r]))
                    if r == 0:
                        self.trials.append(trial)
            spent = (time.monotonic() - started) / (len(running) * draws(blocks))
            self.seconds_per_draw = (self.seconds_per_draw + spent) / 2 if self.seconds_per_draw else spent
            if r + 1 < len(self.rounds):
                running = self._promote(running, r)
                if not running:
                    return True
        self._learn(running)
        return True

    def sums(self, trial: Trial, blocks: Sequence[tuple[slice, int, int]], scorer: Scorer | None = None) -> np.ndarray:
        """Return the sum of merit over some prompts and iterations at each budget, NaN where infeasible."""
        scorer = self.scorer if scorer is None else scorer
        fits = trial.counts[:, 0] > 0
        found = np.full(len(fits), np.nan)
        for prompts, first, last in blocks:
            part = scorer.sums(trial.schedule.steps, trial.counts[fits], first, last, prompts=prompts).sum(1)
            found[fits] = np.where(np.isnan(found[fits]), 0.0, found[fits]) + part
        return found

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
        """Return the trials of a generation that go on from a round."""
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
        """Take in how far the scores of the first rounds were from those of the last."""
        for r in range(2):
            self._gaps[r] += [trial.scores[-1] - trial.scores[r] for trial in last_round]
            self._gaps[r] = self._gaps[r][-200:]
            if len(self._gaps[r]) >= 20:
                gaps = np.ma.masked_invalid(self._gaps[r])
                self._spread[r] = gaps.std(axis=0).filled(np.inf)

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
