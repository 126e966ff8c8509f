"""TFLOPs of the presets of ``costs.py``, counted on the real architectures on the meta device: no weights, no memory.

One forward at batch 1 with two operations per multiply-add; a step with classifier-free guidance is two of them. Configurations
are diffusers' defaults where these are the published model, else those of the published ``config.json``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.real_rewards import real_rewards
from tests.benchmarks.rows import Row
from ttsnap_lib.costs import PRESETS, VERIFY

META = torch.device("meta")
TOKENS = 64  # of a text whose pipeline cuts the padding off: a long prompt with the chat template around it


def counted(run: Callable[[], Any]) -> float:
    """Return the TFLOPs of `run`."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def empty(*shape: int) -> torch.Tensor:
    """Return a tensor without values."""
    return torch.empty(*shape, device=META)


class Ones:
    """A mask of ones whose sums are known, which a meta tensor's are not."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def sum(self, dim: int) -> Any:
        return SimpleNamespace(tolist=lambda: [self.shape[1]] * self.shape[0])

    def bool(self) -> torch.Tensor:
        return empty(*self.shape).bool()


def flux(model: Any, side: int) -> Any:
    n = (side // 16) ** 2
    return model(empty(1, n, 64), empty(1, 512, 4096), empty(1, 768), empty(1), empty(n, 3), empty(512, 3), empty(1))


def flux2(model: Any, side: int, width: int) -> Any:
    n = (side // 16) ** 2
    return model(empty(1, n, 128), empty(1, 512, width), empty(1), empty(1, n, 4), empty(1, 512, 4), empty(1))


def flux3(model: Any, side: int) -> Any:
    n = (side // 16) ** 2
    given = {"img_ids": empty(n, 4), "txt_ids": empty(80, 4)}  # the shortest window of text
    if model.config.flow_map:
        given["target_timestep"] = empty(1)
    return model(empty(1, n, 128), encoder_hidden_states=empty(1, 80, 20480), timestep=empty(1), **given)


def qwen(model: Any, side: int) -> Any:
    grid, n = side // 16, (side // 16) ** 2
    return model(empty(1, n, 64), empty(1, TOKENS, 3584), None, empty(1), [[(1, grid, grid)]])


def z_image(model: Any, side: int) -> Any:
    return model([empty(16, 1, side // 8, side // 8)], empty(1), [empty(TOKENS, 2560)])


def sd3(model: Any, side: int) -> Any:
    return model(empty(1, 16, side // 8, side // 8), empty(1, 333, 4096), empty(1, 2048), empty(1))


def sana(model: Any, side: int) -> Any:
    mask = empty(1, 300)
    return model(empty(1, 32, side // 32, side // 32), empty(1, 300, 2304), empty(1), encoder_attention_mask=mask)


def lumina2(model: Any, side: int) -> Any:
    return model(empty(1, 16, side // 8, side // 8), empty(1), empty(1, 256, 2304), Ones(1, 256))


def chroma(model: Any, side: int) -> Any:
    n = (side // 16) ** 2
    return model(empty(1, n, 64), empty(1, 512, 4096), empty(1), empty(n, 3), empty(512, 3))


def pixart(model: Any, side: int) -> Any:
    given = {"encoder_attention_mask": empty(1, 300), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return model(empty(1, 4, side // 8, side // 8), empty(1, 300, 4096), empty(1), **given)


def hidream(model: Any, side: int) -> Any:
    for block in model.modules():  # which tokens go to which expert cannot be told without values, how many can
        if type(block).__name__ == "MOEFeedForwardSwiGLU":
            block.moe_infer = lambda x, *_, block=block: block.experts[0](x.repeat(block.num_activated_experts, 1))[
                : len(x)
            ]
    model.unpatchify = lambda x, *_: x  # reads sizes that a tensor holds
    return model(
        empty(1, 16, side // 8, side // 8), empty(1), empty(1, 128, 4096), empty(32, 1, 128, 4096), empty(1, 2048)
    )


STEPS: dict[str, tuple[str, dict[str, Any], Callable[..., Any], int]] = {
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}, flux, 1),
    "flux2-dev": ("Flux2Transformer2DModel", {}, lambda model, side: flux2(model, side, 15360), 1),
    "flux2-klein-4b": (
        "Flux2Transformer2DModel",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
         "guidance_embeds": False}, lambda model, side: flux2(model, side, 7680), 1,
    ),
    "flux2-klein-9b": (
        "Flux2Transformer2DModel",
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
         "guidance_embeds": False}, lambda model, side: flux2(model, side, 12288), 1,
    ),
    "flux3-klein-base": ("Flux3Transformer2DModel", {}, flux3, 2),
    "flux3-klein": ("Flux3Transformer2DModel", {"flow_map": True}, flux3, 1),
    "qwen-image": ("QwenImageTransformer2DModel", {}, qwen, 2),
    "z-image": ("ZImageTransformer2DModel", {}, z_image, 2),
    "z-image-turbo": ("ZImageTransformer2DModel", {}, z_image, 1),
    "sd3.5-large": (
        "SD3Transformer2DModel",
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
         "qk_norm": "rms_norm"}, sd3, 2,
    ),
    "sd3.5-medium": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
         "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}, sd3, 2,
    ),
    "sana": ("SanaTransformer2DModel", {}, sana, 2),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {"axes_dim_rope": (32, 32, 32), "axes_lens": (300, 512, 512), "cap_feat_dim": 2304}, lumina2, 2,
    ),
    "chroma": ("ChromaTransformer2DModel", {}, chroma, 2),
    "pixart-sigma": (
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "use_additional_conditions": False}, pixart, 2,
    ),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096],
         "axes_dims_rope": (64, 32, 32), "llama_layers": [*range(32), *[31] * 16]}, hidream, 2,
    ),
}  # fmt: skip
"""By model: class, configuration, how it is called, and how often in a step at the pipeline's own guidance."""

