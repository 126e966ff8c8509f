"""Checks of what goes into a simulation: each returns the value in the form that the loops take, or raises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .checks import choice, integer, real
from .costs import CostModel
from .errors import BudgetError, ConfigError, CostError, ScheduleError, TensorError, TTSnapError
from .schedule import Schedule

__all__ = [
    "COMBINE",
    "candidates_table",
    "check_combine",
    "check_n_steps",
    "check_subsets",
    "checks_array",
    "final_array",
    "missing_scores",
    "numbers_array",
    "random_generator",
    "selecting_rewards",
    "step_positions",
]

COMBINE = ("rank_sum", "z_score", "weighted_sum")


def candidates_table(methods, budgets, numbers, cost, schedule, pool: int) -> tuple[np.ndarray, np.ndarray]:
    """Return candidates and cost, both (method, budget), or raise when a budget buys none or more than the pool."""
    if budgets is not None and not np.iterable(budgets):
        raise BudgetError(
            "budgets", value=budgets, bound="a list of numbers", remedy="Write it as a list, even of one."
        )
    amounts = [real("budget", budget, 0) for budget in budgets] if budgets is not None else list(numbers)
    if not amounts:
        raise BudgetError("budgets", value=amounts, bound="at least one", remedy="Name one budget or more.")
    table = np.empty((len(methods), len(amounts)), np.int64)
    spent = np.full(table.shape, np.nan)
    for m, method in enumerate(methods):
        plan = None if method == "best_of_n" else schedule
        for b, amount in enumerate(amounts):
            n = cost.candidates(amount, plan) if budgets is not None else integer("n", amount, 1, error=BudgetError)
            if n < 1:
                raise BudgetError(
                    f"budget for {method}",
                    value=amount,
                    bound=f"at least {cost.total(1, plan):.6g} {cost.unit}, the cost of one candidate",
                    remedy="Raise the budget, or use a cheaper model, fewer steps or fewer checks.",
                )
            if n > pool:
                wanted = f"budget {amount} buys {n} candidates" if budgets is not None else f"n = {n}"
                largest = "" if cost is None else f" (a budget of {cost.total(pool, plan):.6g} {cost.unit})"
                raise BudgetError(
                    f"{wanted} for {method}",
                    value=n,
                    bound=f"at most {pool}, the images in the pool{largest}",
                    remedy="Lower the budget, or generate and score more images per prompt.",
                )
            table[m, b] = n
            spent[m, b] = np.nan if cost is None else cost.total(n, plan)
    return table, spent


def selecting_rewards(names, report, combine, weights) -> tuple[list[int], np.ndarray | None]:
    """Return the positions of the rewards that select, and their weights in that order."""
    report = [] if report is None else [report] if isinstance(report, str) else list(report)
    for name in report:
        choice("report", name, names)
    selecting = [k for k, name in enumerate(names) if name not in report]
    if not selecting:
        raise ConfigError(
            "report", value=report, bound=f"fewer than all of {names}", remedy="Leave one reward to select by."
        )
    if isinstance(weights, Mapping):
        chosen = [names[k] for k in selecting]
        for name in (*weights, *chosen):
            choice("weights", name, chosen)
            choice("reward with a weight", name, list(weights))
        weights = [weights[name] for name in chosen]
    return selecting, check_combine(combine, weights, len(selecting))


def check_combine(combine: str, weights: Sequence[float] | None, n_rewards: int) -> np.ndarray | None:
    choice("combine", combine, COMBINE)
    if (weights is not None) != (combine == "weighted_sum"):
        raise ConfigError(
            f"weights with combine={combine!r}",
            value=weights,
            bound="weights for weighted_sum, none otherwise",
            remedy="Set combine='weighted_sum' and give one weight per selecting reward.",
        )
    if weights is None:
        return None
    checked = np.array([real("weights", weight) for weight in weights])
    if len(checked) != n_rewards:
        raise ConfigError(
            "weights", value=list(weights), bound=f"{n_rewards} numbers", remedy="Give one weight per selecting reward."
        )
    return checked


def numbers_array(name: str, value: Any, error: type[TTSnapError]) -> np.ndarray:
    """Return `value` as an array of real numbers."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as failure:  # rows of different lengths
        raise error(name, value=value, bound="numbers in rows of equal length", remedy="Fill the rows up.") from failure
    if array.dtype.kind not in "fiu":
        raise error(
            name,
            value=f"shape {array.shape} of {array.dtype}",
            bound="numbers, integers where indices are meant",
            remedy="Convert it with .astype(float) or .astype(int) where that is meant.",
        )
    return array


