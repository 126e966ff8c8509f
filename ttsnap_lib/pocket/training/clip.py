"""Training of pocket-clip: contrastive with hard negatives, then preferences between generated pictures.

As for the PickScore it stands for, the last stage sees finished pictures only: what a denoising run looks like on
its way stays unknown to it, and is left to noise-aware finetuning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from ttsnap_lib.pocket.training.loop import fit
from ttsnap_lib.pocket.training.models import make_clip
from ttsnap_lib.pocket.training.text import attribute_heads, attribute_loss, attribute_targets
from ttsnap_lib.pocket.training.tokens import clip_tokenizer, tokenize
from ttsnap_lib.pocket.world import PIXELS, Scene, caption, hard_negative, parse_caption

_NEGATIVES = 2
_LABEL_TEMPERATURE = 0.08  # oracle difference at which a preference is 73% sure


def clip_processor() -> tuple[CLIPImageProcessor, PreTrainedTokenizerFast]:
    """Return the two halves of pocket-clip's processor: pictures of 32 x 32 pixels, scaled to [-1, 1], and words.

    Apart, because transformers 4 makes a CLIPProcessor of CLIP's own tokenizer classes alone.
    """
    images = CLIPImageProcessor(
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return images, clip_tokenizer()


def degrade(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return float pictures (n, 32, 32, 3) in [0, 1]: a third as they are, the others blurred or lightly noised."""
    out = pictures.astype(np.float32) / 255.0
    kind = rng.integers(3, size=len(out))
    blurred = np.flatnonzero(kind == 1)
    strength = rng.uniform(0.3, 0.8)  # one filter for the batch keeps this cheap
    if len(blurred):
        out[blurred] = ndimage.gaussian_filter(out[blurred], (0, strength, strength, 0))
    noised = np.flatnonzero(kind == 2)
    levels = rng.uniform(0.0, 0.05, size=(len(noised), 1, 1, 1))
    out[noised] += (levels * rng.standard_normal(out[noised].shape)).astype(np.float32)
    return np.clip(out, 0.0, 1.0)


def _pixels(pictures: np.ndarray) -> torch.Tensor:
    """Return what the processor makes of float pictures in [0, 1] of the right size."""
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float().sub_(0.5).div_(0.5)


def _embed(clip: CLIPModel, pictures: np.ndarray | None, ids: torch.Tensor | None) -> tuple:
    seen = None if pictures is None else clip.get_image_features(pixel_values=_pixels(pictures))
    read = None if ids is None else clip.get_text_features(input_ids=ids)
    # An object that holds the embedding since transformers 5.
    return tuple(
        found if found is None else F.normalize(getattr(found, "pooler_output", found), dim=-1)
        for found in (seen, read)
    )


