"""Measures a cost model on the machine at hand: FLOPs and seconds of a step, a decode, a check, the text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checks import choice, integer
from .costs import CostModel

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Measurement", "count_tflops", "measure_costs"]


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes
    ----------
    tflops, seconds : CostModel
        Per candidate, at the largest batch size for the seconds.
    by_batch : pandas.DataFrame
        Batch size, part (step, decode, preview_decode, verify), seconds per candidate: median, lowest and highest run.
    facts : dict
        Model, reward, device, precision, size, versions.
    """

    tflops: CostModel
    seconds: CostModel
    by_batch: pd.DataFrame
    facts: dict[str, Any]

    def cost(self, unit: str = "TFLOPs") -> CostModel:
        """Return the cost model in ``"TFLOPs"`` or ``"seconds"``."""
        return self.tflops if choice("unit", unit, ("TFLOPs", "seconds")) == "TFLOPs" else self.seconds

    def save(self, path: str | Path, unit: str = "TFLOPs") -> Path:
        """Write JSON that :meth:`CostModel.load` reads: the model in `unit` under ``cost``, and everything else."""
        from .paths import write_json

        content = {
            "cost": self.cost(unit).to_dict(),
            "tflops": self.tflops.to_dict(),
            "seconds": self.seconds.to_dict(),
            "by_batch": self.by_batch.to_dict("records"),
            "facts": self.facts,
        }
        write_json(path, content)
        return Path(path)


def count_tflops(function: Callable[[], Any]) -> float:
    """Return the TFLOPs of one call, two per multiply-add.

    Torch's counter sees matrix products, convolutions and attention, not elementwise work.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops() / 1e12


def measure_costs(
    pipeline: Any,
    reward: Any,
    settings: Any = None,
    *,
    decoder: Any = None,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 3,
    prompt: str = "a small red circle on a white background",
) -> Measurement:
    """Measure what a candidate costs with this pipeline and reward.

    Parameters
    ----------
    pipeline : diffusers pipeline
    reward : Reward
    settings : Settings, optional
    decoder : AutoencoderTiny, optional
        Measured as ``preview_decode``.
    batch_sizes : sequence of int
        Seconds are measured at each; the last one gives the cost model.
    repeats : int
        Runs per number, after one to warm up; medians are taken.
    prompt : str
        Text to measure with; its length does not matter where prompts are padded.
    """
    import pandas as pd
    import torch

    from .denoise import Denoiser, image_generator
    from .provenance import versions

    sizes = [integer("batch_sizes", size, 1) for size in batch_sizes]
    repeats = integer("repeats", repeats, 1)
    denoiser = Denoiser(pipeline, settings)
    n_steps = denoiser.settings.n_steps
    text = denoiser.encode([prompt])
    middle = n_steps // 2

    def parts(size: int) -> dict[str, Callable[[], Any]]:
        row = text.take([0] * size)
        start = denoiser.noise([image_generator(0, 0, image) for image in range(size)])
        moved = denoiser.run(start, row, middle - 1) if middle else start
        images = denoiser.decode(moved.latents)
        found: dict[str, Callable[[], Any]] = {
            "step": lambda: denoiser.run(moved, row, middle),
            "decode": lambda: denoiser.decode(moved.latents),
            "verify": lambda: reward.score(prompt, images, check=False, batch_size=size),
        }
        if decoder is not None:
            found["preview_decode"] = lambda: denoiser.decode(moved.latents, decoder)
        return found

    def seconds(function: Callable[[], Any], size: int) -> list[float]:
        times = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) / size)
        return times[1:]

    single = parts(1)
    reward.score(
        prompt, denoiser.decode(denoiser.noise([image_generator(0, 0, 0)]).latents), check=False
    )  # text cached
    tflops = {name: count_tflops(function) for name, function in single.items()}
    per_prompt = count_tflops(lambda: denoiser.encode([prompt])) + count_tflops(lambda: reward.encode_text([prompt]))
    rows = []
    latest: dict[str, float] = {}
    for size in sizes:
        for name, function in parts(size).items():
            times = seconds(function, size)
            latest[name] = statistics.median(times)
            rows.append(
                {"batch_size": size, "part": name, "seconds": latest[name], "low": min(times), "high": max(times)}
            )
    text_s = statistics.median(seconds(lambda: denoiser.encode([prompt]), 1))
    facts = {
        "pipeline": type(pipeline).__name__,
        "model": str(getattr(pipeline.config, "_name_or_path", "")).rsplit("/", 1)[-1],
        "reward": reward.name,
        "device": str(denoiser.device),
        "dtype": str(denoiser.dtype),
        "settings": denoiser.settings.to_dict(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    return Measurement(
        CostModel(**tflops, per_prompt=per_prompt, n_steps=n_steps),
        CostModel(**latest, per_prompt=float(np.round(text_s, 9)), n_steps=n_steps, unit="seconds"),
        pd.DataFrame(rows),
        facts,
    )
