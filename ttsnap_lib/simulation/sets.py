"""Sets of images instead of one winner, on a tensor with embeddings: mean reward and mean distance, and what early checks know.

The rule is that of :mod:`ttsnap_lib.sets`, at every check and at the end; the subsets are those of
:func:`ttsnap_lib.simulate` for the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.checks import choice, integer, real
from ttsnap_lib.costs import CostModel, check_n_steps
from ttsnap_lib.errors import ConfigError, ScheduleError, TensorError
from ttsnap_lib.files import failures_as
from ttsnap_lib.schedule import METHODS, Schedule, selecting_rewards
from ttsnap_lib.sets import check_set, choose_set, mean_distance, pairwise_distances
from ttsnap_lib.simulation.metrics import Estimate
from ttsnap_lib.simulation.pruning import NaNRead, run_threads, step_positions
from ttsnap_lib.simulation.simulate import MOST_DRAWS, VARIABLE, candidates_table
from ttsnap_lib.tensors.tensor import check_rewards, read_steps

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


@dataclass(frozen=True)
class Sets:
    """Mean reward and mean pairwise distance of the sets of several methods, as the weight of difference runs."""

    methods: tuple[str, ...]
    diversities: tuple[float, ...]
    rewards: tuple[str, ...]
    keep: int
    n: np.ndarray  # int64 (method,), candidates per prompt
    spent: np.ndarray  # float64 (method,), cost per prompt; NaN without a cost model
    reward: np.ndarray  # float64 (method, diversity, reward, prompt), means over iterations and the set
    distance: np.ndarray  # float64 (method, diversity, prompt); NaN without embeddings
    level: float
    resamples: int
    seed: int  # of the intervals

    def frame(self) -> pd.DataFrame:
        """Return one row per method, diversity and reward: both means with their intervals over prompts."""
        import pandas as pd

        def told(values: np.ndarray) -> Estimate:
            moved = np.moveaxis(values, -1, 0)
            return Estimate.over_prompts(moved, self.seed, level=self.level, resamples=self.resamples)

        reward, distance = told(self.reward), told(self.distance)
        rows = []
        for m, w, r in np.ndindex(self.reward.shape[:3]):
            values = [getattr(reward, end)[m, w, r] for end in ("mean", "low", "high")]
            apart = [getattr(distance, end)[m, w] for end in ("mean", "low", "high")]
            which = (self.methods[m], self.diversities[w], self.rewards[r], self.n[m], self.spent[m])
            rows.append((*which, *values, *apart))
        names = ["method", "diversity", "reward", "n", "spent", "mean", "low", "high"]
        return pd.DataFrame(rows, columns=[*names, "distance", "distance_low", "distance_high"])


def simulate_sets(
    dataset: xr.Dataset,
    methods: Sequence[str],
    keep: int,
    diversities: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 2.0),
    *,
    budget: float | None = None,
    n: int | None = None,
    cost: CostModel | None = None,
    schedule: Schedule | None = None,
    iterations: int = 50,
    rng: int = 0,
    combine: str = "rank_sum",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    report: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
) -> Sets:
    """Simulate searches for the best `keep` images at one budget (or with `n` candidates), for several weights of difference.

    Parameters
    ----------
    dataset : xarray.Dataset
        A reward tensor; with embeddings (``ttsnap score --embeddings``) at the steps of the schedule and at the end
        where a diversity is above 0.
    methods : sequence of {"best_of_n", "ttsp", "ttsnap"}
    keep : int
        Images per set.
    diversities : sequence of float
        As in :func:`ttsnap_lib.search`; 0 takes the best rewards.
    budget, n, cost, schedule, iterations, combine, weights, report, level, resamples
        As in :func:`ttsnap_lib.simulate`.
    rng : int
        Seed of the subsets and of the intervals.

    Returns
    -------
    Sets

    Raises
    ------
    BudgetError, ConfigError, ScheduleError, CostError, TensorError
        More images than a schedule leaves, a diversity without embeddings, and what :func:`ttsnap_lib.simulate` refuses.
    """
    methods = [choice("method", method, METHODS) for method in methods]
    plans: dict[str, Any] = {method: Schedule() if method == "best_of_n" else schedule for method in methods}
    if not methods or any(not isinstance(plan, Schedule) for plan in plans.values()):
        raise ScheduleError(
            f"methods {methods} with schedule {schedule!r}: expected a method, and a Schedule to prune by."
        )
    if (budget is None) == (n is None):
        raise ConfigError(f"budget and n: got {(budget, n)}, expected either budget or n. Give exactly one of them.")
    check_rewards(dataset)
    steps, pool = dataset["step"].values, dataset.sizes["image"]
    if cost is not None or budget is not None:
        check_n_steps(cost, int(steps[-1]) + 1)
    budgets, numbers = None if budget is None else [budget], None if n is None else [n]
    counts, spent = candidates_table(methods, budgets, numbers, cost, schedule, pool)
    weighed = tuple(real("diversities", one, 0) for one in diversities)
    for method, (size,) in zip(methods, counts, strict=True):
        keep, _ = check_set(keep, max(weighed, default=0.0), int(size), plans[method])
    names = [str(name) for name in dataset["reward"].values]
    selecting, shares = selecting_rewards(names, report, combine, weights)
    seed = integer("rng", rng, 0)
    drawn = np.random.default_rng(seed)
    tables = (integer("iterations", iterations, 1, MOST_DRAWS), dataset.sizes["prompt"])
    subsets, labels = (drawn.permuted(np.tile(np.arange(pool), (rows, 1)), axis=1) for rows in tables)

    positions = step_positions(schedule, steps) if schedule is not None and set(methods) - {"best_of_n"} else []
    places = [*positions, len(steps) - 1]
    values = read_steps(dataset["base"], [-1])[:, :, 0]
    scores = {method: read_steps(dataset[VARIABLE[method]], positions) for method in methods if method in VARIABLE}
    embeddings = read_embeddings(dataset, places) if any(weighed) or "embedding" in dataset else None
    reward = np.empty((len(methods), len(weighed), len(names), len(values)))
    distance = np.full((len(methods), len(weighed), len(values)), np.nan)

    def work(p: int) -> None:
        far = None if embeddings is None else [pairwise_distances(embeddings[p, :, k]) for k in range(len(places))]
        for m, method in enumerate(methods):
            columns = [scores[method][p, :, k] for k in range(len(positions))] if len(plans[method]) else []
            left = [*plans[method].survivors(int(counts[m, 0]))[1:], keep]
            for w, diversity in enumerate(weighed):
                alive = labels[p][subsets[:, : counts[m, 0]]]
                for k, (column, count) in enumerate(zip([*columns, values[p]], left, strict=True)):
                    alive = np.sort(alive, axis=1)
                    at = len(places) - 1 if k == len(columns) else k
                    read = column[alive][..., selecting]
                    if np.isnan(read).any():
                        raise NaNRead(p, k)
                    apart = far[at][alive[:, :, None], alive[:, None, :]] if far is not None and diversity else None
                    if apart is not None and np.isnan(apart).any():
                        raise TensorError(
                            f"embeddings of prompt {p} at step {steps[places[at]]}: got NaN, expected one for every image. "
                            "Score them: `ttsnap score --embeddings` goes on where it stopped."
                        )
                    chosen = choose_set(read, count, diversity, apart, combine, shares)
                    alive = np.take_along_axis(alive, chosen, axis=1)
                reward[m, w, :, p] = values[p][alive].mean((0, 1), dtype=np.float64)
                if far is not None and keep > 1:
                    distance[m, w, p] = mean_distance(far[-1][alive[:, :, None], alive[:, None, :]]).mean()

    run_threads(work, range(len(values)))
    return Sets(
        tuple(methods), weighed, tuple(names), keep, counts[:, 0], spent[:, 0], reward, distance,
        real("level", level, 0, 1, open_low=True), integer("resamples", resamples, 1, MOST_DRAWS), seed,
    )  # fmt: skip


def distance_agreement(dataset: xr.Dataset, rng: int = 0, **options: Any) -> pd.DataFrame:
    """Return how well the distances between estimates tell those between the final images, a row a step.

    Columns step, correlation, low, high: Pearson's correlation over the pairs of images of a prompt, its mean over prompts
    with its interval; `options` as :meth:`ttsnap_lib.simulation.metrics.Estimate.over_prompts` takes them.
    """
    import pandas as pd

    steps, n_images = dataset["step"].values, dataset.sizes["image"]
    pairs = np.triu_indices(integer("images of the tensor", n_images, 3, error=TensorError), 1)
    found = np.empty((dataset.sizes["prompt"], len(steps)))
    for p in range(len(found)):
        block = read_embeddings(dataset.isel(prompt=[p]), range(len(steps)))[0]
        far = pairwise_distances(np.swapaxes(block, 0, 1))[:, pairs[0], pairs[1]]
        with np.errstate(invalid="ignore"):
            found[p] = np.corrcoef(far)[-1]
    told = Estimate.over_prompts(found, rng, **options)
    return pd.DataFrame({"step": steps, "correlation": told.mean, "low": told.low, "high": told.high})


def read_embeddings(dataset: Any, positions: Sequence[int]) -> np.ndarray:
    """Return the embeddings (prompt, image, step, feature) at some positions of the step axis, as they are kept."""
    if "embedding" not in dataset:
        raise TensorError(
            "tensor without embeddings: distances between images need them. Score it with `ttsnap score --embeddings`, or "
            "leave diversity at 0."
        )
    block = dataset["embedding"].isel(step=list(positions)).transpose("prompt", "image", "step", "feature")
    with failures_as(TensorError, "embeddings cannot be read: got a damaged chunk. Score the tensor again."):
        return block.values
