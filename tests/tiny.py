"""Tiny random pipelines of the real diffusers and transformers classes, built in memory in a fraction of a second."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from ttsnap_lib.pocket.training.tokens import as_clip, as_t5

__all__ = ["PIPELINES", "SIZE", "build", "flux", "save", "sd", "sd3", "sdxl", "tiny_decoder"]

SIZE = 32  # pixels; the VAE is 4x down
TOKENS = 16
WIDTH = 32
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
_VOCABULARY = {
    token: k
    for k, token in enumerate([*_SPECIAL, *string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)])
}


def _letters(template: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(_VOCABULARY, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    special = [(token, _VOCABULARY[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def clip_tokenizer() -> PreTrainedTokenizerFast:
    return as_clip(_letters("<s> $A </s>"), TOKENS)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    return as_t5(_letters("$A </s>"), TOKENS)


def _clip_text(projection: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5(width: int = WIDTH) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_VOCABULARY),
            d_model=width,
            d_kv=8,
            d_ff=WIDTH,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=3,
            decoder_start_token_id=0,
        )
    ).eval()


def _vae(**options: object) -> AutoencoderKL:
    settings = {"scaling_factor": 0.5, "shift_factor": None, "force_upcast": False} | options
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        **settings,
    ).eval()


def tiny_decoder(seed: int = 5) -> AutoencoderTiny:
    """Return an AutoencoderTiny over the latents of all pipelines here."""
    return _seeded(
        seed,
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            latent_channels=4,
        ).eval(),
    )


def _unet(cross: int, **options: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=cross,
        norm_num_groups=4,
        **options,
    ).eval()


def _euler(**options: object) -> EulerDiscreteScheduler:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return EulerDiscreteScheduler(**settings, timestep_spacing="leading", **options)


def _seeded(seed: int, make: Callable):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def flux(seed: int = 0, *, guidance_embeds: bool = True, **scheduler: object) -> FluxPipeline:
    """Return a FluxPipeline; keywords go to its flow-matching scheduler (dynamic shifting as in FLUX.1-dev)."""

    def make() -> FluxPipeline:
        options = {"shift": 3.0, "use_dynamic_shifting": True} | scheduler
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**options),
            vae=_vae(shift_factor=0.1),
            text_encoder=_clip_text(False),
            tokenizer=clip_tokenizer(),
            text_encoder_2=_t5(),
            tokenizer_2=t5_tokenizer(),
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 4, 8),
            ).eval(),
        )

    return _quiet(_seeded(seed, make))


def sdxl(seed: int = 0, **unet: object) -> StableDiffusionXLPipeline:
    """Return a StableDiffusionXLPipeline with an Euler scheduler; keywords go to its UNet."""

    def make() -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=_clip_text(False),
            text_encoder_2=_clip_text(True),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=_unet(
                2 * WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=WIDTH + 6 * 8,
                use_linear_projection=True,
                **unet,
            ),
            scheduler=_euler(),
        )

    return _quiet(_seeded(seed, make))


def sd(seed: int = 0) -> StableDiffusionPipeline:
    """Return a StableDiffusionPipeline (1.x and 2.x) with an Euler scheduler."""

    def make() -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_clip_text(False),
            tokenizer=clip_tokenizer(),
            unet=_unet(WIDTH),
            scheduler=_euler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return _quiet(_seeded(seed, make))


def sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """Return a StableDiffusion3Pipeline with a flow-matching scheduler of fixed shift."""

    def make() -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=SIZE // 4,
                patch_size=2,
                in_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=2 * WIDTH,
                caption_projection_dim=WIDTH,
                pooled_projection_dim=2 * WIDTH,
                out_channels=4,
                pos_embed_max_size=16,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(shift_factor=0.1),
            text_encoder=_clip_text(True),
            tokenizer=clip_tokenizer(),
            text_encoder_2=_clip_text(True),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=_t5(2 * WIDTH),
            tokenizer_3=t5_tokenizer(),
        )

    return _quiet(_seeded(seed, make))


def _quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {"flux": flux, "sdxl": sdxl, "sd": sd, "sd3": sd3}


def build(name: str, **options: object) -> DiffusionPipeline:
    """Return the tiny pipeline `name` of :data:`PIPELINES`."""
    return PIPELINES[name](**options)


def save(name: str, folder: Path, **options: object) -> Path:
    """Write the tiny pipeline `name` as an ordinary pipeline folder and return it."""
    build(name, **options).save_pretrained(folder)
    return folder
