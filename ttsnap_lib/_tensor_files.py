"""Reward tensors on disk: a Zarr store is written whole, opened lazily, and read by steps."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._reading import as_path, failures_as
from ._store_checks import check_store
from ._tensor_schema import DIMS, check_rewards
from .errors import TensorError
from .paths import SHIPPED_TENSORS, atomic_folder, shipped_tensor

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["PROMPT_CHUNK", "open_rewards", "read_steps", "save_rewards", "write_zarr"]

PROMPT_CHUNK = 25  # prompts a chunk: a store of one-prompt chunks opens ten times slower


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
    cannot_open = "reward tensor cannot be opened"
    with (
        failures_as(TensorError, cannot_open, value=str(path), bound="a Zarr store", remedy=remedy),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*Zarr.*|.*zarr.*|.*data type.*")
        # Format 3 alone: chunks of format 2 can be pickles. Nothing is a date here, whatever attributes say.
        dataset = xr.open_zarr(
            path, chunks=None, consolidated=False, zarr_format=3, decode_times=False, decode_timedelta=False
        )
    return check_rewards(dataset)


def read_steps(variable: xr.DataArray, positions: Sequence[int]) -> np.ndarray:
    """Return some steps of ``base`` or ``noise_aware`` as (prompt, image, step, reward), read once.

    Raises
    ------
    TensorError
        A damaged chunk.
    """
    block = variable.isel(step=list(positions)).transpose("prompt", "image", "step", "reward")
    with failures_as(
        TensorError,
        f"{variable.name} cannot be read",
        value=variable.encoding.get("source", ""),
        bound="a whole Zarr store",
        remedy="Score or import it again; one of its chunks is damaged.",
    ):
        values = block.values
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
