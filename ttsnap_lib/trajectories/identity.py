"""What decides the bytes of generated images, as plain values: weights by a digest, settings, and what was set at run time."""

from __future__ import annotations

import hashlib
import math
import platform
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ttsnap_lib.diffusion.denoise import Conditioning, Denoiser
from ttsnap_lib.diffusion.families import adapter_of
from ttsnap_lib.diffusion.pipelines import pipeline_source
from ttsnap_lib.diffusion.schedulers import set_at_run_time
from ttsnap_lib.files import digest
from ttsnap_lib.provenance import git_state, now, versions

SEED_RULE = "SeedSequence([seed, prompt, image]).generate_state(1, uint64) & (2**63 - 1), torch CPU generator, fp32"

_SAMPLES = 16  # values of each tensor that go into a digest


def identity_of(denoiser: Denoiser, **more: Any) -> dict[str, Any]:
    """Return everything that decides the bytes of the images, as plain JSON values."""
    pipeline, scheduler = denoiser.pipeline, denoiser.pipeline.scheduler
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    return {
        **pipeline_source(pipeline),
        "weights": weights_digest(pipeline),
        "pipeline": type(pipeline).__name__,
        "scheduler": {"class": type(scheduler).__name__, "config": _plain(config)},
        "sigmas": [float(f"{sigma:.7g}") for sigma in denoiser.sigmas],
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "seed_rule": SEED_RULE,
        **run_time_changes(pipeline),
        **denoiser.settings.to_dict(),
        **more,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):  # a bound of DPM-Solver, which JSON has no word for
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


# What weights and configuration do not tell


def run_time_changes(pipeline: Any) -> dict[str, Any]:
    """Return what was set on a loaded pipeline and decides the bytes: LoRA, FreeU, caches, precisions, scheduler.

    Only what is not as it was loaded is named, so that older folders, which tell nothing of it, are still found.
    """
    model, vae = adapter_of(pipeline).component(pipeline), pipeline.vae
    parts = _modules(pipeline)
    dtypes = {name: getattr(part, "dtype", model.dtype) for name, part in parts.items()}
    freeu = [
        [getattr(block, key, None) for key in ("s1", "s2", "b1", "b2")] for block in getattr(model, "up_blocks", ())
    ]
    in_parts = bool(getattr(vae, "use_tiling", False) or getattr(vae, "use_slicing", False))
    found = {
        "lora": {name: scales for name, part in parts.items() if (scales := _adapter_scales(part))},
        "freeu": freeu if any(value is not None for block in freeu for value in block) else None,
        "vae_in_parts": {key: _plain(value) for key, value in vars(vae).items() if key.startswith(("use_", "tile_"))}
        if in_parts
        else None,
        "scheduler_set": {
            name: digest(value.tolist()) if isinstance(value, torch.Tensor) else _without_addresses(_plain(value))
            for name, value in set_at_run_time(pipeline.scheduler).items()
        },
        "cache": _without_addresses(getattr(model, "_cache_config", None) or ""),
        "compile": getattr(pipeline, "ttsnap_compile", "").partition(",")[0],
        "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items() if dtype != model.dtype},
    }
    return {key: value for key, value in found.items() if value}


def _modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def _adapter_scales(module: torch.nn.Module) -> dict[str, float | str]:
    """Return the scale of each adapter of peft, 0 for one that is off; empty when all are on and at 1, as loaded.

    Fused adapters are part of the weights, whose digest tells them. Scales that differ by layer become a digest.
    """
    scales: dict[str, dict[str, float]] = {}
    for place, layer in module.named_modules():
        if not hasattr(layer, "lora_alpha") or layer.merged:
            continue
        on = () if layer.disable_adapters else layer.active_adapters
        for name, value in layer.scaling.items():
            rank = math.sqrt(layer.r[name]) if layer.use_rslora.get(name) else layer.r[name]
            own = layer.lora_alpha[name] / rank or 1.0
            scales.setdefault(name, {})[place] = float(f"{value / own:.7g}") if name in on else 0.0
    if all(scale == 1 for layers in scales.values() for scale in layers.values()):
        return {}
    return {
        name: values.pop() if len(values := set(layers.values())) == 1 else digest(layers)
        for name, layers in scales.items()
    }


