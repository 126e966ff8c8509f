"""What decides the bytes of a trajectory folder, and who wrote it."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch

from . import provenance
from .denoise import Denoiser
from .paths import git_state
from .pipelines import pipeline_source

__all__ = ["SEED_RULE", "decoder_digest", "identity", "weights_digest", "writer_of"]

SEED_RULE = "SeedSequence([seed, prompt, image]).generate_state(1, uint64) & (2**63 - 1), torch CPU generator, fp32"
_SAMPLES = 16


def identity(denoiser: Denoiser, **more: Any) -> dict[str, Any]:
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
        **denoiser.settings.to_dict(),
        **more,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def weights_digest(pipeline: Any) -> str | None:
    """Return a short digest of the pipeline's weights; None when some are not in memory (sequential offload).

    It takes 16 values spread over each tensor: enough to tell another model, other training or a LoRA, at no cost
    for billions of weights.
    """
    return _digest({name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)})


def decoder_digest(decoder: Any) -> str | None:
    """Return class and weights of a decoder that stands in for the pipeline's; None without one."""
    return None if decoder is None else f"{type(decoder).__name__} {_digest({'decoder': decoder})}"


@torch.no_grad()
def _digest(modules: dict[str, torch.nn.Module]) -> str | None:
    digest = hashlib.sha256()
    samples = []
    for name, module in sorted(modules.items()):
        for key, weight in sorted(module.state_dict().items()):
            if weight.device.type == "meta":
                return None
            digest.update(f"{name}.{key} {tuple(weight.shape)};".encode())
            flat = weight.reshape(-1)
            samples.append(flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].float().cpu())
    if samples:
        digest.update(torch.cat(samples).numpy().tobytes())
    return digest.hexdigest()[:16]


def writer_of(denoiser: Denoiser, prompts_source: str | None) -> dict[str, Any]:
    """Return who writes: versions, commit, host, device, time."""
    device = denoiser.device
    return {
        "versions": {
            name: version
            for name, version in provenance.versions().items()
            if name in ("python", "ttsnap", "torch", "diffusers", "transformers", "numpy")
        },
        "git": git_state(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})",
        "prompts_source": prompts_source,
        "time": provenance.now(),
    }
