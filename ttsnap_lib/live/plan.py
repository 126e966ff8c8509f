"""What a search will do: its schedule, its cost model and its number of candidates, known without torch or a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ttsnap_lib.checks import MAX_IMAGES, choice, integer
from ttsnap_lib.costs import CostModel, check_n_steps
from ttsnap_lib.errors import BudgetError, ConfigError, CostError, ScheduleError
from ttsnap_lib.schedule import METHODS, Draft, Schedule


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
    draft: Draft | None = None,
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
    if draft is not None:
        draft.check(n_steps)
        if len(schedule) or method not in (None, "best_of_n") or group > 1:
            unfit = f"schedule {schedule}" if len(schedule) else f"method {method}" if group == 1 else "NegToMe"
            raise ConfigError(
                f"draft: got one with {unfit}, expected none: a draft is what chooses who runs in full. Leave one out."
            )
    n = _candidates_for(budget, candidates, costs, schedule if draft is None else draft, n_steps, group)
    if size is not None and size % group:
        raise ConfigError(
            f"batch_size with NegToMe: got {size}, expected a multiple of its group_size, {group}. Set one."
        )
    return schedule, costs, n


def as_draft(draft: int | None, finish: int | None) -> Draft | None:
    """Return the draft that its steps and the number of full runs tell; None without one."""
    if (draft is None) != (finish is None):
        raise ConfigError(
            f"draft and finish: got {draft} and {finish}, expected both or none. Give the steps of a draft and how many run "
            "in full."
        )
    return None if draft is None or finish is None else Draft(draft, finish)


def _candidates_for(
    budget: float | None,
    candidates: int | None,
    cost: CostModel | None,
    schedule: Schedule | Draft,
    n_steps: int,
    group: int,
) -> int:
    least = schedule.finish if isinstance(schedule, Draft) else group
    if (budget is None) == (candidates is None):
        raise BudgetError(
            f"budget and candidates: got {budget} and {candidates}, expected either budget or candidates. Give one."
        )
    if cost is not None:
        check_n_steps(cost, n_steps)
    if budget is None:
        n = integer("candidates", candidates, 1, MAX_IMAGES, error=BudgetError)
        if isinstance(schedule, Draft) and n < least:
            raise BudgetError(
                f"candidates: got {n}, expected at least {least}, as many as run in full after the drafts. Draft more, or "
                "finish fewer."
            )
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
        what = "one candidate" if least == 1 else f"one group of {group} candidates"
        if isinstance(schedule, Draft):
            what = f"{least} drafts and as many full runs"
        raise BudgetError(
            f"budget: got {budget}, expected at least {cost.total(least, schedule):.6g} {cost.unit}, the cost of {what}. "
            "Raise the budget or use fewer steps."
        )
    return n
