"""Pipelines and their settings, search, generation, cost measurement."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.bad_input.cases_models import reward
from tests.bad_input.drill import Cases
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.diffusion.denoise import Settings
from ttsnap_lib.diffusion.negtome import NegToMe
from ttsnap_lib.diffusion.pipelines import load_pipeline
from ttsnap_lib.live.measure import measure_costs
from ttsnap_lib.live.run import search
from ttsnap_lib.trajectories.generate import generate

CASES = Cases()

# -- pipelines ---------------------------------------------------------------------------------------------------------

CASES.each(
    "pipeline settings",
    Settings.from_dict,
    [
        ("unknown key", {"n_step": 4}, "Did you mean 'n_steps'"),
        ("a number for a mapping", 5, "mapping"),
        ("no steps", {"n_steps": 0}, "n_steps"),
        ("10^9 steps", {"n_steps": 10**9}, "10000"),
        ("size zero", {"height": 0}, "height"),
        ("10^12 pixels", {"height": 10**6, "width": 10**6}, "height x width"),
        ("size as text", {"width": "512"}, "width"),
        ("guidance negative", {"guidance": -1}, "guidance"),
        ("guidance NaN", {"guidance": float("nan")}, "guidance"),
        ("text of 10^6 tokens", {"max_sequence_length": 10**6}, "512"),
        ("negative prompt a list", {"negative_prompt": ["x"]}, "negative_prompt"),
    ],
)
CASES.each(
    "pipeline settings",
    lambda options: NegToMe(**options),
    [
        ("a group of none", {"group_size": 0}, "group_size"),
        ("a cosine of two", {"threshold": 2}, "threshold"),
        ("alpha negative", {"alpha": -1}, "alpha"),
        ("a window turned round", {"start": 100, "end": 900}, "start"),
        ("unknown matching", {"matching": "both"}, "matching"),
    ],
)
CASES.each(
    "pipeline",
    load_pipeline,
    [
        ("misspelt", "pocket-fluks", "Did you mean 'pocket-flux'"),
        ("nothing", "", "model"),
        ("a number", 5, "model"),
        ("a path that is not there", "./none", "none"),
        ("a NUL", "a\0b", "without NUL"),
        ("a name of 5000 letters", "x" * 5000, "at most 255 bytes"),
    ],
)
CASES.each(
    "pipeline",
    lambda options: load_pipeline("pocket-flux", **options),
    [
        ("a device that is none", {"device": "gpu"}, "device"),
        ("a device a number", {"device": 1.5}, "device"),
        ("a type that is none", {"dtype": "fp13"}, "dtype"),
        ("a scheduler that is none", {"scheduler": "eular"}, "Did you mean 'euler'"),
        ("offload on the CPU", {"device": "cpu", "offload": "model"}, "offload"),
    ],
)


@functools.cache
def flux() -> Any:
    """Return the pocket pipeline, loaded once."""
    return load_pipeline("pocket-flux", device="cpu")


def bright(prompts: Any, images: Any) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


SHORT = Settings(n_steps=3)
CASES.each(
    "search",
    lambda changes: search(**{"pipeline": flux(), "prompt": "a cat", "reward": bright, "candidates": 2, **changes}),
    [
        ("a blank prompt", {"prompt": " "}, "prompt"),
        ("a list of prompts", {"prompt": ["a cat"]}, "prompt"),
        ("a pipeline that is none", {"pipeline": 5}, "model|pipeline"),
        ("no reward", {"reward": []}, "reward"),
        ("a reward that is none", {"reward": 5}, "callable"),
        ("the same reward twice", {"reward": [bright, bright]}, "reward|distinct"),
        ("a schedule that is a tuple", {"schedule": (1, 2)}, "schedule"),
        ("a schedule past the end", {"schedule": Schedule((5,), (0.5,)), "settings": SHORT}, "at most 1"),
        ("an unknown method", {"method": "ttsnp"}, "Did you mean"),
        ("ttsnap with a base reward", {"method": "ttsnap", "schedule": Schedule((2,), (0.5,))}, "noise-aware"),
        ("budget and candidates", {"budget": 10.0}, "either budget or candidates"),
        ("a budget without a cost", {"candidates": None, "budget": 10.0}, "cost"),
        ("a cost that is a number", {"cost": 5}, "cost"),
        ("a cost of other steps", {"cost": CostModel(step=1, verify=1, n_steps=7)}, "n_steps"),
        ("10^12 candidates", {"candidates": 10**12}, "1000000"),
        ("seed negative", {"seed": -1}, "seed"),
        ("deadline NaN", {"deadline_s": float("nan")}, "deadline_s"),
        ("deadline zero", {"deadline_s": 0}, "deadline_s"),
        ("batch zero", {"batch_size": 0}, "batch_size"),
        ("weights for a rank sum", {"weights": [1.0]}, "weights"),
        ("a reward reported that is not there", {"report": ["x"]}, "report"),
        ("a decoder that is not there", {"decoder": "./none"}, "decoder"),
        ("a size that the model cannot take", {"settings": Settings(n_steps=3, height=33)}, "multiple"),
        (
            "a negative prompt without guidance",
            {"settings": Settings(n_steps=3, negative_prompt="x")},
            "negative_prompt",
        ),
        ("settings that are a mapping", {"settings": {"n_steps": 3}}, "settings"),
    ],
)
CASES.each(
    "generation",
    lambda changes: generate(
        **{"pipeline": flux(), "prompts": ["a cat"], "on_batch": lambda *given: None, "settings": SHORT, **changes}
    ),
    [
        ("a blank prompt", {"prompts": [" "]}, "blank"),
        ("nowhere to put it", {"on_batch": None}, "folder"),
        ("no images", {"images_per_prompt": 0}, "images_per_prompt"),
        ("10^12 images", {"images_per_prompt": 10**12}, "1000000"),
        ("a step out of range", {"steps": [3]}, "steps"),
        ("seed negative", {"seed": -1}, "seed"),
        ("batch zero", {"batch_size": 0}, "batch_size"),
        ("10^9 rows in a batch", {"batch_size": 10**9}, "65536"),
        ("a shard beyond its count", {"shard": (2, 2)}, "shard"),
        ("no threads", {"cpu_threads": 0}, "cpu_threads"),
        ("no workers", {"workers": 0}, "workers"),
        ("an image that is not wanted", {"only": [(0, 99)]}, "only"),
        ("a format with loss", {"image_format": "jpeg"}, "image_format"),
        ("a pipeline that is none", {"pipeline": 5}, "pipeline"),
        ("a NegToMe group that does not divide", {"negtome": NegToMe(group_size=4), "batch_size": 6}, "multiple"),
    ],
)
CASES.add(
    "generation", "into a file",
    lambda folder: ((folder / "f").write_text("x"), generate(flux(), ["a cat"], folder / "f" / "g")), "cannot write",
)  # fmt: skip
CASES.each(
    "cost measurement",
    lambda changes: measure_costs(**{"pipeline": flux(), "reward": reward(), "settings": SHORT, **changes}),
    [
        ("no batch sizes", {"batch_sizes": []}, "batch_sizes"),
        ("a batch of none", {"batch_sizes": [0]}, "batch_sizes"),
        ("no repeats", {"repeats": 0}, "repeats"),
    ],
)


def model_index(folder: Path, content: Any) -> Any:
    (folder / "model_index.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return load_pipeline(folder)


EVIL = {"_class_name": ["evil", "Pipeline"], "_diffusers_version": "0.39.0"}
PARTS = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}
for what, content, names in [
    ("a folder of another class", {"_class_name": "AudioLDMPipeline"}, "AudioLDMPipeline, which is not supported"),
    ("a folder that brings code", EVIL, "evil.*not supported"),
    ("a folder whose part is code", {"_class_name": "FluxPipeline", "vae": ["evil", "Vae"]}, "'evil'"),
    ("a folder with parts missing", PARTS, "missing or broken"),
    ("an index that is no JSON", "{", "not a valid JSON"),
    ("an index that is a list", [1], "missing or broken"),
    ("an index nested too deep", "[" * 100_000, "missing or broken"),
    ("an index without a class", {}, "without a class name"),
]:
    CASES.add("pipeline", what, lambda folder, content=content: model_index(folder, content), names)
