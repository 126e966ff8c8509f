"""A reward tensor that is filled prompt by prompt: created, widened and written in place, resumed, shared by shards.

Chunks hold one reward and `PROMPT_CHUNK` prompts. A shard owns whole chunks, so several processes write side by side.
What is still NaN is what is left to do; nothing else has to be kept.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ._plan import others_at_work, shard_lock
from ._store_plan import PARTIAL, PENDING, SCORED, RewardPlan, planned, write_store
from .errors import TensorError
from .paths import tidy, typed_disk_errors
from .tensors import FINETUNED, PROMPT_CHUNK, open_rewards

if TYPE_CHECKING:
    import zarr

__all__ = ["RewardPlan", "RewardStore", "open_store"]


@contextlib.contextmanager
def open_store(
    path: str | Path,
    rewards: Sequence[RewardPlan],
    prompts: Sequence[str],
    n_images: int,
    steps: Sequence[int],
    *,
    shard: tuple[int, int] = (0, 1),
    attributes: Mapping[str, Any] | None = None,
) -> Iterator[RewardStore]:
    """Create the tensor at `path`, or widen the one that is there, and hold this shard of it.

    Rewards, prompts, images and steps that the tensor lacks are added; values that it has stay. Steps of a
    noise-aware series that were copies of the base value become open again.

    Yields
    ------
    RewardStore

    Raises
    ------
    TensorError
        A tensor of other prompts, other trajectories or other weights.
    DiskError
        Another process writes this shard.
    """
    path = Path(path)
    # Locks and their like stand beside the store: it is replaced as a whole when it is widened.
    beside = path.parent / f".{path.name}"
    with contextlib.ExitStack() as stack:
        with shard_lock(beside, shard) as held:
            tidy(path.parent, glob.escape(path.name))
            old = open_rewards(path).load() if path.exists() else None
            new = planned(old, path, rewards, list(prompts), n_images, sorted(steps), dict(attributes or {}))
            if old is None or not old.identical(new):
                if shard[1] > 1 and old is not None and others_at_work(beside, shard):
                    raise TensorError(
                        f"{path} cannot be widened while other shards write it",
                        value=str(path),
                        bound="one process while rewards, prompts, images or steps are added",
                        remedy="Wait for them to end, or start all shards with the same settings.",
                    )
                write_store(new, path)
            elif not others_at_work(beside, shard):
                for leftover in path.rglob("*.partial"):  # a chunk that was being written when a process ended
                    leftover.unlink()
        stack.enter_context(held)
        yield RewardStore(path, shard)


class RewardStore:
    """An open tensor; see :func:`open_store`."""

    def __init__(self, path: Path, shard: tuple[int, int]) -> None:
        import zarr

        self.path = path
        self._group = zarr.open_group(str(path), mode="r+")
        dataset = open_rewards(path)
        self.rewards = [str(name) for name in dataset["reward"].values]
        self.steps = [int(step) for step in dataset["step"].values]
        self.n_prompts, self.n_images = dataset.sizes["prompt"], dataset.sizes["image"]
        source = dataset["noise_aware_source"].transpose("reward", "step").values == FINETUNED
        self._finetuned = {name: source[k] for k, name in enumerate(self.rewards)}
        chunks = range(0, self.n_prompts, PROMPT_CHUNK)
        self.chunks = [
            list(range(start, min(start + PROMPT_CHUNK, self.n_prompts)))
            for k, start in enumerate(chunks)
            if k % shard[1] == shard[0]
        ]
        """Prompts of this shard, chunk by chunk."""

    def read(self, variable: str, reward: str, prompt: int) -> np.ndarray:
        """Return ``base`` or ``noise_aware`` of one prompt, float32 (image, step)."""
        return np.asarray(self._array(variable)[self.rewards.index(reward), prompt])

    def todo(self, reward: str, prompt: int, steps: Sequence[int], n_images: int) -> tuple[list[int], list[int]]:
        """Return the steps whose base, and whose finetuned values, are not whole yet."""
        columns = [self.steps.index(step) for step in steps]
        open_steps = []
        for variable in ("base", "noise_aware"):
            gaps = np.isnan(self.read(variable, reward, prompt)[:n_images][:, columns]).any(0)
            if variable == "noise_aware":
                gaps &= self._finetuned[reward][columns]
            open_steps.append([step for step, gap in zip(steps, gaps, strict=True) if gap])
        return open_steps[0], open_steps[1]

    def write(self, prompt: int, values: Mapping[tuple[str, str], np.ndarray]) -> None:
        """Write scores of one prompt.

        Parameters
        ----------
        prompt : int
            Its index.
        values : mapping
            (reward, ``"base"`` or ``"noise_aware"``) -> (image, step) over all images and steps of the tensor; NaN
            leaves what is there. Copies of base values are kept up here.
        """
        for reward in dict.fromkeys(name for name, _ in values):
            row = self.rewards.index(reward)
            base, aware = self.read("base", reward, prompt), self.read("noise_aware", reward, prompt)
            for variable, kept in (("base", base), ("noise_aware", aware)):
                given = values.get((reward, variable))
                if given is not None:
                    np.copyto(kept, given.astype(np.float32), where=~np.isnan(given))
            copied = ~self._finetuned[reward]
            aware[:, copied] = base[:, copied]
            # In this order: a process that ends in between leaves a base value open, and does the prompt again.
            with typed_disk_errors(self.path):
                self._array("noise_aware")[row, prompt] = aware
                self._array("base")[row, prompt] = base
        self.settle(prompt)

    def settle(self, prompt: int) -> None:
        """Bring ``status`` of a prompt up to date."""
        gaps = np.isnan(np.stack([np.asarray(self._array(name)[:, prompt]) for name in ("base", "noise_aware")]))
        status = PENDING if gaps.all() else PARTIAL if gaps.any() else SCORED
        if self._array("status")[prompt] != status:
            with typed_disk_errors(self.path):
                self._array("status")[prompt] = status

    def _array(self, name: str) -> zarr.Array:
        return cast("zarr.Array", self._group[name])
