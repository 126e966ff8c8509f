"""Generation against a bare loop over the stock pipeline, which makes the final images only; where the time goes."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch

from tests.benchmarks.rows import Row, interleaved, ratio
from ttsnap_lib.diffusion.denoise import Denoiser, Settings, image_generator
from ttsnap_lib.diffusion.pipelines import load_pipeline
from ttsnap_lib.trajectories.generate import generate
from ttsnap_lib.trajectories.prompts import read_prompts

THREADS = 1
PARTS = ("denoise", "decode", "encode", "hand_over", "finish")


def run(
    model: str = "pocket-flux", n_prompts: int = 2, images: int = 16, n_steps: int = 20, rounds: int = 5
) -> list[Row]:
    """Measure images per second and the overhead of recording and writing every estimate."""
    pipeline = load_pipeline(model, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    prompts = read_prompts("pocket")[:n_prompts]
    settings = Settings(n_steps=n_steps)
    denoiser = Denoiser(pipeline, settings)
    options = denoiser._adapter.call_options(pipeline, denoiser.settings)
    shared = {"images_per_prompt": images, "batch_size": images, "settings": settings, "cpu_threads": THREADS}
    last: dict[str, float] = {}

    def stock() -> None:
        for index, prompt in enumerate(prompts):
            generators = [image_generator(0, index, image) for image in range(images)]
            pipeline(prompt, num_images_per_prompt=images, generator=generators, output_type="np", **options)

    def final_only() -> None:
        generate(pipeline, prompts, on_batch=lambda *given: None, steps=[n_steps - 1], **shared)

    def estimates() -> None:
        generate(pipeline, prompts, on_batch=lambda *given: None, **shared)

    def written() -> None:
        with tempfile.TemporaryDirectory() as folder:
            report = generate(pipeline, prompts, Path(folder), **shared)
        last.update(report.seconds, elapsed_s=report.elapsed_s, bytes=report.bytes_written)

    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        ways = (stock, final_only, estimates, written)
        for way in ways:  # warm up
            way()
        seconds = interleaved(*ways, repeats=rounds)
    finally:
        torch.set_num_threads(threads)
    total = n_prompts * images
    names = ("stock pipeline in a bare loop, final images only", "generate, final images only",
             f"generate, {n_steps} estimates decoded", f"generate, {n_steps} estimates decoded and written")  # fmt: skip
    rows = []
    for name, taken in zip(names, seconds, strict=True):
        rows.append(Row(f"{model}: {name}", total / statistics.median(taken), "images/s"))
        if taken is not seconds[0]:
            value, note = ratio(taken, seconds[0])
            # The engine's own promise is 1.05 for denoising (bench_denoise); here are also decoding and hand-over.
            limit = 1.1 if taken is seconds[1] else None
            rows.append(Row(f"{model}: {name}, time over the bare loop's", value, "x", at_most=limit, note=note))
    for part in PARTS:
        rows.append(Row(f"{model}: written, share of {part}", last.get(part, 0.0) / last["elapsed_s"], "of 1"))
    rows.append(Row(f"{model}: bytes of one written estimate", last["bytes"] / (total * n_steps), "bytes"))
    return rows
