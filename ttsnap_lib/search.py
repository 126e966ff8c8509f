"""The online run: one prompt, one budget, live pruning, one best image.

Candidates start from noise in batches, run to the first pruning step, are decoded and scored there, the best go on in
full batches, and the end is chosen on the clean image (paper, section 3). With the same seeds and scores the winner is
the one that :func:`ttsnap_lib.prune` returns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ._callable import make_callable
from ._inputs import selecting_rewards
from ._search_checks import candidates_for, check_negtome, check_schedule, method_for, variants_for
from ._search_run import Plan, TimeUp, best_so_far, run_stages
from ._settings import as_settings
from .checks import choice, integer, real, text
from .costs import CostModel
from .denoise import Denoiser, Settings, image_generator, image_seed
from .errors import BudgetError, ConfigError
from .measure import pipeline_facts
from .negtome import NegToMe
from .rewards import load_reward
from .schedule import Schedule
from .search_models import load_decoder
from .search_record import SearchRecord, SearchResult
from .simulate import METHODS

__all__ = ["SearchResult", "regenerate", "search"]

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
            "batch_size with NegToMe", value=batch_size, bound=f"a multiple of its group_size, {group}",
            remedy="Set one, or leave batch_size out.",
        )  # fmt: skip
    rewards = [load_reward(one) for one in (reward if isinstance(reward, list | tuple) else [reward])]
    names = [one.name for one in rewards]
    if not names or len(set(names)) != len(names):
        raise ConfigError(
            "reward", value=names, bound="rewards of distinct names", remedy="Rename one with load_reward(name=...)."
        )
    report = [report] if isinstance(report, str) else list(report or ())
    selecting, weight_row = selecting_rewards(names, report, combine, weights)
    method = method_for(method, schedule, [rewards[k] for k in selecting])
    if isinstance(pipeline, str | Path):
        from .pipelines import load_pipeline

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
    from .provenance import versions

    names = ("ttsnap", "torch", "diffusers", "transformers")
    return {
        **pipeline_facts(denoiser),
        "decoder": None if decoder is None else type(decoder).__name__,
        "versions": {name: versions().get(name) for name in names},
    }


def _too_late(deadline_s: float | None) -> BudgetError:
    return BudgetError(
        "deadline_s", value=deadline_s, bound="time for the first step of one batch",
        remedy="Give more time or a smaller batch_size.",
    )  # fmt: skip


make_callable(__name__, search)
