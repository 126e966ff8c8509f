"""What searches take against what their cost model says: six schedules, three sizes, pocket models, one thread.

One prompt at a time, and eight prompts that share batches (each told for one prompt).

Costs and searches are measured in turns, in processor time, so that other work on the machine disturbs all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from unittest.mock import patch

import numpy as np
import torch

from tests.benchmarks.rows import Row
from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel, Schedule, load_pipeline, load_reward, measure_costs, search
from ttsnap_lib.live.run import Searcher
from ttsnap_lib.pocket.world import pocket_prompts

SCHEDULES = (
    Schedule(),
    PUBLISHED_SCHEDULE,
    Schedule((4, 8), (0.35, 0.5)),
    Schedule((3,), (0.25,)),
    Schedule((8,), (0.1,)),
    Schedule((2, 5, 9, 14), (0.6, 0.6, 0.6, 0.6)),
)
SIZES = (6, 20, 48)
ROUNDS = {1: 3, 8: 1}  # by prompts together: eight are their own repeats


def run(models: Sequence[str] = ("pocket-flux", "pocket-sdxl"), together: Sequence[int] = (1, 8)) -> list[Row]:
    """Return predicted and measured seconds, and how far they are apart."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with patch.object(time, "perf_counter", time.process_time):
            return [row for model in models for number in together for row in _rows(model, number)]
    finally:
        torch.set_num_threads(before)


def _rows(model: str, together: int) -> list[Row]:
    pipeline, reward = load_pipeline(model, device="cpu"), load_reward("pocket-clip", device="cpu")
    rounds = ROUNDS[together]
    wanted = 1 + rounds * len(SCHEDULES) * len(SIZES) * together
    prompts = iter(pocket_prompts("train", wanted))  # each new: a prompt's text is kept
    measured, took = [], {}
    search(pipeline, next(prompts), reward, candidates=16)
    for _ in range(rounds):
        measured.append(measure_costs(pipeline, reward).seconds)
        for schedule in SCHEDULES:
            for n in SIZES:
                group = dict(enumerate(islice(prompts, together)))
                options = {"candidates": n, "cost": measured[-1], "together": together}
                searcher = Searcher(pipeline, reward, schedule, **options)
                begin = time.perf_counter()
                searcher.run(group, lambda *_: None)
                took.setdefault((schedule, n), []).append((time.perf_counter() - begin) / together)
    cost = replace(_median(measured), prompts_together=together)
    # Until costs went by batch: each part as in the largest one.
    full = {part: cost.each(part, cost.batch_size) for part in ("step", "decode", "verify")}
    flat = replace(cost, **full)
    label = f"{model}, {together} together" if together > 1 else model
    rows, errors, flat_errors = [], [], []
    for (schedule, n), seconds in took.items():
        live, told = statistics.median(seconds), cost.total(n, schedule)
        errors.append(100 * abs(told / live - 1))
        flat_errors.append(100 * abs(flat.total(n, schedule) / live - 1))
        note = f"{live:.3f} s live ({min(seconds):.3f} to {max(seconds):.3f}), {told:.3f} s predicted; {schedule}"
        rows.append(Row(f"{label}, {n} candidates: predicted / live", told / live, "x", note=note))
    note = f"largest {max(errors):.1f}; of costs without batches {statistics.median(flat_errors):.1f}, largest {max(flat_errors):.1f}"
    rows.append(
        Row(
            f"{label}: prediction off by, median of {len(errors)}",
            statistics.median(errors),
            "%",
            at_most=10,
            note=note,
        )
    )
    return rows


def _median(models: list[CostModel]) -> CostModel:
    """Return the cost model of the medians of several measurements."""
    tables = {
        part: {size: float(np.median([model.each(part, size) for model in models])) for size, _ in models[0].step}
        for part in ("step", "decode", "verify")
    }
    return replace(models[0], **tables, per_prompt=statistics.median(model.per_prompt for model in models))
