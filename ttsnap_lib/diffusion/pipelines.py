"""Loads a text-to-image pipeline or a decoder by name, folder or hub id, and says clearly why it cannot.

FLUX.1-dev fits a card of 24 GB with ``dtype="bf16", fp8=True, offload="model"``; not run on such a card yet.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import warnings
from collections.abc import Iterator, Sequence
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

from ttsnap_lib.checks import as_device, as_dtype, choice
from ttsnap_lib.diffusion.compiling import COMPILE, compile_decoder, compile_pipeline, compile_told
from ttsnap_lib.diffusion.families import ADAPTERS, adapter_of, unsupported
from ttsnap_lib.diffusion.modular import FACES, load_modular
from ttsnap_lib.diffusion.schedulers import schedulable
from ttsnap_lib.diffusion.weights import SINGLE_FILE, load_loras, load_single_file
from ttsnap_lib.errors import ConfigError, DeviceError, PipelineError
from ttsnap_lib.files import as_path, failures_as, reason
from ttsnap_lib.pocket import POCKET_DEFAULTS, pocket_folder, world
from ttsnap_lib.style import quiet_loading

# The old name of the argument draws a warning since diffusers 0.42.
_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"

POCKET_PIPELINES = ("pocket-flux", "pocket-sdxl")
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flow-euler": (FlowMatchEulerDiscreteScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
}
"""Names for `scheduler`: the class, and the options that latents need."""

_KNOWN_IDS = (  # what a misspelt name is compared with
    *POCKET_PIPELINES, "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell",
    "SG161222/RealVisXL_V4.0", "stabilityai/stable-diffusion-xl-base-1.0",
    "stabilityai/stable-diffusion-3.5-medium", "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "black-forest-labs/FLUX.1-Krea-dev", "black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-klein-4B",
    "black-forest-labs/flux-3-image-klein-base", "black-forest-labs/flux-3-image-klein",
    "Qwen/Qwen-Image", "Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo", "Alpha-VLLM/Lumina-Image-2.0",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers", "lodestones/Chroma1-HD", "HiDream-ai/HiDream-I1-Full",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
)  # fmt: skip
_DEFAULT_KEYS = ("guidance", "height", "width", "max_sequence_length")
_OFFLINE = {
    "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectTimeout", "Timeout", "HTTPError",
    "TransportError",  # of the hub since it speaks httpx
}  # fmt: skip


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
    compile: str | None = None,
    base: str | None = None,
    lora: str | Sequence[str] = (),
) -> DiffusionPipeline:
    """Load a pipeline, whatever `model` is.

    Parameters
    ----------
    model : str or Path
        ``"pocket-flux"`` or ``"pocket-sdxl"``, a folder written by ``save_pretrained``, a hub id, or one file of
        weights (``.safetensors``).
    device : str
        ``"auto"`` (cuda, else mps, else cpu) or a torch device.
    dtype : str or torch.dtype
        ``"fp32"``, ``"bf16"``, ``"fp16"``; ``"auto"`` is fp32 on the CPU, bf16 on an accelerator (fp16 where it has none).
    revision, variant : str, optional
        Commit, branch or tag, and file variant (such as ``"fp16"``) of a hub id.
    offload : {"none", "model", "sequential"}
        Keep components, or single layers, in main memory until they are needed. Needs an accelerator.
    fp8 : bool
        Keep the denoising model's weights in 8-bit floats and compute in `dtype`: half the memory of bf16.
    scheduler : str or diffusers scheduler, optional
        A name of :data:`SCHEDULERS`, built with the configuration of the pipeline's own; or a scheduler.
    compile : {"blocks", "whole"}, optional
        Compile the denoising model with torch.compile at its first run: the blocks it repeats (20 to 40 s once), or all
        of it with CUDA graphs, for batches padded to 1, 2, 4, 8, ... images. The VAE's decoder, and a tiny one loaded
        for this pipeline, are compiled too. What cannot be compiled runs as it is, with a warning.
    base : str, optional
        For one file of weights: the folder or hub id that gives what the file lacks; by default the repository that
        diffusers names for its kind.
    lora : str or sequence of str
        LoRA adapters: file, folder or hub id, with ``:scale`` behind it where that is not 1.

    Returns
    -------
    diffusers.DiffusionPipeline
        Ready for :class:`~ttsnap_lib.diffusion.denoise.Denoiser`.

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
    if choice("offload", offload, ("none", "model", "sequential")) != "none" and place.type == "cpu":
        raise DeviceError(f"offload without an accelerator: got {offload!r}, expected 'none'. Leave offload out.")
    if isinstance(scheduler, str):
        choice("scheduler", scheduler, SCHEDULERS)
    if compile is not None:
        choice("compile", compile, COMPILE)
    source, is_folder = _source(model)
    options = {} if is_folder else {"revision": revision}
    bar = diffusers_logging.is_progress_bar_enabled()
    if is_folder:  # nothing is fetched: a bar would only be in the way
        diffusers_logging.disable_progress_bar()
    single = source.endswith(SINGLE_FILE) and not is_folder
    if base is not None and not single:
        raise ConfigError(f"base: got {base!r} for a model that is not one {SINGLE_FILE} file. Leave it out.")
    try:
        # The index names the class before any weights are fetched. (A list would name code of the folder: not run.)
        index = {} if single else _index(source, options)
        kind = str(index.get("_class_name", "pipeline without a class name"))
        if single:
            pipeline = load_single_file(Path(source), base, **{_DTYPE: number})
            kind = type(pipeline).__name__
        elif kind in FACES:
            with quiet_loading() if is_folder else contextlib.nullcontext():
                pipeline = load_modular(kind, source, options, **{_DTYPE: number})
        elif kind in ADAPTERS:
            with quiet_loading() if is_folder else contextlib.nullcontext():
                pipeline = DiffusionPipeline.from_pretrained(source, variant=variant, **{_DTYPE: number}, **options)
    except PipelineError:
        raise
    except Exception as error:  # many libraries below, each with its own errors
        raise _explained(base or source, is_folder, error) from error
    finally:
        if bar:
            diffusers_logging.enable_progress_bar()
    if kind not in ADAPTERS:
        raise PipelineError(unsupported(f"model {model}", kind))
    adapter = adapter_of(pipeline)
    if scheduler is not None:
        pipeline.scheduler = _scheduler(scheduler, pipeline.scheduler)
    schedulable(pipeline.scheduler)
    if lora:
        load_loras(pipeline, lora)
    if fp8:
        adapter.component(pipeline).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=number)
    if offload != "none" and kind in FACES:
        raise DeviceError(
            f"offload: got {offload!r} for a {kind}, whose parts a ComponentsManager of diffusers moves. Load it yourself with "
            "enable_auto_cpu_offload() and pass the object."
        )
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=place)
    elif place.type != "cpu":  # where it is already; `to` would warn of fp16 there, once for every part
        pipeline.to(place)
    if compile is not None:
        compile_pipeline(pipeline, compile)
    pipeline.ttsnap_defaults = {**getattr(pipeline, "ttsnap_defaults", {}), **(_defaults(source) if is_folder else {})}
    commit = None if is_folder or single else _commit(source, revision)
    more = {"base": base, "lora_from": [lora] if isinstance(lora, str) else list(lora)}
    told = {key: value for key, value in more.items() if value}
    pipeline.ttsnap_source = {"model": str(model), "revision": commit, **told}
    return pipeline


