"""The online run: one prompt, one budget, live pruning, one best image.

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
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from ttsnap_lib.checks import MAX_IMAGES, choice, integer, real, text
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
from ttsnap_lib.diffusion.negtome import NegToMe
from ttsnap_lib.diffusion.pipelines import load_decoder, pipeline_facts
from ttsnap_lib.errors import BudgetError, ConfigError, CostError, DeviceError, ScheduleError, SearchError
from ttsnap_lib.live.record import SearchRecord, SearchResult, StageRecord
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.schedule import METHODS, Schedule, choose, kept, selecting_rewards


def check_schedule(schedule: Any, n_steps: int) -> Schedule:
    """Return a schedule that fits the loop; None is the empty one."""
    schedule = Schedule() if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"schedule: got {schedule!r}, expected a Schedule or None. Pass Schedule(steps, keep_ratios)."
        )
    schedule.check(n_steps)
    return schedule


def method_for(method: str | None, schedule: Schedule, selecting: Sequence[Any]) -> str:
    """Return the method: what was asked for when it can be, else what schedule and rewards suggest."""
    aware = any(one.adapter_steps for one in selecting)
    if method is None:
        return "best_of_n" if not len(schedule) else "ttsnap" if aware else "ttsp"
    choice("method", method, METHODS)
    if method == "ttsnap" and len(schedule) and not aware:
        raise ConfigError(
            f"method ttsnap with a base reward: got {[one.name for one in selecting]!r}, expected a reward with "
            "noise-aware weights. Load it with load_reward(..., adapters=<folder of ttsnap finetune>), or use "
            "method='ttsp'."
        )  # fmt: skip
    return method


def variants_for(method: str, schedule: Schedule, rewards: Sequence[Any]) -> list[str]:
    """Return per check, the clean image last, whether noise-aware weights are used there or the base ones."""
    aware = {step for one in rewards for step in one.adapter_steps} if method == "ttsnap" else set()
    return [*("noise_aware" if step in aware else "base" for step in schedule.steps), "base"]


def candidates_for(
    budget: float | None, candidates: int | None, cost: CostModel | None, schedule: Schedule, n_steps: int, group: int
) -> int:
    """Return how many candidates are started: as many as the budget buys, in whole groups."""
    if (budget is None) == (candidates is None):
        raise BudgetError(
            f"search: got { {'budget': budget, 'candidates': candidates}!r}, expected either budget or candidates. "
            "Give exactly one of them."
        )  # fmt: skip
    if cost is not None and not isinstance(cost, CostModel):
        raise CostError(f"cost: got {cost!r}, expected a CostModel, a preset's name or a file. Pass one of them.")
    if cost is not None and cost.n_steps != n_steps:
        raise CostError(
            f"cost.n_steps: got {cost.n_steps!r}, expected {n_steps}, the steps of this run. Use a cost model with "
            f"n_steps={n_steps}, or Settings(n_steps={cost.n_steps})."
        )  # fmt: skip
    if candidates is not None:
        n = integer("candidates", candidates, 1, MAX_IMAGES, error=BudgetError)
        if n % group:
            raise BudgetError(
                f"candidates with NegToMe: got {n!r}, expected a multiple of its group_size, {group}. The nearest is "
                f"{max(group, round(n / group) * group)}."
            )  # fmt: skip
        return n
    if cost is None:
        raise CostError(
            f"budget without a cost model: got {cost!r}, expected a CostModel. Measure one with `ttsnap cost`, name a "
            "preset, or give candidates instead."
        )  # fmt: skip
    n = cost.candidates(cast("float", budget), schedule) // group * group
    if n > MAX_IMAGES:
        raise BudgetError(
            f"budget: got {budget!r}, expected at most {cost.total(MAX_IMAGES, schedule):.6g} {cost.unit}, "
            f"{MAX_IMAGES} candidates. Check the unit of the cost model."
        )  # fmt: skip
    if n < 1:
        what = "one candidate" if group == 1 else f"one group of {group} candidates"
        raise BudgetError(
            f"budget: got {budget!r}, expected at least {cost.total(group, schedule):.6g} {cost.unit}, the cost of "
            f"{what}. Raise the budget or use fewer steps."
        )  # fmt: skip
    return n


def check_negtome(negtome: NegToMe | None, schedule: Schedule, denoiser: Any) -> None:
    """Refuse to prune where NegToMe still couples the candidates of a batch."""
    if negtome is None or not len(schedule):
        return
    window = negtome.active_steps(denoiser.pipeline, denoiser.timesteps)
    if window and schedule.steps[0] < window[-1]:
        raise ScheduleError(
            f"pruning inside the window of NegToMe: got {schedule.steps[0]!r}, expected steps of at least "
            f"{window[-1]}. Prune later, narrow the window, or search without NegToMe."
        )  # fmt: skip


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
                f"no candidate could be scored at step {last}: got {record.rewards!r}, expected a score for one "
                "candidate. The warnings before this say why the reward failed."
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


_BATCH = {"cpu": 16}  # where an automatic batch begins; on accelerators memory is what limits it


_BATCH_ON_ACCELERATOR = 64


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
    settings: Settings | None = None,
    combine: str = "rank_sum",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    report: Sequence[str] | None = None,
    decoder: Any = None,
    batch_size: int | None = None,
    deadline_s: float | None = None,
    prompt_index: int = 0,
    negtome: NegToMe | None = None,
    preview_px: int = 128,
    on_check: Callable[[SearchRecord], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Find the best image of many seeds within a budget.

    Parameters
    ----------
    pipeline : diffusers pipeline or str
        A text-to-image pipeline, or what :func:`ttsnap_lib.pipelines.load_pipeline` takes.
    prompt : str
    reward : Reward, str, callable, or a list of them
        What :func:`ttsnap_lib.rewards.load_reward` takes. Several select jointly, except those in `report`.
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
    settings : Settings, optional
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
    preview_px : int
        Longest side of the pictures kept for the gallery.
    on_check : callable, optional
        Called with the record after each stage, for a live display.
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
    n_steps = as_settings(settings).n_steps
    schedule = check_schedule(schedule, n_steps)
    schedule = Schedule() if method is not None and choice("method", method, METHODS) == "best_of_n" else schedule
    costs = CostModel.load(cost) if isinstance(cost, str | Path) else cost
    group = 1 if negtome is None else negtome.group_size
    n = candidates_for(budget, candidates, costs, schedule, n_steps, group)
    if batch_size is not None and integer("batch_size", batch_size, 1) % group:
        raise ConfigError(
            f"batch_size with NegToMe: got {batch_size!r}, expected a multiple of its group_size, {group}. Set one, or "
            "leave batch_size out."
        )  # fmt: skip
    rewards = [load_reward(one) for one in (reward if isinstance(reward, list | tuple) else [reward])]
    names = [one.name for one in rewards]
    if not names or len(set(names)) != len(names):
        raise ConfigError(
            f"reward: got {names!r}, expected rewards of distinct names. Rename one with load_reward(name=...)."
        )
    report = [report] if isinstance(report, str) else list(report or ())
    selecting, weight_row = selecting_rewards(names, report, combine, weights)
    method = method_for(method, schedule, [rewards[k] for k in selecting])
    if isinstance(pipeline, str | Path):
        from ttsnap_lib.diffusion.pipelines import load_pipeline

        pipeline = load_pipeline(pipeline)
    denoiser = Denoiser(pipeline, settings)
    check_negtome(negtome, schedule, denoiser)
    decoder = load_decoder(decoder, pipeline)
    if batch_size is None:
        batch_size = max(group, _BATCH.get(denoiser.device.type, _BATCH_ON_ACCELERATOR) // group * group)

    checks = [*schedule.steps, n_steps - 1]
    record = SearchRecord(
        prompt=prompt, method=method, seed=seed, prompt_index=prompt_index,
        seeds=[image_seed(seed, prompt_index, image) for image in range(n)], rewards=names,
        schedule=schedule.to_dict(), settings=denoiser.settings.to_dict(), checks=checks,
        scores=np.full((n, len(checks), len(names)), np.nan, np.float32), pruned_at=[-1] * n, combine=combine,
        weights=None if weight_row is None else weight_row.tolist(), report=report,
        cost_model=None if costs is None else costs.to_dict(), facts=_facts(denoiser, decoder),
    )  # fmt: skip
    stage_steps = np.diff([-1, *checks])
    plan = Plan(
        denoiser=denoiser, rewards=rewards, selecting=selecting, weights=weight_row, keep_ratios=schedule.keep_ratios,
        variants=variants_for(method, schedule, rewards), decoder=decoder, batch_size=batch_size, group=group,
        deadline=deadline, preview_px=integer("preview_px", preview_px, 1), on_check=on_check, progress=progress,
        forwards=int(np.dot(schedule.survivors(n), stage_steps)),
    )  # fmt: skip
    before = [one.step for one in rewards]
    try:
        with contextlib.nullcontext() if negtome is None else negtome.install(pipeline):
            encoded = denoiser.encode([prompt])
            record.text_s = time.perf_counter() - begin
            noise = denoiser.noise([image_generator(seed, prompt_index, image) for image in range(n)])
            run_stages(plan, record, encoded, noise)
        picture = plan.pictures[record.winner, len(checks) - 1]
    except (TimeUp, KeyboardInterrupt) as stop:
        record.stopped = "deadline" if isinstance(stop, TimeUp) else "interrupt"
        found = best_so_far(plan, record)
        if found is None:
            raise (_too_late(deadline_s) if isinstance(stop, TimeUp) else stop) from None
        picture = found
    finally:
        for one, step in zip(rewards, before, strict=True):
            one.use_step(step)
    record.elapsed_s = time.perf_counter() - begin
    spent = float("nan")
    if costs is not None:
        spent = record.spent(costs)
        for stage in record.stages:
            stage.cost = stage.price(costs)
    return SearchResult(Image.fromarray(picture), record.winner, record, spent, not record.stopped)


def regenerate(pipeline: Any, record: SearchRecord, candidate: int) -> Image.Image:
    """Return the finished image of one candidate of an earlier run, denoised alone from its recorded seed.

    Alone it may differ from the batch it ran in by rounding; with NegToMe it differs more.
    """
    denoiser = Denoiser(pipeline, Settings.from_dict(record.settings))
    generator = torch.Generator().manual_seed(record.seeds[integer("candidate", candidate, 0, len(record.seeds) - 1)])
    moved = denoiser.run(denoiser.noise([generator]), denoiser.encode([record.prompt]), denoiser.settings.n_steps - 1)
    pixels = denoiser.final(moved)[0]
    levels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _facts(denoiser: Denoiser, decoder: Any) -> dict[str, Any]:
    from ttsnap_lib.provenance import versions

    names = ("ttsnap", "torch", "diffusers", "transformers")
    return {
        **pipeline_facts(denoiser),
        "decoder": None if decoder is None else type(decoder).__name__,
        "versions": {name: versions().get(name) for name in names},
    }


def _too_late(deadline_s: float | None) -> BudgetError:
    return BudgetError(
        f"deadline_s: got {deadline_s!r}, expected time for the first step of one batch. Give more time or a smaller "
        "batch_size."
    )  # fmt: skip
