"""The reward models at their published sizes, on the meta device: their weights, LoRA layers and TFLOPs a picture."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.blip.modeling_blip_text import BlipTextModel

from ttsnap_lib.rewards import aesthetic, image_reward, mps, towers, vlm
from ttsnap_lib.rewards.base import TextBatch

META = torch.device("meta")
# Of HPSv3: the chat and the instruction are 529 tokens in Qwen's vocabulary; a prompt of 35, and the picture's 256.
HPSV3_TOKENS = 529 + 35 + 256
# Of VQAScore: the chat and the question are 33; a prompt of 35, and the picture's, by its side in pixels.
VQA_TOKENS = {512: 33 + 35 + 18**2, 1024: 33 + 35 + 37**2}


@dataclass(frozen=True)
class Real:
    """A reward model without values, and what scores one picture of the first of `sides`, or of another, in pixels."""

    module: Any
    lora_targets: str | None
    score: Callable[[int], Any]
    sides: tuple[int, ...] = (224,)

    def tflops(self, side: int | None = None) -> float:
        """Return the TFLOPs of one picture."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.score(self.sides[0] if side is None else side)
        return counter.get_total_flops() / 1e12

    @property
    def millions(self) -> float:
        return sum(parameter.numel() for parameter in self.module.parameters()) / 1e6

    @property
    def lora_layers(self) -> int:
        """Layers that peft would adapt; open_clip's attention is one layer."""
        names = (name for name, part in self.module.named_modules() if not isinstance(part, torch.nn.ModuleList))
        return sum(re.fullmatch(self.lora_targets, name) is not None for name in names) if self.lora_targets else 0


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor without values."""
    return torch.empty(*shape, device=META, dtype=dtype)


PIXELS = empty(1, 3, 224, 224)


def clip(size: str) -> Any:
    """Return CLIP-H (laion2B) or CLIP-L (OpenAI)."""
    width, (text_layers, text_heads), (vision, layers, heads) = {
        "h": (1024, (24, 16), (1280, 32, 16)),
        "l": (768, (12, 12), (1024, 24, 16)),
    }[size]
    text = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": text_layers,
            "num_attention_heads": text_heads}  # fmt: skip
    seen = {"hidden_size": vision, "intermediate_size": 4 * vision, "num_hidden_layers": layers,
            "num_attention_heads": heads, "patch_size": 14, "image_size": 224}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=seen, projection_dim=width)
    with META:
        return transformers.CLIPModel(config).eval()


def _clip_score(model: Any) -> Real:
    return Real(model, towers.CLIP_LORA_TARGETS, lambda _: model.get_image_features(pixel_values=PIXELS))


def _open_clip() -> Real:
    import open_clip

    with META:
        model = open_clip.create_model("ViT-H-14", pretrained=None, precision="fp32", device="meta").eval()
    return Real(model, towers._OPEN_CLIP_LORA_TARGETS, lambda _: model.encode_image(PIXELS))


def _mps(model: Any) -> Real:
    with META:
        module = mps.MpsScorer(model).eval()
    shapes = {"words": empty(1, 77, 1024), "read": empty(1, 77, dtype=torch.bool), "features": empty(1, 1024)}
    reward = SimpleNamespace(module=module, dtype=torch.float32)
    return Real(module, mps._LORA_TARGETS, lambda _: mps.MpsReward.forward_embedding(reward, PIXELS, TextBatch(shapes)))


def _aesthetic(model: Any) -> Real:
    with META:
        module = aesthetic.AestheticScorer(model).eval()
    reward = SimpleNamespace(module=module, dtype=torch.float32)
    return Real(module, towers.CLIP_LORA_TARGETS, lambda _: aesthetic.AestheticReward.forward_embedding(reward, PIXELS))


def _blip(tokens: int, head: Any) -> Real:
    settings = {"encoder_hidden_size": 1024, "is_decoder": True, "bos_token_id": None, "eos_token_id": None}
    text = transformers.BlipTextConfig(**image_reward._BLIP_TEXT, **settings, sep_token_id=None)
    seen = transformers.BlipVisionConfig(**image_reward._VISION, image_size=224)
    with META:
        encoder = BlipTextModel(text, add_pooling_layer=False)
        module = image_reward.BlipScorer(transformers.BlipVisionModel(seen), encoder, None, head()).eval()

    def score(_: int) -> None:
        image = module.blip.visual_encoder(pixel_values=PIXELS).last_hidden_state
        ids = empty(1, tokens, dtype=torch.long)
        # without masks, whose values transformers would look at
        read = module.blip.text_encoder(input_ids=ids, encoder_hidden_states=image, is_decoder=False)
        module.mlp.layers(read.last_hidden_state[:, 0])

    return Real(module, image_reward._LORA_TARGETS, score)


def _seen(visual: Any, patches: int, window: int | None = None) -> None:
    """Run a vision tower of Qwen's, block by block: its own forward reads sizes from tensors' values."""
    hidden = visual.patch_embed(empty(patches, 3 * 2 * 14 * 14))
    width = hidden.shape[-1] // visual.blocks[0].attn.num_heads
    whole = torch.tensor([0, patches])
    parts = whole if window is None else torch.tensor([*range(0, patches, window), patches])
    full = getattr(visual, "fullatt_block_indexes", range(len(visual.blocks)))
    for k, block in enumerate(visual.blocks):
        given = {"cu_seqlens": whole if k in full else parts, "position_embeddings": (empty(patches, width),) * 2}
        hidden = block(hidden, **given)
    visual.merger(hidden)


def _read(language: Any, tokens: int) -> torch.Tensor:
    positions = empty(3, 1, tokens, dtype=torch.long)
    embeds = empty(1, tokens, language.config.hidden_size)
    return language(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state


_QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}  # fmt: skip


def _hpsv3() -> Real:
    config = transformers.Qwen2VLConfig(text_config={**_QWEN_7B, "vocab_size": 151658})
    config.text_config._attn_implementation = "eager"  # sdpa's mask is looked at, which a meta tensor cannot be
    with META:
        module = vlm.Hpsv3Scorer(transformers.Qwen2VLModel(config)).eval()

    def score(_: int) -> None:
        _seen(module.model.visual, 4 * 256)
        module.rm_head(_read(module.model.language_model, HPSV3_TOKENS)[:, -1])

    return Real(module, None, score, (448,))


def _vqascore() -> Real:
    text = {**_QWEN_7B, "vocab_size": 152064}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config={"hidden_size": 1280, "out_hidden_size": 3584}
    )
    config.text_config._attn_implementation = "eager"
    with META:
        module = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()

    def score(side: int) -> None:
        _seen(module.model.visual, round(side / 14 / 2) ** 2 * 4, window=64)
        module.lm_head(_read(module.model.language_model, VQA_TOKENS[side])[:, -1])

    return Real(module, None, score, tuple(VQA_TOKENS))


def real_rewards() -> dict[str, Real]:
    """Return the named rewards that have a published size; HPSv2.1 is as HPSv2."""
    h, small = clip("h"), clip("l")
    return {
        "image_reward": _blip(35, image_reward.linear_head),
        "pickscore": _clip_score(h),
        "hpsv2": _open_clip(),
        "clipscore": _clip_score(small),
        "mps": _mps(h),
        "cyclereward": _blip(128, image_reward._gelu_head),
        "aesthetic": _aesthetic(small),
        "hpsv3": _hpsv3(),
        "vqascore": _vqascore(),
    }
