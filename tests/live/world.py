"""A tiny world to search in: real pipelines and real CLIP rewards with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tests import tiny
from ttsnap_lib import CostModel, Schedule, prune, search
from ttsnap_lib.diffusion.denoise import Settings
from ttsnap_lib.live.record import SearchRecord, SearchResult
from ttsnap_lib.rewards.loading import load_reward

__all__ = ["COST", "FULL", "N_STEPS", "PROMPT", "SCHEDULE", "make_clip", "pruned_winner", "run", "settings"]

N_STEPS = 5
COST = CostModel(step=1.0, verify=0.25, decode=0.5, preview_decode=0.125, per_prompt=0.0625, n_steps=N_STEPS)
FULL = dataclasses.replace(COST, preview_decode=None)  # without a tiny decoder
PROMPT = "a red circle above the cat"
SCHEDULE = Schedule((1, 3), (0.5, 0.5))


def settings(name: str = "flux", n_steps: int = N_STEPS) -> Settings:
    """Return settings that the tiny pipeline `name` takes."""
    return Settings(
        n_steps=n_steps, height=tiny.SIZE, width=tiny.SIZE, max_sequence_length=tiny.TOKENS if name == "flux" else None
    )


def make_clip(folder: Path, name: str = "clip", **options: Any) -> Any:
    """Return a tiny CLIP reward from a folder of :func:`tests.rewards.conftest.save_clip`."""
    return load_reward(folder, name=name, device="cpu", **options)


def run(pipeline: Any, reward: Any, *, name: str = "flux", **options: Any) -> SearchResult:
    """Search with eight candidates in batches of three unless told otherwise."""
    given = {"settings": settings(name), "batch_size": 3} | options
    if "candidates" not in given and "budget" not in given:
        given["candidates"] = 8
    return search(pipeline, given.pop("prompt", PROMPT), reward, **given)


def pruned_winner(record: SearchRecord) -> int:
    """Return the winner that `prune` finds in the recorded scores."""
    selecting = [r for r, name in enumerate(record.rewards) if name not in record.report]
    scores = xr.DataArray(
        record.scores[None][..., selecting], dims=("prompt", "image", "step", "reward"), coords={"step": record.checks}
    )
    subset = np.arange(len(record.seeds))[None]
    winners = prune(scores, subset, Schedule.from_dict(record.schedule), combine=record.combine, weights=record.weights)
    return int(winners[0, 0])
