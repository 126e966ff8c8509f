"""Loads a text-to-image pipeline by name, folder or hub id, and says clearly why it cannot.

FLUX.1-dev on a card of 24 GB: its transformer alone fills the card in bf16 (12 billion weights). Keep the weights in
8 bits, compute in bf16, and let the text encoders make room: ``load_pipeline("black-forest-labs/FLUX.1-dev",
dtype="bf16", fp8=True, offload="model")`` (about 12 GB for the transformer). Without the 8 bits,
``offload="sequential"`` fits any card but is many times slower. Both are untested so far.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging

from ._adapters import ADAPTERS, adapter_of
from ._devices import as_device
from ._load_errors import KNOWN_IDS, POCKET_MODELS, explain
from ._reading import as_path
from ._segments import schedulable
from .checks import choice
from .errors import ConfigError, DeviceError, PipelineError

__all__ = ["POCKET_MODELS", "SCHEDULERS", "load_pipeline", "pipeline_source"]

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flow-euler": (FlowMatchEulerDiscreteScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
}
"""Names for `scheduler`: the class, and the options that latents need."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEFAULT_KEYS = ("guidance", "height", "width", "max_sequence_length")


def load_pipeline(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    variant: str | None = None,
    offload: str = "none",
    fp8: bool = False,
    scheduler: str | Any | None = None,
) -> DiffusionPipeline:
    """Load a pipeline with ``from_pretrained``, whatever `model` is.

    Parameters
    ----------
    model : str or Path
        ``"pocket-flux"`` or ``"pocket-sdxl"``, a folder written by ``save_pretrained``, or a hub id.
    device : str
        ``"auto"`` (cuda, else mps, else cpu) or a torch device.
    dtype : str or torch.dtype
        ``"fp32"``, ``"bf16"``, ``"fp16"``; ``"auto"`` is fp32 on the CPU, bf16 on an accelerator (fp16 where it has none).
    revision, variant : str, optional
        Commit, branch or tag, and file variant (such as ``"fp16"``) of a hub id.
    offload : {"none", "model", "sequential"}
        Keep components, or single layers, in main memory until they are needed. Needs an accelerator; untested so far.
    fp8 : bool
        Keep the denoising model's weights in 8-bit floats and compute in `dtype`: half the memory of bf16.
    scheduler : str or diffusers scheduler, optional
        A name of :data:`SCHEDULERS`, built with the configuration of the pipeline's own; or a scheduler.

    Returns
    -------
    diffusers.DiffusionPipeline
        Ready for :class:`~ttsnap_lib.denoise.Denoiser`.

    Raises
    ------
    PipelineError
        Unknown, unreachable, gated, incomplete, or not a text-to-image pipeline that is supported.
    DeviceError
        A device that is not there, or offload without an accelerator.
    ConfigError
        A bad option.
    """
    place = as_device(device)
    number = _dtype(dtype, place)
    choice("offload", offload, ("none", "model", "sequential"))
    if offload != "none" and place.type == "cpu":
        raise DeviceError(
            "offload without an accelerator", value=offload, bound="'none' on the CPU", remedy="Leave offload out."
        )
    if isinstance(scheduler, str):
        choice("scheduler", scheduler, SCHEDULERS)
    source, is_folder = _source(model)
    options = {} if is_folder else {"revision": revision}
    kind = _class_name(source, is_folder, options)
    if kind not in ADAPTERS:
        raise PipelineError(
            f"{model} is a {kind}, which is not supported",
            bound=f"one of {list(ADAPTERS)}",
            value=kind,
            remedy="Use a text-to-image model of one of these families.",
        )
    bar = logging.is_progress_bar_enabled()
    if is_folder:  # nothing is fetched: a bar would only be in the way
        logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=number, variant=variant, **options)
    except Exception as error:  # many libraries below, each with its own errors
        raise explain(source, is_folder, error) from error
    finally:
        if bar:
            logging.enable_progress_bar()
    adapter = adapter_of(pipeline)
    if scheduler is not None:
        pipeline.scheduler = _scheduler(scheduler, pipeline.scheduler)
    schedulable(pipeline.scheduler)
    if fp8:
        adapter.component(pipeline).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=number)
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=place)
    else:
        pipeline.to(place)
    pipeline.ttsnap_defaults = _defaults(source) if is_folder else {}
    pipeline.ttsnap_source = {"model": str(model), "revision": None if is_folder else _commit(source, revision)}
    return pipeline


