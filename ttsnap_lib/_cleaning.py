"""What a reward tensor repeats or misses, and the tensor without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from .errors import TensorError

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["drop_missing", "drop_repeats", "repeated_images"]


def repeated_images(dataset: xr.Dataset) -> np.ndarray:
    """Return for each image the first image with the same rewards in every prompt, step and reward.

    An image that repeats none maps to itself. int64 (image,).
    """
    base = dataset["base"].transpose("image", ...).values
    flat = np.ascontiguousarray(base.reshape(base.shape[0], -1))
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(row.tobytes(), k) for k, row in enumerate(flat)])


def drop_repeats(dataset: xr.Dataset) -> xr.Dataset:
    """Return the tensor with the first of each group of repeated images; ``image`` keeps the original indices."""
    firsts = np.unique(repeated_images(dataset))
    return dataset.isel(image=firsts)


def drop_missing(dataset: xr.Dataset) -> xr.Dataset:
    """Return the tensor without the images that miss a finite value anywhere, and without prompts not scored at all.

    Raises
    ------
    TensorError
        When nothing would be left.
    """
    missing = cast("xr.DataArray", ~(np.isfinite(dataset["base"]) & np.isfinite(dataset["noise_aware"])))
    scored = ~missing.all(["reward", "image", "step"])
    dataset, missing = dataset.isel(prompt=scored.values), missing.isel(prompt=scored.values)
    whole = ~missing.any(["reward", "prompt", "step"])
    dataset = dataset.isel(image=whole.values)
    if 0 in dataset["base"].shape:
        raise TensorError(
            "images without a missing value", value=0, bound="one or more", remedy="Score the tensor again."
        )
    return dataset
