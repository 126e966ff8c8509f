"""Makes one batch after another: encode, denoise, decode, in shapes that never change; hands the pictures over."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ._image_writer import ImageWriter
from ._plan import Blocks, Wanted
from .checks import integer
from .denoise import Conditioning, Denoiser, image_generator

__all__ = ["BatchMaker", "Clock", "OnBatch", "hand_over_to", "host_pixels", "model_threads", "threads_of_torch"]

OnBatch = Callable[[int, list[int], int, torch.Tensor], None]
"""``on_batch(prompt_index, image_indices, step, images)``: float32 (n, 3, height, width) in [0, 1] on the device."""


_SMALL_MODEL = 50_000_000


class Clock:
    """Adds up where the time goes; a part inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[part] = self.seconds.get(part, 0.0) + spent - self._inside.pop()
            if self._inside:
                self._inside[-1] += spent


class BatchMaker:
    """Runs batches of fixed shape through a denoiser.

    Parameters
    ----------
    denoiser : Denoiser
    prompts : sequence of str
    blocks : Blocks
        Composition of the batches.
    seed : int
        Base seed.
    decoder : optional
        Decodes the estimates; the final image is the pipeline's own.
    clock : Clock
        Takes the times of encode, denoise and decode.
    """

    def __init__(
        self, denoiser: Denoiser, prompts: Sequence[str], blocks: Blocks, seed: int, decoder: Any, clock: Clock
    ) -> None:
        self._denoiser, self._prompts, self._blocks = denoiser, prompts, blocks
        self._seed, self._decoder, self._clock = seed, decoder, clock
        self._encoded: tuple[int, Conditioning] | None = None
        # With offload, a decoder called between two steps would push the denoising model out and in again each time.
        self._decode_late = bool(getattr(denoiser.pipeline, "_all_hooks", None))

    def make(
        self, start: tuple[int, int], steps: Collection[int], on_images: Callable[[int, torch.Tensor], None]
    ) -> None:
        """Make the batch that begins at `start`; ``on_images(step, images)`` gets all its rows at each of `steps`."""
        denoiser, clock = self._denoiser, self._clock
        last = denoiser.settings.n_steps - 1
        rows = self._blocks.rows(start)
        with clock("encode"):
            conditioning = self._conditioning(start[0])
            candidates = denoiser.noise([image_generator(self._seed, *row) for row in rows])
        kept: list[tuple[int, torch.Tensor]] = []

        def decode(step: int, x0: torch.Tensor) -> None:
            with clock("decode"):
                images = denoiser.decode(x0, self._decoder)
            on_images(step, images)

        early = sorted(set(steps) - {last})
        on_x0 = (lambda step, x0: kept.append((step, x0))) if self._decode_late else decode
        with clock("denoise"):
            done = denoiser.run(candidates, conditioning, last, early, on_x0 if early else None)
        for step, x0 in kept:
            decode(step, x0)
        if last in steps:
            with clock("decode"):
                images = denoiser.final(done)
            on_images(last, images)

    def _conditioning(self, first_prompt: int) -> Conditioning:
        """Return one row per image; the prompts of a batch are encoded together, always as many."""
        if self._encoded is None or self._encoded[0] != first_prompt:
            n, count = self._blocks.prompts, len(self._prompts)
            texts = [self._prompts[min(first_prompt + k, count - 1)] for k in range(n)]
            self._encoded = first_prompt, self._denoiser.encode(texts).repeat(self._blocks.images)
        return self._encoded[1]


def host_pixels(images: torch.Tensor) -> Callable[[int], np.ndarray]:
    """Start to copy images in [0, 1] to the host as bytes; return a function from row to uint8 (height, width, 3).

    The function waits for the copy, so that the thread that calls it does, and not the one that drives the model.
    """
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    if pixels.device.type != "cuda":
        host = pixels.cpu().numpy()
        return lambda row: host[row]
    pinned = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
    pinned.copy_(pixels, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def row_of(row: int) -> np.ndarray:
        copied.synchronize()
        return pinned[row].numpy()

    return row_of


def hand_over_to(
    rows: Sequence[tuple[int, int]],
    wanted: Wanted,
    chosen: Collection[int],
    writer: ImageWriter | None,
    on_batch: OnBatch | None,
    clock: Clock,
) -> Callable[[int, torch.Tensor], None]:
    """Return the function that gives a batch's pictures to the writer and the callback."""
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        if row in wanted:
            places.setdefault(row[0], []).append(place)
            if writer is not None:
                writer.start(*row, wanted[row])

    def hand_over(step: int, images: torch.Tensor) -> None:
        with clock("hand_over"):
            if writer is not None:
                pixels = host_pixels(images)
                for place in (place for found in places.values() for place in found):
                    writer.put(*rows[place], step, partial(pixels, place))
            if on_batch is not None and step in chosen:
                for prompt, found in places.items():
                    on_batch(prompt, [rows[place][1] for place in found], step, images[found])

    return hand_over


def model_threads(denoiser: Denoiser, given: int | None, made_with: int | None) -> int | None:
    """Return the threads of the model: None on an accelerator, where they decide nothing."""
    given = None if given is None else integer("cpu_threads", given, 1, 1024)
    if denoiser.device.type != "cpu":
        return None
    if given or made_with:
        return given or made_with
    # A small model gains little from a second thread and loses much where the cores are busy: threads wait for each
    # other at every operation. Several processes (shards) use the cores better.
    if sum(weight.numel() for weight in denoiser._adapter.component(denoiser.pipeline).parameters()) < _SMALL_MODEL:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextlib.contextmanager
def threads_of_torch(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads on the CPU during the block; None leaves it alone."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
