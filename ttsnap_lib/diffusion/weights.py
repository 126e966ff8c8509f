"""Weights that are not a pipeline of their own: a model in a single file, and LoRA adapters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    CHECKPOINT_KEY_NAMES,
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    infer_diffusers_model_type,
)
from safetensors import safe_open

from ttsnap_lib.diffusion.families import ADAPTERS, unsupported
from ttsnap_lib.errors import ConfigError, PipelineError
from ttsnap_lib.files import failures_as

SINGLE_FILE = ".safetensors"
_WHOLE = (
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
)  # a file with these has the VAE and the text encoders too


def load_single_file(path: Path, base: str | None, **options: Any) -> Any:
    """Return the pipeline whose weights are in one file of their first authors' layout, or of diffusers'.

    What the file lacks (configurations, and where it holds the denoising model alone also the VAE and text encoders)
    comes from `base`, a folder or hub id; by default the repository that diffusers names for this kind of file.
    """
    unreadable = f"model {path} cannot be read as {SINGLE_FILE}. Download it again."
    with failures_as(PipelineError, unreadable), safe_open(path, "pt") as file:  # the heading alone
        names = file.keys()
        shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    base = base or _base_of(path, shapes)
    index = diffusers.DiffusionPipeline.load_config(base)
    kind = str(index.get("_class_name"))
    if kind not in ADAPTERS:
        raise PipelineError(unsupported(f"base {base}", kind))
    message = f"model {path} is not in one of the layouts of {kind}. Use a file made for {base}, or name its own base."
    with failures_as(PipelineError, message):
        if any(key.startswith(_WHOLE) for key in shapes):
            return getattr(diffusers, kind).from_single_file(str(path), config=base, **options)
        part = ADAPTERS[kind].model
        model = getattr(diffusers, index[part][1]).from_single_file(str(path), config=base, subfolder=part, **options)
    if any(value.device.type == "meta" for value in model.state_dict().values()):
        raise PipelineError(message)
    return diffusers.DiffusionPipeline.from_pretrained(base, **{part: model}, **options)


def _base_of(path: Path, shapes: dict[str, torch.Tensor]) -> str:
    """Return the repository that diffusers names for a file with weights of these names and shapes."""
    try:
        kind = infer_diffusers_model_type(shapes)
    except (KeyError, IndexError, UnboundLocalError):  # nearly a kind that it knows
        kind = "v1"
    known = {one: adapter.pipeline for adapter in ADAPTERS.values() for one in adapter.single_files}
    if kind not in known or (kind == "v1" and CHECKPOINT_KEY_NAMES["v1"] not in shapes):  # "v1" is also its last guess
        told = "of no family that is known" if kind == "v1" else f"those of {kind}, which is not supported"
        raise PipelineError(
            f"model {path}: its weights are {told}. If it belongs to one of {list(ADAPTERS)}, name the folder or hub id of "
            "that model as its base."
        )
    return DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


def load_loras(pipeline: Any, sources: str | Sequence[str]) -> None:
    """Load LoRA adapters into `pipeline`: each a file, folder or hub id, with ``:scale`` behind it where it is not 1."""
    name = type(pipeline).__name__
    scales: dict[str, float] = {}
    if not hasattr(pipeline, "load_lora_weights"):
        raise PipelineError(f"lora: got one for a {name}, which takes none. Leave it out.")
    for source in [sources] if isinstance(sources, str) else sources:
        place, scale = _scaled(source)
        adapter = f"lora_{len(scales)}"
        message = f"LoRA {place} does not fit this {name}. Use one that was made for this model."
        with failures_as(PipelineError, message), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is asked for
            path = Path(place).expanduser()
            pipeline.load_lora_weights(str(path) if path.exists() else place, adapter_name=adapter)
        if not any(
            adapter in adapters for adapters in pipeline.get_list_adapters().values()
        ):  # only logged by diffusers
            raise PipelineError(message)
        scales[adapter] = scale
    pipeline.set_adapters(list(scales), list(scales.values()))


def _scaled(source: str) -> tuple[str, float]:
    place, colon, scale = source.rpartition(":")
    try:
        return (place, float(scale)) if colon and place else (source, 1.0)
    except ValueError:
        raise ConfigError(
            f"lora: got the scale {scale!r} in {source!r}, expected a number. Write PATH_OR_ID:0.8."
        ) from None
