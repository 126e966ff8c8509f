"""The cost preset that belongs to a reward tensor: that of its diffusion model, its picture size and its reward."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap_lib.costs import AUTO, COUNTERPARTS, PRESETS, SAME_TOWER, CostModel, preset_for, priced
from ttsnap_lib.errors import CostError

if TYPE_CHECKING:
    import xarray as xr


def tensor_preset(dataset: xr.Dataset, reward: str | None = None) -> str:
    """Return the name of the preset of a tensor: its model and size, and `reward`, its first one by default.

    Of a tensor whose scores at the checks were made through a tiny decoder it is the preset that charges that one.
    A CostError that names the choices where the tensor does not say enough.
    """
    return preset_for(**_facts(dataset, reward))


def _facts(dataset: xr.Dataset, reward: str | None) -> dict[str, Any]:
    """Return what a tensor is priced by, as :func:`preset_for` takes it."""
    reward = str(dataset["reward"].values[0]) if reward is None else reward
    if dataset.attrs.get("source") == "synthetic":  # it has the shape of the published FLUX tensors
        known = f"flux-512+{SAME_TOWER.get(reward, reward)}" in PRESETS
        return {"model": "flux", "reward": reward if known else "image_reward", "size": 512}
    size = 512 if dataset.attrs.get("source") == "published" else dataset.attrs.get("size")
    tiny = bool(dataset.attrs.get("decoder"))
    return {"model": str(dataset.attrs.get("model", "")), "reward": reward, "size": size, "tiny": tiny}


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
    name, model = priced(cost, int(dataset["step"][-1]) + 1, **_facts(dataset, reward))
    if told := mismatch(dataset, name, reward):
        warnings.warn(told, stacklevel=2)
    return name, model


def mismatch(dataset: xr.Dataset, cost: str, reward: str | None = None) -> str:
    """Return what is wrong with a preset for a tensor, in a sentence; nothing where it fits or cannot be told."""
    if cost not in PRESETS or cost == "published":  # the released formula prices all models alike
        return ""
    try:
        own = tensor_preset(dataset, reward)
    except CostError:
        return ""
    if _same(own, cost):
        return ""
    return f"The cost {cost} is not that of this tensor. Its model, size and reward have the preset {own}; cost 'auto' takes it."


def _same(one: str, other: str) -> bool:
    """Tell whether two presets are of one model, size and reward, whatever decodes at the checks and in whatever unit."""
    plain = (replace(PRESETS[COUNTERPARTS.get(name, name)], preview_decode=None) for name in (one, other))
    return next(plain) == next(plain)


def fitting(dataset: xr.Dataset, reward: str | None = None) -> list[str]:
    """Return the presets of a tensor's model, size and reward, its own first; of presets that cost the same, one."""
    try:
        own = tensor_preset(dataset, reward)
    except CostError:
        return []
    found: list[str] = []
    for name in (own, *PRESETS):
        if _same(own, name) and not any(PRESETS[name] == PRESETS[other] for other in found):
            found.append(name)
    return found
