"""The picture world: scenes of one or two colored shapes, their captions and pictures, and the packaged splits of captions."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ttsnap_lib.checks import choice, integer
from ttsnap_lib.errors import PromptError

PIXELS = 32
"""Height and width of a picture."""
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.12, 0.22, 0.88),
    "yellow": (0.96, 0.86, 0.10),
    "purple": (0.58, 0.14, 0.72),
    "cyan": (0.12, 0.80, 0.86),
}
"""Colors of things, RGB in [0, 1]."""
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.06, 0.06, 0.06),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.95, 0.95, 0.95),
    "pink": (0.98, 0.68, 0.76),
}
"""Background colors, RGB in [0, 1]; none is a color of things."""
SHAPES = ("circle", "square", "triangle", "ring", "cross")
SIZES: dict[str, float] = {"small": 4.6, "large": 6.5}
"""Half the extent of a shape, in pixels."""
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Where the first thing stands from the second: (x, y), y downwards."""
WORDS = (*SIZES, *COLORS, *SHAPES, *(name.split()[0] for name in RELATIONS), *BACKGROUNDS)
"""The words that carry meaning; the rest of a caption (a, of, on, background) is grammar."""
MISLABELED = 0.1
"""Chance of each attribute of a training caption to be wrong, in the last stage of both diffusion models.

Captions scraped from the web are wrong about as often. A model that learned from them draws clean pictures with a
wrong color, shape, size or place in a part of the seeds: what Best-of-N is for.
"""
SPLITS: dict[str, int] = {"train": 2000, "selection": 128, "evaluation": 128, "test": 128}
"""Captions per split. The models never saw a picture of the last three."""

_ATTRIBUTES = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES}
_NEAR, _FAR = 8.0, 24.0  # centers of two things along the axis of their relation
_AXIS_JITTER, _CROSS_JITTER, _ALONE_JITTER = 0.6, 2.5, 3.0  # pixels, uniform
_SIZE_JITTER, _SHADE_JITTER = 0.05, 0.04
_SUPERSAMPLING = 3
_THING = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_PATTERN = re.compile(rf"{_THING}(?: ({'|'.join(RELATIONS)}) {_THING})? on a ({'|'.join(BACKGROUNDS)}) background")
_FILE = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True)
class Thing:
    """One colored shape."""

    size: str
    color: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a caption says: one thing, or two and where the first stands from the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None

    def mirrored(self) -> Scene:
        """Return the same picture told from the other thing ("a above b" is "b below a")."""
        if self.relation is None:
            return self
        x, y = RELATIONS[self.relation]
        other = next(name for name, offset in RELATIONS.items() if offset == (-x, -y))
        return Scene(self.background, self.things[::-1], other)


def caption(scene: Scene) -> str:
    """Return the caption of a scene, e.g. ``a small red ring left of a large blue square on a pink background``."""
    things = [f"a {thing.size} {thing.color} {thing.shape}" for thing in scene.things]
    return f"{f' {scene.relation} '.join(things)} on a {scene.background} background"


def parse_caption(text: str) -> Scene:
    """Return the scene that a caption tells: the inverse of :func:`caption`; PromptError for any other text."""
    match = _PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise PromptError(
            f"not a caption of the pocket world: got {text!r}, expected e.g. 'a small red ring left of a large blue "
            f"square on a pink background'. Use the words {', '.join(WORDS)}; pocket_prompts() lists captions."
        )
    first, relation, second, background = match.group(1, 2, 3), match[4], match.group(5, 6, 7), match[8]
    things = (Thing(*first),) if relation is None else (Thing(*first), Thing(*second))
    return Scene(background, things, relation)


def outside(text: str) -> str:
    """Return what a text asks for that the pocket world does not have, and what there is, in words; else ""."""
    words = dict.fromkeys(re.findall(r"\w+", text.lower()))
    if strange := [word for word in words if word not in {"a", "of", "on", "background", *WORDS}]:
        return f"does not know {', '.join(map(repr, strange))}; its words are {', '.join(WORDS)}"
    background = re.search(r"(\w+) background", text.lower())
    if background and background[1] not in BACKGROUNDS:
        return f"does not know a {background[1]} background; there are {', '.join(BACKGROUNDS)}"
    return ""


def random_scene(rng: np.random.Generator, alone: float = 0.25) -> Scene:
    """Return a random scene; `alone` is the chance of a single thing."""
    pick = lambda options: str(rng.choice(list(options)))
    draw = lambda: Thing(pick(SIZES), pick(COLORS), pick(SHAPES))
    background, first = pick(BACKGROUNDS), draw()
    if rng.random() < alone:
        return Scene(background, (first,))
    second = draw()
    while (first.color, first.shape) == (second.color, second.shape):
        second = draw()
    return Scene(background, (first, second), pick(RELATIONS))


def shape_mask(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return where points (x, y), in units of the half extent, y downwards, lie inside `shape`."""
    if shape == "circle":
        return x * x + y * y < 1.0
    if shape == "square":
        return (np.abs(x) < 0.88) & (np.abs(y) < 0.88)
    if shape == "triangle":  # tip up; the slanted edges meet the base corners
        return (y < 0.85) & (2.0 * np.abs(x) - 1.08 * y < 1.06)
    if shape == "ring":
        radius = x * x + y * y
        return (radius < 1.0) & (radius > 0.50**2)
    narrow, long = 0.32, 1.0  # cross
    return ((np.abs(x) < narrow) & (np.abs(y) < long)) | ((np.abs(y) < narrow) & (np.abs(x) < long))


def render(scenes: Sequence[Scene], rng: np.random.Generator, *, jitter: bool = True) -> np.ndarray:
    """Draw scenes, uint8 (n, 32, 32, 3), anti-aliased by 3 x 3 supersampling.

    Place, size and shade jitter unless `jitter` is false; each scene draws the same count of numbers from `rng`.
    """
    n = len(scenes)
    noise = rng.uniform(-1.0, 1.0, size=(n, 2, 8)) * float(jitter)
    fine = (np.arange(PIXELS * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING
    background = np.array([BACKGROUNDS[scene.background] for scene in scenes]).reshape(n, 3)
    picture: np.ndarray = np.broadcast_to(background[:, None, None, :], (n, PIXELS, PIXELS, 3)).astype(np.float32)
    picture = picture + (_SHADE_JITTER * noise[:, 0, 5:8])[:, None, None, :]
    for which in range(2):
        for shape in SHAPES:
            chosen = [
                k for k, scene in enumerate(scenes) if len(scene.things) > which and scene.things[which].shape == shape
            ]
            for start in range(0, len(chosen), 256):  # bounds the memory of the fine grid
                rows = np.array(chosen[start : start + 256])
                _draw(picture, rows, [scenes[k] for k in rows], which, noise[rows, which], fine)
    return np.round(np.clip(picture, 0.0, 1.0) * 255.0).astype(np.uint8)


def _draw(picture, rows, scenes: list[Scene], which: int, noise: np.ndarray, fine: np.ndarray) -> None:
    """Paint thing number `which` of `scenes` (all of one shape) over their rows of `picture`."""
    centers = np.array([_center(scene, which) for scene in scenes])
    spread = np.array([_spread(scene) for scene in scenes])
    centers = (centers + spread * noise[:, :2]).astype(np.float32)
    things = [scene.things[which] for scene in scenes]
    half: np.ndarray = np.array([SIZES[thing.size] for thing in things]) * (1.0 + _SIZE_JITTER * noise[:, 2])
    half = half.astype(np.float32)[:, None, None]
    x = (fine[None, None, :] - centers[:, 0, None, None]) / half
    y = (fine[None, :, None] - centers[:, 1, None, None]) / half
    inside = shape_mask(things[0].shape, x, y).astype(np.float32)
    blocks = inside.reshape(len(rows), PIXELS, _SUPERSAMPLING, PIXELS, _SUPERSAMPLING)
    cover = blocks.mean(axis=(2, 4))[..., None]
    shade = np.array([COLORS[thing.color] for thing in things]) + _SHADE_JITTER * noise[:, 3:6]
    picture[rows] = picture[rows] * (1.0 - cover) + cover * shade.astype(np.float32)[:, None, None, :]


def _center(scene: Scene, which: int) -> tuple[float, float]:
    """Return (x, y) of a thing without jitter."""
    middle = PIXELS / 2
    if scene.relation is None:
        return middle, middle
    x, y = RELATIONS[scene.relation]
    sign = (x + y) * (1 if which == 0 else -1)
    place = _NEAR if sign < 0 else _FAR
    return (place, middle) if x else (middle, place)


def _spread(scene: Scene) -> tuple[float, float]:
    if scene.relation is None:
        return _ALONE_JITTER, _ALONE_JITTER
    return (_AXIS_JITTER, _CROSS_JITTER) if RELATIONS[scene.relation][0] else (_CROSS_JITTER, _AXIS_JITTER)


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


@functools.cache
def _splits() -> dict[str, tuple[str, ...]]:
    return {name: tuple(texts) for name, texts in json.loads(_FILE.read_text("utf-8")).items()}


def pocket_prompts(split: str = "evaluation", n: int | None = None) -> list[str]:
    """Return the first `n` captions of a split (all by default).

    ``train`` captions are among those the models were trained on; the others were held out: choose settings on
    ``selection``, report on ``evaluation``, and keep ``test`` for a last check.
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