def missing_scores(dataset: Any) -> list[str]:
    """Return the scores that a reward tensor lacks, as text."""
    base, aware = (dataset[name].transpose("reward", "prompt", "image", "step") for name in ("base", "noise_aware"))
    rewards, prompts, images, steps = (base[dim].values for dim in base.dims)
    return [
        f"{rewards[r]}: prompt {prompts[p]}, image {images[i]}, step {steps[s]}"
        for r, p, i, s in np.argwhere(np.isnan(base.values) | np.isnan(aware.values)).tolist()
    ]


def random_generator(rng: Any) -> np.random.Generator:
    """Return `rng` as a generator; None is 0."""
    if isinstance(rng, np.random.Generator):
        return rng
    return np.random.default_rng(integer("rng (a seed, or a numpy.random.Generator)", 0 if rng is None else rng, 0))


def check_n_steps(cost: CostModel | None, steps: np.ndarray) -> None:
    if cost is not None and cost.n_steps != int(steps[-1]) + 1:
        raise CostError(
            "cost.n_steps",
            value=cost.n_steps,
            bound=f"{int(steps[-1]) + 1}, the steps of the reward tensor",
            remedy=f"Use a cost model with n_steps={int(steps[-1]) + 1} (dataclasses.replace changes one field).",
        )


def step_positions(schedule: Schedule, steps: np.ndarray) -> list[int]:
    """Return where the schedule's steps stand on the step axis."""
    schedule.check(int(steps[-1]) + 1)
    where = {int(step): position for position, step in enumerate(steps)}
    for step in schedule.steps:
        if step not in where:
            raise ScheduleError(
                "schedule.steps",
                value=step,
                bound=f"one of the scored steps {sorted(where)}",
                remedy="Score that step, or prune at another.",
            )
    return [where[step] for step in schedule.steps]


def checks_array(rewards: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return rewards as (prompt, image, step, reward), and the step coordinate."""
    steps = None
    if hasattr(rewards, "dims"):
        known = ("prompt", "image", "step", "reward")
        missing = [dim for dim in known[:3] if dim not in rewards.dims]
        if missing or set(rewards.dims) - set(known):
            raise TensorError(
                "dims of rewards",
                value=rewards.dims,
                bound="prompt, image, step and perhaps reward",
                remedy="Select one variable of the tensor, e.g. dataset['noise_aware'].",
            )
        if "step" in rewards.coords:
            steps = rewards["step"].values
        rewards = rewards.transpose(*(dim for dim in known if dim in rewards.dims)).values
    array = numbers_array("rewards", rewards, TensorError)
    if array.ndim == 3:
        array = array[:, :, :, None]
    if array.ndim != 4 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise TensorError(
            "rewards",
            value=f"shape {array.shape} of {array.dtype}",
            bound="numbers of shape (prompt, image, step) or (prompt, image, step, reward)",
            remedy="Order the axes so, or pass a DataArray with named dims.",
        )
    return array, np.arange(array.shape[2]) if steps is None else steps


def final_array(final: Any, shape: tuple[int, ...]) -> np.ndarray:
    if hasattr(final, "dims"):
        final = final.transpose(*(dim for dim in ("prompt", "image", "reward") if dim in final.dims)).values
    final = numbers_array("final", final, TensorError)
    if final.ndim == 2:
        final = final[:, :, None]
    if final.shape != (shape[0], shape[1], shape[3]):
        raise TensorError(
            "final",
            value=final.shape,
            bound=f"shape {(shape[0], shape[1])} or {(shape[0], shape[1], shape[3])}",
            remedy="Pass the clean-image rewards of the same prompts, images and rewards.",
        )
    return final


def check_subsets(subsets: Any, pool: int) -> np.ndarray:
    array = numbers_array("subsets", subsets, BudgetError)
    bound = f"integers of shape (iteration, n), distinct within a row, in [0, {pool - 1}]"
    remedy = "Draw them with rng.permuted(np.tile(np.arange(pool), (iterations, 1)), axis=1)[:, :n]."
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "iu":
        raise BudgetError("subsets", value=f"shape {array.shape} of {array.dtype}", bound=bound, remedy=remedy)
    if array.min() < 0 or array.max() >= pool:
        raise BudgetError(
            "subsets", value=int(array.min() if array.min() < 0 else array.max()), bound=bound, remedy=remedy
        )
    ordered = np.sort(array, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        row = int(np.argmax((ordered[:, 1:] == ordered[:, :-1]).any(1)))
        raise BudgetError(f"subsets, row {row}: repeated image", value=array[row].tolist(), bound=bound, remedy=remedy)
    return np.ascontiguousarray(array, np.int64)
