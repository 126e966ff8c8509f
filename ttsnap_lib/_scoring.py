"""Mean reward of many schedules on the same prompts and subsets, fast: what does not change is computed once.

Three things make an estimate cheap. Ranks, and the moves between any two steps, are kept. Subsets are balanced: a
random order of the pool and its rotations, so that every image stands equally often at every place; each subset alone
is still uniformly random. And the known mean of Best-of-n is used as a control: what the subsets at hand give the best
of n too much, they give the pruned choice too much, nearly.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._pruning import Level, rank_level
from .errors import TensorError
from .simulate import best_of_n_weights

__all__ = ["Scorer", "Selection", "balanced_subsets"]

_CONTROL = 0.8  # share of the control that is taken off; the best share lies between 0.7 and 1 on the published data
_BLOCK = 8  # rotations of one order


@dataclass(frozen=True)
class Selection:
    """How the rewards of a tensor select, and what is to be gained.

    Attributes
    ----------
    selecting : tuple of int, positions of the rewards that select
    combine : str
    weights : float64 (selecting,) or None, for ``weighted_sum``
    merit : float64 (reward,), the reward that is optimised is ``rewards @ merit``; 0 for rewards that are reported only
    """

    selecting: tuple[int, ...]
    combine: str
    weights: np.ndarray | None
    merit: np.ndarray

    @property
    def joint(self) -> bool:
        """Whether several rewards select by ranks or z-scores within the set."""
        return len(self.selecting) > 1 and self.combine != "weighted_sum"


def balanced_subsets(pool: int, iterations: int, rng: np.random.Generator) -> np.ndarray:
    """Return permutations of the pool, int64 (iteration, pool), in blocks of rotations of one random order."""
    rows: list[np.ndarray] = []
    while len(rows) < iterations:
        order = rng.permutation(pool)
        turns = min(_BLOCK, iterations - len(rows))
        rows += [np.roll(order, -(k * pool // turns)) for k in range(turns)]
    return np.array(rows, np.int64)


class Scorer:
    """Scores schedules on fixed prompts and subsets.

    Parameters
    ----------
    checks : float (prompt, image, step, reward)
        Rewards at the steps of `steps`.
    steps : tuple of int
    final : float (prompt, image, reward)
    selection : Selection
    iterations : int
        Subsets drawn for each prompt.
    rng : numpy.random.Generator
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
        self._moves: dict[tuple[int, int], np.ndarray] = {}
        self._draw(iterations, rng)
        chosen = list(selection.selecting)
        columns = {step: checks[:, :, k][:, :, chosen] for k, step in enumerate(steps)}
        columns[-1] = rewards[:, :, chosen]  # the final choice
        if selection.joint:
            self._scores, self._ranks, self._valid = {}, {}, {}
            for step, column in columns.items():
                score = np.ascontiguousarray(np.moveaxis(column, 2, 1), dtype=np.float64)
                flat = rank_level(score.reshape(-1, self.pool))
                self._scores[step] = score
                self._ranks[step] = flat.rank.reshape(score.shape)
                self._valid[step] = flat.valid.reshape(score.shape[:2])
            self.exact: Any = None  # no closed form
            return
        weights = np.ones(1) if selection.weights is None else selection.weights
        scores = {step: column.astype(np.float64) @ weights for step, column in columns.items()}
        self._levels: dict[int, Level] = {step: rank_level(score) for step, score in scores.items()}
        # Best-of-n of every n, exactly: sorted by what selects, weighted by the chance of being the best of n.
        order = self._levels[-1].order[:, ::-1]
        ordered = np.take_along_axis(self._values, order[:, :, None], axis=1)
        by_n = np.stack([best_of_n_weights(self.pool, n) for n in range(1, self.pool + 1)])
        self.exact = np.moveaxis(np.tensordot(ordered, by_n, axes=(1, 1)), 2, 0)  # (n, prompt, 1 + reward)

    def redrawn(self, iterations: int, rng: np.random.Generator) -> Scorer:
        """Return a scorer of the same prompts on fresh subsets."""
        other = copy.copy(self)
        other._draw(iterations, rng)
        return other

    def _draw(self, iterations: int, rng: np.random.Generator) -> None:
        self.iterations = iterations
        self.subsets = balanced_subsets(self.pool, iterations, rng)
        # Images in another order for each prompt, so that prompts have subsets of their own.
        self._labels = rng.permuted(np.tile(np.arange(self.pool), (self.n_prompts, 1)), axis=1).astype(np.int32)
        self._entries: dict[int, np.ndarray] = {}
        self._controls: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def sums(
        self, steps: tuple[int, ...], counts: np.ndarray, first: int, last: int, *, every_reward: bool = False,
        prompts: slice = slice(None),
    ) -> np.ndarray:  # fmt: skip
        """Return the sum over iterations [first, last) of the winners' merit, (budget, prompt[, 1 + reward]).

        The control is taken off, where there is one. `counts` is (budget, stage + 1), ascending, all above 0.
        """
        from . import _kernels  # numba: paid for where it is used

        values = self._values if every_reward else self._merit
        values = values[prompts]
        sums = np.zeros((len(counts), values.shape[0], values.shape[2]))
        fault = np.full(2, -1, np.int64)
        subsets = self.subsets[first:last]
        no_winners = np.empty((0, 0, 0), np.int32)
        path = (*steps, -1)
        if self._selection.joint:
            mode = _kernels.RANK_SUM if self._selection.combine == "rank_sum" else _kernels.Z_SCORE
            ranks, scores, valid = (
                np.stack([table[s][prompts] for s in path], 1) for table in (self._ranks, self._scores, self._valid)
            )
            labels = self._labels[prompts]
            _kernels.multi_reward(mode, ranks, scores, valid, labels, subsets, counts, values, no_winners, sums, fault)
        else:
            levels = [self._levels[s] for s in path]
            moves = np.empty((values.shape[0], len(steps), self.pool), np.int32)
            for k in range(len(steps)):
                moves[:, k] = self._move(path[k], path[k + 1])[prompts]
            valid = np.stack([level.valid[prompts] for level in levels], axis=1)
            _kernels.single_reward(
                self._entry(path[0])[prompts], moves, levels[-1].order[prompts], valid, subsets, counts, values, no_winners,
                sums, fault,
            )  # fmt: skip
            share = _CONTROL if steps else 1.0  # without a check the control is the thing itself
            sums -= share * self._control(first, last, every_reward)[counts[:, 0] - 1][:, prompts]
        if fault[0] >= 0:
            raise TensorError(
                "reward tensor with missing values",
                value=float("nan"),
                bound="a number for every image, at every step that a schedule may check",
                remedy="Score the missing images, or drop them with tensors.drop_missing().",
            )
        return sums if every_reward else sums[:, :, 0]

    def _move(self, here: int, there: int) -> np.ndarray:
        key = (here, there)
        if key not in self._moves:  # two threads may both compute it: the same array
            self._moves[key] = np.take_along_axis(self._levels[there].rank, self._levels[here].order, axis=1)
        return self._moves[key]

    def _entry(self, step: int) -> np.ndarray:
        if step not in self._entries:
            self._entries[step] = np.take_along_axis(self._levels[step].rank, self._labels, axis=1)
        return self._entries[step]

    def _control(self, first: int, last: int, every_reward: bool) -> np.ndarray:
        """Return by how much the subsets flatter Best-of-n, summed over iterations: (n, prompt, column)."""
        key = (first, last)
        with self._lock:
            if key not in self._controls:
                rank = self._entry(-1)
                total = np.zeros_like(self.exact)
                prompts = np.arange(self.n_prompts)
                for row in self.subsets[first:last]:
                    best = np.minimum.accumulate(rank[:, row], axis=1).T  # (n, prompt)
                    total += self._values[prompts, self._levels[-1].order[prompts, best]]
                self._controls[key] = total - (last - first) * self.exact
        return self._controls[key] if every_reward else self._controls[key][:, :, :1]
