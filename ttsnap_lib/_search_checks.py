"""Checks of what goes into an online run, before any model is loaded or run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from .checks import choice, integer
from .costs import CostModel
from .errors import BudgetError, ConfigError, CostError, ScheduleError
from .negtome import NegToMe
from .schedule import Schedule
from .simulate import METHODS
from .trajectories import MAX_IMAGES

__all__ = ["candidates_for", "check_negtome", "check_schedule", "method_for", "variants_for"]


def check_schedule(schedule: Any, n_steps: int) -> Schedule:
    """Return a schedule that fits the loop; None is the empty one."""
    schedule = Schedule() if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise ScheduleError(
            "schedule", value=schedule, bound="a Schedule or None", remedy="Pass Schedule(steps, keep_ratios)."
        )
    schedule.check(n_steps)
    return schedule


def method_for(method: str | None, schedule: Schedule, selecting: Sequence[Any]) -> str:
    """Return the method: what was asked for when it can be, else what schedule and rewards suggest."""
    aware = any(one.adapter_steps for one in selecting)
    if method is None:
        return "best_of_n" if not len(schedule) else "ttsnap" if aware else "ttsp"
    choice("method", method, METHODS)
    if method == "ttsnap" and len(schedule) and not aware:
        raise ConfigError(
            "method ttsnap with a base reward", value=[one.name for one in selecting],
            bound="a reward with noise-aware weights",
            remedy="Load it with load_reward(..., adapters=<folder of ttsnap finetune>), or use method='ttsp'.",
        )  # fmt: skip
    return method


def variants_for(method: str, schedule: Schedule, rewards: Sequence[Any]) -> list[str]:
    """Return per check, the clean image last, whether noise-aware weights are used there or the base ones."""
    aware = {step for one in rewards for step in one.adapter_steps} if method == "ttsnap" else set()
    return [*("noise_aware" if step in aware else "base" for step in schedule.steps), "base"]


def candidates_for(
    budget: float | None, candidates: int | None, cost: CostModel | None, schedule: Schedule, n_steps: int, group: int
) -> int:
    """Return how many candidates are started: as many as the budget buys, in whole groups."""
    if (budget is None) == (candidates is None):
        raise BudgetError(
            "search", value={"budget": budget, "candidates": candidates}, bound="either budget or candidates",
            remedy="Give exactly one of them.",
        )  # fmt: skip
    if cost is not None and not isinstance(cost, CostModel):
        raise CostError("cost", value=cost, bound="a CostModel, a preset's name or a file", remedy="Pass one of them.")
    if cost is not None and cost.n_steps != n_steps:
        raise CostError(
            "cost.n_steps", value=cost.n_steps, bound=f"{n_steps}, the steps of this run",
            remedy=f"Use a cost model with n_steps={n_steps}, or Settings(n_steps={cost.n_steps}).",
        )  # fmt: skip
    if candidates is not None:
        n = integer("candidates", candidates, 1, MAX_IMAGES, error=BudgetError)
        if n % group:
            raise BudgetError(
                "candidates with NegToMe", value=n, bound=f"a multiple of its group_size, {group}",
                remedy=f"The nearest is {max(group, round(n / group) * group)}.",
            )  # fmt: skip
        return n
    if cost is None:
        raise CostError(
            "budget without a cost model", value=cost, bound="a CostModel",
            remedy="Measure one with `ttsnap cost`, name a preset, or give candidates instead.",
        )  # fmt: skip
    n = cost.candidates(cast("float", budget), schedule) // group * group
    if n > MAX_IMAGES:
        raise BudgetError(
            "budget", value=budget, bound=f"at most {cost.total(MAX_IMAGES, schedule):.6g} {cost.unit}, {MAX_IMAGES} "
            "candidates", remedy="Check the unit of the cost model.",
        )  # fmt: skip
    if n < 1:
        what = "one candidate" if group == 1 else f"one group of {group} candidates"
        raise BudgetError(
            "budget", value=budget, bound=f"at least {cost.total(group, schedule):.6g} {cost.unit}, the cost of {what}",
            remedy="Raise the budget or use fewer steps.",
        )  # fmt: skip
    return n


def check_negtome(negtome: NegToMe | None, schedule: Schedule, denoiser: Any) -> None:
    """Refuse to prune where NegToMe still couples the candidates of a batch."""
    if negtome is None or not len(schedule):
        return
    window = negtome.active_steps(denoiser.pipeline, denoiser.timesteps)
    if window and schedule.steps[0] < window[-1]:
        raise ScheduleError(
            "pruning inside the window of NegToMe", value=schedule.steps[0], bound=f"steps of at least {window[-1]}",
            remedy="Prune later, narrow the window, or search without NegToMe.",
        )  # fmt: skip
