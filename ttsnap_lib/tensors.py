"""Reward tensors: open, save, check, stack and clean them. A tensor is an xarray Dataset, on disk a Zarr store.

Variables ``base`` and ``noise_aware``, float32, dims (reward, prompt, image, step); ``noise_aware_source`` says per
reward and step whether a value is ``finetuned`` or ``copied_from_base``; ``status`` per prompt what is scored.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._cleaning import drop_missing, drop_repeats, repeated_images
from ._reading import as_path
from ._store_checks import check_store
from .errors import TensorError
from .paths import SHIPPED_TENSORS, atomic_folder, shipped_tensor

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
    "stack_rewards",
    "write_zarr",
]

DIMS = ("reward", "prompt", "image", "step")
SCHEMA_VERSION = 1
PROMPT_CHUNK = 25  # prompts a chunk: a store of one-prompt chunks opens ten times slower
FINETUNED, COPIED = "finetuned", "copied_from_base"


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


def check_rewards(dataset: Any) -> xr.Dataset:
    """Return `dataset` when it is a reward tensor; values are not read.

    Raises
    ------
    TensorError
        A missing variable, dim or coordinate, repeated reward names, steps that do not increase, a newer schema.
    """
    remedy = "Make tensors with make_rewards(), import_published() or `ttsnap score`."
    if not hasattr(dataset, "data_vars"):
        raise TensorError("reward tensor", value=type(dataset).__name__, bound="an xarray.Dataset", remedy=remedy)
    for name in ("base", "noise_aware"):
        if name not in dataset.data_vars or set(dataset[name].dims) != set(DIMS) or 0 in dataset[name].shape:
            found = dict(dataset[name].sizes) if name in dataset.data_vars else sorted(map(str, dataset.data_vars))
            raise TensorError(
                f"variable {name!r}", value=found, bound=f"one with dims {DIMS}, nothing empty", remedy=remedy
            )
        if dataset[name].dtype.kind != "f":
            raise TensorError(f"variable {name!r}", value=str(dataset[name].dtype), bound="float32", remedy=remedy)
    for dim in DIMS:
        if dim not in dataset.coords:
            raise TensorError(
                f"coordinate {dim!r}", value=sorted(map(str, dataset.coords)), bound="present", remedy=remedy
            )
    names = [str(name) for name in dataset["reward"].values]
    if len(set(names)) != len(names):
        raise TensorError("reward names", value=names, bound="each once", remedy="Rename one with assign_coords.")
    for dim in ("prompt", "image"):
        values = dataset[dim].values
        if values.dtype.kind not in "iu" or len(np.unique(values)) != len(values) or values.min() < 0:
            raise TensorError(dim, value=values, bound="distinct integers of at least 0", remedy=remedy)
    for name, dims in {
        "noise_aware_source": ("reward", "step"),
        "status": ("prompt",),
        "prompt_text": ("prompt",),
    }.items():
        if name in dataset.variables and set(dataset[name].dims) != set(dims):
            raise TensorError(f"variable {name!r}", value=dataset[name].dims, bound=f"dims {dims}", remedy=remedy)
    steps = dataset["step"].values
    if steps.dtype.kind not in "iu" or (np.diff(steps) <= 0).any() or (len(steps) and steps[0] < 0):
        raise TensorError(
            "step", value=steps.tolist(), bound="increasing integers of at least 0", remedy="Sort by step."
        )
    version = dataset.attrs.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int | np.integer) or version > SCHEMA_VERSION:
        raise TensorError(
            "schema_version",
            value=version,
            bound=f"at most {SCHEMA_VERSION}",
            remedy="Update ttsnap to read this tensor.",
        )
    return dataset


def save_rewards(dataset: xr.Dataset, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a reward tensor as a Zarr store, whole or not at all, and return its path.

    Parameters
    ----------
    dataset : xarray.Dataset
        A reward tensor.
    path : str or Path
        The Zarr folder to write.
    overwrite : bool
        False refuses a folder that is there.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    TensorError
        The path is taken (and `overwrite` is false), or the dataset is no reward tensor.
    DiskError
        A full disk or a folder that cannot be written.
    """
    path = as_path("reward tensor", path, error=TensorError)
    check_rewards(dataset)
    if path.exists() and not overwrite:
        raise TensorError(
            "save_rewards", value=str(path), bound="a new path", remedy="Pass overwrite=True or another path."
        )
    ordered = dataset.transpose(..., *DIMS).copy()
    for variable in ordered.variables.values():
        variable.encoding = {}  # chunks of the store it was read from need not fit
    chunks = tuple(min(PROMPT_CHUNK, size) if dim == "prompt" else size for dim, size in ordered["base"].sizes.items())
    # NaN as fill value: what was never written, or was lost, must not read as zero.
    values = {"chunks": chunks, "dtype": "float32", "_FillValue": np.float32("nan")}
    encoding = {name: dict(values) for name in ("base", "noise_aware")}
    for name in ("noise_aware_source", "status", "prompt_text", "reward"):
        if name in ordered.variables:  # fixed-width text: variable-length strings have no stable Zarr v3 type yet
            ordered[name] = ordered[name].astype(str)
    write_zarr(ordered, path, encoding)
    return path


