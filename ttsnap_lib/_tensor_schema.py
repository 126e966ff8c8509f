"""What a reward tensor is: its names, and the check that a dataset is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import TensorError

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["COPIED", "DIMS", "FINETUNED", "SCHEMA_VERSION", "check_rewards"]

DIMS = ("reward", "prompt", "image", "step")
SCHEMA_VERSION = 1
FINETUNED, COPIED = "finetuned", "copied_from_base"


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
