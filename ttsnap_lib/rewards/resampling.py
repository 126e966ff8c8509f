"""Pillow's resizing of 8-bit images as matrix products, so that it runs on any device and gives the same levels."""

from __future__ import annotations

import functools
import math

import torch

from ttsnap_lib.errors import RewardError

__all__ = ["resize_levels"]

_PRECISION = 22  # bits of Pillow's fixed-point weights for 8-bit images (32 - 8 - 2)


def _bilinear(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _bicubic(x: float) -> float:
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


_FILTERS = {2: (_bilinear, 1.0), 3: (_bicubic, 2.0)}  # PIL.Image.Resampling value -> filter, its support


@functools.lru_cache(maxsize=64)
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
    """Resize images with values in [0, 255] as Pillow resizes 8-bit images: rows first, then columns.

    Parameters
    ----------
    pixels : Tensor (..., height, width)
        Whole numbers 0 to 255 when `rounded`.
    height, width : int
        The new size.
    resample : int
        ``PIL.Image.Resampling.BILINEAR`` or ``BICUBIC``.
    rounded : bool
        True gives Pillow's levels to the bit: its fixed-point weights in float64, where every product and sum is
        exact, rounded and clipped after each direction. False leaves the rounding out, for gradients.

    Returns
    -------
    Tensor (..., height, width)
        float32.

    Raises
    ------
    RewardError
        A filter that is neither bilinear nor bicubic.
    """
    if resample not in _FILTERS:
        raise RewardError(
            "tensors cannot be resized with this resampling",
            value=resample,
            bound="2 (bilinear) or 3 (bicubic)",
            remedy="Pass PIL images instead.",
        )
    dtype = torch.float64 if rounded else torch.float32
    pixels = pixels.to(dtype)
    for axis, size in ((-1, width), (-2, height)):
        if pixels.shape[axis] == size:
            continue
        table = (_weights(pixels.shape[axis], size, resample) / (1 << _PRECISION)).to(pixels.device, dtype)
        pixels = pixels @ table.mT if axis == -1 else table @ pixels
        if rounded:
            pixels = (pixels + 0.5).floor()
        pixels = pixels.clamp(0, 255)
    return pixels.to(torch.float32)
