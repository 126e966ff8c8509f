"""Pixels as each published reward model wants them, from PIL images and from tensors on any device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from ttsnap_lib.errors import RewardError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_LEVELS = 255.0
_PRECISION = 22  # bits of Pillow's fixed-point weights for 8-bit images (32 - 8 - 2)


@dataclass(frozen=True)
class Preprocessing:
    """How one family of models turns an image into its input; two equal ones give the same pixels.

    Parameters
    ----------
    size : int
        Side of the square input, in pixels.
    fit : {"shortest", "longest", "stretch", "none"}
        Resize the shortest side to `resize_to` and crop; the longest to `size` and pad with black; both sides to
        `size`; or not at all.
    resize_to : int, optional
        Length of the shortest side before the crop; `size` when not given.
    resample : int
        A `PIL.Image.Resampling` value.
    levels : bool
        True resizes 8-bit images as Pillow does (rounded to 256 levels after each direction); False resizes floats,
        which may leave [0, 1].
    centre : {"round", "floor"}
        Where the crop begins when an odd number of pixels is left over: torchvision rounds the half to even,
        transformers takes the floor.
    rgb_first : bool
        Convert to RGB before resizing (transformers) or after (torchvision as ImageReward uses it). Only images that
        are not RGB see a difference.
    mean, std : tuple of float
        Normalization of the channels.
    """

    size: int
    fit: str = "shortest"
    resize_to: int | None = None
    resample: int = int(Image.Resampling.BICUBIC)
    levels: bool = True
    centre: str = "round"
    rgb_first: bool = True
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def image(self, image: Image.Image) -> torch.Tensor:
        """Return one PIL image as a float32 tensor (3, size, size) on the CPU."""
        return self.batch([self.resized(image)], "cpu")[0]

    def resized(self, image: Image.Image) -> torch.Tensor:
        """Return one PIL image on the CPU, as many of them go to :meth:`batch`.

        uint8 (size, size, 3) of the families that resize 8-bit images, float32 (3, size, size) of the others.
        """
        if not self.levels:
            return self.tensor(_to_tensor(_levels(image.convert("RGB"))[None]))[0]
        if self.rgb_first and image.mode != "RGB":
            image = image.convert("RGB")
        height, width = self._resized(image.height, image.width)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), Image.Resampling(self.resample))
        top, left = self._crop_origin(height, width)
        if (height, width) != (self.size, self.size):
            image = image.crop((left, top, left + self.size, top + self.size))
        return _levels(image.convert("RGB"))

    def batch(self, images: Sequence[torch.Tensor], device: torch.device | str) -> torch.Tensor:
        """Return what :meth:`resized` gave of each image as model input, float32 (n, 3, size, size) on `device`."""
        pixels = torch.stack(list(images)) if images else torch.empty(0, 3, self.size, self.size)
        if torch.device(device).type == "cuda":  # 8-bit images go up as such, while the device works on
            pixels = pixels.pin_memory().to(device, non_blocking=True)
        pixels = pixels.to(device)
        return self._normalize(_to_tensor(pixels)).contiguous() if pixels.dtype == torch.uint8 else pixels

    def tensor(self, pixels: torch.Tensor, *, differentiable: bool = False) -> torch.Tensor:
        """Return float images (n, 3, height, width) in [0, 1] as model input, float32, on the device where they are.

        They are rounded to 256 levels first, as writing a PNG does, and resized to the levels that Pillow gives: a
        tensor and the file written from it give the same pixels, to the bit for the families that resize 8-bit images,
        within 2e-6 for those that resize floats (HPSv2). `differentiable` leaves out every rounding, so that gradients
        reach the images; then up to 2 of 255 levels of difference.
        """
        pixels = pixels.to(torch.float32)
        if not len(pixels):
            return pixels.new_empty(0, 3, self.size, self.size)
        if not differentiable:
            levels = (pixels.clamp(0, 1) * _LEVELS).round()
            if self.levels and pixels.device.type == "cpu":  # Pillow itself is the fastest way here
                arrays = levels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
                return self.batch([self.resized(Image.fromarray(array)) for array in arrays], "cpu")
            pixels = levels / _LEVELS
        height, width = self._resized(*pixels.shape[-2:])
        if (height, width) != tuple(pixels.shape[-2:]):
            pixels = self._resize_tensor(pixels, height, width, rounded=self.levels and not differentiable)
        if self.fit == "longest":
            missing_h, missing_w = self.size - height, self.size - width
            pixels = functional.pad(
                pixels, (missing_w // 2, missing_w - missing_w // 2, missing_h // 2, missing_h - missing_h // 2)
            )
        else:
            top, left = self._crop_origin(height, width)
            pixels = pixels[..., top : top + self.size, left : left + self.size]
        return self._normalize(pixels)

    # Geometry

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) after resizing."""
        if self.fit == "none":
            if min(height, width) < self.size:
                raise RewardError(
                    f"image is smaller than the model's input: got {width} x {height}, expected at least {self.size} x "
                    f"{self.size}, since this model does not resize. Generate larger images, or use a processor that "
                    "resizes."
                )
            return height, width
        if self.fit == "stretch":
            return self.size, self.size
        if self.fit == "longest":
            scale = self.size / float(max(height, width))
            return round(height * scale), round(width * scale)
        short = self.resize_to or self.size
        if height <= width:
            return short, int(short * width / height)
        return int(short * height / width), short

    def _crop_origin(self, height: int, width: int) -> tuple[int, int]:
        if self.centre == "floor":
            return (height - self.size) // 2, (width - self.size) // 2
        return round((height - self.size) / 2.0), round((width - self.size) / 2.0)

    def _resize_tensor(self, pixels: torch.Tensor, height: int, width: int, *, rounded: bool) -> torch.Tensor:
        if self.levels:
            levels = pixels * _LEVELS
            if rounded:
                levels = levels.round()  # the division above left whole numbers but for the last bit
            return resize_levels(levels, height, width, resample=self.resample, rounded=rounded) / _LEVELS
        mode = {2: "bilinear", 3: "bicubic"}[self.resample]  # PIL.Image.Resampling
        return functional.interpolate(pixels, size=(height, width), mode=mode, antialias=True, align_corners=False)

    def _normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - _channels(self.mean, pixels.device)) / _channels(self.std, pixels.device)


