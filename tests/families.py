"""Tiny pipelines of the families that came after those of :mod:`tests.worlds`: the real classes with random weights.

Classes are looked up by name, since the oldest diffusers and transformers that are allowed lack some.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests import worlds
from ttsnap_lib.diffusion.families import adapter_of
from ttsnap_lib.diffusion.modular import faced
from ttsnap_lib.pocket.training.models import make_clip_text, make_t5, make_vae
from ttsnap_lib.pocket.training.tokens import VOCABULARY, clip_tokenizer, t5_tokenizer

_CHAT = """{% for message in messages %}{% if message.content is string %}{{ message.content }}
{% else %}{% for part in message.content %}{{ part.text }} {% endfor %}{% endif %}{% endfor %}"""
_DECODER = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
WIDTH = _DECODER["hidden_size"]


@dataclass(frozen=True)
class Family:
    """A family of the tests' table: how to build it, and how its users call it."""

    build: Callable[[], Any]
    guided: dict[str, Any] = field(default_factory=dict)  # arguments of a stock call with classifier-free guidance
    plain: dict[str, Any] = field(default_factory=dict)  # and of one without
    more: dict[str, Any] = field(default_factory=dict)  # arguments of both
    call: Callable[..., Any] | None = None  # how diffusers makes pictures, where the pipeline is not what one calls

    def stock(self, pipeline: Any, output_type: str = "latent", guided: bool = True, **changes: Any) -> Any:
        """Call the pipeline as its users do; of latents, return those that its scheduler gave at the last step."""
        given = {"height": worlds.SIZE, "width": worlds.SIZE, "num_inference_steps": worlds.STEPS, **self.more}
        given |= (self.guided if guided else self.plain) | changes
        if "latents" not in given:
            given["generator"] = worlds.generators()
        seen, step = [], pipeline.scheduler.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen[:] = [step(*args, **kwargs)]
            return seen[0]

        pipeline.scheduler.step = watched
        try:
            if self.call is not None:
                found = self.call(pipeline, list(worlds.CAPTIONS), output_type, **given)
            else:
                found = pipeline(prompt=list(worlds.CAPTIONS), output_type=output_type, **given).images
        finally:
            del pipeline.scheduler.step
        return seen[0][0] if output_type == "latent" else found


