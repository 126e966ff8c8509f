"""How many schedules a second the optimiser scores, against a plain NumPy implementation in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import config

from tests.benchmarks.rows import Row, interleaved, ratio
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.simulation.pruning import best_of_n
from ttsnap_lib.tensors.tensor import synthetic_rewards
from ttsnap_lib.tuning.race import Scorer, Selection
from ttsnap_lib.tuning.space import SearchSpace

COST = CostModel.preset("flux-512+image_reward")
BUDGETS = np.arange(2, 21) * COST.total(1)
PROMPTS, ITERATIONS = 100, 30


def numpy_curve(aware: np.ndarray, final: np.ndarray, schedule: Schedule, rng: np.random.Generator) -> np.ndarray:
    """Score one schedule the plain way, (budget,): random subsets, then an argpartition per stage over all prompts."""
    prompts = np.arange(len(final))[:, None]
    means = np.empty(len(BUDGETS))
    for b, budget in enumerate(BUDGETS):
        n = COST.candidates(budget, schedule)
        total = 0.0
        for _ in range(ITERATIONS):
            alive = np.argpartition(rng.random(final.shape), n - 1, axis=1)[:, :n]
            for step, keep in zip(schedule.steps, schedule.keep_ratios, strict=True):
                left = max(1, round(alive.shape[1] * keep))
                best = np.argpartition(-aware[prompts, alive, step], left - 1, axis=1)[:, :left]
                alive = np.take_along_axis(alive, best, axis=1)
            total += final[prompts, alive].max(1).mean()
        means[b] = total / ITERATIONS
    return means


def run() -> list[Row]:
    """Measure the rate and how near the two ways of scoring agree."""
    dataset = synthetic_rewards(PROMPTS, 200, 20)
    aware, final = dataset["noise_aware"].values[0], dataset["base"].values[0, :, :, -1]
    space = SearchSpace(tuple(range(3, 15)), 4, COST, BUDGETS, 200)
    rng = np.random.default_rng(0)
    schedules = []
    while len(schedules) < 40:
        schedule = space.random(rng)
        if space.feasible(schedule).all():
            schedules.append(schedule)
    selection = Selection((0,), "rank_sum", None, np.ones(1))
    scorer = Scorer(aware[:, :, 3:15, None], space.steps, final[:, :, None].astype(float), selection, ITERATIONS, rng)

    def ours(schedule: Schedule) -> np.ndarray:
        return scorer.sums(schedule.steps, space.counts(schedule), 0, ITERATIONS).mean(1) / ITERATIONS

    def all_of_ours() -> None:
        with ThreadPoolExecutor(config.NUMBA_NUM_THREADS) as pool:
            list(pool.map(ours, schedules))

    some = schedules[:4]  # as many as a run of the slow way has time for
    all_of_ours()

    def some_of_numpy() -> None:
        for schedule in some:
            numpy_curve(aware, final, schedule, rng)

    def per_schedule(clock: Callable[[], float]) -> tuple[list[float], list[float]]:
        slow, fast = interleaved(some_of_numpy, all_of_ours, clock=clock)
        return [seconds / len(some) for seconds in slow], [seconds / len(schedules) for seconds in fast]

    wall, cpu = per_schedule(time.perf_counter), per_schedule(time.process_time)
    (value, spread), (per_core, core_spread) = ratio(*wall), ratio(*cpu)
    gap = max(np.abs(numpy_curve(aware, final, schedule, rng) - ours(schedule)).max() for schedule in some)
    one = abs(ours(Schedule()) - [best_of_n(final, n).mean() for n in range(2, 21)]).max()
    what = f"{len(BUDGETS)} budgets x {ITERATIONS} iterations x {PROMPTS} prompts"
    return [
        Row(f"schedules, {what}: NumPy / ours", value, "x", 30, note=f"{config.NUMBA_NUM_THREADS} threads; {spread}"),
        Row("  the same in CPU time: one core of each", per_core, "x", 30, note=core_spread),
        Row("  the same, ours", 1 / float(np.median(wall[1])), "schedules/s"),
        Row("  largest difference of the two means (Monte Carlo)", float(gap), "reward", at_most=0.05),
        Row("  largest difference of no pruning to the closed form", float(one), "reward", at_most=1e-9),
    ]
