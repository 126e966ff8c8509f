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
from .errors import DeviceError, SearchError
from .schedule import kept
from .search_record import SearchRecord, StageRecord
from .selection import choose

__all__ = ["Plan", "TimeUp", "best_so_far", "run_stages"]

_ON_DEVICE_BYTES = 2**29  # latents of waiting candidates beyond this rest on the CPU


class TimeUp(Exception):
    """The deadline has passed; raised between two denoising steps."""


@dataclass
class Plan:
    """What a run needs besides the record: models, selection, limits; and what it holds while it goes on.

    ``pictures`` keeps full-size pictures (uint8, H x W x 3) by (candidate, check): those of the check at work, and of
    earlier checks the best one. ``estimate`` is what the batch at work looks like at the moment.
    """

    denoiser: Denoiser
    rewards: Sequence[Any]
    selecting: list[int]
    weights: np.ndarray | None
    keep_ratios: Sequence[float]
    variants: list[str]
    decoder: Any
    batch_size: int
    group: int  # batches are multiples of it: NegToMe couples that many candidates
    deadline: float | None
    preview_px: int
    on_check: Callable[[SearchRecord], None] | None
    progress: Callable[[int, int], None] | None
    forwards: int  # of the whole run, for the progress
    pictures: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    estimate: tuple[np.ndarray, torch.Tensor] | None = None
    check_size: int = 0  # images decoded and scored at once; batch_size until memory runs out there
    done: int = 0

    def check_time(self) -> None:
        """Raise when the deadline has passed."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TimeUp

    def choose(self, record: SearchRecord, k: int, rows: np.ndarray, keep: int) -> np.ndarray:
        """Return the `keep` best of the candidates `rows` at check `k`, ascending."""
        scores = record.scores[rows, k][:, self.selecting]
        return rows[choose(scores, keep, record.combine, self.weights)]


def run_stages(plan: Plan, record: SearchRecord, text: Conditioning, candidates: Candidates) -> None:
    """Run all stages; fill `record` and ``plan.pictures`` as it goes.

    Raises
    ------
    TimeUp, KeyboardInterrupt
        With the record filled as far as the run came.
    SearchError
        No candidate could be scored.
    """
    alive = np.arange(len(record.seeds))
    plan.check_size = plan.batch_size
    for k, last in enumerate(record.checks):
        is_final = k == len(record.checks) - 1
        small = not is_final and plan.decoder is not None
        stage = StageRecord(candidates.step + 1, last, len(alive), plan.variants[k], preview=small)
        record.stages.append(stage)
        start = time.perf_counter()
        try:
            candidates = _run_stage(plan, record, stage, text, candidates, alive, k)
        finally:
            stage.elapsed_s = time.perf_counter() - start
        scored = alive[_scored(plan, record, k)[alive]]
        for lost in np.setdiff1d(alive, scored):
            record.pruned_at[int(lost)] = -2
        if not len(scored):
            raise SearchError(
                f"no candidate could be scored at step {last}", value=record.rewards, bound="a score for one candidate",
                remedy="The warnings before this say why the reward failed.",
            )  # fmt: skip
        # A candidate without a score leaves its place to the others.
        keep = 1 if is_final else min(kept(len(alive), plan.keep_ratios[k]), len(scored))
        stay = plan.choose(record, k, scored, keep)
        winner = int(plan.choose(record, k, stay, 1)[0])
        if not is_final:
            for dropped in np.setdiff1d(scored, stay):
                record.pruned_at[int(dropped)] = last
            candidates, alive = candidates.take(np.searchsorted(alive, stay).tolist()), stay
        record.winner = winner
        plan.pictures = {(winner, k): plan.pictures[winner, k]}
        if plan.on_check is not None:
            plan.on_check(record)
    if plan.progress is not None:
        plan.progress(plan.forwards, plan.forwards)


def best_so_far(plan: Plan, record: SearchRecord) -> np.ndarray | None:
    """Return the picture of the best candidate of the furthest check that anyone reached, and note the winner.

    Before the first score it is the present estimate of the first candidate; None before the first step.
    """
    for k in reversed(range(len(record.checks))):
        ready = _scored(plan, record, k) & [(c, k) in plan.pictures for c in range(len(record.seeds))]
        if ready.any():
            record.winner = int(plan.choose(record, k, np.flatnonzero(ready), 1)[0])
            return plan.pictures[record.winner, k]
    if plan.estimate is None:
        return None
    rows, x0 = plan.estimate
    record.winner = int(rows[0])
    warnings.warn("cut short before the first check: the image is an estimate that no reward has seen", stacklevel=3)
    return _picture(plan.denoiser.decode(x0[:1], plan.decoder)[0])


def _scored(plan: Plan, record: SearchRecord, k: int) -> np.ndarray:
    return ~np.isnan(record.scores[:, k][:, plan.selecting]).any(1)


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
    parts: list[Candidates] = []
    start = 0
    while start < len(alive):
        plan.check_time()
        rows = alive[start : start + plan.batch_size]
        places = list(range(start, start + len(rows)))
        try:
            moved, x0 = _denoise(plan, stage, text, candidates.take(places), rows)
        except DeviceError as error:
            plan.batch_size = _halved(len(rows), plan.group, "denoising", error)
            moved = None
        if moved is None:  # outside the except block, whose traceback keeps the tensors alive
            _free(plan.denoiser.device)
            continue
        _check(plan, record, stage, moved, x0, rows, k)
        waiting = moved.latents.nbytes * len(alive) / len(rows) > _ON_DEVICE_BYTES
        parts.append(replace(moved, latents=moved.latents.cpu()) if waiting else moved)
        start += len(rows)
    return Candidates.cat(parts)


def _denoise(
    plan: Plan, stage: StageRecord, text: Conditioning, candidates: Candidates, rows: np.ndarray
) -> tuple[Candidates, torch.Tensor]:
    """Run to the last step of the stage; return the candidates and their x0 estimates there."""
    latest: list[torch.Tensor] = []
    before = plan.done

    def on_x0(step: int, x0: torch.Tensor) -> None:
        latest[:] = [x0]
        plan.estimate = (rows, x0)
        plan.done += len(rows)
        stage.forwards += len(rows)
        if plan.progress is not None:
            plan.progress(min(plan.done, plan.forwards - 1), plan.forwards)
        plan.check_time()

    begin = time.perf_counter()
    steps = range(candidates.step + 1, stage.last_step + 1)
    try:
        moved = plan.denoiser.run(candidates, text.take([0] * len(rows)), stage.last_step, record=steps, on_x0=on_x0)
    except DeviceError:
        plan.done = before
        raise
    finally:
        _wait_for(plan.denoiser.device)
        stage.denoise_s += time.perf_counter() - begin
    return moved, latest[0]


def _check(
    plan: Plan,
    record: SearchRecord,
    stage: StageRecord,
    moved: Candidates,
    x0: torch.Tensor,
    rows: np.ndarray,
    k: int,
) -> None:
    """Decode and score a batch, in smaller parts when memory runs out: what is denoised stays."""
    is_final = k == len(record.checks) - 1
    start = 0
    while start < len(rows):
        part = list(range(start, min(start + plan.check_size, len(rows))))
        begin = time.perf_counter()
        pixels: Any = None
        try:
            if is_final:
                pixels = plan.denoiser.final(moved.take(part))
            else:
                pixels = plan.denoiser.decode(x0[part[0] : part[-1] + 1], plan.decoder)
            _wait_for(plan.denoiser.device)
            middle = time.perf_counter()
            table = _score(plan, stage, record, rows[part], pixels)
        except DeviceError as error:
            plan.check_size = _halved(len(part), 1, "decoding and scoring", error)
            table = None
        if table is None:
            pixels = None
            _free(plan.denoiser.device)
            continue
        stage.decode_s += middle - begin
        stage.score_s += time.perf_counter() - middle
        stage.decodes += len(part)
        stage.scores += len(part)
        # Pictures come first: a score without its picture could not be shown after an interruption.
        for row, picture in zip(rows[part], pixels, strict=True):
            plan.pictures[int(row), k] = _picture(picture)
            record.previews[int(row), stage.last_step] = _thumbnail(picture, plan.preview_px)
        record.scores[rows[part], k] = table
        start += len(part)


def _score(
    plan: Plan, stage: StageRecord, record: SearchRecord, candidates: np.ndarray, pixels: torch.Tensor
) -> np.ndarray:
    """Return (n, reward) scores with the weights of the step; NaN where a reward failed for an image."""
    aware = stage.variant == "noise_aware"
    table = np.full((len(pixels), len(plan.rewards)), np.nan, np.float32)
    reasons: list[str] = []
    for r, reward in enumerate(plan.rewards):
        reward.use_step(stage.last_step if aware and stage.last_step in reward.adapter_steps else None)
        table[:, r] = _score_each(reward, record.prompt, pixels, reasons)
        table[~np.isfinite(table[:, r]), r] = np.nan
        lost = candidates[np.isnan(table[:, r])]
        if len(lost):
            fate = "drop out" if r in plan.selecting else "have no score of it"
            why = reasons[-1] if reasons else "a score that is not finite"
            warnings.warn(
                f"{reward.name} failed at step {stage.last_step} for the candidates {lost.tolist()}, which {fate}: {why}",
                stacklevel=2,
            )
    return table


def _score_each(reward: Any, prompt: str, pixels: torch.Tensor, reasons: list[str]) -> np.ndarray:
    """Return the scores (n,); NaN for the images at which the reward raises."""
    try:
        return reward.score(prompt, pixels, check=False)
    except DeviceError:
        raise
    except Exception as error:  # noqa: BLE001 - a reward may be anyone's function
        reasons.append(f"{type(error).__name__}: {error}")
        if len(pixels) == 1:
            return np.full(1, np.nan, np.float32)
    # One bad image must not cost the others their scores.
    return np.concatenate([_score_each(reward, prompt, one[None], reasons) for one in pixels])


def _halved(size: int, group: int, what: str, error: DeviceError) -> int:
    """Return half of `size` in whole groups, or raise `error` again when nothing smaller is left."""
    smaller = size // 2 // group * group
    if smaller < 1:
        raise error
    warnings.warn(f"out of memory while {what} {size} candidates; going on with {smaller} at once", stacklevel=2)
    return smaller


def _thumbnail(pixels: torch.Tensor, size: int) -> np.ndarray:
    """Return a small uint8 picture (H, W, 3) for the gallery."""
    factor = max(1, -(-max(pixels.shape[-2:]) // size))
    return _picture(torch.nn.functional.avg_pool2d(pixels[None], factor)[0] if factor > 1 else pixels)


def _picture(pixels: torch.Tensor) -> np.ndarray:
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
