"""What tuned schedules gain on held-out prompts: tuned on even ones, told on odd ones, three seeds; and the frontier."""

from __future__ import annotations

import statistics

import numpy as np

from tests.benchmarks.rows import Row
from tests.benchmarks.tuning_cases import CASES, POCKET, TuningCase
from tests.reference_data import MISSING
from ttsnap_lib import PUBLISHED_SCHEDULE, optimize_schedule
from ttsnap_lib.errors import TTSnapError
from ttsnap_lib.tuning.optimize import compare_schedules

SEEDS = (0, 1, 2)
SECONDS = 60  # on two cores


def run() -> list[Row]:
    """Measure every case; those of the published data are skipped where the data are not at hand."""
    rows: list[Row] = []
    for case in (*CASES, *POCKET):
        dataset = case.dataset()
        if dataset is None:
            rows.append(Row(f"{case.name}: skipped", float("nan"), "", note=MISSING))
            continue
        rows += _case(case, dataset)
    for case in (CASES[0], CASES[2], POCKET[0]):
        dataset = case.dataset()
        if dataset is not None:
            rows.append(frontier_row(case, dataset))
    return rows


def _case(case: TuningCase, dataset) -> list[Row]:
    found = [optimize_schedule(dataset, case.cost, case.budgets, seed=seed) for seed in SEEDS]
    gains = [result.test_gain for result in found]
    seconds = [result.elapsed_s for result in found]
    middle = found[int(np.argsort(gains)[len(gains) // 2])]
    low, high = middle.test_interval
    each = [optimize_schedule(dataset, case.cost, case.budgets, objective="frontier", seed=seed) for seed in SEEDS]
    per_budget, took = ([getattr(result, name) for result in each] for name in ("test_gain", "elapsed_s"))
    # What no choice can beat: tuned on the very prompts that it is told on.
    ceiling = optimize_schedule(dataset, case.cost, case.budgets, tune=middle.test, test=middle.tune, seed=SEEDS[0])
    return [
        Row(f"{case.name}: held-out gain, median of {len(SEEDS)} seeds", statistics.median(gains), "%", case.wanted,
            note=f"seeds {min(gains):.1f} to {max(gains):.1f}, interval {low:.1f} to {high:.1f}; {middle.schedule}"),
        Row("  the published schedule there", _published(case, dataset, middle.test), "%"),
        Row("  tuned on those same prompts: about what there is to find", ceiling.tuned_gain, "%"),
        Row("  seconds", statistics.median(seconds), "s", at_most=SECONDS, note=f"{min(seconds):.0f} to {max(seconds):.0f}"),
        Row("  one schedule for each budget: held-out gain, median", statistics.median(per_budget), "%",
            note=f"seeds {min(per_budget):.1f} to {max(per_budget):.1f}"),
        Row("  seconds for that", statistics.median(took), "s", at_most=SECONDS, note=f"{min(took):.0f} to {max(took):.0f}"),
    ]  # fmt: skip


def _published(case: TuningCase, dataset, prompts: np.ndarray) -> float:
    try:
        table = compare_schedules(dataset, case.cost, case.budgets, [PUBLISHED_SCHEDULE], prompts=prompts)
    except TTSnapError:  # a tensor without its steps
        return float("nan")
    return float(table["gain"][0])


def frontier_row(case: TuningCase, dataset, **options) -> Row:
    """Tell at how many budgets the frontier is surely worse than the best single schedule, on held-out prompts.

    Intervals are widened so that all budgets hold at once with 95%.
    """
    level = 1 - 0.05 / len(case.budgets)
    found = optimize_schedule(dataset, case.cost, case.budgets, objective="frontier", level=level, **options)
    table = found.frontier
    worse = int((table["over_single_high"] < 0).sum())
    percent = 100 * table["over_single"] / (table["best_of_n"].iloc[-1] - table["best_of_n"].iloc[0])
    note = (
        f"{found.test_gain:.1f}% in all; over the single one {percent.mean():+.2f}% of Best-of-N's climb on average, "
        f"{percent.min():+.2f} to {percent.max():+.2f}; {found.elapsed_s:.0f} s"
    )
    return Row(f"frontier, {case.name}: budgets where it is worse than one schedule", worse, "", at_most=0, note=note)
