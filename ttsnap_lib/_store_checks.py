"""Looks at the metadata of a Zarr store before any library allocates what it claims."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ._reading import read_json
from .errors import TensorError

__all__ = ["MAX_CHUNK_BYTES", "MAX_COORDINATE", "MAX_VALUES", "check_store"]

MAX_VALUES = 2**36
"""Most values of a variable: 10,000 prompts x 1,000 images x 50 steps x 10 rewards are 2**32."""
MAX_COORDINATE = 2**24
"""Most entries of a one-dimensional variable, which is read whole."""
MAX_CHUNK_BYTES = 2**31
"""Largest chunk: reading one value allocates one."""
_REMEDY = "Get the store from where it was written; `ttsnap score` and save_rewards() write none like it."


def check_store(path: Path) -> None:
    """Refuse a store of another format, with links inside, or of sizes that would exhaust the memory.

    Raises
    ------
    TensorError
        With the variable and the bound.
    """
    if not (path / "zarr.json").exists():
        raise TensorError(
            "reward tensor", value=str(path), bound="a Zarr store of format 3", remedy="Check the path; older stores "
            "(.zgroup) can hold pickles and are not opened.",
        )  # fmt: skip
    group = read_json(path / "zarr.json", "metadata of the reward tensor", error=TensorError, remedy=_REMEDY)
    if group.get("node_type") != "group" or group.get("zarr_format") != 3:
        raise TensorError(
            f"{path}: node", value=(group.get("zarr_format"), group.get("node_type")), bound="a group of Zarr format 3",
            remedy=_REMEDY,
        )  # fmt: skip
    for child in sorted(path.iterdir()):
        if child.is_symlink():  # writing goes through links, to anywhere
            raise TensorError(f"{child} is a symbolic link", value=str(child), bound="plain folders", remedy=_REMEDY)
        if (child / "zarr.json").exists():
            about = read_json(child / "zarr.json", f"metadata of {child.name}", error=TensorError, remedy=_REMEDY)
            _check_array(f"{path.name}: {child.name}", about)


def _check_array(name: str, about: dict[str, Any]) -> None:
    if about.get("node_type") != "array":
        return
    shape: Any = about.get("shape")
    grid = about.get("chunk_grid")
    chunks: Any = grid.get("configuration", {}).get("chunk_shape") if isinstance(grid, dict) else None
    for what, sizes, low in (("shape", shape, 0), ("chunk_shape", chunks, 1)):
        if not isinstance(sizes, list) or not all(type(size) is int and size >= low for size in sizes):
            raise TensorError(
                f"{name}: {what}", value=sizes, bound=f"a list of integers of at least {low}", remedy=_REMEDY
            )
    for key in ("scale_factor", "add_offset"):  # xarray would change the numbers by them
        if key in (about.get("attributes") or {}):
            raise TensorError(f"{name}: {key}", value=about["attributes"][key], bound="none", remedy=_REMEDY)
    most = MAX_VALUES if len(shape) > 1 else MAX_COORDINATE
    width = _width(about.get("data_type"))
    for what, value, bound in (
        ("shape", math.prod(shape), most),
        ("chunk in bytes", math.prod(chunks) * width, MAX_CHUNK_BYTES),
        ("size in bytes", math.prod(shape) * width if len(shape) < 2 else 0, MAX_CHUNK_BYTES),
    ):
        if value > bound:
            raise TensorError(f"{name}: {what}", value=value, bound=f"at most {bound}", remedy=_REMEDY)


def _width(kind: Any) -> int:
    """Return the bytes of a value, at least 1 for types of variable length or unknown ones."""
    if isinstance(kind, dict):
        size = (kind.get("configuration") or {}).get("length_bytes")
        return size if type(size) is int and size > 0 else 1
    digits = "".join(letter for letter in str(kind) if letter.isdigit())
    return max(1, int(digits[:6]) // 8) if digits else 1
