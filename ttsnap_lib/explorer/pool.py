"""A reward tensor held ready for the explorer: ranks made once, pruning that grows block by block, tau, resamples.

What a slider move needs again is kept; what it needs anew is computed in blocks of iterations, short enough to redraw
in between. With all blocks done the numbers are those of :func:`ttsnap_lib.simulate.curves` for the same seed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ttsnap_lib.checks import integer
from ttsnap_lib.schedule import Schedule
from ttsnap_lib.simulation import metrics
from ttsnap_lib.simulation.pruning import Level, NaNRead, best_of_n_weights, prune_levels, rank_level, run_threads
from ttsnap_lib.tensors.tensor import COPIED, check_rewards

if TYPE_CHECKING:
    import xarray as xr


_BLOCK_S = 0.025  # of one block of iterations, on a quiet core


_SINGLE_S, _JOINT_S = 0.3e-6, 0.8e-6  # of one pruning run; the second per reward


_TAU_PROMPTS = 400  # tau is over this many prompts at most, evenly spread: its interval is narrow by then


_KEPT_JOBS, _KEPT_LEVELS = 24, 256


@dataclass(frozen=True)
class Job:
    """One method at some budgets: what has to be pruned. Equal jobs share their work.

    Attributes
    ----------
    variable : {"base", "noise_aware"}
    schedule : Schedule
    selecting : tuple of int
        Positions of the rewards that select.
    combine : {"rank_sum", "z_score"}
    n : tuple of int
        Candidates at each budget.
    """

    variable: str
    schedule: Schedule
    selecting: tuple[int, ...]
    combine: str
    n: tuple[int, ...]


@dataclass
class _Progress:
    sums: np.ndarray
    blocks: int = 0
    kept: dict[int, np.ndarray] = field(default_factory=dict)  # at the marks of `Pool.marks`


class Pool:
    """A reward tensor in memory, with everything that stays the same while a schedule is moved.

    Parameters
    ----------
    dataset : xarray.Dataset
        A reward tensor; read whole.
    iterations : int
        Random subsets per prompt in all.
    seed : int
        Of the subsets and the resamples.
    resamples : int
        Bootstrap resamples over prompts.

    Attributes
    ----------
    names : tuple of str, the rewards
    steps : tuple of int, the scored steps
    copied : bool (reward, step), where the noise-aware reward is a copy of the base reward
    values : float64 (prompt, image, reward), rewards of the clean images
    """

    def __init__(self, dataset: xr.Dataset, *, iterations: int = 200, seed: int = 0, resamples: int = 500) -> None:
        self.dataset = check_rewards(dataset).load()
        self.iterations = integer("iterations", iterations, 1)
        self.names = tuple(str(name) for name in dataset["reward"].values)
        self.steps = tuple(int(step) for step in dataset["step"].values)
        self.n_prompts, self.n_images = dataset.sizes["prompt"], dataset.sizes["image"]
        self.copied = np.zeros((len(self.names), len(self.steps)), bool)
        if "noise_aware_source" in dataset:
            self.copied = dataset["noise_aware_source"].transpose("reward", "step").values == COPIED
        self._arrays = {
            name: dataset[name].transpose("step", "reward", "prompt", "image").values
            for name in ("base", "noise_aware")
        }
        self.values = np.ascontiguousarray(np.moveaxis(self._arrays["base"][-1], 0, -1), dtype=np.float64)
        rng = np.random.default_rng(integer("seed", seed, 0))  # in the order of simulate: the same subsets
        self._subsets = rng.permuted(np.tile(np.arange(self.n_images), (self.iterations, 1)), axis=1)
        self._labels = rng.permuted(np.tile(np.arange(self.n_images), (self.n_prompts, 1)), axis=1)
        drawn = rng.integers(0, self.n_prompts, (integer("resamples", resamples, 1), self.n_prompts))
        drawn += np.arange(resamples)[:, None] * self.n_prompts
        counts = np.bincount(drawn.ravel(), minlength=resamples * self.n_prompts)
        self._weights = counts.reshape(resamples, self.n_prompts) / self.n_prompts
        self._levels: OrderedDict[tuple, Level] = OrderedDict()
        self._jobs: OrderedDict[Job, _Progress] = OrderedDict()
        self._exact: dict[tuple[int, int], np.ndarray] = {}
        self._taus: dict[int, tuple[metrics.Estimate, metrics.Estimate]] = {}

    # -- pruning, block by block --------------------------------------------------------------------------------

    def block(self, n_rewards: int, n_budgets: int) -> int:
        """Return the iterations of one block: the same for all that are compared, whatever the machine's speed."""
        seconds = (_SINGLE_S if n_rewards == 1 else _JOINT_S * n_rewards) * self.n_prompts * max(1, n_budgets)
        return min(self.iterations, max(1, int(_BLOCK_S / seconds)))

    def marks(self, block: int) -> list[int]:
        """Return after how many blocks results are kept and drawn: 1, 2, 4, ... and all."""
        total = -(-self.iterations // block)
        marks = [1]
        while marks[-1] * 2 < total:
            marks.append(marks[-1] * 2)
        return marks if total == marks[-1] else [*marks, total]

    def iterations_at(self, block: int, mark: int) -> int:
        """Return the iterations done after `mark` blocks."""
        return min(self.iterations, block * mark)

    def advance(self, job: Job, block: int, mark: int) -> bool:
        """Do one block of `job` towards `mark`; return False when it is there already."""
        progress = self._jobs.get(job)
        if progress is None:
            shape = (len(job.n), self.n_prompts, len(self.names))
            progress = self._jobs[job] = _Progress(np.zeros(shape))
            while len(self._jobs) > _KEPT_JOBS:
                self._jobs.popitem(last=False)
        self._jobs.move_to_end(job)
        if progress.blocks >= mark:
            return False
        first = progress.blocks * block
        progress.sums += self._prune(job, self._subsets[first : first + block])
        progress.blocks += 1
        if progress.blocks in self.marks(block):
            progress.kept[progress.blocks] = progress.sums.copy()
        return True

    def per_prompt(self, job: Job, block: int, mark: int) -> np.ndarray:
        """Return the mean reward of the winners after `mark` blocks, float64 (budget, prompt, reward)."""
        if not job.schedule.steps and len(job.selecting) == 1:
            return np.stack([self._best_of_n(job.selecting[0], n) for n in job.n])
        while self.advance(job, block, mark):
            pass
        return self._jobs[job].kept[mark] / self.iterations_at(block, mark)

    def done(self, job: Job) -> int:
        """Return how many blocks of a job are done; all of one that needs none."""
        if not job.schedule.steps and len(job.selecting) == 1:
            return self.iterations
        return self._jobs[job].blocks if job in self._jobs else 0

    def _prune(self, job: Job, subsets: np.ndarray) -> np.ndarray:
        order = np.argsort(job.n, kind="stable")
        counts = np.array([job.schedule.survivors(job.n[k]) for k in order], np.int64)
        stages = [*((job.variable, step) for step in job.schedule.steps), ("base", self.steps[-1])]
        levels = [[self._level(variable, reward, step) for reward in job.selecting] for variable, step in stages]
        if len(job.selecting) == 1:
            work = self._single([level for (level,) in levels], subsets, counts)
        else:
            work = self._joint(job, stages, levels, subsets, counts)
        sums = np.empty((len(counts), self.n_prompts, len(self.names)))
        sums[order] = np.concatenate(run_threads(work, self._parts()), axis=1)
        return sums

    def _single(self, levels: Sequence[Level], subsets: np.ndarray, counts: np.ndarray):
        def work(part: slice) -> np.ndarray:
            taken = [level.take(part) for level in levels]
            return prune_levels(taken, self.values[part], subsets, counts, labels=self._labels[part])

        return work

    def _joint(self, job: Job, stages, levels, subsets: np.ndarray, counts: np.ndarray):
        from ttsnap_lib.simulation import kernels as _kernels

        scores = np.zeros((1, 1, 1, 1))  # ranks need no scores
        if job.combine == "z_score":
            scores = np.stack([self._arrays[name][self.steps.index(step)] for name, step in stages])
            scores = np.ascontiguousarray(np.moveaxis(scores[:, list(job.selecting)], 2, 0), dtype=np.float64)

        def work(part: slice) -> np.ndarray:
            ranks = np.stack([np.stack([level.rank[part] for level in stage], 1) for stage in levels], 1)
            valid = np.stack([np.stack([level.valid[part] for level in stage], 1) for stage in levels], 1)
            sums, fault = np.zeros((len(counts), len(ranks), len(self.names))), np.full(2, -1, np.int64)
            _kernels.multi_reward(
                _kernels.Z_SCORE if job.combine == "z_score" else _kernels.RANK_SUM,
                ranks,
                scores[part] if job.combine == "z_score" else scores,
                valid,
                np.ascontiguousarray(self._labels[part], np.int32),
                subsets,
                counts,
                self.values[part],
                np.empty((0, 0, 0), np.int32),
                sums,
                fault,
            )
            if fault[0] >= 0:
                raise NaNRead(int(fault[0]) + part.start, int(fault[1]))
            return sums

        return work

    def _parts(self) -> list[slice]:
        size = -(-self.n_prompts // 2) if self.n_prompts <= 128 else 64
        return [slice(start, min(start + size, self.n_prompts)) for start in range(0, self.n_prompts, size)]

    def _level(self, variable: str, reward: int, step: int) -> Level:
        key = (variable, reward, step)
        if key not in self._levels:
            self._levels[key] = rank_level(self._arrays[variable][self.steps.index(step), reward])
            while len(self._levels) > _KEPT_LEVELS:
                self._levels.popitem(last=False)
        self._levels.move_to_end(key)
        return self._levels[key]

    def _best_of_n(self, reward: int, n: int) -> np.ndarray:
        """Return the exact expected rewards (prompt, reward) of the best of n by one reward."""
        if (reward, n) not in self._exact:
            level = self._level("base", reward, self.steps[-1])
            if (level.valid < self.n_images).any():
                raise NaNRead(int(np.argmax(level.valid < self.n_images)), 0)
            ordered = np.take_along_axis(self.values, level.order[:, ::-1, None], axis=1)
            self._exact[reward, n] = np.einsum("pkr,k->pr", ordered, best_of_n_weights(self.n_images, n))
        return self._exact[reward, n]

    # -- over prompts -------------------------------------------------------------------------------------------

    def resample(self, per_prompt: np.ndarray) -> np.ndarray:
        """Return bootstrap means (resample, budget) of (budget, prompt); all calls share the resamples (paired)."""
        return self._weights @ per_prompt.T

    def tau(self, reward: int) -> tuple[metrics.Estimate, metrics.Estimate]:
        """Return Kendall's tau per step of the base and of the noise-aware reward, computed once."""
        if reward not in self._taus:
            every = slice(None, None, -(-self.n_prompts // _TAU_PROMPTS))
            final = self.values[every, :, reward]
            scores = [np.moveaxis(self._arrays[name][:, reward, every], 0, -1) for name in ("base", "noise_aware")]
            base, aware = (metrics.kendall_tau(score, final) for score in scores)
            self._taus[reward] = base, aware
        return self._taus[reward]
