"""Batches of pictures through rewards, and the values of each prompt into the tensor."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ._score_work import Call, Portion, Work
from .errors import DeviceError, RewardError, TTSnapError
from .reward_store import RewardStore
from .rewards.base import Reward
from .trajectories import Trajectories

__all__ = ["ScoreReport", "ScoreRun", "Skipped"]


@dataclass(frozen=True)
class Skipped:
    """A score that was left NaN, and why."""

    prompt: int
    image: int
    step: int
    reward: str
    variant: str
    reason: str


@dataclass
class ScoreReport:
    """What a call of :func:`score` did."""

    path: Path
    pictures: int = 0
    """Pictures read now; each is scored by every reward and variant that lacks it."""
    scores: int = 0
    elapsed_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the time of the main thread went: wait (for reading), model, write."""
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def images_per_s(self) -> float:
        """Pictures per second, all of it counted."""
        return self.pictures / self.elapsed_s if self.elapsed_s else 0.0

    def __str__(self) -> str:
        if not self.pictures:
            return f"{self.path}: nothing left to score"
        text = f"{self.path}: {self.pictures} pictures, {self.scores} scores, {self.images_per_s:.1f} images/s"
        if self.skipped:
            text += f", {len(self.skipped)} scores skipped"
        return text


class ScoreRun:
    """Scores batches and writes each work's values when its last batch is through."""

    def __init__(self, store: RewardStore, found: Trajectories, on_error: str, report: ScoreReport) -> None:
        self.store, self.found, self.skip, self.report = store, found, on_error == "skip", report
        self._values: dict[tuple[str, str], np.ndarray] = {}
        self._column = {step: k for k, step in enumerate(store.steps)}

    def spent(self, part: str, since: float) -> None:
        self.report.seconds[part] = self.report.seconds.get(part, 0.0) + time.perf_counter() - since

    def batch(self, portion: Portion) -> None:
        """Score one batch by every call of its work."""
        for row, error in portion.failed.items():
            if not self.skip:
                raise error
            step, image = portion.slots[row]
            for call in portion.work.calls:
                if step in call.steps:
                    self._skip(portion.work, call, step, image, str(error))
        begin = time.perf_counter()
        for call in portion.work.calls:
            if call.variant == "base":
                rows = [row for row, (step, _) in enumerate(portion.slots) if step in call.steps]
                self._call(portion, call, rows, None)
                continue
            for step in sorted({step for step, _ in portion.slots} & call.steps):
                self._call(portion, call, [row for row, slot in enumerate(portion.slots) if slot[0] == step], step)
        self.spent("model", begin)
        if portion.last:
            begin = time.perf_counter()
            self.store.write(portion.work.prompt, self._values)
            self._values = {}
            self.spent("write", begin)

    def _call(self, portion: Portion, call: Call, rows: list[int], step: int | None) -> None:
        if not rows:
            return
        call.reward.use_step(step)
        try:
            scores, reasons = self._score(portion, call, rows)
        finally:
            call.reward.use_step(None)
        table = self._values.setdefault(
            (call.reward.name, call.variant),
            np.full((self.store.n_images, len(self.store.steps)), np.nan, np.float32),
        )
        for k, row in enumerate(rows):
            at, image = portion.slots[row]
            if row in portion.failed:
                continue
            if np.isfinite(scores[k]):
                table[image, self._column[at]] = scores[k]
                self.report.scores += 1
                continue
            if not self.skip:
                raise RewardError(
                    f"reward {call.reward.name} gave a score that is not finite for "
                    f"{self.found.path(portion.work.prompt, image, at)}",
                    value=float(scores[k]),
                    bound="a finite number",
                    remedy="Look at the picture and the weights; --on-error skip leaves such scores out.",
                )
            self._skip(portion.work, call, at, image, reasons.get(k, f"score {scores[k]}"))

    def _score(self, portion: Portion, call: Call, rows: list[int]) -> tuple[np.ndarray, dict[int, str]]:
        """Return the scores of some rows and, where there is none, why."""
        text = self.found.prompts[portion.work.prompt]
        try:
            return _forward(call.reward, text, portion.inputs(call.reward, rows)), {}
        except DeviceError:
            raise
        except Exception as error:  # a function given as a reward may raise anything
            if not self.skip:
                raise self._named(portion, call, rows, error) from error
        scores, reasons = np.full(len(rows), np.nan, np.float32), {}
        for k, row in enumerate(rows):  # find the pictures that it cannot score
            try:
                scores[k] = _forward(call.reward, text, portion.inputs(call.reward, [row]))[0]
            except Exception as error:  # noqa: BLE001
                reasons[k] = f"{type(error).__name__}: {error}"
        return scores, reasons

    def _named(self, portion: Portion, call: Call, rows: list[int], error: Exception) -> RewardError:
        step, image = portion.slots[rows[0]]
        first = self.found.path(portion.work.prompt, image, step)
        detail = str(error) if isinstance(error, TTSnapError) else f"{type(error).__name__}: {error}"
        return RewardError(
            f"reward {call.reward.name} failed on {first} and the {len(rows) - 1} after it in the batch ({detail})",
            value=str(first),
            bound="a picture that the reward can score",
            remedy="Mend the reward; scores that are written stay, and the same command goes on.",
        )

    def _skip(self, work: Work, call: Call, step: int, image: int, reason: str) -> None:
        self.report.skipped.append(Skipped(work.prompt, image, step, call.reward.name, call.variant, reason))


def _forward(reward: Reward, text: str, inputs: Any) -> np.ndarray:
    if reward.preprocessing is None:
        return reward.score(text, inputs, batch_size=len(inputs), check=False)
    return reward.score_pixels(text, inputs)
