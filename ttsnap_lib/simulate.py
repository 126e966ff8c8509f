"""Best-of-N, TTSp and TTSnap on reward tensors: arrays in, arrays or tidy frames out.

TTSp and TTSnap are the same pruning; TTSp reads the ``base`` variable at the checks, TTSnap the ``noise_aware`` one,
and both choose at the end by the base reward of the clean image (paper, section 3). All methods, budgets and rewards
of one call see the same random subsets, nested across budgets, so that their differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ._callable import make_callable
from ._inputs import (
    candidates_table,
    check_n_steps,
    missing_scores,
    random_generator,
    selecting_rewards,
    step_positions,
)
from ._winners import best_of_n, best_of_n_weights, prune
from .checks import choice, integer, real
from .costs import CostModel
from .errors import ConfigError, CostError, ScheduleError
from .metrics import bootstrap_means
from .results import Curves, Simulation
from .schedule import Schedule

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["METHODS", "MOST_DRAWS", "best_of_n", "best_of_n_weights", "curves", "prune", "simulate", "sweep"]

METHODS = ("best_of_n", "ttsp", "ttsnap")
MOST_DRAWS = 10_000_000
"""Most subsets, and most bootstrap samples: beyond, their tables fill the memory and no figure changes."""
_VARIABLE = {"ttsp": "base", "ttsnap": "noise_aware"}


def simulate(
    dataset: xr.Dataset,
    method: str,
    *,
    budget: float | None = None,
    n: int | None = None,
    cost: CostModel | None = None,
    schedule: Schedule | None = None,
    iterations: int = 50,
    rng: np.random.Generator | int | None = None,
    combine: str = "rank_sum",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    report: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
) -> Simulation:
    """Simulate one method at one budget (or with `n` candidates) by Monte Carlo over random subsets.

    Parameters
    ----------
    dataset : xarray.Dataset
        A reward tensor. All its rewards select jointly, except those in `report`.
    method : {"best_of_n", "ttsp", "ttsnap"}
    budget : float, optional
        Compute per prompt in the unit of `cost`. Exactly one of `budget` and `n` is given.
    n : int, optional
        Candidates per prompt.
    cost : CostModel, optional
        Needed with `budget`.
    schedule : Schedule, optional
        Needed by ``ttsp`` and ``ttsnap``, not read by ``best_of_n``.
    iterations : int
        Random subsets drawn for each prompt; equal for equal `rng` whatever the method and budget.
    rng : numpy.random.Generator or int, optional
        Source of the subsets and of the bootstrap; 0 by default. A Generator is advanced.
    combine, weights
        As in :func:`prune`; `weights` may name the rewards.
    report : sequence of str, optional
        Rewards measured on the winner without taking part in the choice (reward hacking shows there).
    level, resamples
        Of the bootstrap over prompts.

    Returns
    -------
    Simulation

    Raises
    ------
    BudgetError
        The budget buys no candidate, or more than the pool holds.
    ConfigError, ScheduleError, CostError, TensorError
        As named by their messages, before anything is computed.
    """
    if (budget is None) == (n is None):
        raise ConfigError(
            "simulate", value={"budget": budget, "n": n}, bound="either budget or n", remedy="Give exactly one of them."
        )
    result = _run(
        dataset, [method], None if budget is None else [budget], None if n is None else [n], cost, schedule,
        iterations=iterations, rng=rng, combine=combine, weights=weights, report=report, level=level,
        resamples=resamples, keep_winners=True,
    )  # fmt: skip
    low, high = result.interval(result.boot)
    return Simulation(
        method=method,
        rewards=result.rewards,
        mean=result.per_prompt[0, 0].mean(-1),
        low=low[0, 0],
        high=high[0, 0],
        per_prompt=result.per_prompt[0, 0],
        winners=cast("np.ndarray", result.winners)[0, 0],
        n=int(result.n[0, 0]),
        budget=float(result.budgets[0]),
        spent=float(result.spent[0, 0]),
    )


def sweep(
    dataset: xr.Dataset,
    methods: Sequence[str],
    budgets: Sequence[float],
    cost: CostModel,
    schedule: Schedule | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Simulate several methods at several budgets.

    Parameters
    ----------
    dataset : xarray.Dataset
        A reward tensor.
    methods : sequence of {"best_of_n", "ttsp", "ttsnap"}
    budgets : (budget,)
        Compute per prompt, in the unit of `cost`.
    cost : CostModel
    schedule : Schedule, optional
        For the methods that prune.
    options : Any
        Further ones of :func:`simulate`: iterations, rng, combine, weights, report, level, resamples.

    Returns
    -------
    pandas.DataFrame
        Tidy: method, reward, budget, n, spent, mean, low, high, gain, gain_low, gain_high, where gain is the
        difference to Best-of-N on the same subsets with its paired interval.
    """
    frame = curves(dataset, methods, budgets, cost, schedule, **options).frame()
    return frame[frame["method"].isin(list(methods))].reset_index(drop=True)


