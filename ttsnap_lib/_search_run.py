"""The work of an online run: batches through the stages, scores at the checks, survivors repacked."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .denoise import Candidates, Conditioning, Denoiser
from .errors import DeviceError, RewardError, SearchError
from .schedule import kept
from .search_record import SearchRecord, StageRecord
from .selection import choose

__all__ = ["Plan", "TimeUp", "run_stages"]

_ON_DEVICE_BYTES = 2**29  # latents of waiting candidates beyond this rest on the CPU


class TimeUp(Exception):
    """The deadline has passed; raised between two denoising steps."""


@dataclass
class Plan:
    """What a run needs besides the record: models, selection, limits."""

    denoiser: Denoiser
    rewards: Sequence[Any]
    selecting: list[int]
    weights: np.ndarray | None
    keep_ratios: Sequence[float]
    variants: list[str]
    decoder: Any
    batch_size: int
    deadline: float | None
    preview_px: int
    on_check: Callable[[SearchRecord], None] | None
    pictures: dict[int, np.ndarray] = field(default_factory=dict)  # of the stage at work, uint8 (H, W, 3)

    def check_time(self, *_: Any) -> None:
        """Raise when the deadline has passed."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TimeUp


def run_stages(plan: Plan, record: SearchRecord, text: Conditioning, candidates: Candidates) -> None:
    """Run all stages; fill `record` and ``plan.pictures`` as it goes.

    Raises
    ------
    TimeUp, KeyboardInterrupt
        With the record filled as far as the run came.
    """
    alive = np.arange(len(record.seeds))
    for k, last in enumerate(record.checks):
        is_final = k == len(record.checks) - 1
        stage = StageRecord(
            candidates.step + 1, last, len(alive), plan.variants[k], preview=not is_final and plan.decoder is not None
        )
        record.stages.append(stage)
        start = time.perf_counter()
        try:
            candidates = _run_stage(plan, record, stage, text, candidates, alive, k)
        finally:
            stage.elapsed_s = time.perf_counter() - start
        scored = np.flatnonzero(~np.isnan(record.scores[alive, k][:, plan.selecting]).any(1))
        for lost in np.setdiff1d(np.arange(len(alive)), scored):
            record.pruned_at[int(alive[lost])] = -2
        if not len(scored):
            raise SearchError(
                f"no candidate could be scored at step {last}", value=record.rewards, bound="a score for one candidate",
                remedy="Look at the warnings above: the reward failed for every image.",
            )  # fmt: skip
        keep = 1 if is_final else min(kept(len(alive), plan.keep_ratios[k]), len(scored))
        stay = scored[choose(record.scores[alive[scored], k][:, plan.selecting], keep, record.combine, plan.weights)]
        record.winner = int(alive[stay[choose(record.scores[alive[stay], k][:, plan.selecting], 1, record.combine,
                                              plan.weights)[0]]])  # fmt: skip
        if not is_final:
            for dropped in np.setdiff1d(scored, stay):
                record.pruned_at[int(alive[dropped])] = last
            candidates, alive = candidates.take(stay.tolist()), alive[stay]
        if plan.on_check is not None:
            plan.on_check(record)


def _run_stage(
    plan: Plan,
    record: SearchRecord,
    stage: StageRecord,
    text: Conditioning,
    candidates: Candidates,
    alive: np.ndarray,
    k: int,
) -> Candidates:
    """Denoise, decode and score all candidates of a stage in batches; halve the batch when memory runs out."""
    done: list[Candidates] = []
    start = 0
    last = record.checks[k]
    is_final = k == len(record.checks) - 1
    while start < len(alive):
        plan.check_time()
        rows = list(range(start, min(start + plan.batch_size, len(alive))))
        try:
            moved, pixels = _denoise(plan, stage, text.take([0] * len(rows)), candidates.take(rows), last, is_final)
            scores = _score(plan, stage, record, alive[rows], pixels, last)
        except DeviceError:
            if plan.batch_size == 1:
                raise
            plan.batch_size = max(1, plan.batch_size // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(f"out of memory; going on with batches of {plan.batch_size}", stacklevel=2)
            continue
        record.scores[alive[rows], k] = scores
        if not start:
            plan.pictures.clear()
        for row, picture in zip(rows, pixels, strict=True):
            plan.pictures[int(alive[row])] = _picture(picture)
            record.previews[int(alive[row]), last] = _thumbnail(picture, plan.preview_px)
        waiting = moved.latents.nbytes * len(alive) / len(rows) > _ON_DEVICE_BYTES
        done.append(replace(moved, latents=moved.latents.cpu()) if waiting else moved)
        start += len(rows)
    return Candidates.cat(done)


def _denoise(
    plan: Plan, stage: StageRecord, text: Conditioning, candidates: Candidates, last: int, is_final: bool
) -> tuple[Candidates, torch.Tensor]:
    """Run to step `last` and return the candidates with their pixels (n, 3, H, W)."""
    estimates: dict[int, torch.Tensor] = {}

    def on_x0(step: int, x0: torch.Tensor) -> None:
        plan.check_time()
        if step == last:
            estimates[step] = x0

    begin = time.perf_counter()
    steps = range(candidates.step + 1, last + 1)
    # Every step is watched only for a deadline; reading an estimate costs a little.
    watched = steps if plan.deadline is not None else [last]
    moved = plan.denoiser.run(candidates, text, last, record=watched, on_x0=on_x0)
    _wait_for(plan.denoiser.device)
    middle = time.perf_counter()
    pixels = plan.denoiser.final(moved) if is_final else plan.denoiser.decode(estimates[last], plan.decoder)
    _wait_for(plan.denoiser.device)
    stage.denoise_s += middle - begin
    stage.decode_s += time.perf_counter() - middle
    stage.forwards += len(steps) * len(candidates)
    stage.decodes += len(candidates)
    return moved, pixels


def _score(
    plan: Plan, stage: StageRecord, record: SearchRecord, candidates: np.ndarray, pixels: torch.Tensor, last: int
) -> np.ndarray:
    """Return (n, reward) scores with the weights of the step; NaN where a reward failed for an image."""
    begin = time.perf_counter()
    step = last if stage.variant == "noise_aware" else None
    table = np.full((len(pixels), len(plan.rewards)), np.nan, np.float32)
    for r, reward in enumerate(plan.rewards):
        reward.use_step(step if step in reward.adapter_steps else None)
        try:
            table[:, r] = reward.score(record.prompt, pixels, check=False)
        except RewardError:
            for row in range(len(pixels)):  # one bad image must not cost the others their scores
                try:
                    table[row, r] = reward.score(record.prompt, pixels[row : row + 1], check=False)[0]
                except RewardError as error:
                    warnings.warn(f"candidate {candidates[row]} drops out at step {last}: {error}", stacklevel=2)
    table[~np.isfinite(table)] = np.nan
    for row in np.flatnonzero(np.isnan(table[:, plan.selecting]).any(1)):
        warnings.warn(f"candidate {candidates[row]} has no score at step {last} and drops out", stacklevel=2)
    stage.scores += len(pixels)
    stage.score_s += time.perf_counter() - begin
    return table


def _thumbnail(pixels: torch.Tensor, size: int) -> np.ndarray:
    """Return a small uint8 picture (H, W, 3) for the gallery."""
    factor = max(1, -(-max(pixels.shape[-2:]) // size))
    small = torch.nn.functional.avg_pool2d(pixels[None], factor)[0] if factor > 1 else pixels
    return _picture(small)


def _picture(pixels: torch.Tensor) -> np.ndarray:
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
