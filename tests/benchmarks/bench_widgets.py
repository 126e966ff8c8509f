"""What a slider move of the explorer costs, without the browser: compute, then draw and encode."""

from __future__ import annotations

import time

import numpy as np

from tests.benchmarks.rows import Row
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.explorer.pool import Pool
from ttsnap_lib.explorer.result import State, compute
from ttsnap_lib.explorer.view import Panels
from ttsnap_lib.tensors.tensor import synthetic_rewards

MOVES = 12


def run() -> list[Row]:
    """Measure moves of every step and keep ratio to places not seen before, on 200 x 200 x 20 x 3."""
    names = ("image_reward", "pickscore", "hpsv2")
    start = time.perf_counter()
    pool = Pool(synthetic_rewards(200, 200, 20, rewards=names))
    rows = [Row("make ready, the synthetic drawing included", time.perf_counter() - start, "s")]
    cost = CostModel.preset("flux-512+image_reward")
    budgets = tuple(multiple * cost.total(1) for multiple in (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20))
    for selecting in (names[:1], names):
        panels = Panels()

        def state(schedule: Schedule, selecting: tuple[str, ...] = selecting) -> State:
            return State(selecting, names[0], cost, budgets, budgets[6], schedule=schedule)

        first = Schedule((2, 6, 11), (0.4, 0.4, 0.5))
        panels.update(compute(state(first), pool, pool.preview(len(selecting))))
        panels.png()
        wall: dict[str, list[float]] = {"compute": [], "draw and encode": []}
        busy: list[float] = []
        for k in range(MOVES):
            moved = state(Schedule((3 + k % 3, 7 + k % 2, 12), (0.40 + 0.01 * k, 0.4, 0.5)))
            begin, begin_busy = time.perf_counter(), time.process_time()
            result = compute(moved, pool, pool.preview(len(selecting)))
            middle = time.perf_counter()
            busy.append(time.process_time() - begin_busy)
            panels.update(result)
            panels.png()
            wall["compute"].append(middle - begin)
            wall["draw and encode"].append(time.perf_counter() - middle)
        label = f"{len(selecting)} reward{'s' if len(selecting) > 1 else ''} select, {result.iterations} subsets"
        for what, seconds in wall.items():
            limit = 50 if what == "compute" else 100
            note = f"{1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f}; processor {1e3 * np.median(busy):.0f}"
            note = note if what == "compute" else note.split(";")[0]
            rows.append(Row(f"{label}: {what}", 1e3 * float(np.median(seconds)), "ms", at_most=limit, note=note))
    return rows
