"""Compiles the denoising model and the decoder of a pipeline with torch.compile; what cannot be compiled goes on as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ttsnap_lib.checks import choice, or_eager
from ttsnap_lib.diffusion.families import adapter_of
from ttsnap_lib.errors import ConfigError

COMPILE = ("blocks", "whole")


def compile_pipeline(pipeline: Any, how: str) -> None:
    """Compile the denoising model at its first run: its repeated ``"blocks"``, or the ``"whole"`` of it, with CUDA graphs.

    The whole model is compiled for each batch size by itself, so batches are padded to 1, 2, 4, 8, ... images. The VAE's
    decoder is compiled too. ``pipeline.ttsnap_compile`` says how the model runs.
    """
    choice("compile", how, COMPILE)
    model = adapter_of(pipeline).component(pipeline)
    if how == "whole":
        model.compile(mode="reduce-overhead", dynamic=False)
    elif not getattr(model, "_repeated_blocks", None):
        raise ConfigError(f"compile: got 'blocks', but {type(model).__name__} has no repeated blocks. Use 'whole'.")
    else:
        model.compile_repeated_blocks(fullgraph=True, dynamic=True)
    pipeline.ttsnap_compile = how

    def failed() -> None:
        pipeline.ttsnap_compile = f"{how}, which failed"

    _fall_back(model, failed, copied=how == "whole")
    compile_decoder(pipeline.vae)


def compile_decoder(vae: Any) -> None:
    """Compile the decoder of a VAE, or a tiny one, at its first run, for batches of every size."""
    if vae.decoder._compiled_call_impl is None:
        vae.decoder.compile(dynamic=True)
        _fall_back(vae.decoder, lambda: None)


def compile_told(pipeline: Any) -> str:
    """Return in words how the denoising model runs; empty when it is not compiled."""
    how = getattr(pipeline, "ttsnap_compile", "")
    return f"{how}, batches padded to 1, 2, 4, 8, ..." if how == "whole" else how


def padded(pipeline: Any, n: int) -> int:
    """Return how many images a batch of `n` runs with: the next power of two where the whole model is compiled."""
    return 1 << (n - 1).bit_length() if getattr(pipeline, "ttsnap_compile", "") == "whole" else n


def _fall_back(model: torch.nn.Module, failed: Callable[[], None], *, copied: bool = False) -> None:
    """Let `model` run as it is from the moment that compiling fails, with a warning; torch compiles at the first run."""
    compiled = {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}

    def give_up(reason: str) -> None:
        for module in compiled:
            module._compiled_call_impl = None
        failed()
        warnings.warn(f"{type(model).__name__} runs without being compiled: {reason}", stacklevel=2)

    for module, call in compiled.items():
        guarded = or_eager(call, module._call_impl, give_up)
        module._compiled_call_impl = _copied(guarded) if copied else guarded


def _copied(call: Callable[..., Any]) -> Callable[..., Any]:
    """Copy what a CUDA graph gives: its next run, for the negative prompt, would overwrite it."""

    def copying(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(torch.Tensor, torch.clone, call(*args, **kwargs))  # Z-Image gives a list in its tuple

    return copying