def pipeline_source(pipeline: Any) -> dict[str, str | None]:
    """Return ``{"model": ..., "revision": ...}`` of a pipeline, for a manifest."""
    found = getattr(pipeline, "ttsnap_source", None)
    return dict(found) if found else {"model": getattr(pipeline, "name_or_path", "") or "unnamed", "revision": None}


def _dtype(name: Any, place: torch.device) -> torch.dtype:
    if isinstance(name, torch.dtype) and name in _DTYPES.values():
        return name
    choice("dtype", name, ("auto", *_DTYPES))
    if name != "auto":
        return _DTYPES[name]
    if place.type == "cpu":
        return torch.float32
    return torch.float16 if place.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16


def _source(model: Any) -> tuple[str, bool]:
    """Return what from_pretrained takes, and whether it is a folder."""
    if not isinstance(model, str | Path) or not str(model).strip():
        raise ConfigError(
            "model", value=model, bound="a name, a folder or a hub id", remedy=f"For example {KNOWN_IDS[0]!r}."
        )
    if model in POCKET_MODELS:
        from .pocket import pocket_folder

        folder = Path(pocket_folder(model))
        if not (folder / "model_index.json").exists():
            raise PipelineError(
                f"{model} is not in {folder}",
                bound="the folder that the repository and the wheel bring",
                value=str(folder),
                remedy="Install the package again, or train the pocket models with `make pocket`.",
            )
        return str(folder), True
    path = as_path("model", model).expanduser()
    if path.is_dir():
        return str(path), True
    named = str(model)
    looks_like_id = named.count("/") == 1 and not named.startswith((".", "/", "~")) and not isinstance(model, Path)
    if not looks_like_id or path.exists():
        close = difflib.get_close_matches(named, KNOWN_IDS, n=1, cutoff=0.5)
        raise PipelineError(
            "unknown model" if not path.exists() else "model is a file, not a folder",
            value=named,
            bound=f"one of {list(POCKET_MODELS)}, a folder written by save_pretrained, or a hub id (owner/name)",
            remedy=f"Did you mean {close[0]!r}?" if close else "Check the spelling and the folder.",
        )
    return named, False


def _class_name(source: str, is_folder: bool, options: dict[str, Any]) -> str:
    """Return the pipeline's class from model_index.json, before any weights are fetched."""
    try:
        # A list names a class in a file of the folder: code that is not run.
        return str(DiffusionPipeline.load_config(source, **options).get("_class_name", "pipeline without a class name"))
    except Exception as error:
        raise explain(source, is_folder, error) from error


def _scheduler(wanted: Any, own: Any) -> Any:
    if not isinstance(wanted, str):
        if not isinstance(wanted, diffusers.SchedulerMixin):
            raise ConfigError(
                "scheduler",
                value=wanted,
                bound=f"one of {list(SCHEDULERS)} or a diffusers scheduler",
                remedy="Use a name.",
            )
        return wanted
    cls, options = SCHEDULERS[wanted]
    flow = isinstance(own, FlowMatchEulerDiscreteScheduler)
    if flow and cls in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        options = {**options, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": own.shift}
    elif flow != (cls is FlowMatchEulerDiscreteScheduler):
        raise ConfigError(
            "scheduler does not fit this model",
            value=wanted,
            bound="flow-euler, dpm++ or unipc" if flow else "euler, ddim, dpm++ or unipc",
            remedy=f"The model was trained for {'flow matching' if flow else 'diffusion'}.",
        )
    return cls.from_config(own.config, **options)


def _defaults(source: str) -> dict[str, Any]:
    """Return the size, guidance and text length that a pocket pipeline was made for; FLUX's own default is 512 px."""
    from .pocket import POCKET_DEFAULTS, pocket_folder

    name = next((name for name in POCKET_MODELS if Path(source).resolve() == Path(pocket_folder(name)).resolve()), None)
    return {key: value for key, value in POCKET_DEFAULTS.get(name or "", {}).items() if key in _DEFAULT_KEYS}


def _commit(model: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision
