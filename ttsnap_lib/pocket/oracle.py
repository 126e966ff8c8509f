"""A rule-based judge: does a picture show what its caption says? It knows the renderer's geometry, and learns nothing."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from ttsnap_lib.errors import RewardError
from ttsnap_lib.pocket.world import (
    BACKGROUNDS,
    COLORS,
    PIXELS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    parse_caption,
    shape_mask,
)

WEIGHTS: dict[str, float] = {
    "background": 0.5,
    "count": 0.4,
    "relation": 0.5,
    "color": 0.45,
    "shape": 0.45,
    "size": 0.3,
    "presence": 0.6,
}
"""How much of the score is lost when that part of the caption is wholly wrong."""

_SMALLEST = 6.0  # pixels of cover; below that a blob is dirt
_TEMPLATE = 20  # pixels of the frame in which shapes are compared
_FRAME = np.pad(np.zeros((PIXELS - 2, PIXELS - 2), bool), 1, constant_values=True)  # mostly background stands there
_CHROMA = 0.14  # distance in RGB over which a color stops being itself


def oracle_score(captions: Sequence[str] | str, images: np.ndarray | Sequence) -> np.ndarray:
    """Score pictures against their captions (or one for all), float64 (n,) in [0, 1].

    Images are uint8 (n, 32, 32, 3), float of that shape in [0, 1], or PIL images. The score is the product over the
    caption's parts of ``1 - weight * (1 - a)``, where ``a`` in [0, 1] says how well the part is met (see :func:`judge`).
    """
    pictures = _pictures(images)
    texts = [captions] * len(pictures) if isinstance(captions, str) else list(captions)
    if len(texts) != len(pictures):
        raise RewardError(
            f"captions and images differ in number: got {len(texts)}, expected {len(pictures)} captions or one. Give one each."
        )
    scenes = [parse_caption(text) for text in texts]
    return np.array([_total(judge(scene, picture)) for scene, picture in zip(scenes, pictures, strict=True)])


def _pictures(images: np.ndarray | Sequence) -> np.ndarray:
    array = np.asarray(images if isinstance(images, np.ndarray) else [np.asarray(image) for image in images])
    if array.ndim != 4 or array.shape[1:] != (PIXELS, PIXELS, 3):
        raise RewardError(
            f"images for the oracle: got {array.shape}, expected (n, {PIXELS}, {PIXELS}, 3). Make them so."
        )
    array = array.astype(np.float64) / (255.0 if array.dtype == np.uint8 else 1.0)
    if not np.isfinite(array).all():
        raise RewardError("images for the oracle: got NaN or infinity, expected finite values. Check what made them.")
    return array


def _total(parts: dict[str, float]) -> float:
    return float(math.prod(1.0 - WEIGHTS[name.split("_")[0]] * (1.0 - value) for name, value in parts.items()))


def judge(scene: Scene, picture: np.ndarray) -> dict[str, float]:
    """Return how well each part of `scene` is met by a float picture (32, 32, 3), each in [0, 1].

    Keys: ``background``, ``count``, ``relation`` (two things), and ``presence_k``, ``color_k``, ``shape_k``,
    ``size_k`` of thing k. Blobs are told from the background by color distance; with two things, the assignment of
    blobs to things that scores best counts.
    """
    border = picture[_FRAME]
    ground = np.median(border, axis=0)
    spread = np.abs(border - ground).mean()
    flat = float(np.exp(-((spread / 0.15) ** 2)))  # a background is one color
    background = _nearness(ground, BACKGROUNDS, scene.background) * flat
    blobs, dirt = _blobs(picture, ground)
    wanted = len(scene.things)
    parts = {"background": background, "count": float(np.exp(-2.0 * abs(len(blobs) - wanted) - dirt / 12.0))}
    options = []
    missing = [None] * max(0, wanted - len(blobs))
    for found in itertools.permutations([*blobs[:3], *missing], wanted):
        judged: dict[str, float] = {}
        if scene.relation is not None:
            judged["relation"] = _relation(scene.relation, *found)
        for k, (thing, blob) in enumerate(zip(scene.things, found, strict=True)):
            judged |= {f"{name}_{k}": value for name, value in _match(thing, blob).items()}
        options.append(judged)
    return parts | max(options, key=_total)


def _nearness(color: np.ndarray, palette: dict[str, tuple[float, float, float]], wanted: str) -> float:
    """Return 1 at the wanted color, 0.5 at the border to another color of the palette or when far from all."""
    distance = {name: float(np.linalg.norm(color - np.array(value))) for name, value in palette.items()}
    right = distance[wanted]
    rival = min(value for name, value in distance.items() if name != wanted)
    margin = 1.0 / (1.0 + np.exp(-(rival - right) / 0.06))
    return float(margin * np.exp(-0.5 * (max(0.0, right - _CHROMA) / 0.2) ** 2))


def _blobs(picture: np.ndarray, ground: np.ndarray) -> tuple[list[dict], float]:
    """Return the blobs, largest first, as color, center, area and shape fits, and the cover of the dirt left out."""
    distance = np.linalg.norm(picture - ground, axis=-1)
    labels, count = ndimage.label(distance > 0.22, structure=np.ones((3, 3)))
    blobs, dirt = [], 0.0
    for k in range(1, count + 1):
        inside = labels == k
        around = ndimage.binary_dilation(inside, structure=np.ones((3, 3))) & ((labels == 0) | inside)
        strength = np.sort(distance[inside])
        full = strength[int(0.6 * (len(strength) - 1))]  # distance of a pixel that the shape covers whole
        cover = np.clip(distance * around / max(full, 0.22), 0.0, 1.0)
        area = cover.sum()
        if area < _SMALLEST:
            dirt += area
            continue
        core = inside & (distance >= 0.85 * full)
        rows, columns = np.indices(cover.shape)
        center = np.array([(columns * cover).sum(), (rows * cover).sum()]) / area
        fits = _fits(cover, center, area)
        blobs.append({"color": np.median(picture[core], axis=0), "center": center, "area": area, "fits": fits})
    return sorted(blobs, key=lambda blob: -blob["area"])[:4], dirt


def _relation(relation: str, first: dict | None, second: dict | None) -> float:
    if first is None or second is None:
        return 0.0
    along = np.array(RELATIONS[relation], dtype=float)
    offset = first["center"] - second["center"]
    forward, aside = float(offset @ along), float(np.abs(offset) @ (1.0 - np.abs(along)))
    return float(1.0 / (1.0 + np.exp(-(forward - 4.0) / 1.5)) / (1.0 + np.exp((aside - forward - 2.0) / 2.0)))


def _match(thing: Thing, blob: dict | None) -> dict[str, float]:
    if blob is None:
        return {"presence": 0.0, "color": 0.0, "shape": 0.0, "size": 0.0}
    shape, half = _shape(thing.shape, blob)
    small, large = SIZES["small"], SIZES["large"]
    right = SIZES[thing.size]
    toward = (half - (small + large) / 2) * (1 if right == large else -1)
    size = 1.0 / (1.0 + np.exp(-toward / 0.3)) * np.exp(-0.5 * (max(0.0, abs(half - right) - 0.6) / 1.5) ** 2)
    return {
        "presence": 1.0,
        "color": _nearness(blob["color"], COLORS, thing.color),
        "shape": shape,
        "size": float(size),
    }


def _shape(wanted: str, blob: dict) -> tuple[float, float]:
    """Return how much the blob is the wanted shape rather than another, and its half extent in pixels."""
    overlaps, halves = blob["fits"]
    rival = max(value for shape, value in overlaps.items() if shape != wanted)
    right = overlaps[wanted]
    # Close shapes (a circle and a square) differ by 0.1 to 0.15 in overlap when both are drawn well.
    clear = 1.0 / (1.0 + np.exp(-(right - rival) / 0.025))
    fit = 1.0 / (1.0 + np.exp(-(right - 0.62) / 0.05))
    winner = max(overlaps, key=overlaps.get)
    return float(clear * fit), halves[wanted] if right >= rival - 0.1 else halves[winner]


def _fits(cover: np.ndarray, center: np.ndarray, area: float) -> tuple[dict[str, float], dict[str, float]]:
    """Return, by shape, the best overlap of a cover with its templates, and the half extent of that template.

    Overlap is the soft intersection over union with the centers of mass aligned, to fractions of a pixel.
    """
    names, halves, templates, offsets = _templates()
    shift = center - (_TEMPLATE / 2 - 0.5) - offsets  # (template, 2), x then y
    base = np.floor(shift).astype(int)
    part_x, part_y = ((shift - base)[:, k, None, None] for k in (0, 1))
    moved = templates.copy()
    moved[:, :, 1:] = (1 - part_x) * templates[:, :, 1:] + part_x * templates[:, :, :-1]
    moved[:, :, 0] *= 1 - part_x[:, :, 0]
    down = moved.copy()
    down[:, 1:] = (1 - part_y) * moved[:, 1:] + part_y * moved[:, :-1]
    down[:, 0] *= 1 - part_y[:, 0]
    side = np.arange(_TEMPLATE + 1)
    padded = np.pad(cover, _TEMPLATE + 1)
    rows, columns = (base[:, k, None] + _TEMPLATE + 1 + side for k in (1, 0))
    window = padded[rows[:, :, None], columns[:, None, :]]
    both = np.minimum(window, down).sum(axis=(1, 2))
    union = np.maximum(window, down).sum(axis=(1, 2)) + area - window.sum(axis=(1, 2))
    overlap = both / np.maximum(union, 1e-9)
    best = {shape: int(np.argmax(np.where(names == shape, overlap, -1.0))) for shape in SHAPES}
    return {s: float(overlap[k]) for s, k in best.items()}, {s: float(halves[k]) for s, k in best.items()}


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return shape names, half extents, covers (n, 21, 21) and offsets of their centers of mass (n, 2)."""
    fine = (np.arange(_TEMPLATE * 4) + 0.5) / 4 - _TEMPLATE / 2
    names, halves, covers, offsets = [], [], [], []
    for shape in SHAPES:
        for half in np.arange(3.0, 8.01, 0.5):
            inside = shape_mask(shape, fine[None, :] / half, fine[:, None] / half).astype(float)
            cover = inside.reshape(_TEMPLATE, 4, _TEMPLATE, 4).mean(axis=(1, 3))
            rows, columns = np.indices(cover.shape) - (_TEMPLATE / 2 - 0.5)
            offsets.append(np.array([(columns * cover).sum(), (rows * cover).sum()]) / cover.sum())
            names.append(shape)
            halves.append(half)
            covers.append(np.pad(cover, ((0, 1), (0, 1))))
    return np.array(names), np.array(halves), np.stack(covers), np.stack(offsets)
