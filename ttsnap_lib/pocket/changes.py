"""Scenes that differ a little from a given one: wrong captions to learn from."""

from __future__ import annotations

import dataclasses

import numpy as np

from .world import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, Scene

__all__ = ["MISLABELED", "hard_negative", "mislabeled"]

MISLABELED = 0.1
"""Chance of each attribute of a training caption to be wrong, in the last stage of both diffusion models.

Captions scraped from the web are wrong about as often. A model that learned from them draws clean pictures with a
wrong color, shape, size or place in a part of the seeds: what Best-of-N is for.
"""

_ATTRIBUTES = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES}


def hard_negative(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with one thing about it changed, never to the same picture."""
    things = list(scene.things)
    kinds = ["background", *["size", "color", "shape"] * len(things)] + ["relation", "swap"] * (len(things) == 2)
    kind = str(rng.choice(kinds))
    if kind == "swap" and things[0] != things[1]:
        return Scene(scene.background, tuple(things[::-1]), scene.relation)
    if kind in ("relation", "swap"):
        others = [name for name in RELATIONS if name != scene.relation]
        return Scene(scene.background, scene.things, str(rng.choice(others)))
    if kind == "background":
        others = [name for name in BACKGROUNDS if name != scene.background]
        return Scene(str(rng.choice(others)), scene.things, scene.relation)
    which = int(rng.integers(len(things)))
    others = [name for name in _ATTRIBUTES[kind] if name != getattr(things[which], kind)]
    things[which] = dataclasses.replace(things[which], **{kind: str(rng.choice(others))})
    return Scene(scene.background, tuple(things), scene.relation)


def mislabeled(scene: Scene, rng: np.random.Generator, chance: float = MISLABELED) -> Scene:
    """Return the scene with each attribute, the relation and the background replaced by another at `chance`."""

    def other(value: str, options: tuple[str, ...]) -> str:
        return str(rng.choice([name for name in options if name != value])) if rng.random() < chance else value

    things = tuple(
        dataclasses.replace(thing, **{name: other(getattr(thing, name), o) for name, o in _ATTRIBUTES.items()})
        for thing in scene.things
    )
    relation = None if scene.relation is None else other(scene.relation, tuple(RELATIONS))
    return Scene(other(scene.background, tuple(BACKGROUNDS)), things, relation)
