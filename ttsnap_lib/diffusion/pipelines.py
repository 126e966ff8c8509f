"""Loads a text-to-image pipeline by name, folder or hub id, and says clearly why it cannot.

FLUX.1-dev on a card of 24 GB: its transformer alone fills the card in bf16 (12 billion weights). Keep the weights in
8 bits, compute in bf16, and let the text encoders make room: ``load_pipeline("black-forest-labs/FLUX.1-dev",
dtype="bf16", fp8=True, offload="model")`` (about 12 GB for the transformer). Without the 8 bits,
``offload="sequential"`` fits any card but is many times slower. Both are untested so far.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
from collections.abc import Iterator
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
from diffusers.utils import logging as diffusers_logging
from packaging.version import Version

from ttsnap_lib.checks import as_device, choice
from ttsnap_lib.diffusion.families import ADAPTERS, adapter_of
from ttsnap_lib.diffusion.schedulers import schedulable
from ttsnap_lib.errors import ConfigError, DeviceError, PipelineError
from ttsnap_lib.files import as_path, failures_as
from ttsnap_lib.style import quiet_loading

# The old name of the argument draws a warning since diffusers 0.42.
_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


_OWN_ENTRY = re.compile(r"\{'block_out_channels': [\[(][^\])]*[\])]\} were passed to AutoencoderTiny")


POCKET_MODELS = ("pocket-flux", "pocket-sdxl")


KNOWN_IDS = (
    *POCKET_MODELS,
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.1-schnell",
    "SG161222/RealVisXL_V4.0",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "stabilityai/stable-diffusion-3.5-medium",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
)
"""Names that a misspelt one is compared with."""


def explain(source: str, is_folder: bool, error: Exception) -> PipelineError:
    """Return the error that says what `error`, raised by ``from_pretrained(source)``, means and what to do."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    names = {cls.__name__ for one in chain for cls in type(one).__mro__}
    text = " ".join(str(one) for one in chain)
    if is_folder:
        what = (
            "no model_index.json"
            if not (Path(source) / "model_index.json").exists()
            else "files that are missing or broken"
        )
        return PipelineError(
            f"folder {source} cannot be loaded: {what} ({type(error).__name__}: {_first_line(error)}): got {source!r}, "
            "expected a whole folder written by save_pretrained. Save the pipeline again, or download it whole."
        )
    if "GatedRepoError" in names or "gated" in text.lower():
        return PipelineError(
            f"{source} is gated: its owner wants a licence accepted first: got {source!r}, expected a model that you "
            f"may download. Log in and accept the licence at https://huggingface.co/{source}, make an access token, "
            "and set it as HF_TOKEN (or run `hf auth login`)."
        )
    if {"RepositoryNotFoundError", "RevisionNotFoundError"} & names or "not a valid model identifier" in text:
        close = difflib.get_close_matches(source, KNOWN_IDS, n=1, cutoff=0.5)
        hint = (
            f"Did you mean {close[0]!r}?"
            if close and close[0] != source
            else "Check the spelling of name and revision."
        )
        return PipelineError(
            f"the hub has no {source}, or not that revision: got {source!r}, expected an existing model. {hint} A "
            "private model needs HF_TOKEN."
        )
    offline = {
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectionError",
        "ConnectTimeout",
        "Timeout",
        "HTTPError",  # the hub's own errors, of requests below 1.0 and of httpx from there on
        "TransportError",
    }
    if offline & names or "connect" in text.lower() or "offline" in text.lower():
        return PipelineError(
            f"{source} is not on this machine and cannot be downloaded: got {source!r}, expected a model in the cache, "
            f"a folder, or a network. Where there is a network, run `hf download {source}`, and give the folder it "
            "prints as the model, or copy the cache (HF_HOME). The pocket models need no download."
        )
    return PipelineError(
        f"{source} cannot be loaded ({type(error).__name__}: {_first_line(error)}): got {source!r}, expected a whole "
        "model of the diffusers library. See the error above this one; `hf download` it again if a file is broken."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


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
            f"offload without an accelerator: got {offload!r}, expected 'none' on the CPU. Leave offload out."
        )
    if isinstance(scheduler, str):
        choice("scheduler", scheduler, SCHEDULERS)
    source, is_folder = _source(model)
    options = {} if is_folder else {"revision": revision}
    kind = _class_name(source, is_folder, options)
    if kind not in ADAPTERS:
        raise PipelineError(
            f"{model} is a {kind}, which is not supported: got {kind!r}, expected one of {list(ADAPTERS)}. Use a "
            "text-to-image model of one of these families."
        )
    bar = diffusers_logging.is_progress_bar_enabled()
    if is_folder:  # nothing is fetched: a bar would only be in the way
        diffusers_logging.disable_progress_bar()
    try:
        with quiet_loading() if is_folder else contextlib.nullcontext():
            pipeline = DiffusionPipeline.from_pretrained(source, variant=variant, **{_DTYPE: number}, **options)
    except Exception as error:  # many libraries below, each with its own errors
        raise explain(source, is_folder, error) from error
    finally:
        if bar:
            diffusers_logging.enable_progress_bar()
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
        raise ConfigError(f"model: got {model!r}, expected a name, a folder or a hub id. For example {KNOWN_IDS[0]!r}.")
    if model in POCKET_MODELS:
        from ttsnap_lib.pocket import pocket_folder

        folder = Path(pocket_folder(model))
        if not (folder / "model_index.json").exists():
            raise PipelineError(
                f"{model} is not in {folder}: got {folder}, expected the folder that the repository and the wheel "
                "bring. Install the package again, or train the pocket models with `make pocket`."
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
            f"{'unknown model' if not path.exists() else 'model is a file, not a folder'}: got {named!r}, expected one "
            f"of {list(POCKET_MODELS)}, a folder written by save_pretrained, or a hub id (owner/name). "
            f"{f'Did you mean {close[0]!r}?' if close else 'Check the spelling and the folder.'}"
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
                f"scheduler: got {wanted!r}, expected one of {list(SCHEDULERS)} or a diffusers scheduler. Use a name."
            )
        return wanted
    cls, options = SCHEDULERS[wanted]
    flow = isinstance(own, FlowMatchEulerDiscreteScheduler)
    if flow and cls in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        options = {**options, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": own.shift}
    elif flow != (cls is FlowMatchEulerDiscreteScheduler):
        raise ConfigError(
            f"scheduler does not fit this model: got {wanted!r}, expected "
            f"{'flow-euler, dpm++ or unipc' if flow else 'euler, ddim, dpm++ or unipc'}. The model was trained for "
            f"{'flow matching' if flow else 'diffusion'}."
        )
    return cls.from_config(own.config, **options)


def _defaults(source: str) -> dict[str, Any]:
    """Return the size, guidance and text length that a pocket pipeline was made for; FLUX's own default is 512 px."""
    from ttsnap_lib.pocket import POCKET_DEFAULTS, pocket_folder

    name = next((name for name in POCKET_MODELS if Path(source).resolve() == Path(pocket_folder(name)).resolve()), None)
    return {key: value for key, value in POCKET_DEFAULTS.get(name or "", {}).items() if key in _DEFAULT_KEYS}


def _commit(model: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision


def pipeline_facts(denoiser: Any) -> dict[str, Any]:
    """Return what ran: model, pipeline, scheduler, device, precision."""
    pipeline = denoiser.pipeline
    return {
        **pipeline_source(pipeline),
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "device": str(denoiser.device),
        "dtype": str(denoiser.dtype).removeprefix("torch."),
    }


@contextlib.contextmanager
def _without_false_alarm() -> Iterator[None]:
    """Keep diffusers quiet about the entry that it writes itself into every saved AutoencoderTiny."""
    log = logging.getLogger("diffusers.configuration_utils")

    def other(record: logging.LogRecord) -> bool:
        return not _OWN_ENTRY.search(record.getMessage())

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def load_decoder(source: Any, pipeline: Any) -> Any:
    """Return the decoder that `source` names, on the device and in the precision of the pipeline's VAE.

    Parameters
    ----------
    source : None, str, Path or module
        None gives None; ``"pocket-tiny"``, a folder or a hub id is loaded; a module is taken as it is.
    pipeline : diffusers pipeline
        Whose latents are decoded.

    Raises
    ------
    PipelineError
        A source that cannot be loaded, or a decoder of other latents.
    """
    if source is None:
        return None
    decoder = source
    if isinstance(source, str | Path):
        from diffusers import AutoencoderTiny

        from ttsnap_lib.pocket import POCKET_MODELS, pocket_folder

        place = pocket_folder(str(source)) if str(source) in POCKET_MODELS else source
        with failures_as(
            PipelineError,
            f"tiny decoder cannot be loaded: got {source}, expected a folder or hub id of an AutoencoderTiny. "
            "pocket-tiny for the pocket models, madebyollin/taef1 for FLUX, madebyollin/taesdxl for SDXL."
        ), _without_false_alarm():  # fmt: skip
            decoder = AutoencoderTiny.from_pretrained(place, **{_DTYPE: pipeline.vae.dtype})
        decoder = decoder.to(pipeline._execution_device).eval()
    channels = [getattr(getattr(one, "config", None), "latent_channels", None) for one in (decoder, pipeline.vae)]
    if channels[0] != channels[1]:
        raise PipelineError(
            f"decoder of other latents: got {channels[0]!r}, expected {channels[1]} latent channels, as the pipeline "
            "has. Use the tiny decoder that was made for this model."
        )  # fmt: skip
    return decoder
