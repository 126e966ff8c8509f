"""Architectures of the pocket models: the stock diffusers and transformers classes at tiny sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxTransformer2DModel, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
)

from ttsnap_lib.pocket.training.tokens import CLIP_TOKENS, VOCABULARY
from ttsnap_lib.pocket.world import PIXELS

LATENT_CHANNELS = 8
LATENT_PIXELS = PIXELS // 4
TEXT_WIDTH = 64
_Model = TypeVar("_Model")


def _seeded(build: Callable[..., _Model]) -> Callable[..., _Model]:
    """Give a builder a first argument `seed`; the global generator stays as it was."""

    @functools.wraps(build)
    def seeded(seed: int = 0, **options: Any) -> _Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(**options)

    return seeded


@_seeded
def make_vae() -> AutoencoderKL:
    """Return the untrained VAE: 4x down, 8 channels; its latents are used unscaled (see ``vae.normalize``)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=PIXELS,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


@_seeded
def make_tiny_decoder() -> AutoencoderTiny:
    """Return the untrained tiny autoencoder over the same latents."""
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )


def _clip_text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=TEXT_WIDTH,
        pad_token_id=VOCABULARY.index("<pad>"),
        bos_token_id=VOCABULARY.index("<s>"),
        eos_token_id=VOCABULARY.index("</s>"),
    )


@_seeded
def make_clip_text(*, projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return a CLIP text encoder; SDXL's second one has a projection."""
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(_clip_text_config())


@_seeded
def make_t5() -> T5EncoderModel:
    """Return the T5 encoder of the FLUX pipeline."""
    config = T5Config(
        vocab_size=len(VOCABULARY),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=4 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=16,
        relative_attention_max_distance=16,
        pad_token_id=VOCABULARY.index("<pad>"),
        eos_token_id=VOCABULARY.index("</s>"),
        decoder_start_token_id=VOCABULARY.index("<pad>"),
    )
    return T5EncoderModel(config)


@_seeded
def make_transformer() -> FluxTransformer2DModel:
    """Return the FLUX transformer: 16 image tokens (8 x 8 latents packed 2 x 2), no guidance embedding."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


@_seeded
def make_unet() -> UNet2DConditionModel:
    """Return the SDXL UNet: text_time conditioning, cross-attention to both text encoders."""
    return UNet2DConditionModel(
        sample_size=LATENT_PIXELS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),  # diffusers takes these as head counts
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
        use_linear_projection=True,
        norm_num_groups=16,
    )


@_seeded
def make_clip() -> CLIPModel:
    """Return the untrained pocket-clip: patches of 8 pixels, 4 vision and 2 text layers, projection 64."""
    text = _clip_text_config().to_dict()
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=8,
        projection_dim=64,
    ).to_dict()
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, logit_scale_init_value=2.6592)
    return CLIPModel(config)