def vae_scaling(vae: Any) -> dict[str, Any]:
    """Return how the VAE's configuration scales latents; weights of the same digest may be used with another."""
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
    return {name: _plain(getattr(vae.config, name, None)) for name in names}


# Weights


def weights_digest(pipeline: Any) -> str | None:
    """Return a short digest of the pipeline's weights; None when some are not in memory (sequential offload).

    A few values of each tensor: enough to tell another model, other training or a LoRA, at no cost for billions.
    """
    return _digest(_modules(pipeline))


def decoder_digest(decoder: Any) -> str | None:
    """Return class and weights of a decoder that stands in for the pipeline's; None without one."""
    return None if decoder is None else f"{type(decoder).__name__} {_digest({'decoder': decoder})}"


@torch.no_grad()
def _digest(modules: dict[str, torch.nn.Module]) -> str | None:
    found = hashlib.sha256()
    samples = []
    for name, module in sorted(modules.items()):
        for key, value in sorted(module.state_dict().items()):
            for told, weight in _parts(f"{name}.{key}", value):
                found.update(f"{told};".encode())
                if weight is None:
                    continue
                if weight.device.type == "meta":
                    return None
                flat = weight.reshape(-1)
                samples.append(_floats(flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES]).cpu())
    if samples:
        found.update(torch.cat(samples).numpy().tobytes())
    return found.hexdigest()[:16]


def _parts(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield name and values of each plain tensor in an entry of a state dict, however it is quantized."""
    if isinstance(value, tuple | list):  # packed weights and bias of torch's own int8
        for place, one in enumerate(value):
            yield from _parts(f"{name}[{place}]", one)
    elif not isinstance(value, torch.Tensor):
        yield f"{name} {_without_addresses(value)}", None
    elif value.is_quantized:
        yield f"{name} {value.dtype} {tuple(value.shape)}", value.dequantize()
    elif is_traceable_wrapper_subclass(value):  # torchao: plain tensors inside
        inner, how = value.__tensor_flatten__()
        for one in inner:
            yield from _parts(f"{name} {type(value).__name__} {_without_addresses(how)} {one}", getattr(value, one))
    elif type(value) in (torch.Tensor, torch.nn.Parameter):
        yield f"{name} {tuple(value.shape)}", value
    else:  # such as diffusers' GGUFParameter: packed bytes that refuse to be handled as a tensor
        kind = f"{type(value).__name__} {getattr(value, 'quant_type', '')}"
        plain = torch.Tensor._make_subclass(torch.Tensor, value)
        yield f"{name} {kind} {tuple(plain.shape)}", plain


def _without_addresses(value: Any) -> str:
    """Return the text of a value without places in memory, which differ between processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def _floats(values: torch.Tensor) -> torch.Tensor:
    try:
        return values.float()
    except (RuntimeError, NotImplementedError):  # types of less than a byte
        return values.view(torch.uint8).float()


def embeds_digests(given: Conditioning | None) -> list[str]:
    """Return a digest of each prompt's embeddings, in float32; empty without any."""
    found: list[str] = []
    if given is None:
        return found
    for row in range(len(given)):
        told = hashlib.sha256()
        for name, value in sorted(given.take([row]).embeds.items()):
            for part in value if isinstance(value, list) else [value]:
                told.update(f"{name} {tuple(part.shape)};".encode())
                told.update(part.detach().float().cpu().contiguous().numpy().tobytes())
        found.append(told.hexdigest()[:16])
    return found


# Who wrote


def writer_of(denoiser: Denoiser, prompts_source: str | None) -> dict[str, Any]:
    """Return who writes: versions, commit, host, device, time."""
    device = denoiser.device
    return {
        "versions": {
            name: version
            for name, version in versions().items()
            if name in ("python", "ttsnap", "torch", "diffusers", "transformers", "numpy")
        },
        "git": git_state(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})",
        "prompts_source": prompts_source,
        "time": now(),
    }
