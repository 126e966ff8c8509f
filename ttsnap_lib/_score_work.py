"""What is left to score, cut into work, and its pictures read and prepared ahead of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import TrajectoryError
from .reward_store import RewardStore
from .rewards.base import Reward
from .trajectories import Trajectories

__all__ = ["Call", "Work", "plan_work", "read_ahead"]


@dataclass(frozen=True)
class Call:
    """One variant of one reward and the steps it has to score."""

    reward: Reward
    variant: str
    steps: frozenset[int]


@dataclass(frozen=True)
class Work:
    """One pass over pictures of one prompt: step by step, image by image."""

    prompt: int
    slots: tuple[tuple[int, int], ...]
    """(step, image)."""
    calls: tuple[Call, ...]


@dataclass
class Portion:
    """A batch of pictures of one work, prepared for each reward."""

    work: Work
    slots: list[tuple[int, int]]
    prepared: list[dict[Any, Any]]
    failed: dict[int, TrajectoryError]
    """Position in the batch -> why it could not be read."""
    last: bool

    def inputs(self, reward: Reward, rows: Sequence[int]) -> Any:
        """Return the given rows as what `reward` takes."""
        values = [self.prepared[row][reward.preprocessing] for row in rows]
        return torch.stack(values) if reward.preprocessing is not None else values


def plan_work(store: RewardStore, rewards: Sequence[Reward], steps: Sequence[int], n_images: int) -> list[Work]:
    """Return what is left of this shard, chunk by chunk.

    Adapters are switched within a batch. Full weights are slow to switch: each of their steps gets a pass of its own
    over a chunk.
    """
    works: list[Work] = []
    for chunk in store.chunks:
        later: dict[tuple[int, int], list[Work]] = {}
        for prompt in chunk:
            calls = []
            for number, reward in enumerate(rewards):
                base, aware = store.todo(reward.name, prompt, steps, n_images)
                if base:
                    calls.append(Call(reward, "base", frozenset(base)))
                aware = [step for step in aware if step in reward.adapter_steps]
                if aware and reward.series_kind == "lora":
                    calls.append(Call(reward, "noise_aware", frozenset(aware)))
                elif aware:
                    for step in aware:
                        call = Call(reward, "noise_aware", frozenset([step]))
                        later.setdefault((number, step), []).append(_work(prompt, (call,), steps, n_images))
            store.settle(prompt)  # a process may have ended between the values and the status
            if calls:
                works.append(_work(prompt, tuple(calls), steps, n_images))
        for key in sorted(later):
            works += later[key]
    return works


def _work(prompt: int, calls: tuple[Call, ...], steps: Sequence[int], n_images: int) -> Work:
    needed = frozenset().union(*(call.steps for call in calls))
    slots = tuple((step, image) for step in steps if step in needed for image in range(n_images))
    return Work(prompt, slots, calls)


def read_ahead(
    found: Trajectories, works: Sequence[Work], batch_size: int, *, workers: int, prefetch: int
) -> Iterator[Portion]:
    """Yield the pictures of `works` in batches, read and preprocessed by threads ahead of use.

    A batch holds pictures of one prompt, and which ones depends on the work alone.
    """
    blank = np.zeros((*found.manifest.size, 3), np.uint8)

    def load(work: Work, step: int, image: int) -> tuple[dict[Any, Any], TrajectoryError | None]:
        from PIL import Image

        failure = None
        try:
            pixels = found.read(work.prompt, image, step)
        except TrajectoryError as error:
            pixels, failure = blank, error  # keeps its place, so that the others' batch is what it would have been
        picture = Image.fromarray(pixels)
        kinds = {call.reward.preprocessing for call in work.calls if step in call.steps}
        return {kind: picture if kind is None else kind.image(picture) for kind in kinds}, failure

    def jobs() -> Iterator[tuple[Work, list[tuple[int, int]], bool]]:
        for work in works:
            for start in range(0, len(work.slots), batch_size):
                last = start + batch_size >= len(work.slots)
                yield work, list(work.slots[start : start + batch_size]), last

    with ThreadPoolExecutor(workers, thread_name_prefix="ttsnap-score") as pool:
        ahead: deque[tuple[Work, list[tuple[int, int]], bool, list[Future]]] = deque()
        todo = jobs()
        try:
            while True:
                while len(ahead) <= prefetch:
                    job = next(todo, None)
                    if job is None:
                        break
                    ahead.append((*job, [pool.submit(load, job[0], *slot) for slot in job[1]]))
                if not ahead:
                    return
                work, slots, last, futures = ahead.popleft()
                results = [future.result() for future in futures]
                failed = {row: error for row, (_, error) in enumerate(results) if error is not None}
                yield Portion(work, slots, [prepared for prepared, _ in results], failed, last)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
