"""The live search: one prompt, one budget, live pruning, one best image.

Candidates start from noise in batches, run to the first pruning step, are decoded and scored there, the best go on in
full batches, and the end is chosen on the clean image (paper, section 3). With the same seeds and scores the winner is
the one that :func:`ttsnap_lib.prune` returns. Several prompts may share the batches; each is pruned by itself.
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
from ttsnap_lib.costs import AUTO, CostModel, priced
from ttsnap_lib.diffusion.denoise import (
    Candidates,
    Conditioning,
    Denoiser,
    Settings,
    as_settings,
    image_generator,
    image_seed,
    resolve,
)
from ttsnap_lib.diffusion.pipelines import load_decoder, load_pipeline, pipeline_facts, pipeline_source, tell_outside
from ttsnap_lib.diffusion.schedulers import spaced_for_drafts
from ttsnap_lib.errors import BudgetError, ConfigError, DeviceError, ScheduleError, SearchError
from ttsnap_lib.live.plan import as_draft, planned
from ttsnap_lib.live.record import DRAFTED, SearchRecord, SearchResult, StageRecord
from ttsnap_lib.provenance import versions
from ttsnap_lib.rewards.base import require_metadata
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.schedule import Schedule, kept, selecting_rewards
from ttsnap_lib.sets import check_set, choose_set, pairwise_distances
from ttsnap_lib.tensors.spread import tell_spreads

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
    keep: int = 1,
    diversity: float = 0.0,
    settings: Settings | Mapping[str, Any] | None = None,
    combine: str = "rank_sum",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    report: Sequence[str] | None = None,
    decoder: Any = None,
    draft: int | None = None,
    finish: int | None = None,
    batch_size: int | None = None,
    deadline_s: float | None = None,
    prompt_index: int = 0,
    negtome: NegToMe | None = None,
    prompt_embeds: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
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
        What :func:`ttsnap_lib.load_reward` takes. Several, and several numbers of one, select jointly, except those in
        `report`.
    schedule : Schedule, optional
        None or empty: no pruning.
    budget : float, optional
        Compute for this prompt in the unit of `cost`; gives the number of candidates. Either this or `candidates`.
    candidates : int, optional
        How many seeds to start.
    cost : CostModel, preset name or file, or ``"auto"``, optional
        Needed with `budget`; with `candidates` it only prices the run. ``"auto"`` is the preset of the pipeline's model, the
        picture size and the first reward that selects.
    seed : int
        Base seed; candidate i has the seed of image i in a trajectory folder of the same base seed.
    method : {"best_of_n", "ttsp", "ttsnap"}, optional
        None: ``best_of_n`` without a schedule, ``ttsnap`` with a reward that has noise-aware weights, else ``ttsp``.
        ``best_of_n`` does not read the schedule.
    keep : int
        How many images to return, the best ones: ``result.images``. The schedule has to leave as many.
    diversity : float
        What difference between the images weighs against their reward, at the end and at every check; 0 takes the best
        rewards. The mean distance of two candidates then counts as much as `diversity` standard deviations of the reward;
        0.25 to 1 is a range to try. The first selecting reward with an image tower tells images apart. See
        :func:`ttsnap_lib.sets.choose_set`.
    settings : Settings or mapping, optional
        Steps, size, guidance; the pipeline's defaults when not given.
    combine, weights, report
        As in :func:`ttsnap_lib.simulate`.
    decoder : AutoencoderTiny, folder, hub id or ``"pocket-tiny"``, optional
        Decodes the estimates at checks; the final image always comes from the full VAE.
    draft : int, optional
        Denoise every candidate in that many steps first, and only the `finish` best ones in full, from the same seeds. In
        place of a schedule; the budget pays for both. Where it pays: docs/drafts.md.
    finish : int, optional
        With `draft`, how many run in full.
    batch_size : int, optional
        Candidates at once; by default the batch size of `cost` where that has seconds by batch size, else 16 on a CPU and
        64 elsewhere. Halved when memory runs out, without losing what is done; decoding and scoring have a size of
        their own, halved apart.
    deadline_s : float, optional
        Stop after these seconds with the best so far, over by one denoising step of one batch, or its decoding and
        scoring, at most.
    prompt_index : int
        Index of the prompt in a prompt file, for the seeds.
    negtome : NegToMe, optional
        Off by default: it couples the candidates of a batch. When on, pruning must begin after its window.
    prompt_embeds : mapping of str to tensor, optional
        The prompt as embeddings of one row, for a pipeline without text encoders; as in :func:`ttsnap_lib.generate`.
        `prompt` is what rewards see.
    metadata : mapping, optional
        What is known about the prompt beside its words, for rewards that read it.
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
    text("prompt", prompt)
    prompt_index = integer("prompt_index", prompt_index, 0)
    searcher = Searcher(
        pipeline, reward, schedule, budget, candidates, cost, seed, method,
        keep=keep, diversity=diversity, settings=settings, combine=combine, weights=weights, report=report, decoder=decoder,
        draft=draft, finish=finish, batch_size=batch_size, deadline_s=deadline_s, negtome=negtome, on_check=on_check,
        progress=progress,
    )  # fmt: skip
    tell_outside(searcher.denoiser.pipeline, [prompt])
    more = dict(metadata or {})
    require_metadata(searcher.rewards, [more])
    found: dict[int, SearchResult | SearchError] = {}
    given = None if prompt_embeds is None else searcher.denoiser.given(prompt_embeds, 1)
    searcher.run({prompt_index: prompt}, found.__setitem__, begin, given, {prompt_index: more})
    result = found[prompt_index]
    if isinstance(result, SearchError):
        raise result
    return result


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


def _own_cost(pipeline: Any, reward: Any, report: Any, settings: Any, decoder: Any) -> CostModel:
    """Return the cost preset of what is searched with, as far as that is known before anything is loaded."""
    given, model = as_settings(settings), str(pipeline)
    if not isinstance(pipeline, str | Path):
        given, model = resolve(given, pipeline), pipeline_source(pipeline)["model"]
    rewards, report = (one if isinstance(one, list | tuple) else [one] for one in (reward, report))
    names = [getattr(one, "name", None) or str(one) for one in rewards]
    selecting = next((name for name in names if name not in report), "")
    size = given.height if given.height == given.width else None
    return priced(AUTO, given.n_steps, model, selecting, size, tiny=decoder is not None)[1]


class _TimeUp(Exception):
    """The deadline has passed; raised between two denoising steps."""


class Searcher:
    """Everything a search needs but its prompts; :meth:`run` searches some prompts in shared batches.

    The arguments are those of :func:`search`, and `together`, the number of prompts that a batch may be shared by: by it
    a budget is turned into candidates.
    """

    def __init__(
        self,
        pipeline: Any,
        reward: Any,
        schedule: Schedule | None = None,
        budget: float | None = None,
        candidates: int | None = None,
        cost: CostModel | str | Path | None = None,
        seed: int = 0,
        method: str | None = None,
        *,
        keep: int = 1,
        diversity: float = 0.0,
        settings: Settings | Mapping[str, Any] | None = None,
        combine: str = "rank_sum",
        weights: Mapping[str, float] | Sequence[float] | None = None,
        report: Sequence[str] | None = None,
        decoder: Any = None,
        draft: int | None = None,
        finish: int | None = None,
        batch_size: int | None = None,
        deadline_s: float | None = None,
        negtome: NegToMe | None = None,
        on_check: Callable[[SearchRecord], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        together: int = 1,
    ) -> None:
        self.deadline_s = None if deadline_s is None else real("deadline_s", deadline_s, 0, open_low=True)
        self.seed = integer("seed", seed, 0)
        self.group = group = 1 if negtome is None else negtome.group_size  # NegToMe couples that many candidates
        settings = as_settings(settings)
        drafting = as_draft(draft, finish)
        cost = _own_cost(pipeline, reward, report or (), settings, decoder) if cost == AUTO else cost
        self.schedule, self.cost, self.n = planned(
            schedule, budget, candidates, cost, method, settings.n_steps, group, batch_size, together, drafting
        )  # fmt: skip
        left = self.n if drafting is None else drafting.finish
        self.keep, self.diversity = check_set(keep, diversity, left, self.schedule)
        self.rewards = [load_reward(one) for one in (reward if isinstance(reward, list | tuple) else [reward])]
        self.names = [name for one in self.rewards for name in one.names]
        if not self.names or len(set(self.names)) != len(self.names):
            raise ConfigError(
                f"reward: got {self.names}, expected rewards of distinct names. Use load_reward(name=...)."
            )
        # The name of a reward of several numbers stands for all of them.
        known = {one.name: one.names for one in self.rewards}
        given = [report] if isinstance(report, str) else list(report or ())
        self.report = [name for one in given for name in known.get(one, (one,))]
        self.combine = combine
        self.selecting, self.weights = selecting_rewards(self.names, self.report, combine, weights)
        self.columns = [one for one in self.rewards for _ in one.names]  # the reward that each name is of
        self.method = _method_for(method, self.schedule, [self.columns[k] for k in self.selecting])
        seeing = [self.columns[k] for k in self.selecting if self.columns[k].embeds]
        self.eye = seeing[0] if self.keep > 1 and seeing else None  # the reward that tells images apart
        if self.diversity and self.eye is None:
            raise ConfigError(
                f"diversity: got {self.diversity:g} with {[self.names[k] for k in self.selecting]}, expected a reward with an "
                "image tower to tell images apart. Add a CLIP reward or image_reward, or leave diversity out."
            )
        self.denoiser = Denoiser(load_pipeline(pipeline) if isinstance(pipeline, str | Path) else pipeline, settings)
        self.decoder = load_decoder(decoder, self.denoiser.pipeline)
        self.negtome = negtome
        if negtome is not None:
            window = negtome.active_steps(self.denoiser.pipeline, self.denoiser.timesteps)
            if window and len(self.schedule) and self.schedule.steps[0] < window[-1]:
                raise ScheduleError(
                    f"pruning inside the window of NegToMe: got step {self.schedule.steps[0]}, expected at least "
                    f"{window[-1]}. Prune later, narrow the window, or search without NegToMe."
                )
        if batch_size is None:
            measured = None if self.cost is None else self.cost.batch_size
            batch_size = measured or _BATCH.get(self.denoiser.device.type, _BATCH_ON_ACCELERATOR)
            batch_size = max(group, batch_size // group * group)
        self.batch_size = batch_size  # halved when memory runs out
        self.check_size = batch_size  # images decoded and scored at once; halved apart
        self.checks = [*self.schedule.steps, self.denoiser.settings.n_steps - 1]
        self.on_check, self.progress = on_check, progress
        self.drafter: Searcher | None = None
        self.finish = 0 if drafting is None else drafting.finish
        if drafting is not None:  # a search of its own, whose best candidates go on from their noise
            self.method, drawn = "draft", self.denoiser.pipeline
            with spaced_for_drafts(drawn):
                self.drafter = Searcher(
                    drawn, self.rewards, candidates=self.n, seed=seed,
                    settings=replace(settings, n_steps=drafting.steps), combine=combine, weights=weights, report=report,
                    batch_size=self.batch_size, deadline_s=deadline_s, on_check=on_check, progress=self._draft_progress,
                )  # fmt: skip

    def run(
        self,
        prompts: Mapping[int, str],
        take: Callable[[int, SearchResult | SearchError], None],
        begin: float | None = None,
        given: Conditioning | None = None,
        metadata: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> str:
        """Search `prompts`, by their index in a prompt file, together; ``take(index, result)`` gets each when it is there.

        Returns "deadline" or "interrupt" when cut short, else "". `begin` is the ``perf_counter`` that time counts from,
        `given` the prompts as embeddings, a row each in their order, when they need not be encoded, `metadata` what is
        known about each prompt beside its words.
        A prompt without a single score gives a SearchError to `take`, and costs the others nothing.

        Raises
        ------
        BudgetError, KeyboardInterrupt
            The deadline, or Ctrl-C, came before the first step.
        """
        begin = time.perf_counter() if begin is None else begin
        self.deadline = None if self.deadline_s is None else begin + self.deadline_s * len(prompts)
        self.take, self.lap_from, self.told_s, self.done = take, begin, 0.0, 0
        more = metadata or {}
        self.work = [
            _Prompt(self._record(index, prompts), self.selecting, np.arange(self.n), dict(more.get(index, {})))
            for index in prompts
        ]
        if self.drafter is not None and (stopped := self._draft(self.drafter, prompts, begin, given, more)):
            return stopped
        if given is not None:
            from ttsnap_lib.trajectories.identity import embeds_digests  # a search by words needs no folders

            for work, told in zip(self.work, embeds_digests(given), strict=True):
                work.record.facts["prompt_embeds"] = told
        steps = np.diff([-1, *self.checks])
        # of candidates, in all
        self.forwards = sum(int(np.dot(self.schedule.survivors(len(one.alive)), steps)) for one in self.work)
        self.forwards += self.done  # of drafts
        self.estimate: tuple[np.ndarray, torch.Tensor] | None = None  # what the batch at work looks like, and its rows
        with contextlib.ExitStack() as held:
            for one in self.rewards:
                held.enter_context(one.at(None))
            if self.negtome is not None:
                held.enter_context(self.negtome.install(self.denoiser.pipeline))
            try:
                self._run_stages(list(prompts.values()), given)
            except (_TimeUp, KeyboardInterrupt) as stop:
                return self._cut_short(stop)
        return ""

    def _draft(self, drafter: Searcher, prompts: Mapping[int, str], *how: Any) -> str:
        """Draft every prompt and leave the best of each to run in full; return what cut it short, as :meth:`run` does."""
        drafts: dict[int, SearchResult | SearchError] = {}
        stopped = drafter.run(prompts, drafts.__setitem__, *how)
        for one in self.work:
            draft = drafts.get(one.record.prompt_index)
            if not isinstance(draft, SearchResult):
                one.end()
                if draft is not None:  # else Ctrl-C came before there was one
                    self.take(one.record.prompt_index, draft)
                continue
            one.begin_from(draft, self.finish)
            if stopped:  # the best draft is the best so far
                one.record.stopped, one.record.winner = stopped, draft.winner
                self._finish(one, [np.asarray(draft.image)])
        self.done, self.lap_from = drafter.forwards, time.perf_counter()
        return stopped

    def _draft_progress(self, done: int, total: int) -> None:
        if self.progress is not None:
            rest = len(self.work) * self.finish * self.denoiser.settings.n_steps
            self.progress(done, total + rest)

    def _record(self, index: int, prompts: Mapping[int, str]) -> SearchRecord:
        facts = {
            **pipeline_facts(self.denoiser),
            "decoder": None if self.decoder is None else type(self.decoder).__name__,
            "versions": {name: versions().get(name) for name in ("ttsnap", "torch", "diffusers", "transformers")},
        }
        return SearchRecord(
            prompt=prompts[index], method=self.method, seed=self.seed, prompt_index=index,
            seeds=[image_seed(self.seed, index, image) for image in range(self.n)], rewards=self.names,
            schedule=self.schedule.to_dict(), settings=self.denoiser.settings.to_dict(), checks=self.checks,
            scores=np.full((self.n, len(self.checks), len(self.names)), np.nan, np.float32), pruned_at=[-1] * self.n,
            combine=self.combine, weights=None if self.weights is None else self.weights.tolist(), report=self.report,
            cost_model=None if self.cost is None else self.cost.to_dict(), facts=facts,
            keep=self.keep, diversity=self.diversity,
            together=list(prompts) if len(prompts) > 1 else [],
        )  # fmt: skip

    def _run_stages(self, prompts: list[str], given: Conditioning | None) -> None:
        """Run all stages. `rows` (n, 2) says which prompt, by its place, and which candidate of it each latent is."""
        if self.drafter is None:
            text = self.denoiser.encode(prompts) if given is None else self.denoiser.placed(given)
        else:
            text = self.drafter.text
        self.text: Conditioning = text
        seconds = self._lap()
        for one in self.work:
            one.record.text_s = seconds / len(self.work)
        rows = np.array([(place, candidate) for place, one in enumerate(self.work) for candidate in one.alive])
        candidates: Candidates | None = None
        for k in range(len(self.checks)):
            candidates, rows = self._stage(k, text, candidates, rows)
        self._tell(self.progress, self.forwards, self.forwards)

    def _stage(
        self, k: int, text: Conditioning, candidates: Candidates | None, rows: np.ndarray
    ) -> tuple[Candidates | None, np.ndarray]:
        """Run the candidates `rows` to check `k`, prune them prompt by prompt, and return those that go on.

        `text` has one row per prompt. `candidates` is None at the start: noise is drawn for each batch.
        """
        last, is_final = self.checks[k], k == len(self.checks) - 1
        aware = self.method == "ttsnap" and not is_final and any(last in one.adapter_steps for one in self.rewards)
        variant, first = "noise_aware" if aware else "base", self.checks[k - 1] + 1 if k else 0
        small = not is_final and self.decoder is not None
        for one in self.work:
            if len(one.alive):
                one.record.stages.append(StageRecord(first, last, len(one.alive), variant, preview=small))
        parts: list[Candidates] = []
        start = 0
        while start < len(rows):
            self._check_time()
            batch = rows[start : start + self.batch_size]
            try:
                moved = self._batch(k, text, candidates, start, batch)
            finally:
                self._note(batch, elapsed_s=self._lap())
            if moved is None:  # memory ran out; smaller batches from here on
                continue
            waiting = moved.latents.nbytes * len(rows) / len(batch) > _ON_DEVICE_BYTES
            parts.append(moved.to("cpu") if waiting else moved)
            start += len(batch)
            for place in np.setdiff1d(batch[:, 0], rows[start:, 0]):  # all of its candidates have their score
                self._prune(k, self.work[place])
        if k == 0 and self.drafter is None:  # of drafts it was told when all had a score
            scores = np.stack([one.record.scores[:, 0] for one in self.work])
            tell_spreads(scores, self.names, self.selecting, self.weights)
        going = {(place, int(candidate)) for place, one in enumerate(self.work) for candidate in one.alive}
        stay = [index for index, row in enumerate(rows.tolist()) if tuple(row) in going]
        return Candidates.cat(parts).take(stay) if stay else None, rows[stay]

    def _batch(
        self, k: int, text: Conditioning, candidates: Candidates | None, start: int, batch: np.ndarray
    ) -> Candidates | None:
        """Denoise, decode and score one batch; None, and a smaller batch size, when memory runs out."""
        try:
            if candidates is None:
                entering = self.denoiser.noise([self._generator(place, candidate) for place, candidate in batch])
            else:
                entering = candidates.take(range(start, start + len(batch))).to(self.denoiser.device)
            moved, x0 = self._denoise(self.checks[k], text.take(batch[:, 0].tolist()), entering, batch)
        except DeviceError as error:
            self.batch_size = _halved(len(batch), self.group, "denoising", error)
            moved = None
        if moved is None:  # outside the except block, whose traceback keeps the tensors alive
            _free(self.denoiser.device)
        else:
            self._check(k, moved, x0, batch)
        return moved

    def _generator(self, place: int, candidate: int) -> torch.Generator:
        return image_generator(self.seed, self.work[place].record.prompt_index, int(candidate))

    def _denoise(
        self, last: int, text: Conditioning, candidates: Candidates, rows: np.ndarray
    ) -> tuple[Candidates, torch.Tensor]:
        """Run to step `last`; return the candidates and their x0 estimates there."""
        latest: list[torch.Tensor] = []
        before = self.done

        def on_x0(step: int, x0: torch.Tensor) -> None:
            latest[:] = [x0]
            self.estimate = (rows, x0)
            self.done += len(rows)
            self._note(rows, "denoised")
            self._tell(self.progress, min(self.done, self.forwards - 1), self.forwards)
            self._check_time()

        begin = self._now()
        steps = range(candidates.step + 1, last + 1)
        try:
            moved = self.denoiser.run(candidates, text, last, record=steps, on_x0=on_x0)
        except DeviceError:
            self.done = before
            raise
        finally:
            self.denoiser.wait()
            self._note(rows, denoise_s=self._now() - begin)
        return moved, latest[0]

    def _check(self, k: int, moved: Candidates, x0: torch.Tensor, rows: np.ndarray) -> None:
        """Decode and score a batch, in smaller parts when memory runs out: what is denoised stays."""
        is_final = k == len(self.checks) - 1
        start = 0
        while start < len(rows):
            part = list(range(start, min(start + self.check_size, len(rows))))
            begin = self._now()
            pixels: Any = None
            table = None
            try:
                if is_final:
                    pixels = self.denoiser.final(moved.take(part))
                else:
                    pixels = self.denoiser.decode(x0[part[0] : part[-1] + 1], self.decoder)
                self.denoiser.wait()
                middle = self._now()
                table = self._scores(k, rows[part], pixels)
            except DeviceError as error:
                self.check_size = _halved(len(part), 1, "decoding and scoring", error)
            if table is None:  # outside the except block, whose traceback keeps the tensors alive
                pixels = None
                _free(self.denoiser.device)
                continue
            self._note(rows[part], "checked", decode_s=middle - begin, score_s=self._now() - middle)
            for (place, candidate), picture, scores in zip(rows[part].tolist(), pixels, table, strict=True):
                one = self.work[place]
                # Pictures come first: a score without its picture could not be shown after an interruption.
                one.pictures[candidate, k] = _picture(picture)
                one.record.previews[candidate, self.checks[k]] = _thumbnail(picture)
                one.record.scores[candidate, k] = scores
            start += len(part)

    def _scores(self, k: int, rows: np.ndarray, pixels: torch.Tensor) -> np.ndarray:
        """Return (n, reward) scores with the weights of the step; NaN where a reward failed for an image."""
        step, works = self.checks[k], [self.work[place] for place in rows[:, 0]]
        told = [one.record.prompt for one in works], [one.metadata for one in works]
        table = np.full((len(pixels), len(self.names)), np.nan, np.float32)
        reasons: list[str] = []
        for reward in self.rewards:
            own = [r for r, one in enumerate(self.columns) if one is reward]
            aware = works[0].record.stages[-1].variant == "noise_aware" and step in reward.adapter_steps
            reward.use_step(step if aware else None)
            seen: list[Any] | None = [] if reward is self.eye else None
            scores = _score_each(reward, *told, pixels, reasons, seen)
            for one, candidate, embedding in zip(works, rows[:, 1].tolist(), seen or (), strict=seen is not None):
                one.record.embeddings[candidate, k] = embedding
            table[:, own] = np.where(np.isfinite(scores), scores, np.nan)
            gone = np.isnan(table[:, own])
            for place in np.unique(rows[gone.any(1), 0]):
                here = gone & (rows[:, :1] == place)
                lost = rows[here.any(1), 1].tolist()
                of = f" of prompt {self.work[place].record.prompt_index}" if len(self.work) > 1 else ""
                drops = any(r in self.selecting for r, missing in zip(own, here.any(0), strict=True) if missing)
                fate = "drop out" if drops else "have no score of it"
                why = reasons[-1] if reasons else "a score that is not finite"
                warnings.warn(
                    f"{reward.name} failed at step {step} for the candidates {lost}{of}, which {fate}: {why}",
                    stacklevel=2,
                )
        return table

    def _prune(self, k: int, one: _Prompt) -> None:
        """Choose who of a prompt goes on after check `k`; at the last one, hand over its result."""
        is_final = k == len(self.checks) - 1
        try:
            one.choose(k, None if is_final else self.schedule.keep_ratios[k])
        except SearchError as error:  # one prompt must not cost the others
            one.end()
            self.take(one.record.prompt_index, error)
            return
        self._tell(self.on_check, one.record)
        if is_final:
            self._finish(one, [one.pictures[candidate, k] for candidate in one.record.set])

    def _finish(self, one: _Prompt, pictures: Sequence[np.ndarray]) -> None:
        record = one.record
        one.end()
        record.facts |= pipeline_facts(self.denoiser)  # compiling may have failed meanwhile
        record.elapsed_s = record.text_s + sum(stage.elapsed_s for stage in record.stages)
        record.elapsed_s += 0.0 if record.draft is None else record.draft.elapsed_s
        spent = float("nan") if self.cost is None else record.price(self.cost)
        images = tuple(Image.fromarray(picture) for picture in pictures)
        result = SearchResult(images[0], record.winner, record, spent, not record.stopped, images)
        self.take(record.prompt_index, result)

    def _cut_short(self, stop: BaseException) -> str:
        """Hand over the best so far of every prompt that is still at work; raise when there is nothing at all yet."""
        late = isinstance(stop, _TimeUp)
        unfinished = [one for one in self.work if len(one.alive)]
        shown = [self._best_so_far(place) for place, one in enumerate(self.work) if len(one.alive)]
        if len(unfinished) == len(self.work) and not any(shown):
            if late:
                raise BudgetError(
                    f"deadline_s: got {self.deadline_s}, expected time for one step of one batch. Raise it or lower "
                    "batch_size."
                ) from None
            raise stop
        for one, pictures in zip(unfinished, shown, strict=True):
            one.record.stopped = "deadline" if late else "interrupt"
            if pictures:
                self._finish(one, pictures)
            elif late:
                self.take(one.record.prompt_index, SearchError("the deadline came before its first step."))
        return "deadline" if late else "interrupt"

    def _best_so_far(self, place: int) -> list[np.ndarray]:
        """Return the pictures of a prompt's best at the furthest check that anyone reached, and note which they are.

        Before the first score it is the present estimate of the first candidate; none before the first step.
        """
        one = self.work[place]
        for k in reversed(range(len(self.checks))):
            ready = one.scored(k) & [(candidate, k) in one.pictures for candidate in range(self.n)]
            if ready.any():
                return [one.pictures[candidate, k] for candidate in one.settle(k, np.flatnonzero(ready))]
        if one.draft is not None:
            one.record.winner = one.draft.winner
            return [np.asarray(one.draft.image)]
        rows, x0 = self.estimate or (np.empty((0, 2), int), torch.empty(0))
        mine = np.flatnonzero(rows[:, 0] == place)
        if not len(mine):
            return []
        one.record.winner = int(rows[mine[0], 1])
        warnings.warn("cut short before the first check: no reward has seen the image, an estimate", stacklevel=3)
        return [_picture(self.denoiser.decode(x0[mine[:1]], self.decoder)[0])]

    # Time

    def _now(self) -> float:
        """Return the clock without the time of displays, which is no part of the search's own."""
        return time.perf_counter() - self.told_s

    def _lap(self) -> float:
        """Return the seconds since this was last called."""
        before, self.lap_from = self.lap_from, self._now()
        return self.lap_from - before

    def _note(self, rows: np.ndarray, count: str = "", **seconds: float) -> None:
        """Note on the stages of the prompts of `rows`, a batch, what was done, and their share of the seconds."""
        for place, n in zip(*(each.tolist() for each in np.unique(rows[:, 0], return_counts=True)), strict=True):
            stage = self.work[place].record.stages[-1]
            if count:
                getattr(stage, count)(n, len(rows))
            for name, value in seconds.items():
                setattr(stage, name, getattr(stage, name) + value * (n / len(rows)))

    def _tell(self, listener: Callable[..., None] | None, *news: Any) -> None:
        if listener is None:
            return
        begin = time.perf_counter()
        try:
            listener(*news)
        finally:
            self.told_s += time.perf_counter() - begin

    def _check_time(self) -> None:
        if self.deadline is not None and time.perf_counter() > self.deadline:
            raise _TimeUp


