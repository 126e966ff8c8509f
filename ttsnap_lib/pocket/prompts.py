"""The packaged captions: training, selection, evaluation and test splits that share no picture."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from ttsnap_lib.checks import choice, integer
from ttsnap_lib.errors import PromptError

from .world import Scene, all_scenes, caption, parse_caption, random_scene

__all__ = ["SPLITS", "held_out", "make_splits", "pocket_prompts", "training_scenes"]

SPLITS: dict[str, int] = {"train": 2000, "selection": 128, "evaluation": 128, "test": 128}
"""Captions per split. The models never saw a picture of the last three."""

_FILE = Path(__file__).with_name("prompts.json")
_SEED = 20251122


def make_splits(seed: int = _SEED) -> dict[str, list[str]]:
    """Draw the splits: as many one-thing captions in each as a random scene would have, no picture in two splits.

    A picture told from its other thing ("a above b", "b below a") counts as the same.
    """
    rng = np.random.default_rng(seed)
    scenes = list(all_scenes())
    single = [scene for scene in scenes if scene.relation is None]
    double = [scene for scene in scenes if scene.relation is not None]
    rng.shuffle(single)
    rng.shuffle(double)
    splits: dict[str, list[str]] = {}
    used: set[Scene] = set()
    for name in ("selection", "evaluation", "test", "train"):
        size = SPLITS[name]
        alone = min(size // 8, len(single)) if name != "train" else len(single)
        chosen = [single.pop() for _ in range(alone)]
        while len(chosen) < size:
            scene = double.pop()
            if scene not in used:
                used |= {scene, scene.mirrored()}
                chosen.append(scene)
        order = rng.permutation(size)
        splits[name] = [caption(chosen[k]) for k in order]
    return splits


@functools.cache
def _splits() -> dict[str, tuple[str, ...]]:
    return {name: tuple(texts) for name, texts in json.loads(_FILE.read_text("utf-8")).items()}


def pocket_prompts(split: str = "evaluation", n: int | None = None) -> list[str]:
    """Return the first `n` captions of a split (all by default).

    Parameters
    ----------
    split : {"train", "selection", "evaluation", "test"}
        ``train`` captions are among those the models were trained on; the others were held out: choose settings on
        ``selection``, report on ``evaluation``, and keep ``test`` for a last check.
    n : int, optional
        How many, from the start of the list.

    Raises
    ------
    PromptError
        An unknown split, or more captions than it has.
    """
    texts = _splits()[choice("split", split, SPLITS, error=PromptError)]
    return list(texts[: integer("n", len(texts) if n is None else n, 1, len(texts), error=PromptError)])


@functools.cache
def held_out() -> frozenset[Scene]:
    """Return the scenes of the held-out splits, told from either thing."""
    scenes = [parse_caption(text) for name in SPLITS if name != "train" for text in _splits()[name]]
    return frozenset(scenes) | {scene.mirrored() for scene in scenes}


def training_scenes(n: int, rng: np.random.Generator) -> list[Scene]:
    """Return `n` random scenes, none of them held out."""
    away, scenes = held_out(), list[Scene]()
    while len(scenes) < n:
        scene = random_scene(rng)
        if scene not in away:
            scenes.append(scene)
    return scenes
