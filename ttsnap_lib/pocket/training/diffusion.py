"""Training of the two diffusion models on cached latents, with the text encoders frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from ttsnap_lib.pocket.training.loop import fit
from ttsnap_lib.pocket.training.models import (
    LATENT_CHANNELS,
    LATENT_PIXELS,
    make_clip_text,
    make_transformer,
    make_unet,
)
from ttsnap_lib.pocket.training.tokens import T5_TOKENS, clip_tokenizer, t5_tokenizer, tokenize
from ttsnap_lib.pocket.world import PIXELS

_DROPOUT = 0.1  # of captions, so that classifier-free guidance has an unconditional model


def plain_clip_text(clip: CLIPTextModelWithProjection) -> CLIPTextModel:
    """Return the same text encoder without the projection."""
    plain = make_clip_text()
    # The class itself is the tower since transformers 5.
    getattr(plain, "text_model", plain).load_state_dict(clip.text_model.state_dict())
    return plain.eval().requires_grad_(False)


def flux_pipeline(vae, t5: T5EncoderModel, clip: CLIPTextModelWithProjection, transformer) -> FluxPipeline:
    """Return the assembled pocket-flux."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),  # about what FLUX.1-dev uses at 1024 pixels
        vae=vae,
        text_encoder=plain_clip_text(clip),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def sdxl_pipeline(vae, clip: CLIPTextModelWithProjection, unet) -> StableDiffusionXLPipeline:
    """Return the assembled pocket-sdxl."""
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=plain_clip_text(clip),
        text_encoder_2=clip,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=sdxl_scheduler(),
        add_watermarker=False,
    )


def sdxl_scheduler() -> EulerDiscreteScheduler:
    """Return SDXL's own scheduler settings."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type="epsilon",
    )


def _normal(rng: np.random.Generator, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(like.shape), dtype=np.float32))


def _ids(tokenizer: Any, texts: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return token ids (picture, caption of it, length)."""
    return tokenize(tokenizer, [text for row in texts for text in row]).unflatten(0, (len(texts), -1))


def train_flux(
    latents: torch.Tensor,
    texts: Sequence[Sequence[str]],
    t5: T5EncoderModel,
    clip: CLIPTextModelWithProjection,
    name: str = "flux",
    transformer: FluxTransformer2DModel | None = None,
    seed: int = 0,
    **how: Any,
) -> FluxTransformer2DModel:
    """Train the FLUX transformer by flow matching: it predicts noise minus latent at a random mixture of both.

    Half of the noise levels are uniform, half logit-normal. Padding stays visible, as it is to the pipeline. `texts`
    holds one or more captions of each picture, drawn at random; training goes on from `transformer` when given.
    """
    transformer = make_transformer(seed) if transformer is None else transformer.requires_grad_(True)
    ids_t5, ids_clip = _ids(t5_tokenizer(), texts), _ids(clip_tokenizer(), texts)
    empty_t5, empty_clip = tokenize(t5_tokenizer(), [""]), tokenize(clip_tokenizer(), [""])
    half = LATENT_PIXELS // 2
    image_ids = FluxPipeline._prepare_latent_image_ids(1, half, half, "cpu", torch.float32)
    text_ids = torch.zeros(T5_TOKENS, 3)

    def loss(rng: np.random.Generator, batch: int) -> dict[str, torch.Tensor]:
        rows = torch.from_numpy(rng.integers(len(latents), size=batch))
        drop = torch.from_numpy(rng.random(batch) < _DROPOUT)[:, None]
        uniform, normal = rng.random(batch), 1 / (1 + np.exp(-rng.standard_normal(batch)))
        sigma = torch.from_numpy(np.where(rng.random(batch) < 0.5, uniform, normal).astype(np.float32))
        told = torch.from_numpy(rng.integers(ids_t5.shape[1], size=batch))
        with torch.no_grad():
            words = t5(torch.where(drop, empty_t5, ids_t5[rows, told]))[0]
            pooled = clip.text_model(torch.where(drop, empty_clip, ids_clip[rows, told])).pooler_output
        clean = latents[rows]
        clean = FluxPipeline._pack_latents(clean, batch, LATENT_CHANNELS, LATENT_PIXELS, LATENT_PIXELS)
        noise = _normal(rng, clean)
        mixed = torch.lerp(clean, noise, sigma[:, None, None])
        flow = transformer(
            hidden_states=mixed,
            timestep=sigma,
            encoder_hidden_states=words,
            pooled_projections=pooled,
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample
        return {"loss": F.mse_loss(flow, noise - clean)}

    fit(name, {"transformer": transformer}, loss, seed=seed, **how)
    return transformer.eval()


def train_sdxl(
    latents: torch.Tensor,
    texts: Sequence[Sequence[str]],
    clip: CLIPTextModelWithProjection,
    name: str = "sdxl",
    unet: UNet2DConditionModel | None = None,
    seed: int = 0,
    **how: Any,
) -> UNet2DConditionModel:
    """Train the SDXL UNet to predict the noise; dropped captions become zeros, as the pipeline's empty prompt does.

    `texts` and `unet` as in :func:`train_flux`.
    """
    unet = (make_unet(seed) if unet is None else unet.requires_grad_(True)).to(memory_format=torch.channels_last)
    ids = _ids(clip_tokenizer(), texts)
    alphas = sdxl_scheduler().alphas_cumprod
    time_ids = torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]], dtype=torch.float32)

    def loss(rng: np.random.Generator, batch: int) -> dict[str, torch.Tensor]:
        rows = torch.from_numpy(rng.integers(len(latents), size=batch))
        keep = torch.from_numpy(rng.random(batch) >= _DROPOUT).float()
        steps = torch.from_numpy(rng.integers(len(alphas), size=batch))
        told = torch.from_numpy(rng.integers(ids.shape[1], size=batch))
        with torch.no_grad():
            out = clip(ids[rows, told], output_hidden_states=True)
            hidden, pooled = out.hidden_states[-2], out.text_embeds
            # the first encoder is the second without its projection, so both read the same
            words = torch.cat([hidden, hidden], dim=-1) * keep[:, None, None]
            added = {"text_embeds": pooled * keep[:, None], "time_ids": time_ids.expand(batch, -1)}
        clean = latents[rows]
        noise, alpha = _normal(rng, clean), alphas[steps][:, None, None, None]
        mixed = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        made = unet(mixed, steps, encoder_hidden_states=words, added_cond_kwargs=added).sample
        return {"loss": F.mse_loss(made, noise)}

    fit(name, {"unet": unet}, loss, seed=seed, **how)
    return unet.eval()
