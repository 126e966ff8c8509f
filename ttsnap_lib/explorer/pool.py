"""A reward tensor held ready for the explorer: what has been pruned once is kept, each number of candidates for itself.

With all iterations the numbers are those of :func:`ttsnap_lib.simulate` for the same seed, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ttsnap_lib.checks import integer
from ttsnap_lib.schedule import Schedule
from ttsnap_lib.simulation import metrics
from ttsnap_lib.simulation.pruning import Level, NaNRead, best_of_n_weights, prune_columns, rank_level
from ttsnap_lib.simulation.simulate import repeats, tell_repeats
from ttsnap_lib.tensors.tensor import COPIED, check_rewards, drop_repeats

if TYPE_CHECKING:
    import xarray as xr

_PREVIEW, _PREVIEW_RUNS = 25, 5_000  # iterations of a preview; prompts x rewards x iterations, where that is less
_RESAMPLES = 500
_TAU_PROMPTS = 400  # tau is over this many prompts at most, evenly spread: its interval is narrow by then
_KEPT = 512


@dataclass(frozen=True)
class Job:
    """How winners are chosen; `selecting` are positions of the rewards that select."""

    variable: str
    schedule: Schedule
    selecting: tuple[int, ...]
    combine: str


class Pool:
    """A reward tensor in memory, with everything that stays the same while a schedule is moved."""

    def __init__(self, dataset: xr.Dataset, *, iterations: int = 200, seed: int = 0, distinct: bool = False) -> None:
        dataset = check_rewards(dataset).drop_vars("embedding", errors="ignore").load()  # it may be gigabytes
        self.dataset = dataset = drop_repeats(dataset) if distinct else dataset
        self.iterations, self._seed = integer("iterations", iterations, 1), integer("seed", seed, 0)
        self.names = tuple(str(name) for name in dataset["reward"].values)
        self.steps = tuple(int(step) for step in dataset["step"].values)
        self.n_prompts, self.n_images = dataset.sizes["prompt"], dataset.sizes["image"]
        # (reward, step), where the noise-aware reward is a copy of the base reward
        self.copied = np.zeros((len(self.names), len(self.steps)), bool)
        if "noise_aware_source" in dataset:
            self.copied = dataset["noise_aware_source"].transpose("reward", "step").values == COPIED
        self._scores = {
            name: np.ascontiguousarray(dataset[name].transpose("step", "prompt", "image", "reward").values)
            for name in ("base", "noise_aware")
        }
        self._final = self._scores["base"][-1].astype(np.float64)
        self.is_whole = not np.isnan(self._final).any()
        tell_repeats(dataset, self._final)
        self.repeats = repeats(dataset, self._final)
        rng = np.random.default_rng(self._seed)  # in the order of simulate: the same subsets
        self._subsets = rng.permuted(np.tile(np.arange(self.n_images), (self.iterations, 1)), axis=1)
        self._labels = rng.permuted(np.tile(np.arange(self.n_images), (self.n_prompts, 1)), axis=1)
        self._kept: dict[tuple[Job, int, int], np.ndarray] = {}
        self._levels: dict[tuple[str, int, int], Level] = {}  # at most twice what the tensor takes
        self._taus: dict[int, tuple[metrics.Estimate, metrics.Estimate]] = {}

    def preview(self, n_rewards: int) -> int:
        """Return the iterations of a preview: few enough to follow a slider."""
        return min(self.iterations, _PREVIEW, max(1, _PREVIEW_RUNS // (self.n_prompts * n_rewards)))

    def has(self, job: Job, n: int) -> bool:
        """Tell whether `n` candidates have been pruned with all iterations."""
        return (job, n, self.iterations) in self._kept

    def per_prompt(self, job: Job, numbers: Sequence[int], iterations: int) -> np.ndarray:
        """Return the mean rewards of the winners, float64 (number of candidates, prompt, reward)."""
        missing = sorted({n for n in numbers if (job, n, iterations) not in self._kept})
        if missing:
            exact = not job.schedule.steps and len(job.selecting) == 1
            rows = self._best_of_n(job.selecting[0], missing) if exact else self._prune(job, missing, iterations)
            self._kept.update({(job, n, iterations): row for n, row in zip(missing, rows, strict=True)})
        found = np.stack([self._kept[job, n, iterations] for n in numbers])
        for oldest in list(self._kept)[:-_KEPT]:
            del self._kept[oldest]
        return found

    def _prune(self, job: Job, numbers: list[int], iterations: int) -> np.ndarray:
        stages = [*((job.variable, step) for step in job.schedule.steps), ("base", self.steps[-1])]
        sums, _ = prune_columns(
            [self._scores[name][self.steps.index(step)][:, :, job.selecting] for name, step in stages],
            self._final,
            self._subsets[:iterations],
            np.array([job.schedule.survivors(n) for n in numbers], np.int64),
            combine=job.combine,
            labels=self._labels,
            levels=[[self._level(name, step, reward) for reward in job.selecting] for name, step in stages],
        )
        return sums / iterations

    def _level(self, variable: str, step: int, reward: int) -> Level:
        """Return the order of the images at a step, made once: to sort them takes longer than to prune."""
        key = variable, step, reward
        if key not in self._levels:
            self._levels[key] = rank_level(self._scores[variable][self.steps.index(step)][:, :, reward])
        return self._levels[key]

    def _best_of_n(self, reward: int, numbers: list[int]) -> np.ndarray:
        """Return the exact expected rewards of the best of n by one reward; of equal ones the lower image wins."""
        level = self._level("base", self.steps[-1], reward)
        if (level.valid < self.n_images).any():
            raise NaNRead(int(np.argmax(level.valid < self.n_images)), 0)
        weights = np.stack([best_of_n_weights(self.n_images, n) for n in numbers])
        worst_first = np.take_along_axis(self._final, level.order[:, ::-1, None], axis=1)
        return np.einsum("pir,ni->npr", worst_first, weights)

    def resample(self, per_prompt: np.ndarray) -> np.ndarray:
        """Return bootstrap means (resample, curve) of (curve, prompt); all calls share the resamples, so they pair."""
        return metrics.bootstrap_means(per_prompt.T, self._seed, _RESAMPLES)

    def tau(self, reward: int) -> tuple[metrics.Estimate, metrics.Estimate]:
        """Return Kendall's tau per step of the base and of the noise-aware reward, computed once."""
        if reward not in self._taus:
            every = slice(None, None, -(-self.n_prompts // _TAU_PROMPTS))
            final = self._final[every, :, reward]
            scores = [np.moveaxis(self._scores[name][:, every, :, reward], 0, -1) for name in ("base", "noise_aware")]
            base, aware = (metrics.kendall_tau(score, final) for score in scores)
            self._taus[reward] = base, aware
        return self._taus[reward]
