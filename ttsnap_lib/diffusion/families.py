"""What the engine has to know about each pipeline class: its embeddings, its guidance and its latents.

Everything else (the loop, the guidance, the model) is the pipeline's own, and so are its defaults, which are read off
its signatures. A new class is one more entry of :data:`ADAPTERS`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ttsnap_lib.errors import PipelineError

_GUIDED = ("prompt_embeds", "negative_prompt_embeds")
_GUIDED_POOLED = (*_GUIDED, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_GUIDED_MASKED = (
    "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask",
)  # fmt: skip
# No size but the one asked for; the negative text comes as embeddings, beside which its default "" is refused.
_PLAIN = {"use_resolution_binning": False, "negative_prompt": None}


@dataclass(frozen=True)
class Adapter:
    """One pipeline class."""

    pipeline: str  # name of the class
    model: str  # name of the denoising component
    embeds: tuple[str | None, ...]  # arguments of the call that encode_prompt returns, in its order; None is dropped
    layout: str = "plain"  # of latents: "plain" (n, channels, height, width), "packed" into tokens of 2 x 2, "patched" or "framed"
    guidance: str | None = "guidance_scale"  # argument of classifier-free guidance; None where there is none
    unguided: float = 1.0  # its largest value at which the model runs once a step
    unless: str = ""  # entry of the pipeline's configuration by which it leaves guidance out
    embeddable: bool = False  # its models may take guidance_scale as an input, instead of classifier-free guidance
    tokenizer: str = "tokenizer"  # the one that max_sequence_length is for
    rows: Mapping[str, int] = field(default_factory=dict)  # axis of the prompts, where an embedding has it not first
    listed: bool = False  # embeddings are lists, with a tensor of a length of its own for each prompt
    float32: bool = False  # latents are in float32, whatever the model's precision
    fixed: Mapping[str, Any] = field(default_factory=dict)  # arguments of the call that the engine needs as they are
    resizes: bool = False  # brings every size to the area of its default one
    video: bool = False  # its VAE takes a frame axis
    single_files: tuple[str, ...] = ()  # what diffusers calls single files of its weights
    no_prompt: str = ""  # the negative prompt of guidance when none is given, where the pipeline has no rule for it

    def component(self, pipeline: Any) -> Any:
        """Return the denoising model of `pipeline`."""
        return getattr(pipeline, self.model)

    # What a pipeline does when it is not told.

    def default_guidance(self, pipeline: Any) -> float:
        """Return the pipeline's own default strength; a model distilled to need none gets none."""
        embedded = self.embedded_guidance(pipeline)
        if not embedded and not self.guidable(pipeline):
            return self.unguided
        found = _default(pipeline.__call__, "guidance_scale" if embedded or self.guidance is None else self.guidance)
        return 1.0 if found is None else float(found)

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """Return the pipeline's own default (height, width) in pixels."""
        given = [_default(pipeline.__call__, side) for side in ("height", "width")]
        if None not in given:
            return given[0], given[1]
        sample: Any = getattr(self.component(pipeline).config, "sample_size", None)
        sample = sample or getattr(pipeline, "default_sample_size", 128)
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor

    def default_sequence_length(self, pipeline: Any) -> int | None:
        """Return the pipeline's own default, or what its tokenizer is made for where that is less; None without one."""
        found = _default(pipeline.__call__, "max_sequence_length")
        if found is None:
            return None
        return min(found, getattr(getattr(pipeline, self.tokenizer, None), "model_max_length", found))

    # Guidance and text.

    def embedded_guidance(self, pipeline: Any) -> bool:
        """Whether the model takes the guidance strength as an input (guidance-distilled FLUX)."""
        return self.embeddable and bool(getattr(self.component(pipeline).config, "guidance_embeds", True))

    def true_guidance(self, pipeline: Any, settings: Any) -> float:
        """Return the strength of classifier-free guidance."""
        if self.guidance is None:
            return self.unguided
        if self.embedded_guidance(pipeline):
            return settings.true_guidance if settings.true_guidance is not None else self.unguided
        return settings.guidance

    def uses_cfg(self, pipeline: Any, settings: Any) -> bool:
        """Whether the loop runs the model on a second text as well, the negative one."""
        embedded = getattr(self.component(pipeline).config, "time_cond_proj_dim", None) is not None
        guided = self.true_guidance(pipeline, settings) > self.unguided
        return guided and not embedded and self.guidable(pipeline)

    def guidable(self, pipeline: Any) -> bool:
        """Whether the pipeline has classifier-free guidance; a model may be distilled to do without."""
        return self.guidance is not None and not (self.unless and getattr(pipeline.config, self.unless, False))

    def encode(self, pipeline: Any, prompts: list[str], settings: Any) -> dict[str, Any]:
        """Return the embeddings that the pipeline call takes, each with one row per prompt."""
        known = inspect.signature(pipeline.encode_prompt).parameters
        call = inspect.signature(pipeline.__call__).parameters
        # What a call hands on when it is not told, such as Sana's instruction on how to read a prompt.
        options = {name: call[name].default for name in known if name in call}
        options |= {"device": pipeline._execution_device}
        if "max_sequence_length" in options:
            options["max_sequence_length"] = settings.max_sequence_length
        guided, negative = self.uses_cfg(pipeline, settings), settings.negative_prompt
        if "do_classifier_free_guidance" in known:
            negative = options["negative_prompt"] if negative is None else negative
            options["do_classifier_free_guidance"] = guided
            options["negative_prompt"] = None if negative is None else [negative] * len(prompts)
            return self._named(pipeline.encode_prompt(**options | {"prompt": prompts}))
        found = self._named(pipeline.encode_prompt(**options | {"prompt": prompts}))
        if guided:
            texts = [self.no_prompt if negative is None else negative] * len(prompts)
            others = self._named(pipeline.encode_prompt(**options | {"prompt": texts}))
            found |= {f"negative_{name}": value for name, value in others.items()}
        return found

    def _named(self, results: tuple) -> dict[str, Any]:
        found = {name: value for name, value in zip(self.embeds, results, strict=False) if name is not None}
        for name, value in found.items():
            if value is None and name.endswith("_mask") and found.get(name.removesuffix("_mask")) is not None:
                # Left out when it is all ones; with it, texts of several lengths can be put together.
                text = found[name.removesuffix("_mask")]
                found[name] = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        return {name: value for name, value in found.items() if value is not None and len(value)}

    def blank_embeds(self, pipeline: Any, settings: Any, *like: Any) -> dict[str, Any]:
        """Return embeddings of the least size that the pipeline's checks let pass; no model ever sees them."""
        config, pooled = self.component(pipeline).config, 1
        if getattr(config, "addition_embed_type", None) == "text_time":  # SDXL checks the width of the pooled text
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        names = [name for name in self.embeds if name is not None]
        if not any(name.startswith("negative") for name in names):
            names += [f"negative_{name}" for name in names]
        if not self.uses_cfg(pipeline, settings):
            names = [name for name in names if not name.startswith("negative")]
        shapes: dict[str, tuple[int, ...]] = {name: (1,) * (3 + self.rows.get(name, 0)) for name in names}
        shapes |= {name: (1, pooled) for name in names if "pooled" in name}
        shapes |= {name: (1, 1) for name in names if self.listed or name.endswith("_mask")}
        blank = {name: torch.zeros(shape).to(*like) for name, shape in shapes.items()}
        return {name: [value] if self.listed else value for name, value in blank.items()}

    def call_options(self, pipeline: Any, settings: Any) -> dict[str, Any]:
        """Return the arguments of the pipeline call that do not depend on the candidates."""
        options: dict[str, Any] = {
            "height": settings.height,
            "width": settings.width,
            "num_inference_steps": settings.n_steps,
            **self.fixed,
        }
        if self.guidance is not None:
            options[self.guidance] = self.true_guidance(pipeline, settings)
        if self.embedded_guidance(pipeline):
            options["guidance_scale"] = settings.guidance
        if settings.max_sequence_length is not None:
            options["max_sequence_length"] = settings.max_sequence_length
        return options

    # Latents.

    def size_multiple(self, pipeline: Any) -> int:
        """Return what height and width have to be divisible by, in pixels."""
        factor = pipeline.vae_scale_factor
        if self.model == "unet":
            return math.lcm(8, factor)
        return factor * (getattr(self.component(pipeline).config, "patch_size", 2) if self.layout == "plain" else 2)

    def made_size(self, pipeline: Any, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that the pipeline makes of a size, by its own rule."""
        if not self.resizes:
            return height, width
        scale = math.sqrt(math.prod(self.default_size(pipeline)) / (height * width))
        multiple = self.size_multiple(pipeline)
        return int(height * scale // multiple * multiple), int(width * scale // multiple * multiple)

    def channels(self, pipeline: Any) -> int:
        """Return how many channels the VAE's latents should have, by what the model takes in."""
        return self.component(pipeline).config.in_channels // (4 if self.layout in ("packed", "patched") else 1)

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        """Return (channels, height, width) of one image's noise, not packed into tokens."""
        patch = 2 if self.layout == "patched" else 1
        step = pipeline.vae_scale_factor * patch
        return self.channels(pipeline) * patch**2, height // step, width // step

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Bring noise (n, channels, height, width) into the layout that the pipeline's loop works in."""
        n, channels, height, width = latents.shape
        if self.layout == "packed":
            patches = latents.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
            return patches.reshape(n, height * width // 4, channels * 4)
        if self.layout == "framed":
            return latents[:, :, None]
        return latents.flatten(2).transpose(1, 2) if self.layout == "patched" else latents

    def given(self, pipeline: Any, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Bring latents of the loop into the layout in which the pipeline's call takes them."""
        if self.layout != "patched":
            return latents
        return latents.transpose(1, 2).reshape(len(latents), *self.latent_shape(pipeline, height, width))

    def unpack(self, pipeline: Any, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Bring latents of the loop to (n, channels, height, width)."""
        if self.layout != "packed":
            given = self.given(pipeline, latents, height, width)
            return given[:, :, 0] if self.layout == "framed" else given
        channels, height, width = self.latent_shape(pipeline, height, width)
        tokens = latents.view(len(latents), height // 2, width // 2, channels, 2, 2)
        return tokens.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), channels, height, width)

    def decodable(self, pipeline: Any, latents: torch.Tensor, decoder: Any) -> torch.Tensor:
        """Bring unpacked latents to what `decoder`, the pipeline's VAE or what stands in for it, takes."""
        vae, config = pipeline.vae, decoder.config
        if self.layout == "patched":  # FLUX.2 keeps the statistics of its latents in a batch norm over patches
            spread = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(latents)
            latents = latents * spread + vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
            n, channels, height, width = latents.shape
            latents = latents.reshape(n, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
            latents = latents.reshape(n, channels // 4, 2 * height, 2 * width)
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        factor, shift = (getattr(config, name, None) for name in ("scaling_factor", "shift_factor"))
        if mean is not None and std is not None:
            means, stds = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
            # Each as its stock pipeline rounds it.
            latents = latents * stds / factor + means if factor else latents / (1.0 / stds) + means
        elif factor:
            latents = latents / factor + shift if shift else latents / factor
        return latents[:, :, None] if self.video and decoder is vae else latents


def _default(function: Any, name: str) -> Any:
    """Return the default of an argument; None where it has none, or is not there."""
    found = inspect.signature(function).parameters.get(name)
    return None if found is None or found.default is inspect.Parameter.empty else found.default


ADAPTERS: dict[str, Adapter] = {
    adapter.pipeline: adapter
    for adapter in (
        Adapter(
            "FluxPipeline", "transformer", ("prompt_embeds", "pooled_prompt_embeds", None), layout="packed",
            guidance="true_cfg_scale", embeddable=True, tokenizer="tokenizer_2", single_files=("flux-dev", "flux-schnell"),
        ),
        Adapter("StableDiffusionXLPipeline", "unet", _GUIDED_POOLED, single_files=("xl_base", "playground-v2-5")),
        Adapter("StableDiffusionPipeline", "unet", _GUIDED, single_files=("v1", "v2")),
        Adapter(
            "StableDiffusion3Pipeline", "transformer", _GUIDED_POOLED, tokenizer="tokenizer_3",
            single_files=("sd3", "sd35_medium", "sd35_large"),
        ),
        Adapter(
            "ZImagePipeline", "transformer", _GUIDED, unguided=0.0, listed=True, float32=True,
            single_files=("z-image-turbo",),
        ),
        Adapter(
            "Flux2Pipeline", "transformer", ("prompt_embeds", None), layout="patched", guidance=None, embeddable=True,
            single_files=("flux-2-dev",),
        ),
        Adapter(
            "Flux2KleinPipeline", "transformer", ("prompt_embeds", None), layout="patched", unless="is_distilled"
        ),
        Adapter("Flux3ModularPipeline", "transformer", ("prompt_embeds",), layout="patched", listed=True),
        Adapter(
            "Flux3DistilledModularPipeline", "transformer", ("prompt_embeds",), layout="patched", listed=True, guidance=None
        ),
        Adapter(
            "AnimaModularPipeline", "transformer", ("prompt_embeds",), layout="framed", listed=True, float32=True, video=True
        ),
        Adapter(
            "QwenImagePipeline", "transformer", ("prompt_embeds", "prompt_embeds_mask"), layout="packed",
            guidance="true_cfg_scale", embeddable=True, video=True, no_prompt=" ",
        ),
        Adapter("SanaPipeline", "transformer", _GUIDED_MASKED, float32=True, fixed=_PLAIN, single_files=("sana",)),
        Adapter("Lumina2Pipeline", "transformer", _GUIDED_MASKED, single_files=("lumina2",)),
        Adapter(
            "ChromaPipeline", "transformer",
            ("prompt_embeds", None, "prompt_attention_mask", "negative_prompt_embeds", None, "negative_prompt_attention_mask"),
            layout="packed", single_files=("chroma",),
        ),
        Adapter("PixArtSigmaPipeline", "transformer", _GUIDED_MASKED, fixed=_PLAIN),
        Adapter(
            "HiDreamImagePipeline", "transformer",
            (
                "prompt_embeds_t5", "negative_prompt_embeds_t5", "prompt_embeds_llama3", "negative_prompt_embeds_llama3",
                "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
            ),
            tokenizer="tokenizer_3", resizes=True, single_files=("hidream",), rows={"prompt_embeds_llama3": 1, "negative_prompt_embeds_llama3": 1},
        ),
    )
}  # fmt: skip
"""The supported pipelines by the name of their class."""


_REASONS = {
    "Cosmos2TextToImagePipeline": "reads its scheduler by the index of its own loop, which begins anew in each part",
    "Ideogram4Pipeline": "takes no embeddings, and its guidance goes by the index of its own loop",
    "SanaSprintPipeline": "adds fresh noise at every step",
}
_PICTURE = ("Img2Img", "Image2Image", "Inpaint", "Edit", "Upscale", "Pix2Pix", "Control", "Fill", "Kontext", "Layered")
_VIDEO = ("Video", "Wan", "LTX", "AnimateDiff", "Mochi")


def unsupported(what: str, name: str) -> str:
    """Return the sentence that refuses a pipeline class, with the reason where it is known."""
    picture, video = (any(word in name for word in words) for words in (_PICTURE, _VIDEO))
    kind = "makes videos" if video else "works on a picture that is given" if picture else "has no entry here"
    found = _REASONS.get(name, kind)
    return (
        f"{what}: a {name} is not supported: it {found}. Use the text-to-image pipeline of one of these families: "
        f"{list(ADAPTERS)} (ttsnap_lib.diffusion.families.ADAPTERS)."
    )


def adapter_of(pipeline: Any) -> Adapter:
    """Return the entry of `pipeline`'s class (or of the nearest base class), or say what is missing."""
    name = type(pipeline).__name__
    found = next((ADAPTERS[cls.__name__] for cls in type(pipeline).__mro__ if cls.__name__ in ADAPTERS), None)
    if found is None:
        raise PipelineError(unsupported("pipeline", name))
    component = found.component(pipeline)
    if component is None or pipeline.vae is None:
        raise PipelineError(
            f"pipeline {name} has no {found.model if component is None else 'vae'}. Load it whole, with load_pipeline()."
        )
    if getattr(component, "encoder_hid_proj", None) is not None and hasattr(
        component.encoder_hid_proj, "num_ip_adapters"
    ):
        raise PipelineError(
            f"pipeline {name} has an IP-Adapter, which wants a picture beside the prompt. Call its unload_ip_adapter()."
        )
    config = pipeline.vae.config
    channels, latent = found.channels(pipeline), getattr(config, "latent_channels", getattr(config, "z_dim", None))
    if latent is not None and channels != latent:
        raise PipelineError(
            f"{found.model} of {name}: got {channels} latent channels, expected the {latent} of its VAE. Inpainting and "
            "editing models take more than noise; use a text-to-image model."
        )
    return found
