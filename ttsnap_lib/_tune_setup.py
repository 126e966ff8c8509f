"""Checks of what goes into a tuning run, and the arrays and the space that come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import tensors
from ._goals import OBJECTIVES, Goals, check_budgets
from ._inputs import candidates_table, check_n_steps, selecting_rewards
from ._scoring import Selection
from ._search_space import SearchSpace
from .checks import choice, integer, real
from .costs import CostModel
from .errors import BudgetError, ConfigError, CostError, ScheduleError, TensorError
from .schedule import PUBLISHED_SCHEDULE, Schedule
from .simulate import MOST_DRAWS

__all__ = ["Setup", "allowed_steps", "make_setup", "split_prompts"]

VARIABLE = {"ttsp": "base", "ttsnap": "noise_aware"}
_TRIALS = {"area": 3000, "single": 3000, "frontier": 10000}


@dataclass(frozen=True)
class Setup:
    """A tuning run, checked: values in memory, who tunes and who tests, what may be tried and what for."""

    checks: np.ndarray  # (prompt, image, step, reward), the rewards that a check reads
    steps: tuple[int, ...]  # of the third axis
    final: np.ndarray  # (prompt, image, reward)
    names: tuple[str, ...]
    tune: np.ndarray
    test: np.ndarray
    selection: Selection
    goals: Goals
    space: SearchSpace
    published: Schedule | None
    n_trials: int
    iterations: int

    def arrays(self, prompts: np.ndarray) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
        """Return what a :class:`~ttsnap_lib._scoring.Scorer` of some prompts takes."""
        return self.checks[prompts], self.steps, self.final[prompts]


def make_setup(
    dataset: Any,
    cost: CostModel,
    budgets: Sequence[float] | np.ndarray | float,
    method: str,
    *,
    tune: Sequence[int] | None,
    test: Sequence[int] | None,
    objective: str,
    n_trials: int | None,
    time_limit_s: float | None,
    max_stages: int,
    iterations: int,
    combine: str,
    weights: Mapping[str, float] | Sequence[float] | None,
    report: Sequence[str] | None,
    copied_steps: bool,
    prompts: np.ndarray | None = None,
) -> Setup:
    """Check the arguments of ``optimize_schedule`` and read the tensor once; `prompts` stand for tune and test both."""
    choice("method", method, VARIABLE)
    choice("objective", objective, OBJECTIVES)
    if not isinstance(cost, CostModel):
        raise CostError("cost", value=cost, bound="a CostModel", remedy="Pass CostModel.preset('flux-512+pickscore').")
    n_trials = integer("n_trials", _TRIALS[objective] if n_trials is None else n_trials, 1)
    if time_limit_s is not None:
        real("time_limit_s", time_limit_s, 0, open_low=True)
    iterations = integer("iterations", iterations, 1, MOST_DRAWS)
    max_stages = integer("max_stages", max_stages, 0)
    amounts = np.array([real("budget", b, 0, error=BudgetError) for b in np.atleast_1d(np.asarray(budgets, object))])
    check_budgets(objective, amounts)
    tensors.check_rewards(dataset)
    names = [str(name) for name in dataset["reward"].values]
    selecting, shares = selecting_rewards(names, report, combine, weights)
    scored = [int(step) for step in dataset["step"].values]
    check_n_steps(cost, dataset["step"].values)
    pool = dataset.sizes["image"]
    n = candidates_table(["best_of_n"], amounts, None, cost, None, pool)[0][0]
    if objective == "single" and n[0] < 2:
        raise BudgetError(
            "budget for objective 'single'",
            value=float(amounts[0]),
            bound=f"at least {cost.total(2):.6g} {cost.unit}, two Best-of-N candidates",
            remedy="Raise the budget: the gain is told in percent of what Best-of-N gains over one candidate.",
        )
    if prompts is None:
        tune_at, test_at = split_prompts(dataset.sizes["prompt"], tune, test)
    else:
        tune_at = test_at = prompts
    allowed = allowed_steps(dataset, method, selecting, copied_steps)
    space = SearchSpace(tuple(allowed), max_stages, cost, amounts, pool)
    published = _published(scored, space)

    wanted = sorted({*allowed, *(published.steps if published is not None else ())})
    checks = tensors.read_steps(dataset[VARIABLE[method]], [scored.index(step) for step in wanted])
    final = tensors.read_steps(dataset["base"], [-1])[:, :, 0, :]
    read = np.concatenate([tune_at, test_at])
    for name, values in (("final rewards", final[read]), (f"{method} rewards at the checks", checks[read])):
        if np.isnan(values).any():
            raise TensorError(
                f"{name} of prompt {int(read[np.argwhere(np.isnan(values))[0][0]])}",
                value=float("nan"),
                bound="a number for every image, at every step that a schedule may check",
                remedy="Score the missing images, or drop them with tensors.drop_missing().",
            )
    merit = np.zeros(len(names))
    if shares is not None:
        merit[selecting] = shares
    else:  # in units of the spread within a prompt, so that no reward counts for more by its scale
        spread = final[tune_at].std(axis=1).mean(0)[selecting]
        merit[selecting] = 1 / np.where(spread > 0, spread, 1.0) / len(selecting) if len(selecting) > 1 else 1.0
    return Setup(
        checks=checks,
        steps=tuple(wanted),
        final=final,
        names=tuple(names),
        tune=tune_at,
        test=test_at,
        selection=Selection(tuple(selecting), combine, shares, merit),
        goals=Goals(objective, amounts, n),
        space=space,
        published=published,
        n_trials=n_trials,
        iterations=iterations,
    )


def split_prompts(
    n_prompts: int, tune: Sequence[int] | None, test: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return positions that tune and positions that test; even and odd ones when nothing is named."""
    everyone = np.arange(n_prompts)
    if n_prompts < 2:
        raise ConfigError(
            "prompts", value=n_prompts, bound="two or more, to tune on some and test on others", remedy="Score more."
        )
    named = {}
    for name, given in (("tune", tune), ("test", test)):
        if given is None:
            continue
        positions = [integer(f"{name} prompt", k, 0, n_prompts - 1) for k in np.asarray(given).ravel().tolist()]
        if not positions or len(set(positions)) != len(positions):
            raise ConfigError(
                name, value=positions, bound="prompt positions, each once", remedy=f"Name one prompt or more in {name}."
            )
        named[name] = np.array(positions)
    if not named:
        return everyone[::2], everyone[1::2]
    for name, other in (("tune", "test"), ("test", "tune")):
        if name not in named:
            named[name] = np.setdiff1d(everyone, named[other])
    shared = np.intersect1d(named["tune"], named["test"])
    if len(shared) or not len(named["tune"]) or not len(named["test"]):
        raise ConfigError(
            "tune and test",
            value=shared.tolist() or "all prompts in one of them",
            bound="two groups of prompts without overlap, neither empty",
            remedy="Tune on some prompts and test on the others, for instance even and odd ones.",
        )
    return named["tune"], named["test"]


def allowed_steps(dataset: Any, method: str, selecting: Sequence[int], copied_steps: bool) -> list[int]:
    """Return the steps at which a check may stand: scored, not the last, for ttsnap with a noise-aware reward."""
    steps = [int(step) for step in dataset["step"].values[:-1]]
    if method == "ttsnap" and not copied_steps and "noise_aware_source" in dataset:
        source = dataset["noise_aware_source"].transpose("reward", "step").values[list(selecting), :-1]
        steps = [step for step, names in zip(steps, source.T, strict=True) if not (names == tensors.COPIED).any()]
        if not steps:
            raise ScheduleError(
                "steps with a noise-aware reward",
                value=[],
                bound="one or more of a finetuned reward",
                remedy="Score with a noise-aware checkpoint, or tune method 'ttsp' on the base reward.",
            )
    return steps


def _published(scored: Sequence[int], space: SearchSpace) -> Schedule | None:
    if not set(PUBLISHED_SCHEDULE.steps) <= set(scored[:-1]) or not space.feasible(PUBLISHED_SCHEDULE).all():
        return None
    return PUBLISHED_SCHEDULE
