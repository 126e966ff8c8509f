"""MPS, the Multi-dimensional Preference Score: CLIP-H, whose picture looks at the words that a condition picks out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ttsnap_lib.checks import text as checked_text
from ttsnap_lib.errors import RewardError
from ttsnap_lib.rewards.base import Reward, TextBatch
from ttsnap_lib.rewards.checkpoints import fetch_weights, load_strict, read_state
from ttsnap_lib.rewards.pixels import Preprocessing, from_clip_processor
from ttsnap_lib.rewards.towers import CLIP_LORA_TARGETS, pretrained

_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_WEIGHTS = "RE-N-Y/mpsv1"  # the authors' own file is a pickled module
_CONSTANTS = (r"(.*\.)?position_ids", r"(.*\.)?inv_freq")
_LAYERS, _HEAD, _WIDER = 4, 64, 4  # cross-attention layers, width of a head, hidden width in units of the width
_NEAR = 0.3  # a word is read where its nearness to the condition is above this part of the nearest word's
_LORA_TARGETS = CLIP_LORA_TARGETS + (
    r"|cross_model\.layers\.\d+\.(0\.(to_q|to_kv|to_out|ff\.[02])|1\.(fused_attn_ff_proj|attn_out|ff_out\.1))"
)
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
"""The authors' condition for the overall preference."""


class _SwiGLU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = x.chunk(2, dim=-1)
        return functional.silu(gate) * x


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return attention (n, tokens, heads x 64) of queries (n, heads, tokens, 64); all heads share one key and value."""
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _split(x: torch.Tensor) -> torch.Tensor:
    """Return (n, heads, tokens, 64) of (n, tokens, heads x 64)."""
    return x.unflatten(-1, (-1, _HEAD)).transpose(1, 2)


class _Cross(nn.Module):
    """Cross-attention of the picture to the words, with a feed-forward beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * _HEAD, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        wide = _WIDER * width
        self.ff = nn.Sequential(nn.Linear(width, 2 * wide, bias=False), _SwiGLU(), nn.Linear(wide, width, bias=False))

    def forward(self, x: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        k, v = self.to_kv(words).chunk(2, dim=-1)
        return self.to_out(_attend(_split(self.to_q(x)), k, v, mask)) + self.ff(x)


class _Parallel(nn.Module):
    """Self-attention of the picture with rotary positions, with a feed-forward beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        wide = _WIDER * width
        self.parts = (width, _HEAD, _HEAD, 2 * wide)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_out = nn.Sequential(_SwiGLU(), nn.Linear(wide, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, wide = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        slots = torch.arange(0, _HEAD, 2, device=x.device, dtype=torch.float32)
        angles = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=torch.float32), 10000 ** (-slots / _HEAD))
        cos, sin = (part.repeat(1, 2).to(x.dtype) for part in (angles.cos(), angles.sin()))
        q, k = (t * cos + torch.cat([-t[..., _HEAD // 2 :], t[..., : _HEAD // 2]], -1) * sin for t in (_split(q), k))
        return self.attn_out(_attend(q, k, v, None)) + self.ff_out(wide)


class MpsScorer(nn.Module):
    """A `CLIPModel` named `model`, and the `cross_model` of the authors, all layers by their names."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        width = model.config.projection_dim
        layers = nn.ModuleList(nn.ModuleList([_Cross(width), _Parallel(width)]) for _ in range(_LAYERS))
        self.model, self.cross_model = model, nn.ModuleDict({"layers": layers})


class MpsReward(Reward):
    """``logit_scale.exp()`` times the cosine of the prompt's embedding and of the picture that has looked at its words.

    Parameters
    ----------
    name : str
        The name under which scores are kept.
    module : MpsScorer
        The model.
    tokenizer : transformers tokenizer
        Prompts are padded and truncated at the text tower's length (77).
    preprocessing : Preprocessing
    condition : str
        What the preference is about: the words of the prompt that are near it are read.
    options : Any
        Device, dtype and batch_size, as :class:`Reward` takes them.
    """

    module: Any

    def __init__(
        self,
        name: str,
        module: MpsScorer,
        tokenizer: Any,
        preprocessing: Preprocessing,
        *,
        condition: str = CONDITION,
        **options: Any,
    ) -> None:
        super().__init__(name, module, preprocessing=preprocessing, default_lora_targets=_LORA_TARGETS, **options)
        self.tokenizer = tokenizer
        self.condition = checked_text("condition", condition, error=RewardError)
        self.settings = f"condition={condition}"
        scale = module.model.logit_scale.detach().float().clone()
        module.to(device=self.device, dtype=self.dtype).eval()
        module.model.logit_scale.data = scale.to(self.device)  # exp() of a bfloat16 logarithm would be off by a percent

    def encode_text(self, prompts: Sequence[str]) -> TextBatch:
        """Return the ``words`` (n, 77, d) of the prompts, which of them are ``read`` (n, 77), and their ``features`` (n, d)."""
        clip: Any = self.module.model
        length = clip.config.text_config.max_position_embeddings
        # Without a mask of the padding, as published.
        tokens = self.tokenizer(
            [*prompts, self.condition], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        found = clip.text_model(input_ids=tokens["input_ids"].to(self.device))
        words = clip.text_projection(found.last_hidden_state)
        near = (words.float() @ words[-1].float().mT).amax(-1)
        features = functional.normalize(clip.text_projection(found.pooler_output).float(), dim=-1)
        rows = {"words": words, "read": near / near.amax(-1, keepdim=True) > _NEAR, "features": features}
        return TextBatch(rows)[: len(prompts)]

    def forward_embedding(
        self, pixels: torch.Tensor, text: TextBatch | Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rewards (n,) and the embeddings (n, d) that the picture has before it looks at the words."""
        rows = (text if isinstance(text, TextBatch) else self.encode_text(text)).expand(len(pixels)).tensors
        clip = self.module.model
        seen = clip.vision_model(pixel_values=pixels.to(self.dtype))
        picture, embedding = clip.visual_projection(seen.last_hidden_state), clip.visual_projection(seen.pooler_output)
        for cross, parallel in self.module.cross_model.layers:
            picture = picture + cross(picture, rows["words"], rows["read"][:, None, None])
            picture = picture + parallel(picture)
        picture = functional.normalize(picture[:, 0].float(), dim=-1)
        scores = (picture * rows["features"]).sum(-1) * clip.logit_scale.float().exp()
        return scores, functional.normalize(embedding.float(), dim=-1)


def load_mps(
    name: str,
    *,
    model: str | Path = _CLIP,
    weights: str | Path | None = None,
    revision: str | None = None,
    **options: Any,
) -> MpsReward:
    """Load MPS from a file of its weights, or from the hub; `model` has the configuration and processor of its CLIP."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    source = str(model)
    path = Path(weights) if weights is not None else fetch_weights(_WEIGHTS, revision=revision)
    state = {key.removeprefix("mps."): value for key, value in read_state(path).items()}
    state = {re.sub(r"^(cross_model\.layers\.\d+\.\d)\.fn\.", r"\1.", key): value for key, value in state.items()}
    module = MpsScorer(CLIPModel(pretrained(CLIPConfig.from_pretrained, source, "config", None)))
    load_strict(module, state, source=str(path), constants=_CONSTANTS)
    tokenizer = pretrained(AutoTokenizer.from_pretrained, source, "tokenizer", None, trust_remote_code=False)
    images = pretrained(CLIPImageProcessor.from_pretrained, source, "image processor", None)
    return MpsReward(name, module, tokenizer, from_clip_processor(images, source), **options)
