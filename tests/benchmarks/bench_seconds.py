"""What searches take against what their cost model says: six schedules, three sizes, pocket models, one thread.

Costs and searches are measured in turns, in processor time, so that other work on the machine disturbs all alike.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch

from tests.benchmarks.rows import Row
from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel, Schedule, load_pipeline, load_reward, measure_costs, search
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
ROUNDS = 3


def run(models: tuple[str, ...] = ("pocket-flux", "pocket-sdxl")) -> list[Row]:
    """Return predicted and measured seconds, and how far they are apart."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with patch.object(time, "perf_counter", time.process_time):
            return [row for model in models for row in _rows(model)]
    finally:
        torch.set_num_threads(before)


def _rows(model: str) -> list[Row]:
    pipeline, reward = load_pipeline(model, device="cpu"), load_reward("pocket-clip", device="cpu")
    prompts = iter(pocket_prompts("evaluation", 1 + ROUNDS * len(SCHEDULES) * len(SIZES)))  # a prompt's text is kept
    measured, took = [], {}
    search(pipeline, next(prompts), reward, candidates=16)
    for _ in range(ROUNDS):
        measured.append(measure_costs(pipeline, reward).seconds)
        for schedule in SCHEDULES:
            for n in SIZES:
                result = search(pipeline, next(prompts), reward, schedule, candidates=n, cost=measured[-1])
                took.setdefault((schedule, n), []).append(result.record.elapsed_s)
    cost = _median(measured)
    # Until costs went by batch: each part as in the largest one.
    full = {part: cost.each(part, cost.batch_size) for part in ("step", "decode", "verify")}
    flat = replace(cost, **full)
    rows, errors, flat_errors = [], [], []
    for (schedule, n), seconds in took.items():
        live, told = statistics.median(seconds), cost.total(n, schedule)
        errors.append(100 * abs(told / live - 1))
        flat_errors.append(100 * abs(flat.total(n, schedule) / live - 1))
        note = f"{live:.3f} s live ({min(seconds):.3f} to {max(seconds):.3f}), {told:.3f} s predicted; {schedule}"
        rows.append(Row(f"{model}, {n} candidates: predicted / live", told / live, "x", note=note))
    note = f"largest {max(errors):.1f}; of costs without batches {statistics.median(flat_errors):.1f}, largest {max(flat_errors):.1f}"
    rows.append(
        Row(
            f"{model}: prediction off by, median of {len(errors)}",
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
