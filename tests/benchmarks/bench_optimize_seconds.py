"""Schedules tuned on seconds of an H100, whose batches count, against those tuned on FLOPs; both told in seconds."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np

from tests.benchmarks.rows import Row
from tests.benchmarks.tuning_cases import FLUX, SDXL, TuningCase
from tests.reference_data import MISSING
from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel, optimize_schedule
from ttsnap_lib.tuning.optimize import compare_schedules

SEEDS = (0, 1, 2)
# Name, model, reward, TFLOPs, seconds, and the Best-of-N images whose price the budgets are. Fewer than 8 SDXL images
# take no less time than 8; more than 16 buy pruned candidates beyond the 56 distinct ones.
CASES = (
    ("FLUX ImageReward", "flux", "image_reward", FLUX, "h100-flux-512", range(2, 21)),
    ("SDXL PickScore, 56 distinct", "sdxl", "pickscore", SDXL, "h100-sdxl-512", range(8, 17)),
)


def run() -> list[Row]:
    """Measure every case, with one prompt at a time and with eight together."""
    rows: list[Row] = []
    for name, model, reward, tflops, preset, images in CASES:
        dataset = TuningCase(name, model, reward, tflops, max(images), None).dataset()
        if dataset is None:
            rows.append(Row(f"{name}: skipped", float("nan"), "", note=MISSING))
            continue
        by_flops = [_tuned(dataset, tflops, images, seed) for seed in SEEDS]
        for together in (1, 8):
            seconds = replace(CostModel.preset(preset), prompts_together=together)
            rows += _case(f"{name}, {preset}, {together} together", dataset, seconds, images, by_flops)
    return rows


def _budgets(cost: CostModel, images: range) -> np.ndarray:
    return np.array([cost.total(n) for n in images])


def _tuned(dataset, cost: CostModel, images: range, seed: int, **options):
    return optimize_schedule(dataset, cost, _budgets(cost, images), seed=seed, **options)


def _case(name: str, dataset, cost: CostModel, images: range, by_flops: list) -> list[Row]:
    found = [_tuned(dataset, cost, images, seed) for seed in SEEDS]
    tables = [
        compare_schedules(
            dataset,
            cost,
            _budgets(cost, images),
            [ours.schedule, theirs.schedule, PUBLISHED_SCHEDULE],
            prompts=ours.test,
        )
        for ours, theirs in zip(found, by_flops, strict=True)
    ]
    gains = [table["gain"].to_numpy() for table in tables]
    middle = int(np.argsort([gain[0] for gain in gains])[len(SEEDS) // 2])
    table = tables[middle]
    rows = []
    for k, label in enumerate(("tuned on seconds", "tuned on FLOPs", "the published schedule")):
        each = [gain[k] for gain in gains]
        told = f"seeds {min(each):.1f} to {max(each):.1f}, interval {table['low'][k]:.1f} to {table['high'][k]:.1f}; {table['schedule'][k]}"
        if k:
            told += f"; behind {table['behind'][k]:.1f}, {table['behind_low'][k]:.1f} to {table['behind_high'][k]:.1f}"
        rows.append(Row(f"{name}: {label}, held-out gain in seconds", statistics.median(each), "%", note=told))
    return rows
