"""Measures a cost model on the machine at hand: FLOPs and seconds of a step, a decode, a check, the text."""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ttsnap_lib.checks import choice, integer
from ttsnap_lib.costs import MOST_AT_ONCE, CostModel
from ttsnap_lib.diffusion.denoise import Denoiser, image_generator
from ttsnap_lib.diffusion.pipelines import load_decoder, pipeline_facts
from ttsnap_lib.errors import ConfigError, DeviceError
from ttsnap_lib.files import write_json
from ttsnap_lib.provenance import versions
from ttsnap_lib.rewards.loading import load_reward

if TYPE_CHECKING:
    import pandas as pd

_SPAN = 5  # denoising steps timed in one go
_LARGEST = {"cpu": 16}  # as many as a search takes at once by itself
_LARGEST_ON_ACCELERATOR = 64


@dataclass(frozen=True)
class Measurement:
    """What was measured, per candidate."""

    tflops: CostModel
    seconds: CostModel  # each part by batch size; of a single size numbers
    by_batch: pd.DataFrame  # batch size, part (step, decode, preview_decode, verify), seconds, low and high
    facts: dict[str, Any]  # model, reward, device, precision, size, versions

    def cost(self, unit: str = "TFLOPs") -> CostModel:
        """Return the cost model in ``"TFLOPs"`` or ``"seconds"``."""
        return self.tflops if choice("unit", unit, ("TFLOPs", "seconds")) == "TFLOPs" else self.seconds

    def save(self, path: str | Path, unit: str = "TFLOPs") -> Path:
        """Write JSON that :meth:`CostModel.load` reads: the model in `unit` under ``cost``, and everything else."""
        content = {
            "cost": self.cost(unit).to_dict(),
            "tflops": self.tflops.to_dict(),
            "seconds": self.seconds.to_dict(),
            "by_batch": self.by_batch.to_dict("records"),
            "facts": self.facts,
        }
        write_json(path, content)
        return Path(path)


