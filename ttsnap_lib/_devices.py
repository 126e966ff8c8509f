"""The device that a name stands for, when it is there, and what its memory says when it is full."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .errors import DeviceError

__all__ = ["as_device", "default_device", "memory_errors"]


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


def default_device() -> torch.device:
    """Return the accelerator when there is one (this process's own under a launcher), else the CPU."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextlib.contextmanager
def memory_errors(n: int, *, doing: str = "", remedy: str) -> Iterator[None]:
    """Turn torch's "out of memory" into a DeviceError that says how many images were at once."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"out of memory with {n} images at once{doing}",
            value=n,
            bound="as many as the memory holds",
            remedy=remedy,
        ) from error