IMAGE_REWARD_PIXELS = Preprocessing(224, rgb_first=False)
"""``ImageReward._transform(224)``: shortest side to 224 with Pillow's bicubic, center crop, then RGB."""


HPS_PIXELS = Preprocessing(224, fit="longest", levels=False)
"""``hpsv2.src.open_clip.transform.image_transform(224, False, resize_longest_max=True)``: a float tensor, bicubic with
antialiasing, to the longest side, then black padding. (With torchvision before 0.17 the package resized without
antialiasing; this follows its code on current versions.)"""


def from_clip_processor(processor: Any, source: str) -> Preprocessing:
    """Return what a `transformers.CLIPImageProcessor` does, or raise when :class:`Preprocessing` cannot say it."""
    size, crop = dict(processor.size or {}), dict(processor.crop_size or {})
    edge: Any = (crop if processor.do_center_crop else size).get("height")
    resize_to: Any = size.get("shortest_edge") if processor.do_resize else None
    fit = "none" if not processor.do_resize else "stretch" if resize_to is None else "shortest"
    known = type(processor).__name__.startswith("CLIPImageProcessor")
    known = known and processor.do_rescale and abs(processor.rescale_factor - 1 / 255) < 1e-9 and processor.do_normalize
    known = known and edge is not None and edge == (crop if processor.do_center_crop else size).get("width")
    known = known and (fit != "stretch" or size.get("height") == size.get("width") == edge)
    if not known or (resize_to is not None and resize_to < edge):
        named = ("do_rescale", "rescale_factor", "do_normalize", "do_resize", "size", "do_center_crop", "crop_size")
        raise RewardError(
            f"image processor of {source}: got {type(processor).__name__} with "
            f"{', '.join(f'{name} {getattr(processor, name)}' for name in named)}, expected a CLIPImageProcessor that "
            "resizes the shortest edge and crops a square not larger than it, or stretches to a square, rescales by "
            "1/255 and normalizes. Save one with such settings beside the model."
        )
    return Preprocessing(
        size=int(edge),
        fit=fit,
        resize_to=None if resize_to in (None, edge) else int(resize_to),
        resample=int(processor.resample),
        centre="floor",
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
    )