def load_decoder(source: Any, pipeline: Any) -> Any:
    """Return the decoder that `source` names, on the device and in the precision of the pipeline's VAE.

    None gives None; ``"pocket-tiny"``, a folder or a hub id of an AutoencoderTiny is loaded; a module is taken as it is.
    PipelineError when it cannot be loaded, or when it decodes other latents.
    """
    if source is None:
        return None
    decoder = source
    if isinstance(source, str | Path):
        place = pocket_folder("pocket-tiny") if str(source) == "pocket-tiny" else source
        message = (
            f"tiny decoder: got {source}, expected a folder or hub id of an AutoencoderTiny. Use pocket-tiny for the "
            "pocket models, madebyollin/taef1 for FLUX, madebyollin/taesdxl for SDXL."
        )
        with failures_as(PipelineError, message), _without_false_alarm():
            decoder = diffusers.AutoencoderTiny.from_pretrained(place, **{_DTYPE: pipeline.vae.dtype})
        decoder = decoder.to(pipeline._execution_device).eval()
    if getattr(pipeline, "ttsnap_compile", "") and isinstance(decoder, diffusers.AutoencoderTiny):
        compile_decoder(decoder)
    given, own = (getattr(getattr(one, "config", None), "latent_channels", None) for one in (decoder, pipeline.vae))
    if given != own:
        raise PipelineError(
            f"decoder: got {given} latent channels, expected {own}, as the pipeline has. Use one made for this model."
        )
    return decoder


