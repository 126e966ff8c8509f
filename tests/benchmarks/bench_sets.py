"""Sets of four images on a recorded pocket pool, reward against difference: ``python -m tests.benchmarks sets``.

32 evaluation captions x 64 images with embeddings at some steps, which stay in the data cache. All at the price of sixteen
finished images; gains are at equal mean distance of the set, between the diversities by interpolation, paired over captions.
"""

from __future__ import annotations

import os

import numpy as np
import xarray as xr

from tests.benchmarks.rows import Row
from ttsnap_lib import CostModel, Schedule, load_pipeline, load_reward, open_rewards
from ttsnap_lib.files import data_cache
from ttsnap_lib.pocket.world import pocket_prompts
from ttsnap_lib.rewards.loading import find_adapters
from ttsnap_lib.scoring.score import generate_scores
from ttsnap_lib.sets import choose_set, mean_distance, pairwise_distances
from ttsnap_lib.simulation.sets import Sets, distance_agreement, read_embeddings, simulate_sets

MODEL, KEEP, IMAGES, ITERATIONS = "pocket-flux", 4, 16, 20
STEPS = [0, 2, 5, 8, 11, 14, 19]
DIVERSITIES = (0.0, 0.25, 0.35, 0.45, 0.55, 0.65, 0.8, 1.0, 1.5, 2.5)
SCHEDULES = (Schedule((0, 5), (0.5, 0.5)), Schedule((5,), (0.5,)), Schedule((8,), (0.4,)))
DISTANCES = (0.05, 0.1, 0.2, 0.3)


def run() -> list[Row]:
    """Record the pool, then tell what early distances know and what sets cost."""
    dataset, cost = _pool(), CostModel.preset(f"{MODEL}+pocket-clip")
    rows = [
        Row(
            f"distances at step {one.step} and at the end, correlation",
            one.correlation,
            "",
            note=_between(one.low, one.high),
        )
        for one in distance_agreement(dataset).itertuples()
    ]
    budget = IMAGES * cost.total(1)
    options = {"budget": budget, "cost": cost, "iterations": ITERATIONS}
    best = simulate_sets(dataset, ["best_of_n"], KEEP, DIVERSITIES, **options)
    rows += _told(best, "Best-of-N")
    for schedule in SCHEDULES:
        n = cost.candidates(budget, schedule)
        every = simulate_sets(dataset, ["ttsnap"], KEEP, DIVERSITIES, schedule=schedule, **options)
        rows += _told(every, f"TTSnap, {schedule}")
        late = _difference_at_the_end_alone(dataset, schedule, n)
        for name, reward, distance in (
            ("", every.reward[0, :, 0], every.distance[0]),
            (", difference at the end alone", *late),
        ):
            label = f"TTSnap, {schedule}, {n} candidates{name}"
            rows.append(Row(f"{label}: farthest apart", distance.mean(1).max(), ""))
            for where in DISTANCES:
                gain, low, high = _gain((reward, distance), (best.reward[0, :, 0], best.distance[0]), where)
                if np.isfinite(gain):
                    rows.append(
                        Row(f"  reward over Best-of-N at a distance of {where:g}", gain, "", note=_between(low, high))
                    )
    return rows


def _told(sets: Sets, label: str) -> list[Row]:
    """Return reward and distance by diversity."""
    rows = []
    for one in sets.frame().itertuples():
        name = f"{label}, {one.n} candidates, diversity {one.diversity:g}"
        rows.append(Row(f"{name}: reward", one.mean, "", note=_between(one.low, one.high)))
        rows.append(Row("  distance", one.distance, "", note=_between(one.distance_low, one.distance_high)))
    return rows


def _pool() -> xr.Dataset:
    path = data_cache() / "benchmarks" / "sets.zarr"
    reward = load_reward("pocket-clip", adapters=find_adapters("pocket", MODEL), device="cpu")
    prompts = pocket_prompts("evaluation", int(os.environ.get("TTSNAP_BENCH_PROMPTS", "32")))
    pipeline = load_pipeline(MODEL, device="cpu")
    how = {"images_per_prompt": 64, "steps": STEPS, "embeddings": True, "batch_size": 32, "cpu_threads": 1}
    print(generate_scores(pipeline, prompts, path, reward, **how))
    return open_rewards(path)


def _difference_at_the_end_alone(dataset: xr.Dataset, schedule: Schedule, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return reward and distance (diversity, prompt) of sets chosen among the candidates that pruning by scores leaves."""
    drawn = np.random.default_rng(0)
    sizes = (ITERATIONS, dataset.sizes["prompt"])
    subsets, labels = (drawn.permuted(np.tile(np.arange(64), (rows, 1)), axis=1) for rows in sizes)
    base, aware = (dataset[name].sel(reward="pocket-clip").values for name in ("base", "noise_aware"))
    seen = read_embeddings(dataset, [len(STEPS) - 1])[:, :, 0]
    reward, distance = np.zeros((2, len(DIVERSITIES), len(base)))
    for p in range(len(base)):
        far = pairwise_distances(seen[p])
        for subset in subsets[:, :n]:
            alive = np.sort(labels[p][subset])
            for step, count in zip(schedule.steps, schedule.survivors(n)[1:], strict=True):
                alive = np.sort(alive[choose_set(aware[p, alive, STEPS.index(step), None], count)])
            for w, diversity in enumerate(DIVERSITIES):
                apart = far[np.ix_(alive, alive)]
                chosen = alive[choose_set(base[p, alive, -1:], KEEP, diversity, apart)]
                reward[w, p] += base[p, chosen, -1].mean() / ITERATIONS
                distance[w, p] += mean_distance(far[np.ix_(chosen, chosen)]) / ITERATIONS
    return reward, distance


def _gain(ours, theirs, where: float) -> tuple[float, float, float]:
    """Return by how much more reward (diversity, prompt) we have at a mean distance, with its interval over prompts."""

    def at(curve, prompts) -> float:
        reward, distance = (values[:, prompts].mean(1) for values in curve)
        order = np.argsort(distance)
        return float(np.interp(where, distance[order], reward[order], left=np.nan, right=np.nan))

    n = ours[0].shape[1]
    resamples = np.random.default_rng(0).integers(0, n, (1000, n))
    gains = [at(ours, prompts) - at(theirs, prompts) for prompts in resamples]
    low, high = np.nanquantile(gains, [0.025, 0.975]) if np.isfinite(gains).any() else (np.nan, np.nan)
    return at(ours, slice(None)) - at(theirs, slice(None)), low, high


def _between(low: float, high: float) -> str:
    return f"[{low:.3f}, {high:.3f}]"