def write_zarr(dataset: xr.Dataset, path: Path, encoding: dict[str, Any]) -> None:
    """Write a whole store beside `path` and rename it; fixed-width text has no stable Zarr v3 type, and warns."""
    with atomic_folder(path) as part:
        store = part / "store"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Zarr.*|.*zarr.*|.*data type.*")
            dataset.to_zarr(store, mode="w", encoding=encoding, consolidated=False, zarr_format=3)
        for child in store.iterdir():
            shutil.move(str(child), part / child.name)
        store.rmdir()


def open_rewards(path: str | Path) -> xr.Dataset:
    """Open a reward tensor lazily: values are read when they are used.

    Parameters
    ----------
    path : path or name
        A Zarr folder; ``"pocket-flux"`` or ``"pocket-sdxl"`` for the shipped pocket tensors; ``"synthetic"`` for the
        statistical stand-in of :mod:`ttsnap_lib.synthetic`.

    Returns
    -------
    xarray.Dataset

    Raises
    ------
    TensorError
        The path is missing or is no reward tensor.
    """
    import xarray as xr

    name = str(path) if isinstance(path, str | os.PathLike) else ""
    if name == "synthetic":
        from .synthetic import synthetic_rewards

        return synthetic_rewards()
    path = shipped_tensor(name) if name in SHIPPED_TENSORS else as_path("reward tensor", path, error=TensorError)
    remedy = "Check the path; `ttsnap import-published` and `ttsnap score` write tensors."
    if not path.is_dir():
        raise TensorError("reward tensor", value=str(path), bound="a Zarr folder", remedy=remedy)
    check_store(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Zarr.*|.*zarr.*|.*data type.*")
            # Format 3 alone: chunks of format 2 can be pickles. Nothing is a date here, whatever attributes say.
            dataset = xr.open_zarr(
                path, chunks=None, consolidated=False, zarr_format=3, decode_times=False, decode_timedelta=False
            )
    except Exception as error:  # zarr and xarray raise many kinds on a folder that is none
        raise TensorError(
            f"reward tensor cannot be opened ({error.__class__.__name__}: {error})",
            value=str(path),
            bound="a Zarr store",
            remedy=remedy,
        ) from error
    return check_rewards(dataset)


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


def read_steps(variable: xr.DataArray, positions: Sequence[int]) -> np.ndarray:
    """Return some steps of ``base`` or ``noise_aware`` as (prompt, image, step, reward), read once.

    Raises
    ------
    TensorError
        A damaged chunk.
    """
    block = variable.isel(step=list(positions)).transpose("prompt", "image", "step", "reward")
    try:
        values = block.values
    except Exception as error:  # a broken chunk
        raise TensorError(
            f"{variable.name} cannot be read ({error.__class__.__name__}: {error})",
            value=variable.encoding.get("source", ""),
            bound="a whole Zarr store",
            remedy="Score or import it again; one of its chunks is damaged.",
        ) from error
    if np.isinf(values).any():
        prompt, image, step, _ = np.argwhere(np.isinf(values))[0].tolist()
        raise TensorError(
            f"{variable.name} of prompt {int(block['prompt'][prompt])}, image {int(block['image'][image])}, step "
            f"{int(block['step'][step])}",
            value=float("inf"),
            bound="finite numbers",
            remedy="Score the image again, or drop it with tensors.drop_missing().",
        )
    return values


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
