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
from PIL import Image

from ._callable import make_callable
from ._inputs import selecting_rewards
from ._search_run import Plan, TimeUp, run_stages
from .checks import choice, integer, real, text
from .costs import CostModel
from .denoise import Denoiser, Settings, image_generator, image_seed
from .errors import BudgetError, ConfigError, CostError, ScheduleError
from .negtome import NegToMe
from .rewards import load_reward
from .schedule import Schedule
from .search_record import SearchRecord, SearchResult
from .simulate import METHODS

__all__ = ["SearchResult", "run_cost", "search"]


def search(
    pipeline: Any,
    prompt: str,
    reward: Any,
    schedule: Schedule | None = None,
    budget: float | None = None,
    candidates: int | None = None,
    cost: CostModel | str | None = None,
    seed: int = 0,
    method: str | None = None,
    *,
    settings: Settings | None = None,
    combine: str = "rank_sum",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    report: Sequence[str] | None = None,
    decoder: Any = None,
    batch_size: int = 16,
    deadline_s: float | None = None,
    prompt_index: int = 0,
    negtome: NegToMe | None = None,
    preview_px: int = 128,
    on_check: Callable[[SearchRecord], None] | None = None,
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
    settings : Settings, optional
        Steps, size, guidance; the pipeline's defaults when not given.
    combine, weights, report
        As in :func:`ttsnap_lib.simulate`.
    decoder : AutoencoderTiny, optional
        Decodes the estimates at checks; the final image always comes from the full VAE.
    batch_size : int
        Candidates at once; halved when memory runs out, without losing what is done.
    deadline_s : float, optional
        Stop after these seconds with the best so far; over by one denoising step of one batch, its decoding and
        scoring at most.
    prompt_index : int
        Index of the prompt in a prompt file, for the seeds.
    negtome : NegToMe, optional
        Off by default: it couples the candidates of a batch. When on, pruning must begin after its window.
    preview_px : int
        Longest side of the pictures kept for the gallery.
    on_check : callable, optional
        Called with the record after each stage, for a live display.

    Returns
    -------
    SearchResult
        On Ctrl-C or at the deadline with ``complete=False`` and the best so far.

    Raises
    ------
    BudgetError, ScheduleError, CostError, ConfigError
        Before any model runs.
    SearchError
        No candidate could be scored.
    """
    begin = time.perf_counter()
    schedule = Schedule() if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            "schedule", value=schedule, bound="a Schedule or None", remedy="Pass Schedule(steps, ratios)."
        )
    text("prompt", prompt)
    seed, batch_size = integer("seed", seed, 0), integer("batch_size", batch_size, 1)
    deadline = None if deadline_s is None else time.monotonic() + real("deadline_s", deadline_s, 0, open_low=True)
    costs = CostModel.load(cost) if isinstance(cost, str | Path) else cost
    rewards = [load_reward(one) for one in (reward if isinstance(reward, list | tuple) else [reward])]
    names = [one.name for one in rewards]
    selecting, weight_row = selecting_rewards(names, report, combine, weights)
    method = _method(method, schedule, [rewards[k] for k in selecting])
    schedule = Schedule() if method == "best_of_n" else schedule
    if isinstance(pipeline, str | Path):
        from .pipelines import load_pipeline

        pipeline = load_pipeline(pipeline)
    denoiser = Denoiser(pipeline, settings)
    schedule.check(denoiser.settings.n_steps)
    _check_negtome(negtome, schedule, denoiser)
    n = _candidates(budget, candidates, costs, schedule, denoiser.settings.n_steps)

    checks = [*schedule.steps, denoiser.settings.n_steps - 1]
    aware = method == "ttsnap"
    variants = [
        "noise_aware" if aware and any(step in one.adapter_steps for one in rewards) else "base"
        for step in schedule.steps
    ]
    record = SearchRecord(
        prompt=prompt, method=method, seed=seed, prompt_index=prompt_index,
        seeds=[image_seed(seed, prompt_index, image) for image in range(n)],
        rewards=names, schedule=schedule.to_dict(), settings=denoiser.settings.to_dict(), checks=checks,
        scores=np.full((n, len(checks), len(names)), np.nan, np.float32), pruned_at=[-1] * n, combine=combine,
        weights=None if weight_row is None else weight_row.tolist(), report=list(report or []),
    )  # fmt: skip
    plan = Plan(
        denoiser=denoiser, rewards=rewards, selecting=selecting, weights=weight_row, keep_ratios=schedule.keep_ratios,
        variants=[*variants, "base"], decoder=decoder, batch_size=batch_size, deadline=deadline, preview_px=preview_px,
        on_check=on_check,
    )  # fmt: skip
    before = [one.step for one in rewards]
    complete = True
    try:
        with contextlib.nullcontext() if negtome is None else negtome.install(pipeline):
            encoded = denoiser.encode([prompt])
            record.text_s = time.perf_counter() - begin
            noise = denoiser.noise([image_generator(seed, prompt_index, image) for image in range(n)])
            run_stages(plan, record, encoded, noise)
    except (TimeUp, KeyboardInterrupt):
        complete = False
        if not plan.pictures:  # nothing to show: not a search yet
            raise KeyboardInterrupt if deadline is None else _too_late(deadline_s) from None
    finally:
        for one, step in zip(rewards, before, strict=True):
            one.use_step(step)
    record.elapsed_s = time.perf_counter() - begin
    if not complete:
        record.winner = _best_so_far(record, selecting, weight_row)
    spent = float("nan") if costs is None else run_cost(record, costs)
    return SearchResult(Image.fromarray(plan.pictures[record.winner]), record.winner, record, spent, complete)


def run_cost(record: SearchRecord, cost: CostModel) -> float:
    """Return what a run cost by the cost model, from the forwards, decodes and scores that were done."""
    total = cost.per_prompt
    for stage in record.stages:
        decode = cost.preview_decode if stage.preview and cost.preview_decode is not None else cost.decode
        total += stage.forwards * cost.step + stage.decodes * decode + stage.scores * cost.verify
    return total


def _method(method: str | None, schedule: Schedule, selecting: Sequence[Any]) -> str:
    aware = any(one.adapter_steps for one in selecting)
    if method is None:
        return "best_of_n" if not len(schedule) else "ttsnap" if aware else "ttsp"
    choice("method", method, METHODS)
    if method == "ttsnap" and len(schedule) and not aware:
        raise ConfigError(
            "method ttsnap with a base reward", value=[one.name for one in selecting],
            bound="a reward with noise-aware weights",
            remedy="Load it with load_reward(..., adapters=<folder of ttsnap finetune>), or use method='ttsp'.",
        )  # fmt: skip
    return method


def _candidates(
    budget: float | None, candidates: int | None, cost: CostModel | None, schedule: Schedule, n_steps: int
) -> int:
    if (budget is None) == (candidates is None):
        raise BudgetError(
            "search", value={"budget": budget, "candidates": candidates}, bound="either budget or candidates",
            remedy="Give exactly one of them.",
        )  # fmt: skip
    if cost is not None and cost.n_steps != n_steps:
        raise CostError(
            "cost.n_steps", value=cost.n_steps, bound=f"{n_steps}, the steps of this run",
            remedy=f"Use a cost model with n_steps={n_steps}, or Settings(n_steps={cost.n_steps}).",
        )  # fmt: skip
    if candidates is not None:
        return integer("candidates", candidates, 1, error=BudgetError)
    if cost is None:
        raise CostError(
            "budget without a cost model", value=cost, bound="a CostModel",
            remedy="Measure one with `ttsnap cost`, name a preset, or give candidates instead.",
        )  # fmt: skip
    n = cost.candidates(budget, schedule)
    if n < 1:
        raise BudgetError(
            "budget", value=budget, bound=f"at least {cost.total(1, schedule):.6g} {cost.unit}, the cost of one candidate",
            remedy="Raise the budget or use fewer steps.",
        )  # fmt: skip
    return n


def _check_negtome(negtome: NegToMe | None, schedule: Schedule, denoiser: Denoiser) -> None:
    """Refuse to prune where NegToMe still couples the candidates of a batch."""
    if negtome is None or not len(schedule):
        return
    window = negtome.active_steps(denoiser.pipeline, denoiser.timesteps)
    if window and schedule.steps[0] < window[-1]:
        raise ScheduleError(
            "pruning inside the window of NegToMe",
            value=schedule.steps[0],
            bound=f"steps of at least {window[-1]}",
            remedy="Prune later, narrow the window, or search without NegToMe.",
        )


def _too_late(deadline_s: float | None) -> BudgetError:
    return BudgetError(
        "deadline_s", value=deadline_s, bound="time for the first check of one batch",
        remedy="Give more time, a smaller batch_size, or an earlier first pruning step.",
    )  # fmt: skip


def _best_so_far(record: SearchRecord, selecting: list[int], weights: np.ndarray | None) -> int:
    """Return the best candidate of the furthest check that anyone reached."""
    from .selection import choose

    scored = ~np.isnan(record.scores[:, :, selecting]).any(-1)
    furthest = int(np.flatnonzero(scored.any(0))[-1])
    rows = np.flatnonzero(scored[:, furthest])
    return int(rows[choose(record.scores[rows, furthest][:, selecting], 1, record.combine, weights)[0]])


make_callable(__name__, search)
