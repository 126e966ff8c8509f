"""The device that a name stands for, when it is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .errors import DeviceError

__all__ = ["as_device"]


def as_device(name: Any) -> torch.device:
    """Return the torch device `name`; ``"auto"`` is cuda, else mps, else cpu.

    Raises
    ------
    DeviceError
        No such device, or one that this machine lacks.
    """
    if isinstance(name, str) and name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    remedy = "Use 'auto' or 'cpu', or one that this machine has."
    try:
        place = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(
            "device", value=name, bound="'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'", remedy=remedy
        ) from error
    there: dict[str, Callable[[], bool]] = {
        "cpu": lambda: True,
        "cuda": lambda: torch.cuda.is_available() and (place.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available,
    }
    if not there.get(place.type, lambda: False)():
        raise DeviceError(
            f"device {place} is not there", value=str(place), bound="a device of this machine", remedy=remedy
        )
    return place
