"""Best-of-N, TTSp and TTSnap on reward tensors: arrays in, arrays or tidy frames out.

TTSp and TTSnap are the same pruning; TTSp reads the ``base`` variable at the checks, TTSnap the ``noise_aware`` one,
and both choose at the end by the base reward of the clean image (paper, section 3). All methods, budgets and rewards
of one call see the same random subsets, nested across budgets, so that their differences are paired.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ttsnap_lib.checks import choice, integer, real
from ttsnap_lib.costs import CostModel, check_n_steps
from ttsnap_lib.errors import BudgetError, ConfigError, ScheduleError
from ttsnap_lib.schedule import METHODS, PUBLISHED_SCHEDULE, Draft, Schedule, selecting_rewards
from ttsnap_lib.simulation.draft import Drafts
from ttsnap_lib.simulation.metrics import (
    bootstrap_means,
    jackknife_interval,
    leave_one_out,
    mean_interval,
    relative_gain_of,
)
from ttsnap_lib.simulation.pruning import NaNRead, prune_columns, step_positions
from ttsnap_lib.tensors.spread import tell_spreads
from ttsnap_lib.tensors.tensor import RepeatedImagesWarning, check_rewards, drop_repeats, read_steps, repeated_images

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

VARIABLE = {"ttsp": "base", "ttsnap": "noise_aware"}  # what a method reads at its checks

# Tensors that were looked at for repeats: each is told of once.
_SEEN: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_LADDER = 1.3  # from one number of candidates of the Best-of-N curve to the next, beside those of the budgets

# Most subsets, and most bootstrap samples: beyond, their tables fill the memory and no figure changes.
MOST_DRAWS = 10_000_000


@dataclass(frozen=True)
class Simulation:
    """One method at one budget; arrays have one row per reward.

    Attributes
    ----------
    method : str
    rewards : tuple of str
    mean, low, high : float64 (reward,), the mean over prompts and iterations with its interval over prompts
    per_prompt : float64 (reward, prompt)
    winners : int64 (iteration, prompt), image indices
    n : int
    budget, spent : float, in the cost model's unit; NaN without a cost model
    """

    method: str
    rewards: tuple[str, ...]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    per_prompt: np.ndarray
    winners: np.ndarray
    n: int
    budget: float
    spent: float


def simulate(
    dataset: xr.Dataset,
    method: str | Drafts,
    *,
    budget: float | None = None,
    n: int | None = None,
    cost: CostModel | None = None,
    schedule: Schedule | None = None,
    **options: Any,
) -> Simulation:
    """Simulate one method at one budget (or with `n` candidates) by Monte Carlo over random subsets.

    Parameters
    ----------
    dataset : xarray.Dataset
        A reward tensor. All its rewards select jointly, except those in `report`.
    method : {"best_of_n", "ttsp", "ttsnap"} or Drafts
    budget : float, optional
        Compute per prompt in the unit of `cost`. Exactly one of `budget` and `n` is given.
    n : int, optional
        Candidates per prompt.
    cost : CostModel, optional
        Needed with `budget`.
    schedule : Schedule, optional
        Needed by ``ttsp`` and ``ttsnap``, not read by ``best_of_n``.
    options : Any
        Further ones, shared with :func:`sweep`:
        ``iterations`` (50), random subsets drawn for each prompt, equal for equal `rng` whatever the method and budget;
        ``rng``, a numpy.random.Generator (it is advanced) or a seed (0), of the subsets and of the bootstrap;
        ``combine`` and ``weights`` as in :func:`prune`, where weights may name the rewards;
        ``report``, rewards measured on the winner without taking part in the choice (reward hacking shows there);
        ``distinct`` (False), to leave out repeated trajectories, as in :func:`import_published`;
        ``level`` (0.95) and ``resamples`` (1000) of the bootstrap over prompts.

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
    result = curves(
        dataset, [method], None if budget is None else [budget], cost, schedule, n=None if n is None else [n],
        baseline=False, reach=False, keep_winners=True, **options,
    )  # fmt: skip
    low, high = result.interval(result.per_prompt.mean(-1), result.boot)
    return Simulation(
        method=str(method),
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
    methods: Sequence[str | Drafts],
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
    methods : sequence of {"best_of_n", "ttsp", "ttsnap"} or :class:`ttsnap_lib.simulation.draft.Drafts`
    budgets : (budget,)
        Compute per prompt, in the unit of `cost`.
    cost : CostModel
    schedule : Schedule, optional
        For the methods that prune.
    options : Any
        Further ones of :func:`simulate`: iterations, rng, combine, weights, report, distinct, level, resamples.

    Returns
    -------
    pandas.DataFrame
        Tidy: method, reward, budget, n, spent, mean, low, high, gain, gain_low, gain_high, where gain is the
        difference to Best-of-N on the same subsets with its paired interval.
    """
    frame = curves(dataset, methods, budgets, cost, schedule, reach=False, **options).frame()
    return frame[frame["method"].isin([str(method) for method in methods])].reset_index(drop=True)


@dataclass(frozen=True)
class Curves:
    """Mean reward of several methods at several budgets, per prompt, on shared subsets.

    The ladder is Best-of-N's own curve from one candidate to the whole pool, empty where it was not asked for.
    """

    methods: tuple[str, ...]
    rewards: tuple[str, ...]
    budgets: np.ndarray  # float64 (budget,), in the unit of the cost model
    n: np.ndarray  # int64 (method, budget), candidates per prompt
    spent: np.ndarray  # float64 (method, budget), cost per prompt, at most the budget
    per_prompt: np.ndarray  # float64 (method, budget, reward, prompt), mean over iterations of the winner's reward
    winners: np.ndarray | None  # int64 (method, budget, iteration, prompt)
    level: float  # of the intervals
    boot: np.ndarray  # float64 (resample, method, budget, reward), means over resampled prompts, the same for all
    ladder_spent: np.ndarray  # float64 (point,), costs of the ladder's points
    ladder: np.ndarray  # float64 (point, reward, prompt), what Best-of-N gets there, on the same subsets
    ladder_boot: np.ndarray  # float64 (resample, point, reward), on the same resamples

    def interval(self, mean: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Return the interval (low, high) of means, or of their differences, from bootstrap `samples` (resample, ...)."""
        return mean_interval(mean, samples, self.per_prompt.shape[-1], self.level)

    def frame(self) -> pd.DataFrame:
        """Return one row per method, reward and budget; ``gain`` is the paired difference to Best-of-N."""
        import pandas as pd

        mean = self.per_prompt.mean(-1)
        low, high = self.interval(mean, self.boot)
        baseline = self.methods.index("best_of_n")
        gain = mean - mean[[baseline]]
        gain_low, gain_high = self.interval(gain, self.boot - self.boot[:, [baseline]])
        rows = []
        for m, method in enumerate(self.methods):
            for r, reward in enumerate(self.rewards):
                for b, budget in enumerate(self.budgets):
                    at = (m, b, r)
                    cost = (budget, self.n[m, b], self.spent[m, b])
                    rows.append(
                        (method, reward, *cost, mean[at], low[at], high[at], gain[at], gain_low[at], gain_high[at])
                    )
        names = ["method", "reward", "budget", "n", "spent", "mean", "low", "high", "gain", "gain_low", "gain_high"]
        return pd.DataFrame(rows, columns=names)

    def relative_gains(self) -> pd.DataFrame:
        """Return the area metric of each method and reward against Best-of-N, in percent, with its interval."""
        import pandas as pd

        rows = []
        for (method, reward), without in self.gains_without().groupby(["method", "reward"], sort=False):
            mean = self.per_prompt[:, :, self.rewards.index(str(reward))].mean(-1)
            base, own = (mean[self.methods.index(name)] for name in ("best_of_n", str(method)))
            gain = float(relative_gain_of(self.budgets, own, base))
            low, high = jackknife_interval(gain, without["relative_gain"].to_numpy(), self.level)
            rows.append((method, reward, gain, float(low), float(high)))
        return pd.DataFrame(rows, columns=["method", "reward", "relative_gain", "low", "high"])

    def gains_without(self) -> pd.DataFrame:
        """Return the gains of :meth:`relative_gains` without each prompt: method, reward, prompt (its place), relative_gain.

        By their differences two simulations on the same prompts are compared, paired.
        """
        import pandas as pd

        base = self.methods.index("best_of_n")
        without = leave_one_out(np.moveaxis(self.per_prompt, -1, 0))
        parts = [pd.DataFrame(columns=["method", "reward", "prompt", "relative_gain"])]
        for m, method in enumerate(self.methods):
            for r, reward in enumerate(self.rewards) if m != base else ():
                gains = relative_gain_of(self.budgets, without[:, m, :, r], without[:, base, :, r], strict=False)
                columns = {"method": method, "reward": reward, "prompt": range(len(gains)), "relative_gain": gains}
                parts.append(pd.DataFrame(columns))
        return pd.concat(parts[1:] or parts, ignore_index=True)

    def needs(self) -> pd.DataFrame:
        """Return the compute that Best-of-N needs for the mean reward of each method, and the share that is saved.

        Columns method, reward, budget, needs, needs_low, needs_high, saved, saved_low, saved_high. A bound is where the
        interval of the paired difference to Best-of-N begins or ceases to hold 0, linear between numbers of candidates.
        ``needs`` is infinite where even the whole pool does not get there, 0 where one candidate is more than enough.
        ``saved`` is ``1 - spent / needs``, negative where the method is worse; beyond the pool it is not known (NaN),
        and its bounds are what the pool vouches for.
        """
        import pandas as pd

        if not len(self.ladder_spent):
            raise ConfigError(
                "curves: got some without Best-of-N over the whole pool. Make them with a cost and reach=True."
            )
        base = self.methods.index("best_of_n")
        rows = []
        for m, method in enumerate(self.methods):
            for r, reward in enumerate(self.rewards) if m != base else ():
                mean, best = self.per_prompt[m, :, r].mean(-1), self.ladder[:, r].mean(-1)
                ahead = mean[:, None] - best  # (budget, point)
                samples = self.boot[:, m, :, r, None] - self.ladder_boot[:, None, :, r]
                bounds = np.stack([ahead, *self.interval(ahead, samples)])
                for b, budget in enumerate(self.budgets):
                    needs = [falls_to_zero(self.ladder_spent, bound[b]) for bound in bounds]
                    known = needs[0] if 0 < needs[0] < np.inf else np.nan
                    ends = np.fmin(needs[1], self.ladder_spent[-1]), max(needs[2], self.ladder_spent[0])
                    saved = [1 - self.spent[m, b] / value if value else -np.inf for value in (known, *ends)]
                    rows.append((method, reward, budget, *needs, *saved))
        names = [f"{what}{end}" for what in ("needs", "saved") for end in ("", "_low", "_high")]
        return pd.DataFrame(rows, columns=["method", "reward", "budget", *names])


def curves(
    dataset: xr.Dataset,
    methods: Sequence[Any],
    budgets: Sequence[float] | None,
    cost: CostModel | None,
    schedule: Schedule | None = None,
    *,
    n: Sequence[int] | None = None,
    iterations: int = 50,
    rng: np.random.Generator | int | None = None,
    combine: str = "rank_sum",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    report: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    distinct: bool = False,
    keep_winners: bool = False,
    baseline: bool = True,
    reach: bool = True,
) -> Curves:
    """Return what :func:`sweep` tabulates, with the values per prompt and the area metric's interval.

    Candidates `n` may stand instead of `budgets`. Best-of-N always runs along as the baseline, unless that is false, and,
    for :meth:`Curves.needs`, over the whole pool, unless `reach` is false. With `distinct` winners are indices of the
    pool as it was given.
    """
    drafts = {str(method): method for method in methods if isinstance(method, Drafts)}
    methods = [methods] if isinstance(methods, str) else [str(method) for method in methods]
    for method in methods:
        if method in drafts:
            continue
        choice("method", method, METHODS)
        if method != "best_of_n" and not isinstance(schedule, Schedule):
            raise ScheduleError(
                f"{method} without a schedule: got {schedule!r}, expected a Schedule. Pass "
                "schedule=PUBLISHED_SCHEDULE, one of optimize_schedule(), or Schedule() for no pruning."
            )
    if not methods:
        raise ConfigError(f"methods: got {methods!r}, expected one or more of {METHODS}. Name one.")
    if baseline and "best_of_n" not in methods:
        methods = ["best_of_n", *methods]
    if (budgets is None) == (n is None):
        raise ConfigError(f"budget and n: got {(budgets, n)}, expected either budget or n. Give exactly one of them.")
    iterations = integer("iterations", iterations, 1, MOST_DRAWS)
    resamples = integer("resamples", resamples, 1, MOST_DRAWS)
    level = real("level", level, 0, 1, open_low=True)
    check_rewards(dataset)
    given, dataset = dataset, drop_repeats(dataset) if distinct else dataset
    drafted = {name: one.beside(dataset) for name, one in drafts.items()}
    steps = dataset["step"].values
    if cost is not None or budgets is not None:
        check_n_steps(cost, int(steps[-1]) + 1)
    names = [str(name) for name in dataset["reward"].values]
    selecting, shares = selecting_rewards(names, report, combine, weights)
    n_prompts, pool = dataset.sizes["prompt"], dataset.sizes["image"]
    candidates, spent = candidates_table(methods, budgets, n, cost, schedule, pool, drafts)
    pruning = set(methods) & {"ttsp", "ttsnap"}
    positions = step_positions(schedule, steps) if schedule is not None and pruning else []
    if not isinstance(rng, np.random.Generator):
        rng = integer("rng (a seed, or a numpy.random.Generator)", 0 if rng is None else rng, 0)
    rng = np.random.default_rng(rng)
    subsets = rng.permuted(np.tile(np.arange(pool), (iterations, 1)), axis=1)
    # Subsets of their own for every prompt: with one table for all, what a subset happens to hold (repeated images,
    # say) would move all prompts together and the mean would not settle with their number.
    labels = rng.permuted(np.tile(np.arange(pool), (n_prompts, 1)), axis=1)

    values = read_steps(dataset["base"], [-1])[:, :, 0, :]
    tell_repeats(dataset, values)
    tell_spreads(values, names, selecting, shares)
    if positions and cost is not None:
        tell_tiny_checks(dataset, cost)
    shape = candidates.shape
    per_prompt = np.empty((*shape, len(names), n_prompts))
    winners = np.empty((*shape, iterations, n_prompts), np.int64) if keep_winners else None
    for m, method in enumerate(methods):
        stages: Schedule | Draft = Schedule()
        columns = [values[:, :, selecting]]
        if method in drafts:
            stages = drafts[method].plan
            columns = [drafted[method][:, :, selecting], *columns]
        elif method != "best_of_n" and schedule is not None and positions:
            stages = schedule
            block = read_steps(dataset[VARIABLE[method]], positions)
            columns = [*(block[:, :, k, :][:, :, selecting] for k in range(len(positions))), *columns]
        ascending = np.argsort(candidates[m], kind="stable")
        counts = np.array([stages.survivors(int(k)) for k in candidates[m][ascending]], np.int64)
        try:
            sums, won = prune_columns(
                columns, values, subsets, counts, combine=combine, weights=shares, keep_winners=keep_winners,
                labels=labels,
            )  # fmt: skip
        except NaNRead as error:
            raise NaNRead(error.prompt, error.stage, _missing_scores(dataset)) from None
        per_prompt[m, ascending] = np.moveaxis(sums, 1, 2) / iterations
        if winners is not None and won is not None:
            winners[m, ascending] = won
    if winners is not None and distinct:
        winners = np.searchsorted(given["image"].values, dataset["image"].values)[winners]
    best, wanted = np.empty((0, len(names), n_prompts)), np.empty(0, np.int64)
    if reach and baseline and cost is not None:
        best, wanted = _ladder(
            values, selecting, candidates[methods.index("best_of_n")], subsets, labels, combine, shares
        )
    table = [np.moveaxis(part, -1, 0) for part in (per_prompt, best)]
    boot = bootstrap_means(np.concatenate([part.reshape(n_prompts, -1) for part in table], axis=1), rng, resamples)
    split = table[0][0].size
    return Curves(
        methods=tuple(methods),
        rewards=tuple(names),
        budgets=np.asarray([np.nan] if budgets is None else budgets, dtype=np.float64),
        n=candidates,
        spent=spent,
        per_prompt=per_prompt,
        winners=winners,
        level=level,
        boot=boot[:, :split].reshape(resamples, *table[0].shape[1:]),
        # With seconds by batch a larger N may cost less than a smaller one, which then nobody runs.
        ladder_spent=np.minimum.accumulate([cast("CostModel", cost).total(int(k)) for k in wanted[::-1]])[::-1],
        ladder=best,
        ladder_boot=boot[:, split:].reshape(resamples, *table[1].shape[1:]),
    )


def rungs(pool: int) -> np.ndarray:
    """Return the numbers of candidates, int64 (point,), at which Best-of-N's curve up to the whole pool is known."""
    return np.unique(np.geomspace(1, pool, 2 + int(np.log(pool) / np.log(_LADDER))).round().astype(np.int64))


def _ladder(values, selecting, numbers, subsets, labels, combine, shares) -> tuple[np.ndarray, np.ndarray]:
    """Return Best-of-N's mean rewards (point, reward, prompt) and numbers of candidates, one to the whole pool."""
    pool = values.shape[1]
    for wanted in (np.union1d(rungs(pool), numbers), np.unique(numbers)):
        try:
            sums, _ = prune_columns(
                [values[:, :, selecting]],
                values,
                subsets,
                wanted[:, None],
                combine=combine,
                weights=shares,
                labels=labels,
            )
        except NaNRead:  # a pool scored in part: as far as the budgets go, which have been read
            continue
        break
    return np.moveaxis(sums, 1, 2) / len(subsets), wanted


def falls_to_zero(costs: np.ndarray, ahead: np.ndarray) -> float:
    """Return the cost at which a lead over Best-of-N, falling with its cost, is used up; 0 or infinite beyond the ends."""
    lead = np.minimum.accumulate(ahead)
    if np.isnan(lead).any():
        return np.nan
    # numpy wants increasing abscissae: the lead from its end to its beginning
    return float(np.interp(0.0, lead[::-1], costs[::-1], left=np.inf, right=0.0))


def tell_repeats(dataset: Any, final: np.ndarray) -> None:
    """Warn, once for each tensor, when it repeats trajectories; `final` (prompt, image, reward) are its last rewards."""
    if _SEEN.get(id(dataset)) is dataset:
        return
    _SEEN[id(dataset)] = dataset
    told = repeats(dataset, final)
    if told:
        warnings.warn(told, RepeatedImagesWarning, stacklevel=3)


def repeats(dataset: Any, final: np.ndarray) -> str:
    """Say how many trajectories of a tensor are distinct; empty when all that are scored are."""
    rows = np.moveaxis(final, 1, 0).reshape(final.shape[1], -1)
    scored = ~np.isnan(rows).any(1)
    # Repeats end alike: only then the whole tensor is read.
    if len(np.unique(rows[scored], axis=0)) == scored.sum():
        return ""
    whole = dataset.isel(image=scored)
    n_images, n_distinct = whole.sizes["image"], len(np.unique(repeated_images(whole)))
    return (
        f"this pool repeats itself: {n_distinct} distinct trajectories of {n_images} per prompt, so random subsets draw "
        "repeats; distinct=True (--distinct) leaves them out"
    ) * (n_distinct < n_images)


class TinyChecksWarning(UserWarning):
    """Checks are charged as if another decoder made them than the one that the scores were made through."""


def as_published(dataset: xr.Dataset, methods: Sequence[str] = ("ttsp", "ttsnap")) -> pd.DataFrame:
    """Return the relative gains of published rewards in the setting of the released simulation, each reward by itself.

    Schedule, costs (a step 9.9, a check 1.2, its own accounting), budgets 400 to 4000 in steps of 200 and 50 random
    subsets are those of the released code; the columns are those of :meth:`Curves.relative_gains`.
    """
    import pandas as pd

    cost, budgets = CostModel.preset("published"), range(400, 4001, 200)
    found = [
        curves(dataset.sel(reward=[name]), methods, budgets, cost, PUBLISHED_SCHEDULE, rng=0, reach=False)
        for name in dataset["reward"].values
    ]
    return pd.concat([one.relative_gains() for one in found], ignore_index=True)


def tell_tiny_checks(dataset: xr.Dataset, cost: CostModel) -> None:
    """Warn when `cost` charges checks by another decoder than the one in the tensor's attribute ``decoder``."""
    seen = dataset.attrs.get("decoder")
    if cost.preview_decode is not None and not seen:
        warnings.warn(tiny_checks(cost), TinyChecksWarning, stacklevel=3)
    elif cost.preview_decode is None and seen:
        warnings.warn(
            f"the tensor's scores at the checks were made through {seen}, but the cost charges the full decoder: give a "
            "cost whose checks are charged by the tiny one, such as flux-512-tiny+image_reward",
            TinyChecksWarning,
            stacklevel=3,
        )


def tiny_checks(cost: CostModel) -> str:
    """Say what such a cost means."""
    tiny = cost.each("preview_decode", cost.batch_size or 1)
    return (
        f"checks are charged by a tiny decoder ({tiny:.4g} {cost.unit}), but the tensor's scores there were "
        "made through the full one: a run that decodes by the tiny one sees slightly other scores, and may prune others"
    )


def candidates_table(
    methods, budgets, numbers, cost, schedule, pool: int, drafts: Mapping[str, Drafts] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return candidates and cost, both (method, budget), or raise when a budget buys none or more than the pool."""
    if budgets is not None and not np.iterable(budgets):
        raise BudgetError(f"budgets: got {budgets!r}, expected a list of numbers. Write it as a list, even of one.")
    amounts = list(numbers) if budgets is None else [real("budget", budget, 0) for budget in budgets]
    if not amounts:
        raise BudgetError("budgets: got none, expected at least one. Name one budget or more.")
    table = np.empty((len(methods), len(amounts)), np.int64)
    spent = np.full(table.shape, np.nan)
    for m, method in enumerate(methods):
        plan = None if method == "best_of_n" else schedule
        if drafts and method in drafts:
            plan = drafts[method].plan
        least, what = (plan.finish, "all of its full runs") if isinstance(plan, Draft) else (1, "one candidate")
        for b, amount in enumerate(amounts):
            n = integer("n", amount, least, error=BudgetError) if budgets is None else cost.candidates(amount, plan)
            if n < 1:
                raise BudgetError(
                    f"budget for {method}: got {amount!r}, expected at least {cost.total(least, plan):.6g} {cost.unit}, "
                    f"the cost of {what}. Raise the budget, or use a cheaper model, fewer steps or fewer checks."
                )
            if n > pool:
                wanted = f"n = {n}" if budgets is None else f"budget {amount} buys {n} candidates"
                largest = "" if cost is None else f" (a budget of {cost.total(pool, plan):.6g} {cost.unit})"
                raise BudgetError(
                    f"{wanted} for {method}: got {n!r}, expected at most {pool}, the images in the pool{largest}. "
                    "Lower the budget, or generate and score more images per prompt."
                )
            table[m, b] = n
            spent[m, b] = np.nan if cost is None else cost.total(n, plan)
    return table, spent


def _missing_scores(dataset: Any) -> list[str]:
    """Return the scores that a reward tensor lacks, as text."""
    base, aware = (dataset[name].transpose("reward", "prompt", "image", "step") for name in ("base", "noise_aware"))
    rewards, prompts, images, steps = (base[dim].values for dim in base.dims)
    return [
        f"{rewards[r]}: prompt {prompts[p]}, image {images[i]}, step {steps[s]}"
        for r, p, i, s in np.argwhere(np.isnan(base.values) | np.isnan(aware.values)).tolist()
    ]
