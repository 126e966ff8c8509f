"""Training of the text encoders: every output must tell what the caption says of its word's thing.

Diffusion losses teach text encoders slowly. A minute of predicting the caption's attributes gives embeddings from
which color, shape, size and place of each thing can be read linearly; the diffusion models then train on them frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from ttsnap_lib.pocket.training.loop import fit
from ttsnap_lib.pocket.training.models import TEXT_WIDTH, make_clip_text, make_t5
from ttsnap_lib.pocket.training.tokens import clip_tokenizer, t5_tokenizer, tokenize
from ttsnap_lib.pocket.world import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, Scene, caption, training_scenes

ATTRIBUTES = (len(SIZES), len(COLORS), len(SHAPES), len(RELATIONS) + 1)
"""How many sizes, colors, shapes and places a thing can have; a thing alone has a place of its own."""


def attribute_targets(scenes: Sequence[Scene]) -> torch.Tensor:
    """Return what captions say as int64 (n, 9): size, color, shape, place of each thing, then the background.

    Missing second things are -100, which cross-entropy ignores; places are 0 (alone) or 1 + the relation's index.
    """
    rows, places = [], [None, *RELATIONS]
    for scene in scenes:
        row = []
        for thing, relation in zip(scene.things, (scene.relation, scene.mirrored().relation), strict=False):
            row += [list(SIZES).index(thing.size), list(COLORS).index(thing.color), SHAPES.index(thing.shape)]
            row.append(places.index(relation))
        rows.append(row + [-100] * (8 - len(row)) + [list(BACKGROUNDS).index(scene.background)])
    return torch.tensor(rows)


def attribute_heads(width: int, things: int) -> nn.ModuleList:
    """Return a linear reader of each column of `attribute_targets` for so many things."""
    return nn.ModuleList(nn.Linear(width, size) for size in (*ATTRIBUTES * things, len(BACKGROUNDS)))


def attribute_loss(heads: Any, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of what the heads read."""
    losses = [F.cross_entropy(head(features), targets[:, k], ignore_index=-100) for k, head in enumerate(heads)]
    return torch.stack(losses).mean()


def train_text(seed: int = 0, **how: Any) -> tuple[T5EncoderModel, CLIPTextModelWithProjection]:
    """Train the T5 and the CLIP text encoder on captions alone."""
    t5, clip = make_t5(seed), make_clip_text(seed, projection=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        slots = {"word": 1, "pooled": 2, "projected": 2, "first": 1}
        heads = nn.ModuleDict({name: attribute_heads(TEXT_WIDTH, things) for name, things in slots.items()})
    clip_words, t5_words = clip_tokenizer(), t5_tokenizer()

    def loss(rng: np.random.Generator, batch: int) -> dict[str, torch.Tensor]:
        scenes = training_scenes(batch, rng)
        texts, targets = [caption(scene) for scene in scenes], attribute_targets(scenes)
        words = t5(tokenize(t5_words, texts))[0]
        two = torch.tensor([len(scene.things) == 2 for scene in scenes])
        own = torch.cat([targets[:, :4], targets[:, 8:]], dim=1)  # words 0..2 tell of the first thing
        other = torch.cat([targets[:, 4:8], targets[:, 8:]], dim=1)[two]  # words 4..6, where there are two
        in_words = [attribute_loss(heads["word"], words[:, k], own) for k in range(3)]
        in_words += [attribute_loss(heads["word"], words[two, k], other) for k in range(4, 7)]
        out = clip(tokenize(clip_words, texts), output_hidden_states=True)
        ends = out.hidden_states[-2][torch.arange(batch), torch.where(two, 9, 5)]  # the layer that SDXL reads
        in_pooled = attribute_loss(heads["pooled"], clip.text_model.final_layer_norm(ends), targets)
        in_projected = attribute_loss(heads["projected"], out.text_embeds, targets)
        in_last = attribute_loss(
            heads["pooled"], out.last_hidden_state[torch.arange(batch), torch.where(two, 9, 5)], targets
        )
        parts = {"words": torch.stack(in_words).mean(), "pooled": in_pooled + in_last, "projected": in_projected}
        return {"loss": sum(parts.values(), torch.zeros(())), **{key: value.detach() for key, value in parts.items()}}

    modules = {"t5": t5, "clip": clip, "heads": heads}
    fit("text", modules, loss, seed=seed, **how)
    return t5.eval().requires_grad_(False), clip.eval().requires_grad_(False)