@torch.no_grad()
def clip_scores(clip: CLIPModel, texts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
    """Return PickScore's formula, ``exp(logit_scale) * cosine``, float32 (n,), of float pictures in [0, 1]."""
    ids, scale = tokenize(clip_tokenizer(), texts), clip.logit_scale.exp()
    out = []
    for start in range(0, len(pictures), 256):
        seen, read = _embed(clip, pictures[start : start + 256], ids[start : start + 256])
        out.append(scale * (seen * read).sum(dim=-1))
    return torch.cat(out).numpy()


def _contrast(clip: CLIPModel, scenes: list[Scene], pictures: np.ndarray, rng: np.random.Generator) -> dict:
    """Return the contrastive loss of a batch, each picture against all captions and its own hard negatives."""
    texts = [caption(scene if rng.random() < 0.5 else scene.mirrored()) for scene in scenes]
    wrong = [caption(hard_negative(scene, rng)) for scene in scenes for _ in range(_NEGATIVES)]
    seen, read = _embed(clip, pictures, tokenize(clip_tokenizer(), texts + wrong))
    n, scale = len(scenes), clip.logit_scale.exp().clamp(max=100.0)
    same = torch.arange(n)
    near = torch.einsum("nd,nkd->nk", seen, read[n:].view(n, _NEGATIVES, -1))
    in_batch = seen @ read[:n].T
    return {
        "contrast": F.cross_entropy(scale * torch.cat([in_batch, near], dim=1), same)
        + F.cross_entropy(scale * in_batch.T, same),
        "hard": (near.max(dim=1).values < in_batch.diagonal()).float().mean(),
        "seen": seen,
    }


def train_contrastive(
    scenes: list[Scene], pictures: np.ndarray, text: CLIPTextModelWithProjection, seed: int = 0, **how: Any
) -> CLIPModel:
    """Train pocket-clip on renders and degraded pictures, from the trained text encoder.

    Besides the contrastive loss, linear readers (dropped afterwards) tell the attributes from the picture's embedding:
    the vision tower learns shapes several times faster with them.
    """
    clip = make_clip(seed)
    clip.text_model.load_state_dict(text.text_model.state_dict())
    clip.text_projection.load_state_dict(text.text_projection.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = attribute_heads(clip.config.projection_dim, 2)
    # A picture has one answer: the telling that starts left or on top.
    told = [scene.mirrored() if scene.relation in ("right of", "below") else scene for scene in scenes]
    targets = attribute_targets(told)

    def loss(rng: np.random.Generator, batch: int) -> dict[str, torch.Tensor]:
        rows = rng.integers(len(scenes), size=batch)
        parts = _contrast(clip, [scenes[k] for k in rows], degrade(pictures[rows], rng), rng)
        parts["attributes"] = attribute_loss(heads, parts.pop("seen") * 8.0, targets[torch.from_numpy(rows)])
        return {"loss": parts["contrast"] + parts["attributes"], **{k: v.detach() for k, v in parts.items()}}

    fit("clip", {"clip": clip, "heads": heads}, loss, seed=seed, **how)
    return clip.eval()


def train_preferences(
    clip: CLIPModel,
    generated: Sequence[tuple[str, np.ndarray, np.ndarray]],
    flawed: Sequence[tuple[str, np.ndarray, np.ndarray]],
    scenes: list[Scene],
    pictures: np.ndarray,
    seed: int = 0,
    **how: Any,
) -> None:
    """Teach pocket-clip, in place, which of two finished pictures of a caption is the better one.

    `generated` and `flawed` hold captions, their pictures, uint8 (k, 32, 32, 3), and their oracle scores (k,). Flawed
    renders are half of each batch: they keep a few thousand generated pictures from being learned by heart. `scenes`
    and `pictures` are renders, for the contrastive loss that keeps what was learned.
    """
    group = min(len(item[2]) for item in (*generated, *flawed))

    def loss(rng: np.random.Generator, batch: int) -> dict[str, torch.Tensor]:
        half = max(1, batch // group // 2)
        chosen = [source[k] for source in (generated, flawed) for k in rng.choice(len(source), half, replace=False)]
        picks = [rng.permutation(len(item[2]))[:group] for item in chosen]
        texts = [item[0] for item in chosen]
        shown = np.concatenate([item[1][pick] for item, pick in zip(chosen, picks, strict=True)])
        shown = shown.astype(np.float32) / 255.0
        if rng.random() < 0.5:  # mirror images of the pairs, with captions that tell them so
            shown, texts = shown[:, :, ::-1], [_flipped(text) for text in texts]
        oracle = np.stack([item[2][pick] for item, pick in zip(chosen, picks, strict=True)])
        truth = torch.from_numpy(oracle).float()
        seen, read = _embed(clip, shown, tokenize(clip_tokenizer(), texts))
        score = clip.logit_scale.exp() * torch.einsum("pkd,pd->pk", seen.view(len(chosen), group, -1), read)
        difference = score[:, :, None] - score[:, None, :]
        better = torch.sigmoid((truth[:, :, None] - truth[:, None, :]) / _LABEL_TEMPERATURE)
        off = ~torch.eye(group, dtype=torch.bool).expand(len(chosen), -1, -1)
        preference = F.binary_cross_entropy_with_logits(difference[off], better[off])
        clear = off & ((better - 0.5).abs() > 0.3)
        right = ((difference > 0) == (better > 0.5))[clear].float()
        rows = rng.integers(len(scenes), size=max(2, batch // 2))
        parts = _contrast(clip, [scenes[k] for k in rows], degrade(pictures[rows], rng), rng)
        total = preference + 0.1 * parts["contrast"]
        return {"loss": total, "preference": preference.detach(), "right": right.mean() if len(right) else right.sum(),
                "contrast": parts["contrast"].detach(), "hard": parts["hard"]}  # fmt: skip

    fit("preferences", {"clip": clip}, loss, seed=seed, **how)
    clip.eval()


def _flipped(text: str) -> str:
    scene = parse_caption(text)
    relation = scene.mirrored().relation if scene.relation in ("left of", "right of") else scene.relation
    return caption(dataclasses.replace(scene, relation=relation))
