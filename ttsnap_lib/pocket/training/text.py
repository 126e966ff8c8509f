"""Training of the text encoders: every output must tell what the caption says of its word's thing.

Diffusion losses teach text encoders slowly. A minute of predicting the caption's attributes gives embeddings from
which color, shape, size and place of each thing can be read linearly; the diffusion models then train on them frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from ttsnap_lib.pocket.training.loop import Fit, fit
from ttsnap_lib.pocket.training.models import TEXT_WIDTH, make_clip_text, make_t5
from ttsnap_lib.pocket.training.tokens import CLIP_TOKENS, T5_TOKENS, clip_tokenizer, t5_tokenizer
from ttsnap_lib.pocket.world import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, Scene, caption, training_scenes

_PARTS = [(name, len(options)) for name, options in (("size", SIZES), ("color", COLORS), ("shape", SHAPES))]


_PLACES = len(RELATIONS) + 1


def tokenize(tokenizer, texts: Sequence[str], length: int) -> torch.Tensor:
    """Return token ids, int64 (n, length), padded and truncated."""
    return tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def attribute_targets(scenes: Sequence[Scene]) -> torch.Tensor:
    """Return what captions say as int64 (n, 9): size, color, shape, place of each thing, then the background.

    Missing second things are -100, which cross-entropy ignores; places are 0 (alone) or 1 + the relation's index.
    """
    rows = []
    relations, opposite = (
        list(RELATIONS),
        {"left of": "right of", "right of": "left of", "above": "below", "below": "above"},
    )
    for scene in scenes:
        row = []
        places = [0, 0] if scene.relation is None else [relations.index(scene.relation) + 1, 0]
        if scene.relation is not None:
            places[1] = relations.index(opposite[scene.relation]) + 1
        for thing, place in zip(scene.things, places, strict=False):
            row += [list(SIZES).index(thing.size), list(COLORS).index(thing.color), SHAPES.index(thing.shape), place]
        row += [-100] * (8 - len(row)) + [list(BACKGROUNDS).index(scene.background)]
        rows.append(row)
    return torch.tensor(rows)


def _heads(slots: int) -> nn.ModuleList:
    sizes = [*(size for _, size in _PARTS), _PLACES] * slots + [len(BACKGROUNDS)]
    return nn.ModuleList(nn.Linear(TEXT_WIDTH, size) for size in sizes)


def _read(heads: Any, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses = [F.cross_entropy(head(features), targets[:, k], ignore_index=-100) for k, head in enumerate(heads)]
    return torch.stack(losses).mean()


def train_text(
    how: Fit, scratch: Path, seed: int = 0, log: Callable = print
) -> tuple[T5EncoderModel, CLIPTextModelWithProjection, list]:
    """Train the T5 and the CLIP text encoder on captions alone."""
    t5, clip = make_t5(seed), make_clip_text(seed, projection=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleDict({"word": _heads(1), "pooled": _heads(2), "projected": _heads(2), "first": _heads(1)})
    clip_words, t5_words = clip_tokenizer(), t5_tokenizer()

    def loss(rng: np.random.Generator, batch: int) -> dict[str, torch.Tensor]:
        scenes = training_scenes(batch, rng)
        texts, targets = [caption(scene) for scene in scenes], attribute_targets(scenes)
        words = t5(tokenize(t5_words, texts, T5_TOKENS))[0]
        two = torch.tensor([len(scene.things) == 2 for scene in scenes])
        own = torch.cat([targets[:, :4], targets[:, 8:]], dim=1)  # words 0..2 tell of the first thing
        other = torch.cat([targets[:, 4:8], targets[:, 8:]], dim=1)[two]  # words 4..6, where there are two
        in_words = [_read(heads["word"], words[:, k], own) for k in range(3)]
        in_words += [_read(heads["word"], words[two, k], other) for k in range(4, 7)]
        out = clip(tokenize(clip_words, texts, CLIP_TOKENS), output_hidden_states=True)
        ends = out.hidden_states[-2][torch.arange(batch), torch.where(two, 9, 5)]  # the layer that SDXL reads
        in_pooled = _read(heads["pooled"], clip.text_model.final_layer_norm(ends), targets)
        in_projected = _read(heads["projected"], out.text_embeds, targets)
        in_last = _read(heads["pooled"], out.last_hidden_state[torch.arange(batch), torch.where(two, 9, 5)], targets)
        parts = {"words": torch.stack(in_words).mean(), "pooled": in_pooled + in_last, "projected": in_projected}
        return {"loss": sum(parts.values(), torch.zeros(())), **{key: value.detach() for key, value in parts.items()}}

    modules = {"t5": t5, "clip": clip, "heads": heads}
    history = fit("text", modules, loss, how, seed=seed, scratch=scratch, log=log)
    return t5.eval().requires_grad_(False), clip.eval().requires_grad_(False), history
