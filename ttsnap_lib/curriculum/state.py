"""A run that can be killed at any point: one state file, replaced whole, and what it belongs to."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttsnap_lib._reading import failures_as
from ttsnap_lib.errors import CheckpointError, CurriculumError
from ttsnap_lib.paths import atomic_write, write_json

from .config import CurriculumConfig

__all__ = [
    "CURRICULUM",
    "STATE",
    "array_digest",
    "identity",
    "open_run",
    "read_state_file",
    "write_curriculum",
    "write_state_file",
]

STATE, CURRICULUM = "state.pt", "curriculum.json"
# These change how a run is carried out, not what comes of it.
_FREE = ("trajectories", "validation", "save_every", "tracker", "accumulation", "gradient_checkpointing")


def identity(config: CurriculumConfig, **digests: Any) -> dict[str, Any]:
    """Return what decides a run's result: settings, weights, pictures and targets."""
    kept = {name: value for name, value in config.to_dict().items() if name not in _FREE}
    return json.loads(json.dumps({"config": kept, **digests}))


def array_digest(array: np.ndarray | None) -> str | None:
    """Return a digest of an array's content."""
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def open_run(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``curriculum.json`` of an earlier sitting of the same run, or None in a new folder.

    Raises
    ------
    CurriculumError
        When the folder holds another run; every difference is shown.
    """
    path = folder / CURRICULUM
    if not path.is_file():
        if any(folder.glob("step_*")):
            raise CurriculumError(
                f"{folder} holds checkpoints without {CURRICULUM}",
                value=str(folder),
                bound="an empty folder, or one of an earlier sitting",
                remedy="Choose another folder for this run.",
            )
        return None
    from ttsnap_lib.rewards.steps import read_curriculum

    found = read_curriculum(folder)
    known = found.get("identity")
    if known != wanted:
        flat = [_flat(known if isinstance(known, Mapping) else {}), _flat(wanted)]
        keys = sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))
        raise CurriculumError(
            f"{folder} holds another run",
            value="; ".join(f"{key}: {flat[0].get(key)!r} there, {flat[1].get(key)!r} now" for key in keys[:6]),
            bound="the same settings, weights, pictures and targets",
            remedy="Choose another folder, or pass overwrite=True (--overwrite) to begin anew.",
        )
    return found


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    config = values.get("config") or {}
    return {**{key: value for key, value in values.items() if key != "config"}, **config}


def write_state_file(folder: Path, state: dict[str, Any]) -> None:
    """Write the state beside the old one, then put it in its place."""
    with atomic_write(folder / STATE) as file:
        torch.save(state, file)


def read_state_file(folder: Path) -> dict[str, Any] | None:
    """Return the saved state, or None when there is none.

    Raises
    ------
    CheckpointError
        A file that is not whole or not ours.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    with failures_as(
        CheckpointError,
        "saved state cannot be read",
        value=str(path),
        bound="a whole file of ttsnap finetune",
        remedy="Delete it: the run begins anew, and checkpoints of finished steps are made again.",
    ):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["identity"]
        return state


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def write_curriculum(
    folder: Path, reward: str, config: CurriculumConfig, who: Mapping[str, Any], rows: list[dict], about: Mapping
) -> None:
    """Write ``curriculum.json``: what the series is, and how each step came out."""
    content = {
        "schema": 1,
        "reward": reward,
        "method": config.method,
        "steps": sorted({row["step"] for row in rows}),
        "identity": dict(who),
        "metrics": [{name: None if _is_nan(value) else value for name, value in row.items()} for row in rows],
        **about,
    }
    write_json(folder / CURRICULUM, content)
