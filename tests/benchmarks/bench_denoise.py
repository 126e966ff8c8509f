"""What the segment engine costs over the stock pipeline's own call: ``python -m tests.benchmarks denoise``.

All ways are run in turns, so that what else goes on meets all alike. Told are ratios of medians in wall time; the note
gives the quartiles of the paired ratios and the ratio in processor time, which other work disturbs less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.rows import Row
from ttsnap_lib.diffusion.denoise import Denoiser, Settings, image_generator
from ttsnap_lib.diffusion.pipelines import load_pipeline

LIMIT = 1.05
STOCK = "stock call"


def run(
    models: tuple[str, ...] = ("pocket-flux", "pocket-sdxl"), images: int = 16, n_steps: int = 20, rounds: int = 15
) -> list[Row]:
    """Return a row per model and way of denoising a batch of one prompt."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for model in models for row in _rows(model, images, n_steps, rounds)]
    finally:
        torch.set_num_threads(threads)


def _rows(model: str, images: int, n_steps: int, rounds: int) -> list[Row]:
    ways = _ways(load_pipeline(model, device="cpu"), images, n_steps)
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # warm up
        way()
    for turn in range(rounds):
        names = list(ways)[:: 1 if turn % 2 else -1]
        for name in names:
            start, start_cpu = time.perf_counter(), time.process_time()
            ways[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    rows = [
        Row(f"{model}: {STOCK}, {images} images, {n_steps} steps", statistics.median(wall[STOCK]), "s"),
    ]
    for name in ways:
        if name == STOCK:
            continue
        low, _, high = statistics.quantiles([a / b for a, b in zip(wall[name], wall[STOCK], strict=True)], n=4)
        in_cpu = statistics.median(cpu[name]) / statistics.median(cpu[STOCK])
        rows.append(
            Row(
                f"{model}: {name} / {STOCK}",
                statistics.median(wall[name]) / statistics.median(wall[STOCK]),
                "x",
                at_most=LIMIT if "again" not in name else None,
                note=f"quartiles {low:.3f} to {high:.3f}, processor time {in_cpu:.3f}",
            )
        )
    return rows


def _ways(pipeline: Any, images: int, n_steps: int) -> dict[str, Callable[[], object]]:
    pipeline.set_progress_bar_config(disable=True)
    denoiser = Denoiser(pipeline, Settings(n_steps=n_steps))
    text = denoiser.encode(["a small red ring left of a large blue square on a green background"]).repeat(images)
    noise = denoiser.noise([image_generator(0, 0, image) for image in range(images)])
    options = denoiser._adapter.call_options(pipeline, denoiser.settings)
    last = n_steps - 1

    def stock() -> object:
        return pipeline(**text.embeds, latents=noise.latents, output_type="latent", **options)

    def parts() -> object:
        candidates = noise
        for step in (2, 6, 11, last):
            candidates = denoiser.run(candidates, text, step)
        return candidates

    return {
        STOCK: stock,
        "one part": lambda: denoiser.run(noise, text, last),
        "the four parts of the published schedule": parts,
        "one part, x0 at every step": lambda: denoiser.run(noise, text, last, range(n_steps), lambda step, x0: None),
        "the same again": stock,  # what two runs of one thing differ by
    }