@dataclass
class _Prompt:
    """One prompt at work: the record that it fills, who is left of it, and what can be shown.

    ``pictures`` keeps full-size pictures (uint8, H x W x 3) by (candidate, check): those of the check at work, and of
    earlier checks the best ones.
    """

    record: SearchRecord
    selecting: list[int]
    alive: np.ndarray  # ascending; empty when it is over
    metadata: dict[str, Any] = field(default_factory=dict)
    pictures: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    draft: SearchResult | None = None  # what is shown until there is a picture of a full run

    def begin_from(self, draft: SearchResult, finish: int) -> None:
        """Leave the candidates with the `finish` best drafts."""
        self.draft = draft
        self.record.draft = record = draft.record
        drafted = _Prompt(record, self.selecting, self.alive)
        scored = np.flatnonzero(drafted.scored(0))
        self.alive = np.sort(drafted.best(0, scored, min(finish, len(scored))))
        self.record.pruned_at = list(record.pruned_at)  # those whose scoring failed
        for dropped in np.setdiff1d(scored, self.alive).tolist():
            record.pruned_at[dropped], self.record.pruned_at[dropped] = record.checks[0], DRAFTED

    def choose(self, k: int, keep_ratio: float | None) -> None:
        """Prune at check `k`, whose scores are all there; keep the winner, or the set, at the last one (None)."""
        record, last = self.record, self.record.checks[k]
        scored = self.alive[self.scored(k)[self.alive]]
        for lost in np.setdiff1d(self.alive, scored):
            record.pruned_at[int(lost)] = -2
        if not len(scored):
            raise SearchError(
                f"no candidate could be scored at step {last} by {record.rewards}. The warnings before this say why."
            )
        if keep_ratio is None:
            self.alive = scored
        else:  # a candidate without a score leaves its place to the others
            keep = min(max(kept(len(self.alive), keep_ratio), record.keep), len(scored))
            self.alive = np.sort(self.best(k, scored, keep))
            for dropped in np.setdiff1d(scored, self.alive):
                record.pruned_at[int(dropped)] = last
        self.pictures = {(candidate, k): self.pictures[candidate, k] for candidate in self.settle(k, self.alive)}

    def end(self) -> None:
        """Leave the batches."""
        self.alive = self.alive[:0]

    def scored(self, k: int) -> np.ndarray:
        """Return which candidates (n,) have the scores of check `k` that select."""
        return ~np.isnan(self.record.scores[:, k][:, self.selecting]).any(1)

    def best(self, k: int, rows: np.ndarray, keep: int) -> np.ndarray:
        """Return the `keep` best of the candidates `rows` at check `k`, as a set where that was asked for; the best first."""
        record = self.record
        weights = None if record.weights is None else np.array(record.weights)
        scores, distances = record.scores[rows, k][:, self.selecting], None
        if record.diversity:
            distances = self.distances(k, rows)
        return rows[choose_set(scores, keep, record.diversity, distances, record.combine, weights)]

    def settle(self, k: int, rows: np.ndarray) -> list[int]:
        """Note, and return, the winner among `rows` at check `k`, or the set with its distances, the winner first."""
        record = self.record
        chosen = self.best(k, rows, min(record.keep, len(rows)))
        record.winner = int(chosen[0])
        if record.keep > 1:
            record.chosen = chosen.tolist()
            record.distances = self.distances(k, chosen).tolist() if record.embeddings else []
        return record.set

    def distances(self, k: int, rows: np.ndarray) -> np.ndarray:
        """Return the distances (n, n) between candidates at check `k`."""
        return pairwise_distances(np.stack([self.record.embeddings[row, k] for row in rows.tolist()]))


def _score_each(
    reward: Any,
    prompts: list[str],
    metadata: list[dict[str, Any]],
    pixels: torch.Tensor,
    reasons: list[str],
    seen: list[Any] | None = None,
) -> np.ndarray:
    """Return the scores (n, one for each of its names); NaN for the images at which the reward raises.

    `seen` gets the embeddings of the images, None for those.
    """
    try:
        with contextlib.nullcontext([]) if seen is None else reward.embeddings() as found:
            scores = reward.score(prompts, pixels, metadata=metadata, check=False)
        reasons.extend(reward.failures.values())
        if seen is not None:
            seen.extend(torch.cat(found).half().cpu().numpy())  # as they are recorded
        return scores.reshape(len(pixels), -1)
    except DeviceError:
        raise
    except Exception as error:  # noqa: BLE001 - a reward may be anyone's function
        reasons.append(f"{type(error).__name__}: {error}")
        if len(pixels) == 1:
            if seen is not None:
                seen.append(None)
            return np.full((1, len(reward.names)), np.nan, np.float32)
    # One bad image must not cost the others their scores.
    each = zip(prompts, metadata, pixels, strict=True)
    return np.concatenate([_score_each(reward, [text], [more], one[None], reasons, seen) for text, more, one in each])


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
