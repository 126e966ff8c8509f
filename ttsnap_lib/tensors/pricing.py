"""The cost preset that belongs to a reward tensor: that of its diffusion model, its picture size and its reward."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ttsnap_lib.costs import AUTO, PRESETS, SAME_TOWER, CostModel, preset_for, with_steps
from ttsnap_lib.errors import CostError

if TYPE_CHECKING:
    import xarray as xr


def tensor_preset(dataset: xr.Dataset, reward: str | None = None) -> str:
    """Return the name of the preset of a tensor: its model and size, and `reward`, its first one by default.

    Of a tensor whose scores at the checks were made through a tiny decoder it is the preset that charges that one.
    A CostError that names the choices where the tensor does not say enough.
    """
    reward = str(dataset["reward"].values[0]) if reward is None else reward
    if dataset.attrs.get("source") == "synthetic":  # it has the shape of the published FLUX tensors
        known = f"flux-512+{SAME_TOWER.get(reward, reward)}"
        return known if known in PRESETS else "flux-512+image_reward"
    size = 512 if dataset.attrs.get("source") == "published" else dataset.attrs.get("size")
    return preset_for(str(dataset.attrs.get("model", "")), reward, size, tiny=bool(dataset.attrs.get("decoder")))


def cost_for(dataset: xr.Dataset, cost: str | Path = AUTO, reward: str | None = None) -> tuple[str, CostModel]:
    """Return the name of a cost model for a tensor, and the model.

    Parameters
    ----------
    dataset : xarray.Dataset
        A reward tensor.
    cost : str or Path
        ``"auto"`` for :func:`tensor_preset`, else a preset or a cost file. A preset, of which a step costs the same
        however many there are, takes the number of steps of the tensor.
    reward : str, optional
        The reward that checks; the first of the tensor by default.

    Returns
    -------
    tuple of str and CostModel

    Warns
    -----
    UserWarning
        The preset is of another model, size or reward than the tensor.

    Raises
    ------
    CostError
        Nothing is known for ``"auto"``; an unknown preset or a broken file.
    """
    name = tensor_preset(dataset, reward) if cost == AUTO else str(cost)
    if told := mismatch(dataset, name, reward):
        warnings.warn(told, stacklevel=2)
    return name, with_steps(name, int(dataset["step"][-1]) + 1)


def mismatch(dataset: xr.Dataset, cost: str, reward: str | None = None) -> str:
    """Return what is wrong with a preset for a tensor, in a sentence; nothing where it fits or cannot be told."""
    if cost not in PRESETS or cost == "published":  # the released formula prices all models alike
        return ""
    try:
        own = tensor_preset(dataset, reward)
    except CostError:
        return ""
    model = own.split("+")[0].removesuffix("-tiny")
    if PRESETS[cost].unit == "seconds" and model in cost:  # it is that model on some card
        return ""
    if replace(PRESETS[own], preview_decode=None) == replace(PRESETS[cost], preview_decode=None):
        return ""
    return f"The cost {cost} is not that of this tensor. Its model, size and reward have the preset {own}; cost 'auto' takes it."