# What is copied to a device is kept there: each copy would wait until the device has done all that came before.


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept ones may meet gradients later
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return one value per channel as float32 (channels, 1, 1) on `device`."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _fractions(before: int, after: int, resample: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return Pillow's weights (after, before) on `device`."""
    return (_weights(before, after, resample) / (1 << _PRECISION)).to(device, dtype)


def _levels(image: Image.Image) -> torch.Tensor:
    """Return an RGB image as uint8 (height, width, 3)."""
    return torch.from_numpy(np.array(image, dtype=np.uint8))


def _to_tensor(levels: torch.Tensor) -> torch.Tensor:
    """Return uint8 (n, height, width, 3) as float32 (n, 3, height, width) in [0, 1]."""
    pixels = levels.permute(0, 3, 1, 2).to(torch.float32)
    # By a tensor, since an accelerator multiplies by 1 / 255 instead of dividing by a number: other last bits.
    return pixels / torch.full((), _LEVELS, device=pixels.device)


# Resizing as Pillow does, on any device


def _bilinear(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _bicubic(x: float) -> float:
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


_FILTERS = {2: (_bilinear, 1.0), 3: (_bicubic, 2.0)}  # PIL.Image.Resampling value -> filter, its support


def _weights(before: int, after: int, resample: int) -> torch.Tensor:
    """Return Pillow's integer weights (after, before), float64 on the CPU (libImaging/Resample.c)."""
    kernel, support = _FILTERS[resample]
    scale = before / after
    stretch = max(scale, 1.0)  # when shrinking, the filter covers all pixels that fall into one
    support *= stretch
    table = torch.zeros(after, before, dtype=torch.float64)
    for row in range(after):
        center = (row + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), before)
        values = [kernel((x - center + 0.5) / stretch) for x in range(first, last)]
        total = sum(values)
        for x, value in zip(range(first, last), values, strict=True):
            fixed = value / total * (1 << _PRECISION)
            table[row, x] = math.trunc(fixed + (0.5 if value >= 0 else -0.5))
    return table


def resize_levels(
    pixels: torch.Tensor, height: int, width: int, *, resample: int = 3, rounded: bool = True
) -> torch.Tensor:
    """Resize images (..., height, width) with values in [0, 255] as Pillow resizes 8-bit images, float32.

    `rounded` gives the levels of Pillow to the bit for whole numbers: its fixed-point weights in float64, where every
    product and sum is exact, rounded and clipped after each direction. False leaves the rounding out, for gradients.
    """
    if resample not in _FILTERS:
        raise RewardError(
            f"tensors cannot be resized with this resampling: got {resample!r}, expected 2 (bilinear) or 3 (bicubic). "
            "Pass PIL images instead."
        )
    dtype = torch.float64 if rounded else torch.float32
    pixels = pixels.to(dtype)
    for axis, size in ((-1, width), (-2, height)):
        if pixels.shape[axis] == size:
            continue
        table = _fractions(pixels.shape[axis], size, resample, pixels.device, dtype)
        pixels = pixels @ table.mT if axis == -1 else table @ pixels
        if rounded:
            pixels = (pixels + 0.5).floor()
        pixels = pixels.clamp(0, 255)
    return pixels.to(torch.float32)