def _seeded(kind: str, *config: Any, **options: Any) -> Any:
    """Return a model of diffusers or transformers with random weights that are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(diffusers if hasattr(diffusers, kind) else transformers, kind)(*config, **options).eval()


def _text(kind: str, config: str, layers: int, **more: Any) -> Any:
    """Return a tiny decoder-only text model."""
    return _seeded(kind, getattr(transformers, config)(**_DECODER, num_hidden_layers=layers, **more))


def _chat() -> Any:
    tokenizer = t5_tokenizer()
    tokenizer.chat_template, tokenizer.model_max_length = _CHAT, 64
    return tokenizer


def _vae(blocks: int = 3, **changes: Any) -> Any:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    given = {"latent_channels": worlds.LATENTS, "scaling_factor": 0.5, "shift_factor": 0.1, **changes}
    return worlds._like(make_vae(), 0, block_out_channels=(8,) * blocks, **kinds, **given)


def _flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | options))


def z_image() -> Any:
    """Return a ZImagePipeline (Z-Image and Z-Image-Turbo)."""
    model = _seeded(
        "ZImageTransformer2DModel", in_channels=worlds.LATENTS, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[4, 2, 2], axes_lens=[256, 32, 32]
    )  # fmt: skip
    text = _text("Qwen3Model", "Qwen3Config", 2)
    return diffusers.ZImagePipeline(_flow(), _vae(), text, _chat(), model)


def _flux2_parts(layers: int, **options: Any) -> tuple[Any, Any]:
    model = _seeded(
        "Flux2Transformer2DModel", in_channels=4 * worlds.LATENTS, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=3 * WIDTH, axes_dims_rope=(4, 4, 4, 4), **options
    )  # fmt: skip
    vae = _seeded(
        "AutoencoderKLFlux2", latent_channels=worlds.LATENTS, block_out_channels=(8, 8, 8), norm_num_groups=1,
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    vae.bn.running_mean = torch.randn(4 * worlds.LATENTS, generator=generator)
    vae.bn.running_var = torch.rand(4 * worlds.LATENTS, generator=generator) + 0.5
    return vae, model


def flux2() -> Any:
    """Return a Flux2Pipeline (FLUX.2-dev): it reads layers 10, 20 and 30 of its text model."""
    vae, model = _flux2_parts(30)
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**_DECODER, num_hidden_layers=30).to_dict(),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ).to_dict(),
    )
    text = _seeded("Mistral3ForConditionalGeneration", config)
    return diffusers.Flux2Pipeline(_flow(use_dynamic_shifting=True), vae, text, _chat(), model)


def klein(distilled: bool = False) -> Any:
    """Return a Flux2KleinPipeline (FLUX.2-klein, distilled to four steps or not)."""
    vae, model = _flux2_parts(27, guidance_embeds=False)
    text = _text("Qwen3ForCausalLM", "Qwen3Config", 27)
    scheduler = _flow(use_dynamic_shifting=True)
    return diffusers.Flux2KleinPipeline(scheduler, vae, text, _chat(), model, is_distilled=distilled)


def qwen_image() -> Any:
    """Return a QwenImagePipeline."""
    model = _seeded(
        "QwenImageTransformer2DModel", in_channels=4 * worlds.LATENTS, out_channels=worlds.LATENTS, num_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4)
    )  # fmt: skip
    vae = _seeded(
        "AutoencoderKLQwenImage", base_dim=8, z_dim=worlds.LATENTS, dim_mult=[1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5]
    )  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_DECODER, "num_hidden_layers": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
    )
    config.image_token_id, config.video_token_id, config.vision_start_token_id = 1000, 1001, 1002  # of no text here
    text = _seeded("Qwen2_5_VLForConditionalGeneration", config)
    pipeline = diffusers.QwenImagePipeline(_flow(use_dynamic_shifting=True), vae, text, _chat(), model)
    pipeline.prompt_template_encode_start_idx = 12  # words of its template here
    return pipeline


def sana() -> Any:
    """Return a SanaPipeline: DPM-Solver++ over flow matching, a deep-compression autoencoder."""
    blocks = {"decoder_block_types": ("ResBlock", "EfficientViTBlock"), "decoder_qkv_multiscales": ((), (5,))}
    blocks |= {name.replace("decoder", "encoder"): value for name, value in blocks.items()}
    vae = _seeded(
        "AutoencoderDC", latent_channels=worlds.LATENTS, attention_head_dim=2, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.4, **blocks
    )  # fmt: skip
    model = _seeded(
        "SanaTransformer2DModel", patch_size=1, in_channels=worlds.LATENTS, out_channels=worlds.LATENTS, num_layers=1,
        num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=WIDTH, sample_size=32
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(_chat(), _text("Gemma2Model", "Gemma2Config", 2), vae, model, scheduler)


def lumina2() -> Any:
    """Return a Lumina2Pipeline; it takes for granted that its VAE is 8x down."""
    model = _seeded(
        "Lumina2Transformer2DModel", sample_size=4, in_channels=worlds.LATENTS, hidden_size=16, num_layers=1,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 64, 64), cap_feat_dim=WIDTH
    )  # fmt: skip
    text = _text("Gemma2Model", "Gemma2Config", 2)
    return diffusers.Lumina2Pipeline(model, _flow(), _vae(blocks=4), text, _chat())


def chroma() -> Any:
    """Return a ChromaPipeline."""
    model = _seeded(
        "ChromaTransformer2DModel", in_channels=4 * worlds.LATENTS, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1
    )  # fmt: skip
    return diffusers.ChromaPipeline(_flow(), _vae(), make_t5(0).eval(), t5_tokenizer(), model)


def pixart() -> Any:
    """Return a PixArtSigmaPipeline; its model also predicts a variance, which is cut off."""
    model = _seeded(
        "PixArtTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=worlds.LATENTS,
        out_channels=2 * worlds.LATENTS, num_layers=1, cross_attention_dim=16, sample_size=8, caption_channels=64,
        norm_num_groups=1, use_additional_conditions=False
    )  # fmt: skip
    vae = _vae(shift_factor=None)
    return diffusers.PixArtSigmaPipeline(
        t5_tokenizer(), make_t5(0).eval(), vae, model, diffusers.DPMSolverMultistepScheduler()
    )


def hidream() -> Any:
    """Return a HiDreamImagePipeline; every picture has the area of its default size."""
    model = _seeded(
        "HiDreamImageTransformer2DModel", patch_size=2, in_channels=worlds.LATENTS, out_channels=worlds.LATENTS,
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, caption_channels=[64, WIDTH],
        text_emb_dim=128, num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(8, 4, 4), max_resolution=(16, 16),
        llama_layers=[0, 1]
    )  # fmt: skip
    pipeline = diffusers.HiDreamImagePipeline(
        _flow(), _vae(), make_clip_text(0, projection=True).eval(), clip_tokenizer(),
        make_clip_text(1, projection=True).eval(), clip_tokenizer(), make_t5(0).eval(), t5_tokenizer(),
        _text("LlamaForCausalLM", "LlamaConfig", 2), t5_tokenizer(), model
    )  # fmt: skip
    pipeline.default_sample_size = worlds.SIZE // 4
    return pipeline


def _processor() -> Any:
    """Return what FLUX.3 takes for a tokenizer: the processor that holds one."""
    tokenizer = _chat()
    images, videos = transformers.Qwen2VLImageProcessor(), transformers.Qwen3VLVideoProcessor()
    return transformers.Qwen3VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template)


def flux3(distilled: bool = False) -> Any:
    """Return the modular pipeline of FLUX.3, without its prompt upsampler: it stacks eight layers of its text model."""
    vae, _ = _flux2_parts(1)
    model = _seeded(
        "Flux3Transformer2DModel", in_channels=4 * worlds.LATENTS, cond_in_channels=4 * worlds.LATENTS, num_layers=1,
        num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8 * WIDTH,
        timestep_channels=32, axes_dims_rope=(4, 4, 4, 4), flow_map=distilled
    )  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={**_DECODER, "num_hidden_layers": 32, "rope_scaling": rope},
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
            "deepstack_visual_indexes": [],
        },
    )  # fmt: skip
    config.image_token_id = config.video_token_id = 1000  # of no text here
    text = _seeded("Qwen3VLForConditionalGeneration", config)
    blocks = (diffusers.Flux3DistilledAutoBlocks if distilled else diffusers.Flux3AutoBlocks)()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipeline = blocks.init_pipeline()
    pipeline.update_components(vae=vae, transformer=model, text_encoder=text, tokenizer=_processor())
    return faced(pipeline)


def anima() -> Any:
    """Return the modular pipeline of Anima."""
    model = _seeded(
        "CosmosTransformer3DModel", in_channels=worlds.LATENTS, out_channels=worlds.LATENTS, num_attention_heads=2,
        attention_head_dim=16, num_layers=1, mlp_ratio=1.0, text_embed_dim=WIDTH, adaln_lora_dim=8, max_size=(4, 16, 16),
        rope_scale=(1.0, 1.0, 1.0), extra_pos_embed_type=None
    )  # fmt: skip
    conditioner = _seeded(
        "AnimaTextConditioner", source_dim=WIDTH, target_dim=WIDTH, model_dim=WIDTH, num_layers=1, num_attention_heads=2,
        mlp_ratio=1.0, target_vocab_size=len(VOCABULARY), min_sequence_length=24
    )  # fmt: skip
    pipeline = diffusers.AnimaModularPipeline()
    pipeline.update_components(
        vae=qwen_image().vae, transformer=model, text_conditioner=conditioner, text_encoder=_text("Qwen3Model", "Qwen3Config", 2),
        tokenizer=_chat(), t5_tokenizer=t5_tokenizer(), scheduler=_flow()
    )  # fmt: skip
    return faced(pipeline)


def _modular_call(face: Any, prompts: list[str], output_type: str, **given: Any) -> Any:
    """Let the blocks of diffusers make the pictures of all prompts in one call: their own loop, on stacked embeddings."""
    blocks = face.modular.blocks.get_execution_blocks(prompt=True).sub_blocks
    after = {name: block for name, block in blocks.items() if not name.startswith("text_encoder")}
    after.pop("denoise.text_conditioning", None)
    pipeline = diffusers.modular_pipelines.SequentialPipelineBlocks.from_blocks_dict(after).init_pipeline()
    pipeline.update_components(**{name: part for name, part in face.components.items() if part is not None})
    pipeline.scheduler = face.scheduler
    guidance, length = given.pop("guidance_scale", 1.0), given.pop("max_sequence_length")
    if getattr(pipeline, "guider", None) is not None:
        pipeline.update_components(guider=pipeline.guider.new(guidance_scale=guidance))
    if "generator" in given:  # drawn on the CPU, as everywhere
        adapter, size = adapter_of(face), (given["height"], given["width"])
        noise = torch.stack(
            [torch.randn(adapter.latent_shape(face, *size), generator=one) for one in given.pop("generator")]
        )
        given["latents"] = adapter.given(face, adapter.pack(noise), *size)
    texts = {"prompt_embeds": prompts, "negative_prompt_embeds": [""] * len(prompts) if guidance > 1 else None}
    given |= {
        name: torch.stack(face.encode_prompt(text, max_sequence_length=length)[0])
        for name, text in texts.items()
        if text
    }
    state = pipeline(**given, output_type="pt")
    return state.values["latents" if output_type == "latent" else "images"]


_CFG = {"guided": {"guidance_scale": 3.0}, "plain": {"guidance_scale": 1.0}}
_TRUE = {"guided": {"true_cfg_scale": 3.0, "negative_prompt": ["the cat"] * 3}, "plain": {"true_cfg_scale": 1.0}}
_CHAT_TEXT = {"max_sequence_length": 64}
_AS_IT_IS = {"use_resolution_binning": False}
FAMILIES: dict[str, Family] = {
    "flux": Family(worlds.flux, **_TRUE, more={"max_sequence_length": worlds.TOKENS}),
    "schnell": Family(lambda: worlds.flux(guidance_embeds=False), **_TRUE, more={"max_sequence_length": worlds.TOKENS}),
    "sdxl": Family(worlds.sdxl, **_CFG),
    "sd": Family(worlds.sd, **_CFG),
    "sd3": Family(worlds.sd3, **_CFG, more={"max_sequence_length": worlds.TOKENS}),
    "z-image": Family(z_image, guided={"guidance_scale": 3.0}, plain={"guidance_scale": 0.0}, more=_CHAT_TEXT),
    "flux2": Family(flux2, more={"guidance_scale": 3.0, **_CHAT_TEXT}),
    "klein": Family(klein, **_CFG, more=_CHAT_TEXT),
    "klein-distilled": Family(lambda: klein(distilled=True), more={"guidance_scale": 1.0, **_CHAT_TEXT}),
    "qwen-image": Family(qwen_image, **_TRUE, more=_CHAT_TEXT),
    "sana": Family(sana, **_CFG, more=_AS_IT_IS | _CHAT_TEXT),
    "lumina2": Family(lumina2, **_CFG, more=_CHAT_TEXT),
    "chroma": Family(chroma, **_CFG, more={"max_sequence_length": worlds.TOKENS}),
    "pixart": Family(pixart, **_CFG, more={**_AS_IT_IS, "max_sequence_length": worlds.TOKENS}),
    "hidream": Family(hidream, **_CFG, more={"max_sequence_length": worlds.TOKENS}),
}
_MODULAR = {"more": {"max_sequence_length": 64}, "call": _modular_call}
if hasattr(diffusers, "AnimaModularPipeline"):  # since diffusers 0.39
    FAMILIES["anima"] = Family(anima, **_CFG, **_MODULAR)
if hasattr(diffusers, "Flux3ModularPipeline"):  # since 0.42
    FAMILIES["flux3"] = Family(flux3, **_CFG, **_MODULAR)
    FAMILIES["flux3-distilled"] = Family(lambda: flux3(distilled=True), **_MODULAR)
"""The families by a short name."""


def write_lora(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a LoRA of random weights for the pipeline `name` as diffusers saves it."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = FAMILIES[name].build()
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    model = getattr(pipeline, part)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        model.add_adapter(config)
    pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": get_peft_model_state_dict(model)})
    return folder / "pytorch_lora_weights.safetensors"