def pipeline_source(pipeline: Any) -> dict[str, Any]:
    """Return ``{"model": ..., "revision": ...}`` of a pipeline, for a manifest, with base and LoRA where it has them."""
    found = getattr(pipeline, "ttsnap_source", None)
    return dict(found) if found else {"model": getattr(pipeline, "name_or_path", "") or "unnamed", "revision": None}


def tell_outside(pipeline: Any, prompts: Sequence[str]) -> None:
    """Warn once when a pocket pipeline gets prompts of which it has learned nothing."""
    if str(pipeline_source(pipeline)["model"]) not in POCKET_PIPELINES:
        return
    told = [found for found in map(world.outside, prompts) if found]
    if told:
        others = len(told) - 1
        more = f", and {others} more prompt{'s are' if others > 1 else ' is'} outside its world" if others else ""
        warnings.warn(f"the pocket model {told[0]}{more}", stacklevel=3)


def pipeline_facts(denoiser: Any) -> dict[str, Any]:
    """Return what ran: model, pipeline, scheduler, device, precision, and how it was compiled."""
    pipeline = denoiser.pipeline
    return {
        **pipeline_source(pipeline),
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "device": str(denoiser.device),
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        **({"compile": told} if (told := compile_told(pipeline)) else {}),
    }


def _index(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the index of a pipeline folder or hub id, or that of a modular pipeline where there is no other."""
    try:
        return DiffusionPipeline.load_config(source, **options)
    except OSError as error:
        offline = type(error.__context__).__name__ == "LocalEntryNotFoundError"
        if offline or "file named" not in str(error):
            raise
        with contextlib.suppress(OSError, AttributeError):  # diffusers too old for modular ones
            return diffusers.ModularPipeline.load_config(source, **options)
        raise


def _dtype(name: Any, place: torch.device) -> torch.dtype:
    if name != "auto":
        return as_dtype(name)
    if place.type == "cpu":
        return torch.float32
    return torch.float16 if place.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16


def _source(model: Any) -> tuple[str, bool]:
    """Return what from_pretrained takes, and whether it is a folder."""
    if not isinstance(model, str | Path) or not str(model).strip():
        raise ConfigError(f"model: got {model!r}, expected a name, a folder or a hub id. Try {POCKET_PIPELINES[0]!r}.")
    if model in POCKET_PIPELINES:
        return str(pocket_folder(str(model))), True
    path = as_path("model", model).expanduser()
    if path.is_dir():
        return str(path), True
    if path.is_file() and path.suffix == SINGLE_FILE:
        return str(path), False
    named = str(model)
    looks_like_id = named.count("/") == 1 and not named.startswith((".", "/", "~")) and not isinstance(model, Path)
    if not looks_like_id or path.exists():
        raise PipelineError(
            f"{'unknown model' if not path.exists() else 'model is a file of another kind'}: got {named!r}, expected one "
            f"of {list(POCKET_PIPELINES)}, a folder written by save_pretrained, a hub id (owner/name), or a "
            f"{SINGLE_FILE} file. "
            f"{_did_you_mean(named) or 'Check the spelling and the folder.'}"
        )
    return named, False


def _did_you_mean(name: str) -> str:
    close = difflib.get_close_matches(name, _KNOWN_IDS, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close and close[0] != name else ""


def _explained(source: str, is_folder: bool, error: Exception) -> PipelineError:
    """Return the error that says what `error`, raised by ``from_pretrained(source)``, means and what to do."""
    if is_folder:
        index = (Path(source) / "model_index.json").exists()
        what = "files that are missing or broken" if index else "no model_index.json"
        return PipelineError(
            f"folder {source} cannot be loaded: {what} ({reason(error)}). Save or download the pipeline again."
        )
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    names = {cls.__name__ for one in chain for cls in type(one).__mro__}
    text = " ".join(str(one) for one in chain)
    if "GatedRepoError" in names or "gated" in text.lower():
        return PipelineError(
            f"{source} is gated: its owner wants a licence accepted first. Log in and accept the licence at "
            f"https://huggingface.co/{source}, make an access token, and set it as HF_TOKEN (or run `hf auth login`)."
        )
    if {"RepositoryNotFoundError", "RevisionNotFoundError"} & names or "not a valid model identifier" in text:
        hint = _did_you_mean(source) or "Check the spelling of name and revision."
        return PipelineError(f"the hub has no {source}, or not that revision. {hint} A private model needs HF_TOKEN.")
    if _OFFLINE & names or "connect" in text.lower() or "offline" in text.lower():
        return PipelineError(
            f"{source} is not on this machine and cannot be downloaded. Where there is a network, run "
            f"`hf download {source}`, and give the folder it prints as the model. The pocket models need no download."
        )
    return PipelineError(f"{source} cannot be loaded ({reason(error)}). `hf download` it again if a file is broken.")


def _scheduler(wanted: Any, own: Any) -> Any:
    if not isinstance(wanted, str):
        if not isinstance(wanted, diffusers.SchedulerMixin):
            raise ConfigError(f"scheduler: got {wanted!r}, expected one of {list(SCHEDULERS)}. Use a name.")
        return wanted
    cls, options = SCHEDULERS[wanted]
    flow = isinstance(own, FlowMatchEulerDiscreteScheduler)
    if flow and cls in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        options = {**options, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": own.shift}
    elif flow != (cls is FlowMatchEulerDiscreteScheduler):
        raise ConfigError(
            f"scheduler: got {wanted!r}, expected {'flow-euler' if flow else 'euler, ddim'}, dpm++ or unipc, since the "
            f"model was trained for {'flow matching' if flow else 'diffusion'}. Choose one of these."
        )
    return cls.from_config(own.config, **options)


def _defaults(source: str) -> dict[str, Any]:
    """Return the size, guidance and text length that a pocket pipeline was made for; FLUX's own default is 512 px."""
    name = next((name for name in POCKET_PIPELINES if Path(source).resolve() == pocket_folder(name).resolve()), "")
    return {key: value for key, value in POCKET_DEFAULTS.get(name, {}).items() if key in _DEFAULT_KEYS}


def _commit(model: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "model_index.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision


@contextlib.contextmanager
def _without_false_alarm() -> Iterator[None]:
    """Keep diffusers quiet about the entry that it writes itself into every saved AutoencoderTiny."""
    log = logging.getLogger("diffusers.configuration_utils")

    def is_other(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not (text.startswith("The config attributes {'block_out_channels':") and text.count("':") == 1)

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)
