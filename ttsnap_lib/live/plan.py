"""What a search will do: its schedule, its cost model and its number of candidates, known without torch or a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ttsnap_lib.checks import MAX_IMAGES, choice, integer
from ttsnap_lib.costs import CostModel, check_n_steps
from ttsnap_lib.errors import BudgetError, ConfigError, CostError, ScheduleError
from ttsnap_lib.schedule import METHODS, Schedule


def planned(
    schedule: Schedule | None,
    budget: float | None,
    candidates: int | None,
    cost: CostModel | str | Path | None,
    method: str | None,
    n_steps: int,
    group: int = 1,
    batch_size: int | None = None,
    together: int = 1,
) -> tuple[Schedule, CostModel | None, int]:
    """Return the schedule, the cost model and how many candidates start: whole groups, as many as the budget buys."""
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ScheduleError(f"schedule: got {schedule!r}, expected a Schedule. Pass Schedule(steps, keep_ratios).")
    schedule = schedule or Schedule()
    schedule.check(n_steps)
    if method is not None and choice("method", method, METHODS) == "best_of_n":
        schedule = Schedule()
    costs = CostModel.load(cost) if isinstance(cost, str | Path) else cost
    if integer("together", together, 1) > 1 and group > 1:
        raise ConfigError(
            f"together with NegToMe: got {together} prompts, expected 1, as it couples the images of a batch. Leave one out."
        )
    size = None if batch_size is None else integer("batch_size", batch_size, 1)
    if isinstance(costs, CostModel):
        costs = replace(costs, prompts_together=together, batch_size=size or costs.batch_size)
    n = _candidates_for(budget, candidates, costs, schedule, n_steps, group)
    if size is not None and size % group:
        raise ConfigError(
            f"batch_size with NegToMe: got {size}, expected a multiple of its group_size, {group}. Set one."
        )
    return schedule, costs, n


def _candidates_for(
    budget: float | None, candidates: int | None, cost: CostModel | None, schedule: Schedule, n_steps: int, group: int
) -> int:
    if (budget is None) == (candidates is None):
        raise BudgetError(
            f"budget and candidates: got {budget} and {candidates}, expected either budget or candidates. Give one."
        )
    if cost is not None:
        check_n_steps(cost, n_steps)
    if budget is None:
        n = integer("candidates", candidates, 1, MAX_IMAGES, error=BudgetError)
        if n % group:
            raise BudgetError(
                f"candidates with NegToMe: got {n}, expected a multiple of its group_size, {group}. The nearest is "
                f"{max(group, round(n / group) * group)}."
            )
        return n
    if cost is None:
        raise CostError(
            "budget without a cost model. Give cost 'auto' (the preset of the model), a preset or a file of `ttsnap cost`, or "
            "candidates instead."
        )
    n = cost.candidates(budget, schedule)
    left = n % group
    n -= left
    while left and n and cost.total(n, schedule) > budget:  # by seconds of batches, fewer may cost more
        n -= group
    if n > MAX_IMAGES:
        raise BudgetError(
            f"budget: got {budget}, expected at most {cost.total(MAX_IMAGES, schedule):.6g} {cost.unit}, {MAX_IMAGES} "
            "candidates. Check the unit of the cost model."
        )
    if n < 1:
        what = "one candidate" if group == 1 else f"one group of {group} candidates"
        raise BudgetError(
            f"budget: got {budget}, expected at least {cost.total(group, schedule):.6g} {cost.unit}, the cost of {what}. "
            "Raise the budget or use fewer steps."
        )
    return n