def measure_costs(
    pipeline: Any,
    reward: Any,
    settings: Any = None,
    *,
    decoder: Any = None,
    batch_sizes: Sequence[int] | None = None,
    repeats: int = 3,
    prompt: str = "a photo of a cat",
    metadata: Mapping[str, Any] | None = None,
) -> Measurement:
    """Measure a step, a decode, a check and the text, each alone and by batch size, on the pipeline's device.

    Parameters
    ----------
    pipeline : diffusers pipeline
    reward : Reward, str, callable, or a list of them
        What :func:`ttsnap_lib.rewards.load_reward` takes; of several the check is the sum.
    settings : Settings or mapping, optional
    decoder : AutoencoderTiny, folder, hub id or ``"pocket-tiny"``, optional
        Measured as ``preview_decode``.
    batch_sizes : sequence of int, optional
        At which seconds are measured. By default 1, 2, 4, ... up to what a search takes at once by itself, 16 on a CPU
        and 64 elsewhere. The first that memory has no room for ends the measuring, with a warning.
    repeats : int
        Runs per number, after one to warm up; medians are taken.
    prompt : str
        Text to measure with; its length does not matter where prompts are padded.
    metadata : mapping, optional
        What is known about the prompt beside its words, for rewards that read it.

    Returns
    -------
    Measurement

    Raises
    ------
    ConfigError
        No batch size, or a number out of its range.
    DeviceError
        Not even the smallest batch fits into memory.
    """
    import pandas as pd

    sizes = (
        None if batch_sizes is None else sorted({integer("batch_sizes", size, 1, MOST_AT_ONCE) for size in batch_sizes})
    )
    if sizes == []:
        raise ConfigError("batch_sizes: got none, expected at least one.")
    repeats = integer("repeats", repeats, 1)
    rewards = [load_reward(one) for one in (reward if isinstance(reward, list | tuple) else [reward])]
    denoiser = Denoiser(pipeline, settings)
    decoder = load_decoder(decoder, pipeline)
    if sizes is None:
        largest = _LARGEST.get(denoiser.device.type, _LARGEST_ON_ACCELERATOR)
        sizes = [2**k for k in range(largest.bit_length())]
    n_steps = denoiser.settings.n_steps
    text = denoiser.encode([prompt])
    # A run of several steps: what starting the pipeline takes is spread over them, as in a search.
    span = min(_SPAN, n_steps)

    def parts(size: int) -> dict[str, tuple[Callable[[], Any], int]]:
        """Return by name what is timed, and how many units of it one call does."""
        rows = text.take([0] * size)
        start = denoiser.noise([image_generator(0, 0, image) for image in range(size)])
        images = denoiser.decode(start.latents)
        found: dict[str, tuple[Callable[[], Any], int]] = {
            "step": (lambda: denoiser.run(start, rows, span - 1), span * size),
            "decode": (lambda: denoiser.decode(start.latents), size),
            # In the reward's own batches, as a search scores.
            "verify": (lambda: [one.score(prompt, images, metadata=metadata, check=False) for one in rewards], size),
        }
        if decoder is not None:
            found["preview_decode"] = (lambda: denoiser.decode(start.latents, decoder), size)
        return found

    def seconds(function: Callable[[], Any], units: int) -> list[float]:
        times = []
        for _ in range(repeats + 1):
            denoiser.wait()
            begin = time.perf_counter()
            function()
            denoiser.wait()
            times.append((time.perf_counter() - begin) / units)
        return times[1:]

    def read_text() -> None:
        denoiser.encode([prompt])
        for one in rewards:
            with contextlib.suppress(NotImplementedError):  # a function has no text tower
                one.encode_text([prompt])

    single = parts(1)
    single["verify"][0]()  # the prompt's embedding is kept from here on, as in a search
    tflops: dict[str, Any] = {name: count_tflops(function) / units for name, (function, units) in single.items()}
    if not tflops["verify"]:
        warnings.warn(
            f"scoring by {[one.name for one in rewards]} counts no FLOPs here, because it runs elsewhere or is no model of "
            "torch: a budget in TFLOPs takes its checks for free. Take its seconds (--unit seconds).",
            stacklevel=2,
        )
    rows: list[dict[str, Any]] = []
    for size in sizes:
        try:
            found = {name: seconds(*timed) for name, timed in parts(size).items()}
        except DeviceError as error:
            if not rows:
                raise
            warnings.warn(f"measured up to batch size {rows[-1]['batch_size']}: {error}", stacklevel=2)
            break
        rows += [
            {
                "batch_size": size,
                "part": name,
                "seconds": statistics.median(times),
                "low": min(times),
                "high": max(times),
            }
            for name, times in found.items()
        ]
    tables = {name: {row["batch_size"]: row["seconds"] for row in rows if row["part"] == name} for name in tflops}
    amounts: dict[str, Any] = {name: table if len(table) > 1 else table[sizes[0]] for name, table in tables.items()}
    with torch.no_grad():
        per_prompt = count_tflops(read_text)
        text_s = statistics.median(seconds(read_text, 1))
    facts = {
        **pipeline_facts(denoiser),
        "rewards": [one.name for one in rewards],
        "decoder": None if decoder is None else type(decoder).__name__,
        "settings": denoiser.settings.to_dict(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    return Measurement(
        CostModel(**tflops, per_prompt=per_prompt, n_steps=n_steps),
        CostModel(**amounts, per_prompt=text_s, n_steps=n_steps, unit="seconds"),
        pd.DataFrame(rows),
        facts,
    )


def count_tflops(function: Callable[[], Any]) -> float:
    """Return the TFLOPs of one call, two per multiply-add.

    Torch's counter sees matrix products, convolutions and attention, not elementwise work.
    """
    counter = FlopCounterMode(display=False)
    # The counter knows no fused attention of the CPU, and no compiled code; as plain products it is the same work.
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops() / 1e12
