"""How often the 95% intervals hold the truth: ``python -m tests.benchmarks coverage``.

The shipped pocket tensors stand for the world: their prompts, drawn with replacement, are prompts of a population whose
mean is the tensor's own, so the truth is known. Every world of 10 to 200 prompts is simulated, or tuned on some of its
prompts and told on the others, by what a user calls, with subsets of its own. The notes tell how other intervals do on
the very same worlds: the percentile bootstrap as it is, widened, and the jackknife with Student's t.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import xarray as xr

from tests.benchmarks.rows import Row
from ttsnap_lib import CostModel, Schedule, open_rewards, optimize_schedule
from ttsnap_lib.simulation import metrics
from ttsnap_lib.simulation.simulate import Curves, curves
from ttsnap_lib.tuning.optimize import compare_schedules

SIZES = (10, 20, 50, 200)
SCHEDULE = Schedule((3, 6, 11), (0.5, 0.4, 0.5))
MULTIPLES = (2, 4, 7, 10)
AT_LEAST = 0.91  # 0.95 less two standard errors of 300 worlds, and what skewed rewards of ten prompts cost
QUANTITIES = ("mean reward", "paired gain", "relative gain")
WAYS = ("percentile", "widened", "jackknife t")


def run(
    models: tuple[str, ...] = ("flux", "sdxl"), worlds: int = 300, tuned: int = 150, sizes: tuple[int, ...] = SIZES
) -> list[Row]:
    """Return the share of worlds whose interval holds the truth, over the models together; `tuned` is that of tuning."""
    held: dict[tuple[str, int], list[tuple[bool, ...]]] = {
        (what, size): [] for what in (*QUANTITIES, "test interval") for size in sizes
    }
    for model in models:
        dataset, cost = open_rewards(f"pocket-{model}").load(), CostModel.preset(f"pocket-{model}-tiny+pocket-clip")
        budgets = np.array(MULTIPLES) * cost.total(1)
        population = curves(dataset, ["ttsnap"], budgets, cost, SCHEDULE, iterations=2000, rng=1, reach=False)
        truth = _values(population, population.per_prompt.mean(-1))
        gain_of = functools.partial(_gain_of, dataset, cost, budgets, {})
        for size in sizes:
            for world in _worlds(dataset, size, worlds):
                found = curves(
                    world,
                    ["ttsnap"],
                    budgets,
                    cost,
                    SCHEDULE,
                    iterations=50,
                    reach=False,
                    rng=len(held["mean reward", size]),
                )
                for what, told in zip(QUANTITIES, _told(found), strict=True):
                    at = QUANTITIES.index(what)
                    held[what, size].append(tuple(low <= truth[at] <= high for low, high in told))
            for k, world in enumerate(_worlds(dataset, size + 10, tuned if size < 200 else 0)):
                # Eight seeds of the search alone: worlds then meet the same schedules, whose true gains are kept.
                best = optimize_schedule(
                    world, cost, budgets, tune=range(10), n_trials=12, iterations=12, seed=k % 8, resamples=2
                )
                low, high = best.test_interval
                held["test interval", size].append((low <= gain_of(best.schedule) <= high,))
    return [_row(what, size, np.mean(found, axis=0), len(found)) for (what, size), found in held.items() if found]


def _worlds(dataset: xr.Dataset, size: int, worlds: int) -> Iterator[xr.Dataset]:
    rng = np.random.default_rng(size)
    for _ in range(worlds):
        drawn = rng.integers(0, dataset.sizes["prompt"], size)
        yield dataset.isel(prompt=drawn).assign_coords(prompt=np.arange(size))


def _gain_of(dataset: xr.Dataset, cost: CostModel, budgets: np.ndarray, kept: dict, schedule: Schedule) -> float:
    """Return the relative gain of a schedule on the whole population."""
    if schedule not in kept:
        kept[schedule] = float(compare_schedules(dataset, cost, budgets, [schedule], iterations=500)["gain"][0])
    return kept[schedule]


def _values(found: Curves, mean: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the quantities of mean rewards (..., method, budget, reward): at the largest budget, or over all."""
    best, ours = mean[..., 0, :, 0], mean[..., 1, :, 0]
    area = metrics.relative_gain_of(found.budgets, ours, best, strict=False)
    return ours[..., -1], ours[..., -1] - best[..., -1], area


def _told(found: Curves) -> Iterator[tuple[np.ndarray, ...]]:
    """Return for each quantity what is displayed, then the interval by each of `WAYS`."""
    frame = found.frame().iloc[-1]
    displayed = (
        frame[["low", "high"]],
        frame[["gain_low", "gain_high"]],
        found.relative_gains()[["low", "high"]].iloc[0],
    )
    without = metrics.leave_one_out(np.moveaxis(found.per_prompt, -1, 0))
    per = [_values(found, given) for given in (found.per_prompt.mean(-1), found.boot, without)]
    for shown, value, samples, others in zip(displayed, *per, strict=True):
        yield (
            shown.to_numpy(float),
            metrics.percentile_interval(samples),
            metrics.mean_interval(value, samples, len(without)),
            metrics.jackknife_interval(value, others),
        )


def _row(what: str, size: int, share: np.ndarray, worlds: int) -> Row:
    note = ", ".join(f"{way} {value:.1%}" for way, value in zip(WAYS, share[1:], strict=False))
    return Row(
        f"{what}, {size} prompts",
        float(share[0]),
        "of worlds",
        at_least=AT_LEAST,
        note=f"{worlds} worlds; {note}".rstrip("; "),
    )
