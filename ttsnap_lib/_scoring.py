"""Mean reward of many schedules on the same prompts and subsets, fast: what does not change is computed once.

Three things make an estimate cheap. The order of every subset at every step is kept, so that a schedule only intersects
sets (:mod:`ttsnap_lib._prefix_kernels`). Subsets are balanced: a random order of the pool and its rotations, so that
every image stands equally often at every place; each subset alone is still uniformly random. And the known mean of
Best-of-n is used as a control: what the subsets at hand give the best of n too much, they give the pruned choice too
much, nearly.
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
_NARROWEST = 64  # candidates of the narrowest table: one machine word


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
        self._draw(iterations, rng)
        chosen = list(selection.selecting)
        columns = {step: checks[:, :, k][:, :, chosen] for k, step in enumerate(steps)}
        columns[-1] = rewards[:, :, chosen]  # the final choice
        if any(np.isnan(column).any() for column in columns.values()):
            raise TensorError(
                "reward tensor with missing values",
                value=float("nan"),
                bound="a number for every image, at every step that a schedule may check",
                remedy="Score the missing images, or drop them with tensors.drop_missing().",
            )
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
        self._orders: dict[int, np.ndarray] = {}
        self._ordered: set[tuple[int, int]] = set()
        self._controls: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

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
            share = _CONTROL if steps else 1.0  # without a check the control is the thing itself
            sums -= share * self._control(first, last, every_reward)[counts[:, 0] - 1][:, prompts]
        return sums if every_reward else sums[:, :, 0]

    def _add(self, steps, counts, iterations, prompts, values, sums) -> None:
        from ._prefix_kernels import prefix_sums  # numba: paid for where it is used

        done, width = 0, _NARROWEST  # small budgets in narrow tables: a search over fewer candidates, in fewer words
        while done < len(counts):
            width = min(width, self.pool)
            rows = slice(done, int(np.searchsorted(counts[:, 0], width, side="right")))
            if rows.stop > rows.start:
                path = np.array([self._table(step, width) for step in (*steps, -1)])
                prefix_sums(
                    self._orders[width], path, self._labels, self.subsets, prompts, iterations, counts[rows], values,
                    sums[rows],
                )  # fmt: skip
            done, width = rows.stop, 2 * width

    def _add_joint(self, steps, counts, iterations, prompts, values, sums) -> None:
        from . import _kernels

        mode = _kernels.RANK_SUM if self._selection.combine == "rank_sum" else _kernels.Z_SCORE
        ranks, scores, valid = (
            np.stack([table[s][prompts] for s in (*steps, -1)], 1) for table in (self._ranks, self._scores, self._valid)
        )
        _kernels.multi_reward(
            mode, ranks, scores, valid, self._labels[prompts], self.subsets[iterations], counts, values[prompts],
            np.empty((0, 0, 0), np.int32), sums, np.full(2, -1, np.int64),
        )  # fmt: skip

    def _table(self, step: int, width: int) -> int:
        """Return where the order of the first `width` positions at a step stands among the tables of that width."""
        from ._prefix_kernels import ordered_positions

        k = list(self._levels).index(step)
        if (step, width) not in self._ordered:
            with self._lock:
                if width not in self._orders:  # takes memory only where it is filled
                    shape = (len(self._levels), self.n_prompts, self.iterations, width)
                    self._orders[width] = np.empty(shape, np.uint8 if width <= 256 else np.uint16)
            # Two threads may both fill it: with the same.
            ordered_positions(self._levels[step].rank, self._labels, self.subsets, self._orders[width][k])
            self._ordered.add((step, width))
        return k

    def _control(self, first: int, last: int, every_reward: bool) -> np.ndarray:
        """Return by how much the subsets flatter Best-of-n, summed over iterations: (n, prompt, column)."""
        key = (first, last)
        with self._lock:
            if key not in self._controls:
                rank = np.take_along_axis(self._levels[-1].rank, self._labels, axis=1)
                total = np.zeros_like(self.exact)
                prompts = np.arange(self.n_prompts)
                for row in self.subsets[first:last]:
                    best = np.minimum.accumulate(rank[:, row], axis=1).T  # (n, prompt)
                    total += self._values[prompts, self._levels[-1].order[prompts, best]]
                self._controls[key] = total - (last - first) * self.exact
        return self._controls[key] if every_reward else self._controls[key][:, :, :1]