def curves(
    dataset: xr.Dataset,
    methods: Sequence[str],
    budgets: Sequence[float],
    cost: CostModel,
    schedule: Schedule | None = None,
    *,
    iterations: int = 50,
    rng: np.random.Generator | int | None = None,
    combine: str = "rank_sum",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    report: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    keep_winners: bool = False,
) -> Curves:
    """Return what :func:`sweep` tabulates, with the values per prompt and the area metric's interval.

    Best-of-N always runs along as the baseline.
    """
    methods = [methods] if isinstance(methods, str) else list(methods)
    with_baseline = methods if not methods or "best_of_n" in methods else ["best_of_n", *methods]
    return _run(
        dataset, with_baseline, budgets, None, cost, schedule, iterations=iterations, rng=rng, combine=combine,
        weights=weights, report=report, level=level, resamples=resamples, keep_winners=keep_winners,
    )  # fmt: skip


# -- behind the interface -------------------------------------------------------------------------------------------


def _run(
    dataset: xr.Dataset,
    methods: Sequence[str],
    budgets: Sequence[float] | None,
    numbers: Sequence[int] | None,
    cost: CostModel | None,
    schedule: Schedule | None,
    *,
    iterations: int,
    rng: np.random.Generator | int | None,
    combine: str,
    weights: Mapping[str, float] | Sequence[float] | None,
    report: Sequence[str] | None,
    level: float,
    resamples: int,
    keep_winners: bool,
) -> Curves:
    from . import tensors

    iterations = integer("iterations", iterations, 1, MOST_DRAWS)
    resamples = integer("resamples", resamples, 1, MOST_DRAWS)
    level = real("level", level, 0, 1, open_low=True)
    for method in methods:
        choice("method", method, METHODS)
        if method != "best_of_n" and not isinstance(schedule, Schedule):
            raise ScheduleError(
                f"{method} without a schedule",
                value=schedule,
                bound="a Schedule",
                remedy="Pass schedule=PUBLISHED_SCHEDULE, one of optimize_schedule(), or Schedule() for no pruning.",
            )
    if not methods:
        raise ConfigError("methods", value=methods, bound=f"one or more of {METHODS}", remedy="Name one.")
    if cost is not None and not isinstance(cost, CostModel):
        raise CostError("cost", value=cost, bound="a CostModel", remedy="Pass CostModel.preset(name) or load(file).")
    if cost is None and budgets is not None:
        raise CostError(
            "budget without a cost model",
            value=cost,
            bound="a CostModel",
            remedy="Pass cost=CostModel.preset('published') or one of your own.",
        )
    tensors.check_rewards(dataset)
    names = [str(name) for name in dataset["reward"].values]
    selecting, shares = selecting_rewards(names, report, combine, weights)
    steps = dataset["step"].values
    check_n_steps(cost, steps)
    pool = dataset.sizes["image"]
    numbers_table, spent = candidates_table(methods, budgets, numbers, cost, schedule, pool)

    rng = random_generator(rng)
    subsets = rng.permuted(np.tile(np.arange(pool), (iterations, 1)), axis=1)
    # Subsets of their own for every prompt: with one table for all, what a subset happens to hold (repeated images,
    # say) would move all prompts together and the mean would not settle with their number.
    labels = rng.permuted(np.tile(np.arange(pool), (dataset.sizes["prompt"], 1)), axis=1)
    positions = step_positions(schedule, steps) if schedule is not None and set(methods) - {"best_of_n"} else []

    final = tensors.read_steps(dataset["base"], [-1])  # (prompt, image, 1, reward)
    values = final[:, :, 0, :]
    last = values[:, :, selecting]
    shape = (len(methods), numbers_table.shape[1])
    per_prompt = np.empty((*shape, len(names), dataset.sizes["prompt"]))
    winners = np.empty((*shape, iterations, dataset.sizes["prompt"]), np.int64) if keep_winners else None
    from ._pruning import NaNRead, prune_columns

    for m, method in enumerate(methods):
        stages = schedule if method != "best_of_n" and schedule is not None else Schedule()
        checks = []
        if len(stages):
            block = tensors.read_steps(dataset[_VARIABLE[method]], positions)
            checks = [block[:, :, k, :][:, :, selecting] for k in range(len(positions))]
        ascending = np.argsort(numbers_table[m], kind="stable")
        counts = np.array([stages.survivors(int(n)) for n in numbers_table[m][ascending]], np.int64)
        try:
            sums, won = prune_columns(
                [*checks, last],
                values,
                subsets,
                counts,
                combine=combine,
                weights=shares,
                keep_winners=keep_winners,
                labels=labels,
            )
        except NaNRead as error:
            raise NaNRead(error.prompt, error.stage, missing_scores(dataset)) from None
        per_prompt[m, ascending] = np.moveaxis(sums, 1, 2) / iterations
        if winners is not None and won is not None:
            winners[m, ascending] = won
    return Curves(
        methods=tuple(methods),
        rewards=tuple(names),
        budgets=np.asarray(budgets if budgets is not None else [np.nan], dtype=np.float64),
        n=numbers_table,
        spent=spent,
        per_prompt=per_prompt,
        winners=winners,
        level=level,
        boot=bootstrap_means(np.moveaxis(per_prompt, -1, 0), rng, resamples),
    )


make_callable(__name__, simulate)