_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
}  # fmt: skip
_DC = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
DECODERS: dict[str, tuple[str, str, str, dict[str, Any], Callable[[int], tuple[int, ...]]]] = {
    "kl": ("z-image", "decode", "AutoencoderKL", {**_KL, "latent_channels": 16}, lambda side: (1, 16, side // 8, side // 8)),
    "tiny": ("z-image", "preview_decode", "AutoencoderTiny", {"latent_channels": 16}, lambda side: (1, 16, side // 8, side // 8)),
    "flux2": ("flux2-dev", "decode", "AutoencoderKLFlux2", {}, lambda side: (1, 32, side // 8, side // 8)),
    "qwen": ("qwen-image", "decode", "AutoencoderKLQwenImage", {}, lambda side: (1, 16, 1, side // 8, side // 8)),
    "dc": (
        "sana", "decode", "AutoencoderDC",
        {"latent_channels": 32, "attention_head_dim": 32, "encoder_block_types": _DC, "decoder_block_types": _DC,
         "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
         "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024), "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
         "decoder_layers_per_block": (3,) * 6, "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
         "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)), "downsample_block_type": "conv",
         "upsample_block_type": "interpolate", "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"},
        lambda side: (1, 32, side // 32, side // 32),
    ),
}  # fmt: skip
"""By kind: a model whose preset tells it, and in which field; class, configuration, shape of the latents."""

_QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
_T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
_GEMMA = {"hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
          "intermediate_size": 9216}  # fmt: skip
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral-24b": (
        "MistralForCausalLM", "MistralConfig",
        {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
         "intermediate_size": 32768, "vocab_size": 131072},
    ),
    "qwen3-4b": ("Qwen3ForCausalLM", "Qwen3Config", {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728}),
    "qwen3-4b-headless": ("Qwen3Model", "Qwen3Config", {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728}),
    "qwen3-8b": ("Qwen3ForCausalLM", "Qwen3Config", {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288}),
    "qwen2.5-7b": (
        "Qwen2ForCausalLM", "Qwen2Config",
        {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
         "intermediate_size": 18944, "vocab_size": 152064},
    ),
    "llama-8b": (
        "LlamaForCausalLM", "LlamaConfig",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "intermediate_size": 14336, "vocab_size": 128256},
    ),
    "gemma-2b": ("Gemma2Model", "Gemma2Config", _GEMMA),
    "t5-xxl": ("T5EncoderModel", "T5Config", _T5),
    "clip-l": (
        "CLIPTextModelWithProjection", "CLIPTextConfig",
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "projection_dim": 768, "max_position_embeddings": 248},
    ),
    "clip-g": (
        "CLIPTextModelWithProjection", "CLIPTextConfig",
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
         "projection_dim": 1280, "max_position_embeddings": 248},
    ),
}  # fmt: skip
TEXTS: dict[str, list[tuple[str, int]]] = {
    "flux": [("clip-l", 77), ("t5-xxl", 512)],
    "flux2-dev": [("mistral-24b", 512)],
    "flux2-klein-4b": [("qwen3-4b", 512)],
    "flux2-klein-9b": [("qwen3-8b", 512)],
    "flux3-klein-base": [("qwen3-4b", 80)] * 2,
    "flux3-klein": [("qwen3-4b", 80)],
    "qwen-image": [("qwen2.5-7b", 34 + TOKENS)] * 2,
    "z-image": [("qwen3-4b-headless", 512)] * 2,
    "z-image-turbo": [("qwen3-4b-headless", 512)],
    "sd3.5-large": [("clip-l", 77), ("clip-g", 77), ("t5-xxl", 256)] * 2,
    "sd3.5-medium": [("clip-l", 77), ("clip-g", 77), ("t5-xxl", 256)] * 2,
    "sana": [("gemma-2b", 300 + 210), ("gemma-2b", 300)],
    "lumina2": [("gemma-2b", 256)] * 2,
    "chroma": [("t5-xxl", 512)] * 2,
    "pixart-sigma": [("t5-xxl", 300)] * 2,
    "hidream": [("clip-l", 128), ("clip-g", 128), ("t5-xxl", 128), ("llama-8b", 128)] * 2,
}
"""By model: the text encoders of a prompt, with the tokens that each reads; twice with a negative prompt."""


def encoding(name: str, tokens: int) -> float:
    """Return the TFLOPs of a text encoder."""
    kind, config, sizes = ENCODERS[name]
    with META:
        model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
        return counted(lambda: model(input_ids=torch.zeros(1, tokens, dtype=torch.long)))


def built(kind: str, config: dict[str, Any]) -> Any:
    """Return a model without weights."""
    with META:
        return getattr(diffusers, kind)(**config).eval()


def near(preset: float | None) -> dict[str, float]:
    """Return the promise that a preset is what is counted, to the two or three digits it is written with."""
    return {} if preset is None else {"at_least": 0.99 * preset, "at_most": 1.01 * preset}


def run() -> list[Row]:
    """Count every model, text and decoder at 512 and 1024 px, and the score of a picture by every reward, against the presets."""
    rows, encoder = [], functools.cache(encoding)
    for name, (kind, config, call, times) in STEPS.items():
        model = built(kind, config)
        note = f"{sum(value.numel() for value in model.parameters()) / 1e9:.2f} billion weights"
        for side in (512, 1024):
            preset = PRESETS.get(f"{name}-{side}+hpsv2")
            if preset is not None:
                value = counted(functools.partial(call, model, side)) * times
                rows.append(Row(f"step of {name} at {side} px", value, "TFLOPs", **near(preset.step), note=note))
        value = sum(encoder(*one) for one in TEXTS[name])
        preset = PRESETS[f"{name}-1024+hpsv2"]
        rows.append(Row(f"text of {name}", value, "TFLOPs", **near(preset.per_prompt or None)))
    for name, (model, field, kind, config, shape) in DECODERS.items():
        decoder = built(kind, config)
        for side in (512, 1024):
            value = counted(functools.partial(decoder.decode, empty(*shape(side))))
            preset = PRESETS[f"{model}-{side}{'-tiny' if field == 'preview_decode' else ''}+hpsv2"]
            rows.append(Row(f"decode of {name} at {side} px", value, "TFLOPs", **near(getattr(preset, field))))
    for name, reward in real_rewards().items():
        for side in reward.sides:
            note = f"{reward.millions / 1e3:.2f} billion weights"
            value = reward.tflops(side)
            rows.append(
                Row(f"score by {name} of a {side} px input", value, "TFLOPs", **near(VERIFY.get(name)), note=note)
            )
    return rows
