"""Reward tensors: open, save, check, stack and clean them. A tensor is an xarray Dataset, on disk a Zarr store.

Variables ``base`` and ``noise_aware``, float32, dims (reward, prompt, image, step); ``noise_aware_source`` says per
reward and step whether a value is ``finetuned`` or ``copied_from_base``; ``status`` per prompt what is scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._cleaning import drop_missing, drop_repeats, repeated_images
from ._tensor_files import PROMPT_CHUNK, open_rewards, read_steps, save_rewards, write_zarr
from ._tensor_schema import COPIED, DIMS, FINETUNED, SCHEMA_VERSION, check_rewards
from .checks import choice
from .errors import TensorError

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "DIMS",
    "PROMPT_CHUNK",
    "SCHEMA_VERSION",
    "RepeatedImagesWarning",
    "check_rewards",
    "drop_missing",
    "drop_repeats",
    "make_rewards",
    "noise_aware_steps",
    "open_rewards",
    "read_steps",
    "repeated_images",
    "save_rewards",
    "select_rewards",
    "stack_rewards",
    "write_zarr",
]


class RepeatedImagesWarning(UserWarning):
    """A pool holds the same trajectory more than once."""


def make_rewards(
    base: np.ndarray,
    noise_aware: np.ndarray | None = None,
    *,
    rewards: Sequence[str],
    prompt_text: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    noise_aware_source: np.ndarray | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Build a reward tensor from arrays.

    Parameters
    ----------
    base, noise_aware : (reward, prompt, image, step)
        Kept as float32. Without `noise_aware` it is a copy of `base`, and says so.
    rewards : sequence of str
        Names along the first axis.
    prompt_text : sequence of str, optional
    steps : sequence of int, optional
        Denoising step of each position on the last axis; 0, 1, 2, ... by default.
    noise_aware_source : str (reward, step), optional
        ``"finetuned"`` or ``"copied_from_base"``; all finetuned when `noise_aware` is given alone.
    attributes : mapping, optional
        For instance model and source.

    Returns
    -------
    xarray.Dataset

    Raises
    ------
    TensorError
        Shapes or names that do not fit.
    """
    import xarray as xr

    base = _float32("base", base)
    source = COPIED if noise_aware is None else FINETUNED
    noise_aware = base.copy() if noise_aware is None else _float32("noise_aware", noise_aware)
    if base.ndim != 4 or 0 in base.shape or noise_aware.shape != base.shape:
        raise TensorError(
            "shapes of base and noise_aware",
            value=(base.shape, noise_aware.shape),
            bound="equal shapes (reward, prompt, image, step), nothing empty",
            remedy="Add the missing axis or stack the rewards first.",
        )
    n_rewards, n_prompts, n_images, n_steps = base.shape
    if noise_aware_source is None:
        noise_aware_source = np.full((n_rewards, n_steps), source)
    noise_aware_source = np.asarray(noise_aware_source).astype(str)
    if noise_aware_source.shape != (n_rewards, n_steps) or not set(noise_aware_source.flat) <= {FINETUNED, COPIED}:
        raise TensorError(
            "noise_aware_source",
            value=noise_aware_source.tolist(),
            bound=f"{FINETUNED} or {COPIED}, of shape {(n_rewards, n_steps)} (reward, step)",
            remedy="Say so for every reward and step.",
        )
    names = {"rewards": (rewards, n_rewards), "steps": (steps, n_steps), "prompt_text": (prompt_text, n_prompts)}
    for name, (given, size) in names.items():
        if given is not None and len(given) != size:
            raise TensorError(name, value=len(given), bound=f"{size} entries", remedy=f"Give one of {name} each.")
    coords: dict[str, Any] = {
        "reward": [str(name) for name in rewards],
        "prompt": np.arange(n_prompts),
        "image": np.arange(n_images),
        "step": np.arange(n_steps) if steps is None else np.asarray(steps, np.int64),
    }
    if prompt_text is not None:
        coords["prompt_text"] = ("prompt", np.array(list(prompt_text), dtype=object))
    dataset = xr.Dataset(
        {
            "base": (DIMS, base),
            "noise_aware": (DIMS, noise_aware),
            "noise_aware_source": (("reward", "step"), np.asarray(noise_aware_source).astype(object)),
            "status": ("prompt", np.full(n_prompts, "scored", dtype=object)),
        },
        coords=coords,
        attrs={"schema_version": SCHEMA_VERSION, **(attributes or {})},
    )
    return check_rewards(dataset)


def _float32(name: str, values: Any) -> np.ndarray:
    """Return numbers as float32; what it cannot hold is refused, NaN (not scored yet) is not."""
    remedy = "Give rewards as numbers; NaN stands for what is missing."
    try:
        given = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise TensorError(name, value=values, bound="numbers in rows of equal length", remedy=remedy) from error
    if given.dtype.kind not in "fiu":
        raise TensorError(name, value=f"{given.dtype} of shape {given.shape}", bound="real numbers", remedy=remedy)
    with np.errstate(over="ignore"):
        narrow = given.astype(np.float32, copy=False)
    if np.isinf(narrow).any():
        worst = given[np.isinf(narrow)].flat[0]
        raise TensorError(name, value=float(worst), bound="finite numbers that float32 can hold", remedy=remedy)
    return narrow


def noise_aware_steps(dataset: xr.Dataset) -> dict[str, list[int]]:
    """Return the steps at which the noise-aware variable is finetuned, by reward.

    Elsewhere it is a copy of ``base``, and TTSnap is TTSp. A tensor that does not say counts as finetuned throughout.
    """
    steps = dataset["step"].values.tolist()
    if "noise_aware_source" not in dataset:
        return {str(name): steps for name in dataset["reward"].values}
    source = dataset["noise_aware_source"].transpose("reward", "step").values
    return {
        str(name): [step for step, kind in zip(steps, row, strict=True) if kind == FINETUNED]
        for name, row in zip(dataset["reward"].values, source, strict=True)
    }


def select_rewards(dataset: xr.Dataset, names: Sequence[str]) -> xr.Dataset:
    """Return the tensor of the rewards in `names` alone, in that order; all of it when `names` is empty.

    Raises
    ------
    ConfigError
        A name that the tensor does not hold.
    """
    known = [str(name) for name in dataset["reward"].values]
    return dataset.sel(reward=[choice("reward", name, known) for name in names]) if len(names) else dataset


def stack_rewards(datasets: Sequence[xr.Dataset]) -> xr.Dataset:
    """Join tensors of the same prompts, images and steps along the reward axis.

    Returns
    -------
    xarray.Dataset

    Raises
    ------
    TensorError
        Different prompts, images or steps, or a reward that stands in two of them.
    """
    import xarray as xr

    if not datasets:
        raise TensorError("datasets", value=[], bound="one or more", remedy="Pass the tensors to stack.")
    for dataset in datasets:
        check_rewards(dataset)
        for dim in DIMS[1:]:
            if not np.array_equal(dataset[dim].values, datasets[0][dim].values):
                raise TensorError(
                    f"coordinate {dim!r} of {list(dataset['reward'].values)}",
                    value=dataset.sizes[dim],
                    bound=f"the same as of {list(datasets[0]['reward'].values)}: {datasets[0].sizes[dim]}",
                    remedy="Select the common part of both with .sel() first.",
                )
    joined = xr.concat(
        datasets, dim="reward", data_vars="minimal", coords="minimal", compat="override", join="override",
        combine_attrs="override",
    )  # fmt: skip
    return check_rewards(joined)
