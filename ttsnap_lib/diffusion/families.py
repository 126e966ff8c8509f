"""What the engine has to know about each pipeline class: its embeddings, its guidance and its latents.

Everything else (the loop, the guidance, the model) is the pipeline's own. A new class is one more entry of
:data:`ADAPTERS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ttsnap_lib.errors import PipelineError

_GUIDED_POOLED = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """One pipeline class."""

    pipeline: str  # name of the class
    model: str  # name of the denoising component
    embeds: tuple[str | None, ...]  # arguments of the call that encode_prompt returns, in its order; None is dropped
    guidance: float  # the pipeline's own default
    more_prompts: tuple[str, ...] = ()  # arguments of encode_prompt for the prompts of further text encoders
    sequence_length: int | None = None  # own default of max_sequence_length; None where there is no such argument
    shifted: bool = False  # adds the VAE's shift_factor when it decodes
    normalized: bool = False  # applies the VAE's latents_mean and latents_std, where there are any
    flux: bool = False  # packed latents, embedded guidance, classifier-free guidance as true_cfg_scale

    def component(self, pipeline: Any) -> Any:
        """Return the denoising model of `pipeline`."""
        return getattr(pipeline, self.model)

    # What a pipeline does when it is not told.

    def default_guidance(self, pipeline: Any) -> float:
        """Return the pipeline's own default strength; 1, which is none, for FLUX without embedded guidance."""
        return self.guidance if not self.flux or self.embedded_guidance(pipeline) else 1.0

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """Return the pipeline's own default (height, width) in pixels."""
        factor = pipeline.vae_scale_factor
        sample = 128 if self.flux else self.component(pipeline).config.sample_size
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return height * factor, width * factor

    def default_sequence_length(self, pipeline: Any) -> int | None:
        """Return the pipeline's own default, or what its T5 tokenizer is made for where that is less."""
        if self.sequence_length is None:
            return None
        tokenizer = getattr(pipeline, "tokenizer_2" if self.flux else "tokenizer_3", None)
        return min(self.sequence_length, getattr(tokenizer, "model_max_length", self.sequence_length))

    # Guidance and text.

    def embedded_guidance(self, pipeline: Any) -> bool:
        """Whether the model takes the guidance strength as an input (guidance-distilled FLUX)."""
        return self.flux and bool(self.component(pipeline).config.guidance_embeds)

    def true_guidance(self, pipeline: Any, settings: Any) -> float:
        """Return FLUX's ``true_cfg_scale``."""
        if self.embedded_guidance(pipeline):
            return settings.true_guidance if settings.true_guidance is not None else 1.0
        return settings.guidance

    def uses_cfg(self, pipeline: Any, settings: Any) -> bool:
        """Whether the loop runs the model twice, with and without the prompt."""
        if self.flux:
            return self.true_guidance(pipeline, settings) > 1
        return settings.guidance > 1 and getattr(self.component(pipeline).config, "time_cond_proj_dim", None) is None

    def encode(self, pipeline: Any, prompts: list[str], settings: Any) -> dict[str, torch.Tensor]:
        """Return the embeddings that the pipeline call takes, each with one row per prompt."""
        options: dict[str, Any] = {"device": pipeline._execution_device, "num_images_per_prompt": 1}
        options |= dict.fromkeys(self.more_prompts)
        if self.sequence_length is not None:
            options["max_sequence_length"] = settings.max_sequence_length
        negative = settings.negative_prompt
        if not self.flux:
            options["do_classifier_free_guidance"] = self.uses_cfg(pipeline, settings)
            options["negative_prompt"] = None if negative is None else [negative] * len(prompts)
        found = self._named(pipeline.encode_prompt(prompt=prompts, **options))
        if self.flux and self.uses_cfg(pipeline, settings):
            others = self._named(pipeline.encode_prompt(prompt=[negative or ""] * len(prompts), **options))
            found |= {f"negative_{name}": value for name, value in others.items()}
        return found

    def _named(self, results: tuple) -> dict[str, torch.Tensor]:
        pairs = zip(self.embeds, results, strict=False)
        return {name: value for name, value in pairs if name is not None and value is not None}

    def blank_embeds(self, pipeline: Any, settings: Any) -> dict[str, torch.Tensor]:
        """Return embeddings of the least size that the pipeline's checks let pass; no model ever sees them."""
        config, pooled = self.component(pipeline).config, 1
        if getattr(config, "addition_embed_type", None) == "text_time":  # SDXL checks the width of the pooled text
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        names = [name for name in self.embeds if name is not None]
        if self.flux:
            names += [f"negative_{name}" for name in names]
        if not self.uses_cfg(pipeline, settings):
            names = [name for name in names if not name.startswith("negative")]
        return {name: torch.zeros((1, pooled) if "pooled" in name else (1, 1, 1)) for name in names}

    def call_options(self, pipeline: Any, settings: Any) -> dict[str, Any]:
        """Return the arguments of the pipeline call that do not depend on the candidates."""
        options: dict[str, Any] = {
            "height": settings.height,
            "width": settings.width,
            "num_inference_steps": settings.n_steps,
            "guidance_scale": settings.guidance,
        }
        if self.flux:
            options["true_cfg_scale"] = self.true_guidance(pipeline, settings)
        if self.sequence_length is not None:
            options["max_sequence_length"] = settings.max_sequence_length
        return options

    # Latents.

    def size_multiple(self, pipeline: Any) -> int:
        """Return what height and width have to be divisible by, in pixels."""
        factor = pipeline.vae_scale_factor
        if self.model == "unet":
            return math.lcm(8, factor)
        return factor * (2 if self.flux else self.component(pipeline).config.patch_size)

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        """Return (channels, height, width) of one image's latents, not packed."""
        channels = self.component(pipeline).config.in_channels // (4 if self.flux else 1)
        return channels, height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor

    def pack(self, pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
        """Bring (n, channels, height, width) into the layout the pipeline's loop works in."""
        return pipeline._pack_latents(latents, *latents.shape) if self.flux else latents

    def unpack(self, pipeline: Any, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Undo :meth:`pack`."""
        return pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor) if self.flux else latents

    def descale(self, latents: torch.Tensor, config: Any) -> torch.Tensor:
        """Bring unpacked latents to the scale that the decoder with this `config` takes."""
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if self.normalized and mean is not None and std is not None:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
            return latents * std / config.scaling_factor + mean
        latents = latents / config.scaling_factor
        shift = getattr(config, "shift_factor", None) if self.shifted else None
        return latents if shift is None else latents + shift


ADAPTERS: dict[str, Adapter] = {
    adapter.pipeline: adapter
    for adapter in (
        Adapter(
            "FluxPipeline", "transformer", ("prompt_embeds", "pooled_prompt_embeds", None), guidance=3.5,
            more_prompts=("prompt_2",), sequence_length=512, shifted=True, flux=True,
        ),
        Adapter(
            "StableDiffusionXLPipeline", "unet", _GUIDED_POOLED, guidance=5.0, more_prompts=("prompt_2",),
            normalized=True,
        ),
        Adapter("StableDiffusionPipeline", "unet", ("prompt_embeds", "negative_prompt_embeds"), guidance=7.5),
        Adapter(
            "StableDiffusion3Pipeline", "transformer", _GUIDED_POOLED, guidance=7.0,
            more_prompts=("prompt_2", "prompt_3"), sequence_length=256, shifted=True,
        ),
    )
}  # fmt: skip
"""The supported pipelines by the name of their class."""


def adapter_of(pipeline: Any) -> Adapter:
    """Return the entry of `pipeline`'s class (or of the nearest base class), or say what is missing."""
    name = type(pipeline).__name__
    found = next((ADAPTERS[cls.__name__] for cls in type(pipeline).__mro__ if cls.__name__ in ADAPTERS), None)
    if found is None:
        raise PipelineError(
            f"pipeline: got a {name}, expected one of {list(ADAPTERS)}. Use the text-to-image pipeline of one of these "
            "model families; another one needs an entry in ttsnap_lib.diffusion.families.ADAPTERS."
        )
    component = found.component(pipeline)
    if component is None or pipeline.vae is None:
        raise PipelineError(
            f"pipeline {name} has no {found.model if component is None else 'vae'}. Load it whole, with load_pipeline()."
        )
    channels, latent = found.latent_shape(pipeline, 8, 8)[0], getattr(pipeline.vae.config, "latent_channels", None)
    if latent is not None and channels != latent:
        raise PipelineError(
            f"{found.model} of {name}: got {channels} latent channels, expected the {latent} of its VAE. Inpainting and "
            "editing models take more than noise; use a text-to-image model."
        )
    return found
