"""The live search: one prompt, one budget, live pruning, one best image.

Candidates start from noise in batches, run to the first pruning step, are decoded and scored there, the best go on in
full batches, and the end is chosen on the clean image (paper, section 3). With the same seeds and scores the winner is
the one that :func:`ttsnap_lib.prune` returns.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ttsnap_lib.checks import as_bytes, integer, real, text
from ttsnap_lib.costs import CostModel
from ttsnap_lib.diffusion.denoise import (
    Candidates,
    Conditioning,
    Denoiser,
    Settings,
    as_settings,
    image_generator,
    image_seed,
)
from ttsnap_lib.diffusion.pipelines import load_decoder, load_pipeline, pipeline_facts
from ttsnap_lib.errors import BudgetError, ConfigError, DeviceError, ScheduleError, SearchError
from ttsnap_lib.live.plan import planned
from ttsnap_lib.live.record import SearchRecord, SearchResult, StageRecord
from ttsnap_lib.provenance import versions
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.schedule import Schedule, choose, kept, selecting_rewards

if TYPE_CHECKING:
    from ttsnap_lib.diffusion.negtome import NegToMe

_BATCH = {"cpu": 16}  # where an automatic batch begins; on accelerators memory is what limits it
_BATCH_ON_ACCELERATOR = 64
_PREVIEW_PX = 128  # longest side of the pictures kept for the gallery
_ON_DEVICE_BYTES = 2**29  # latents of waiting candidates beyond this rest on the CPU


def search(
    pipeline: Any,
    prompt: str,
    reward: Any,
    schedule: Schedule | None = None,
    budget: float | None = None,
    candidates: int | None = None,
    cost: CostModel | str | Path | None = None,
    seed: int = 0,
    method: str | None = None,
    *,
    settings: Settings | Mapping[str, Any] | None = None,
    combine: str = "rank_sum",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    report: Sequence[str] | None = None,
    decoder: Any = None,
    batch_size: int | None = None,
    deadline_s: float | None = None,
    prompt_index: int = 0,
    negtome: NegToMe | None = None,
    on_check: Callable[[SearchRecord], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Find the best image of many seeds within a budget.

    Parameters
    ----------
    pipeline : diffusers pipeline or str
        A text-to-image pipeline, or what :func:`ttsnap_lib.load_pipeline` takes.
    prompt : str
    reward : Reward, str, callable, or a list of them
        What :func:`ttsnap_lib.load_reward` takes. Several select jointly, except those in `report`.
    schedule : Schedule, optional
        None or empty: no pruning.
    budget : float, optional
        Compute for this prompt in the unit of `cost`; gives the number of candidates. Either this or `candidates`.
    candidates : int, optional
        How many seeds to start.
    cost : CostModel, preset name or file, optional
        Needed with `budget`; with `candidates` it only prices the run.
    seed : int
        Base seed; candidate i has the seed of image i in a trajectory folder of the same base seed.
    method : {"best_of_n", "ttsp", "ttsnap"}, optional
        None: ``best_of_n`` without a schedule, ``ttsnap`` with a reward that has noise-aware weights, else ``ttsp``.
        ``best_of_n`` does not read the schedule.
    settings : Settings or mapping, optional
        Steps, size, guidance; the pipeline's defaults when not given.
    combine, weights, report
        As in :func:`ttsnap_lib.simulate`.
    decoder : AutoencoderTiny, folder, hub id or ``"pocket-tiny"``, optional
        Decodes the estimates at checks; the final image always comes from the full VAE.
    batch_size : int, optional
        Candidates at once: 16 on a CPU and 64 elsewhere when not given. Halved when memory runs out, without losing
        what is done; decoding and scoring have a size of their own, halved apart.
    deadline_s : float, optional
        Stop after these seconds with the best so far, over by one denoising step of one batch, or its decoding and
        scoring, at most.
    prompt_index : int
        Index of the prompt in a prompt file, for the seeds.
    negtome : NegToMe, optional
        Off by default: it couples the candidates of a batch. When on, pruning must begin after its window.
    on_check : callable, optional
        Called with the record after each stage, for a live display. Its time, and that of `progress`, is left out of
        the record's ``elapsed_s``.
    progress : callable, optional
        Called after each step with (steps of candidates done, steps of candidates in all).

    Returns
    -------
    SearchResult
        On Ctrl-C or at the deadline with ``complete=False`` and the best so far.

    Raises
    ------
    BudgetError, ScheduleError, CostError, ConfigError
        Before any model runs; also when a deadline leaves no time for a first step.
    SearchError
        No candidate could be scored.
    KeyboardInterrupt
        Ctrl-C before the first step.
    """
    begin = time.perf_counter()
    deadline = None if deadline_s is None else time.monotonic() + real("deadline_s", deadline_s, 0, open_low=True)
    text("prompt", prompt)
    seed, prompt_index = integer("seed", seed, 0), integer("prompt_index", prompt_index, 0)
    group = 1 if negtome is None else negtome.group_size
    n_steps = as_settings(settings).n_steps
    schedule, costs, n = planned(schedule, budget, candidates, cost, method, n_steps, group, batch_size)
    rewards = [load_reward(one) for one in (reward if isinstance(reward, list | tuple) else [reward])]
    names = [one.name for one in rewards]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"reward: got {names}, expected rewards of distinct names. Use load_reward(name=...).")
    report = [report] if isinstance(report, str) else list(report or ())
    selecting, weight_row = selecting_rewards(names, report, combine, weights)
    method = _method_for(method, schedule, [rewards[k] for k in selecting])
    denoiser = Denoiser(load_pipeline(pipeline) if isinstance(pipeline, str | Path) else pipeline, settings)
    decoder = load_decoder(decoder, denoiser.pipeline)
    if negtome is not None:
        window = negtome.active_steps(denoiser.pipeline, denoiser.timesteps)
        if window and len(schedule) and schedule.steps[0] < window[-1]:
            raise ScheduleError(
                f"pruning inside the window of NegToMe: got step {schedule.steps[0]}, expected at least {window[-1]}. "
                "Prune later, narrow the window, or search without NegToMe."
            )
    if batch_size is None:
        batch_size = max(group, _BATCH.get(denoiser.device.type, _BATCH_ON_ACCELERATOR) // group * group)

    checks = [*schedule.steps, denoiser.settings.n_steps - 1]
    facts = {
        **pipeline_facts(denoiser),
        "decoder": None if decoder is None else type(decoder).__name__,
        "versions": {name: versions().get(name) for name in ("ttsnap", "torch", "diffusers", "transformers")},
    }
    record = SearchRecord(
        prompt=prompt, method=method, seed=seed, prompt_index=prompt_index,
        seeds=[image_seed(seed, prompt_index, image) for image in range(n)], rewards=names,
        schedule=schedule.to_dict(), settings=denoiser.settings.to_dict(), checks=checks,
        scores=np.full((n, len(checks), len(names)), np.nan, np.float32), pruned_at=[-1] * n, combine=combine,
        weights=None if weight_row is None else weight_row.tolist(), report=report,
        cost_model=None if costs is None else costs.to_dict(), facts=facts,
    )  # fmt: skip
    run = Run(
        record, denoiser, rewards, selecting, schedule, decoder, batch_size, group, deadline, on_check, progress
    )  # fmt: skip
    with contextlib.ExitStack() as held:
        for one in rewards:
            held.enter_context(one.at(None))
        if negtome is not None:
            held.enter_context(negtome.install(denoiser.pipeline))
        try:
            encoded = denoiser.encode([prompt])
            record.text_s = time.perf_counter() - begin
            picture = run.whole(encoded, denoiser.noise([image_generator(seed, prompt_index, i) for i in range(n)]))
        except (_TimeUp, KeyboardInterrupt) as stop:
            record.stopped = "deadline" if isinstance(stop, _TimeUp) else "interrupt"
            found = run.best_so_far()
            if found is None and isinstance(stop, _TimeUp):
                raise BudgetError(
                    f"deadline_s: got {deadline_s}, expected time for one step of one batch. Raise it or lower batch_size."
                ) from None
            if found is None:
                raise
            picture = found
    record.elapsed_s = time.perf_counter() - begin - run.told_s
    spent = float("nan") if costs is None else record.price(costs)
    return SearchResult(Image.fromarray(picture), record.winner, record, spent, not record.stopped)


def _method_for(method: str | None, schedule: Schedule, selecting: Sequence[Any]) -> str:
    """Return the method: what was asked for when it can be, else what schedule and rewards suggest."""
    aware = any(one.adapter_steps for one in selecting)
    if method is None:
        return "best_of_n" if not len(schedule) else "ttsnap" if aware else "ttsp"
    if method == "ttsnap" and len(schedule) and not aware:
        raise ConfigError(
            f"method ttsnap: got {[one.name for one in selecting]}, expected a reward with noise-aware weights. Load it "
            "with load_reward(..., adapters=<folder of ttsnap finetune>), or use method='ttsp'."
        )
    return method


class _TimeUp(Exception):
    """The deadline has passed; raised between two denoising steps."""


@dataclass
class Run:
    """A search at work: what stays the same, the record that it fills, and what it holds at the moment.

    ``pictures`` keeps full-size pictures (uint8, H x W x 3) by (candidate, check): those of the check at work, and of
    earlier checks the best one. ``estimate`` is what the batch at work looks like at the moment.
    """

    record: SearchRecord
    denoiser: Denoiser
    rewards: Sequence[Any]
    selecting: list[int]
    schedule: Schedule
    decoder: Any
    batch_size: int  # halved when memory runs out
    group: int  # batches are multiples of it: NegToMe couples that many candidates
    deadline: float | None
    on_check: Callable[[SearchRecord], None] | None
    progress: Callable[[int, int], None] | None
    pictures: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    estimate: tuple[np.ndarray, torch.Tensor] | None = None
    done: int = 0  # forwards of candidates, of `forwards` in the whole run
    told_s: float = 0.0  # seconds inside on_check and progress: a display is no part of the search's own time

    def __post_init__(self) -> None:
        self.check_size = self.batch_size  # images decoded and scored at once; halved apart
        survivors = self.schedule.survivors(len(self.record.seeds))
        self.forwards = int(np.dot(survivors, np.diff([-1, *self.record.checks])))

    def whole(self, text: Conditioning, candidates: Candidates) -> np.ndarray:
        """Run all stages and return the winner's picture; `text` is the prompt's one row.

        On _TimeUp and KeyboardInterrupt the record is filled as far as the run came.
        """
        alive = np.arange(len(self.record.seeds))
        for k in range(len(self.record.checks)):
            candidates, alive = self.stage(k, text, candidates, alive)
            self._tell(self.on_check, self.record)
        self._tell(self.progress, self.forwards, self.forwards)
        return self.pictures[self.record.winner, len(self.record.checks) - 1]

    def stage(
        self, k: int, text: Conditioning, candidates: Candidates, alive: np.ndarray
    ) -> tuple[Candidates, np.ndarray]:
        """Run the candidates `alive` to check `k` and score them there; return those that go on."""
        record, last = self.record, self.record.checks[k]
        is_final = k == len(record.checks) - 1
        aware = record.method == "ttsnap" and not is_final and any(last in one.adapter_steps for one in self.rewards)
        small = not is_final and self.decoder is not None
        variant = "noise_aware" if aware else "base"
        stage = StageRecord(candidates.step + 1, last, len(alive), variant, preview=small)
        record.stages.append(stage)
        begin, told = time.perf_counter(), self.told_s
        try:
            candidates = self._in_batches(k, stage, text, candidates, alive)
        finally:
            stage.elapsed_s = time.perf_counter() - begin - (self.told_s - told)
        scored = alive[self._scored(k)[alive]]
        for lost in np.setdiff1d(alive, scored):
            record.pruned_at[int(lost)] = -2
        if not len(scored):
            raise SearchError(
                f"no candidate could be scored at step {last} by {record.rewards}. The warnings before this say why."
            )
        # A candidate without a score leaves its place to the others.
        keep = 1 if is_final else min(kept(len(alive), self.schedule.keep_ratios[k]), len(scored))
        stay = self._best(k, scored, keep)
        record.winner = int(self._best(k, stay, 1)[0])
        self.pictures = {(record.winner, k): self.pictures[record.winner, k]}
        if is_final:
            return candidates, alive
        for dropped in np.setdiff1d(scored, stay):
            record.pruned_at[int(dropped)] = last
        return candidates.take(np.searchsorted(alive, stay).tolist()), stay

    def check(self, k: int, stage: StageRecord, moved: Candidates, x0: torch.Tensor, rows: np.ndarray) -> None:
        """Decode and score a batch, in smaller parts when memory runs out: what is denoised stays."""
        record = self.record
        is_final = k == len(record.checks) - 1
        start = 0
        while start < len(rows):
            part = list(range(start, min(start + self.check_size, len(rows))))
            begin = time.perf_counter()
            pixels: Any = None
            table = None
            try:
                if is_final:
                    pixels = self.denoiser.final(moved.take(part))
                else:
                    pixels = self.denoiser.decode(x0[part[0] : part[-1] + 1], self.decoder)
                self.denoiser.wait()
                middle = time.perf_counter()
                table = self._scores(stage, rows[part], pixels)
            except DeviceError as error:
                self.check_size = _halved(len(part), 1, "decoding and scoring", error)
            if table is None:  # outside the except block, whose traceback keeps the tensors alive
                pixels = None
                _free(self.denoiser.device)
                continue
            stage.decode_s += middle - begin
            stage.score_s += time.perf_counter() - middle
            stage.decodes += len(part)
            stage.scores += len(part)
            # Pictures come first: a score without its picture could not be shown after an interruption.
            for row, picture in zip(rows[part], pixels, strict=True):
                self.pictures[int(row), k] = _picture(picture)
                record.previews[int(row), stage.last_step] = _thumbnail(picture)
            record.scores[rows[part], k] = table
            start += len(part)

    def best_so_far(self) -> np.ndarray | None:
        """Return the picture of the best candidate of the furthest check that anyone reached, and note the winner.

        Before the first score it is the present estimate of the first candidate; None before the first step.
        """
        record = self.record
        for k in reversed(range(len(record.checks))):
            ready = self._scored(k) & [(c, k) in self.pictures for c in range(len(record.seeds))]
            if ready.any():
                record.winner = int(self._best(k, np.flatnonzero(ready), 1)[0])
                return self.pictures[record.winner, k]
        if self.estimate is None:
            return None
        rows, x0 = self.estimate
        record.winner = int(rows[0])
        warnings.warn("cut short before the first check: no reward has seen the image, an estimate", stacklevel=3)
        return _picture(self.denoiser.decode(x0[:1], self.decoder)[0])

    def _in_batches(
        self, k: int, stage: StageRecord, text: Conditioning, candidates: Candidates, alive: np.ndarray
    ) -> Candidates:
        """Denoise, decode and score all candidates of a stage; halve the batch when memory runs out."""
        parts: list[Candidates] = []
        start = 0
        while start < len(alive):
            self._check_time()
            rows = alive[start : start + self.batch_size]
            moved = None
            try:
                batch = candidates.take(list(range(start, start + len(rows))))
                moved, x0 = self._denoise(stage, text.take([0] * len(rows)), batch, rows)
            except DeviceError as error:
                self.batch_size = _halved(len(rows), self.group, "denoising", error)
            if moved is None:
                _free(self.denoiser.device)
                continue
            self.check(k, stage, moved, x0, rows)
            waiting = moved.latents.nbytes * len(alive) / len(rows) > _ON_DEVICE_BYTES
            parts.append(replace(moved, latents=moved.latents.cpu()) if waiting else moved)
            start += len(rows)
        return Candidates.cat(parts)

    def _denoise(
        self, stage: StageRecord, text: Conditioning, candidates: Candidates, rows: np.ndarray
    ) -> tuple[Candidates, torch.Tensor]:
        """Run to the last step of the stage; return the candidates and their x0 estimates there."""
        latest: list[torch.Tensor] = []
        before = self.done

        def on_x0(step: int, x0: torch.Tensor) -> None:
            latest[:] = [x0]
            self.estimate = (rows, x0)
            self.done += len(rows)
            stage.forwards += len(rows)
            self._tell(self.progress, min(self.done, self.forwards - 1), self.forwards)
            self._check_time()

        begin, told = time.perf_counter(), self.told_s
        steps = range(candidates.step + 1, stage.last_step + 1)
        try:
            moved = self.denoiser.run(candidates, text, stage.last_step, record=steps, on_x0=on_x0)
        except DeviceError:
            self.done = before
            raise
        finally:
            self.denoiser.wait()
            stage.denoise_s += time.perf_counter() - begin - (self.told_s - told)
        return moved, latest[0]

    def _scores(self, stage: StageRecord, candidates: np.ndarray, pixels: torch.Tensor) -> np.ndarray:
        """Return (n, reward) scores with the weights of the step; NaN where a reward failed for an image."""
        table = np.full((len(pixels), len(self.rewards)), np.nan, np.float32)
        reasons: list[str] = []
        for r, reward in enumerate(self.rewards):
            aware = stage.variant == "noise_aware" and stage.last_step in reward.adapter_steps
            reward.use_step(stage.last_step if aware else None)
            scores = _score_each(reward, self.record.prompt, pixels, reasons)
            table[:, r] = np.where(np.isfinite(scores), scores, np.nan)
            lost = candidates[np.isnan(table[:, r])]
            if len(lost):
                fate = "drop out" if r in self.selecting else "have no score of it"
                why = reasons[-1] if reasons else "a score that is not finite"
                warnings.warn(
                    f"{reward.name} failed at step {stage.last_step} for the candidates {lost.tolist()}, which {fate}: "
                    f"{why}",
                    stacklevel=2,
                )
        return table

    def _scored(self, k: int) -> np.ndarray:
        return ~np.isnan(self.record.scores[:, k][:, self.selecting]).any(1)

    def _best(self, k: int, rows: np.ndarray, keep: int) -> np.ndarray:
        """Return the `keep` best of the candidates `rows` at check `k`, ascending."""
        weights = None if self.record.weights is None else np.array(self.record.weights)
        return rows[choose(self.record.scores[rows, k][:, self.selecting], keep, self.record.combine, weights)]

    def _tell(self, listener: Callable[..., None] | None, *news: Any) -> None:
        if listener is None:
            return
        begin = time.perf_counter()
        try:
            listener(*news)
        finally:
            self.told_s += time.perf_counter() - begin

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise _TimeUp


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


def _picture(pixels: torch.Tensor) -> np.ndarray:
    return as_bytes(pixels).cpu().numpy()


def _thumbnail(pixels: torch.Tensor) -> np.ndarray:
    """Return a small uint8 picture (H, W, 3) for the gallery."""
    factor = -(-max(pixels.shape[-2:]) // _PREVIEW_PX)
    return _picture(torch.nn.functional.avg_pool2d(pixels[None], factor)[0] if factor > 1 else pixels)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
