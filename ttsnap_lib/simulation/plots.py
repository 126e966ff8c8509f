"""What a reader takes from a simulation: figures, tables of methods and schedules, and the commands that come next."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.checks import choice
from ttsnap_lib.costs import CostModel
from ttsnap_lib.errors import ConfigError
from ttsnap_lib.schedule import Schedule
from ttsnap_lib.simulation.metrics import AS_GOOD, jackknife_interval, kendall_tau, leave_one_out, relative_gain_of
from ttsnap_lib.simulation.simulate import Curves
from ttsnap_lib.style import axes_or_new, figure_size, method_label, method_style, paper_style, reward_label, tidy  # noqa: F401
from ttsnap_lib.tensors.tensor import noise_aware_steps

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler

_PRICE = 10  # finished images whose price the headline tells about
# The models of the published tensors, by the short name that those carry.
_PUBLISHED = {"flux": "black-forest-labs/FLUX.1-dev", "sdxl": "SG161222/RealVisXL_V4.0"}


def reward_against_budget(
    frame: pd.DataFrame, reward: str | None = None, *, unit: str = "TFLOPs", ax: Axes | None = None
) -> Axes:
    """Draw the mean reward of each method of a :func:`ttsnap_lib.sweep` frame against the budget, its interval as a band.

    `reward` is needed when the frame holds several; `unit` is that of the budget.
    """
    reward = _drawn(frame, reward)
    ax = axes_or_new(ax, (5.2, 3.6))
    for method, rows in frame[frame["reward"] == reward].groupby("method", sort=False):
        rows = rows.sort_values("budget")
        style = method_style(method)
        ax.fill_between(rows["budget"], rows["low"], rows["high"], color=style["color"], alpha=0.18, linewidth=0)
        ax.plot(rows["budget"], rows["mean"], label=method_label(method), markersize=4, linewidth=1.6, **style)
    ax.set(xlabel=f"budget per prompt ({unit})", ylabel=f"mean {reward_label(reward)} of the chosen image")
    ax.legend(frameon=False)
    return tidy(ax)


def set_trade_off(frame: pd.DataFrame, reward: str | None = None, *, ax: Axes | None = None) -> Axes:
    """Draw mean reward against mean distance of the sets of each method, a point a diversity, from ``Sets.frame()``.

    Bars are 95% intervals over prompts; `reward` is needed when the frame holds several.
    """
    reward = _drawn(frame, reward)
    ax = axes_or_new(ax, (5.2, 3.6))
    for method, rows in frame[frame["reward"] == reward].groupby("method", sort=False):
        style = method_style(method)
        bars = {
            f"{axis}err": np.abs(rows[[low, high]].to_numpy().T - rows[mean].to_numpy())
            for axis, mean, low, high in (
                ("x", "distance", "distance_low", "distance_high"),
                ("y", "mean", "low", "high"),
            )
        }
        ax.errorbar(rows["distance"], rows["mean"], **bars, elinewidth=0.6, label=method_label(method), **style)
        for x, y, weight in zip(rows["distance"], rows["mean"], rows["diversity"], strict=True):
            ax.annotate(f"{weight:g}", (x, y), (3, 3), textcoords="offset points", fontsize=7, color=style["color"])
    ax.set(xlabel="mean distance within the set", ylabel=f"mean {reward_label(reward)} of the set")
    ax.legend(frameon=False)
    return tidy(ax)


def _drawn(frame: pd.DataFrame, reward: str | None) -> str:
    """Return the reward of a frame to draw: the one it holds, or the one that is named."""
    rewards = list(dict.fromkeys(frame["reward"]))
    if reward is None and len(rewards) > 1:
        raise ConfigError(f"reward: got None, expected one of {rewards}. Name the reward to draw.")
    return choice("reward", rewards[0] if reward is None else reward, rewards)


def reward_panels(
    curves: Curves, cost: CostModel, *, title: str | None = None, axes: np.ndarray | None = None
) -> Figure:
    """Draw the rewards of all methods against the budget, and under them their gain over Best-of-N, paired.

    A column for each reward. Bands are 95% intervals; above they are mostly differences between prompts, which all methods
    share. The dotted line is what a perfect verifier would reach with the same seeds: the best of all that were started.
    `axes` (2, reward) are those to draw into, else a figure is made.
    """
    import matplotlib.pyplot as plt

    if axes is None:
        axes = plt.subplots(
            2, len(curves.rewards), figsize=figure_size(5.4 * len(curves.rewards), 5.6), layout="constrained",
            squeeze=False, sharex=True, height_ratios=(3, 2),
        )[1]  # fmt: skip
    figure: Any = axes[0, 0].figure
    frame, images = curves.frame(), curves.budgets / cost.total(1)
    pruning = [method for method in curves.methods if method != "best_of_n"]
    for r, (reward, top, below) in enumerate(zip(curves.rewards, *axes, strict=True)):
        levels, gains = [], []
        for method in curves.methods:
            rows = frame[(frame["reward"] == reward) & (frame["method"] == method)]
            style, name = method_style(method), method_label(method)
            look = {"color": style["color"], "linewidth": 0}
            top.fill_between(images, rows["low"], rows["high"], alpha=0.08, **look)
            top.plot(images, rows["mean"], markersize=4, linewidth=1.6, **style)
            levels.append((images, rows["mean"].to_numpy(), name, style["color"]))
            if method == "best_of_n":
                below.axhline(0, color=style["color"], linestyle="--", linewidth=1)
                gains.append((images, np.zeros(len(images)), name, style["color"]))
            else:
                below.fill_between(images, rows["gain_low"], rows["gain_high"], alpha=0.18, **look)
                below.plot(images, rows["gain"], markersize=4, linewidth=1.6, **style)
                gains.append((images, rows["gain"].to_numpy(), name, style["color"]))
        if pruning and len(curves.ladder_spent):
            spent = [cost.total(int(n)) for n in curves.n[curves.methods.index(pruning[-1])]]
            best = np.interp(spent, curves.ladder_spent, curves.ladder[:, r].mean(-1))
            top.plot(images, best, color="0.3", linestyle=":", linewidth=1.2)
            levels.append((images, best, "perfect verifier", "0.3"))
        label = reward_label(reward)
        top.set_ylabel(f"mean {label}\nof the chosen image")
        below.set_ylabel(f"gain over Best-of-N\nin {label}, paired")
        _in_images(top, curves.budgets, cost)
        top.set_xlabel("")
        below.set_xlabel("budget per prompt, in finished images")
        for ax, lines in ((top, levels), (below, gains)):
            tidy(ax)
            _name_lines(ax, lines)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def headline(curves: Curves, cost: CostModel, method: str = "ttsnap", reward: str | None = None) -> str:
    """Return in words what a method gains over Best-of-N at one budget, that next to the price of ten finished images.

    The first reward is told by default; the curves need their reach (:func:`ttsnap_lib.simulation.simulate.curves`).
    """
    reward = choice("reward", curves.rewards[0] if reward is None else reward, curves.rewards)
    one = cost.total(1)
    rows = curves.frame().merge(curves.needs(), on=["method", "reward", "budget"])
    rows = rows[(rows["method"] == method) & (rows["reward"] == reward)]
    row = rows.iloc[_told_budget(curves, cost)]
    return headline_of(
        method, reward, row["budget"] / one, row["n"], (row["gain"], row["gain_low"], row["gain_high"]),
        row["needs"] / one, curves.ladder_spent[-1] / one,
    )  # fmt: skip


def headline_of(
    method: str, reward: str, images: float, n: int, gain: Sequence[float], needs: float, most: float
) -> str:
    """Return :func:`headline` for numbers: a budget, what Best-of-N needs, and the whole pool, in finished images.

    `n` seeds gain the first of `gain` over Best-of-N, with its interval behind it.
    """
    told = f"At the price of {_images(images)}, {method_label(method)} tries {n} seed{'s' if n > 1 else ''}"
    if method == "best_of_n":
        return f"{told}."
    value, low, high = gain
    over = f"{_interval(value, low, high, '+.3f')} {reward_label(reward)}"
    if low <= 0 <= high:
        return f"{told}; its difference to Best-of-N, {over}, may be chance: the interval includes 0."
    told = f"{told} and {'gains' if value >= 0 else 'loses'} {over}"
    if np.isnan(low):
        return f"{told}. One prompt tells no interval."
    if np.isinf(needs):
        return f"{told}; Best-of-N does not get there with all {_images(most)} of the pool."
    if not needs:
        return f"{told}; a single image of Best-of-N is better."
    return f"{told}; Best-of-N needs {_images(needs)} for that: {needs / images:.2f} x the compute."


def over_ttsp(curves: Curves, reward: str | None = None) -> str:
    """Return in words what the noise-aware reward adds: TTSnap minus TTSp, paired, over all budgets or at the one given."""
    reward = choice("reward", curves.rewards[0] if reward is None else reward, curves.rewards)
    r = curves.rewards.index(reward)
    base, plain, snap = (curves.methods.index(method) for method in ("best_of_n", "ttsp", "ttsnap"))
    if len(curves.budgets) > 1:
        mean = curves.per_prompt[:, :, r].mean(-1)
        without = leave_one_out(np.moveaxis(curves.per_prompt[:, :, r], -1, 0))
        gains = [
            relative_gain_of(curves.budgets, given[..., snap, :], given[..., base, :], strict=False)
            - relative_gain_of(curves.budgets, given[..., plain, :], given[..., base, :], strict=False)
            for given in (mean, without)
        ]
        value, (low, high) = gains[0], jackknife_interval(gains[0], gains[1], curves.level)
        what = f"{_interval(value, low, high, '+.1f')} points of relative gain over these budgets"
    else:
        value = (curves.per_prompt[snap, 0, r] - curves.per_prompt[plain, 0, r]).mean()
        low, high = curves.interval(value, curves.boot[:, snap, 0, r] - curves.boot[:, plain, 0, r])
        what = f"{_interval(value, low, high, '+.3f')} {reward_label(reward)}"
    told = f"TTSnap minus TTSp, which prunes by the base reward, prompt by prompt: {what}."
    return f"{told} The interval includes 0: the difference may be chance." if low <= 0 <= high else told


def _told_budget(curves: Curves, cost: CostModel) -> int:
    return int(np.abs(curves.budgets / cost.total(1) - _PRICE).argmin())


def _images(count: float) -> str:
    return f"{count:.3g} image{'' if f'{count:.3g}' == '1' else 's'}"


def speed_up(curves: Curves, cost: CostModel, reward: str | None = None, *, ax: Axes | None = None) -> Axes:
    """Draw how many times the compute of a budget Best-of-N needs for the reward that each method has there.

    A band is the 95% interval. Bands and lines end where the pool of recorded images does.
    """
    reward = choice("reward", curves.rewards[0] if reward is None else reward, curves.rewards)
    ax = axes_or_new(ax, (5.2, 3.6))
    needs, most = curves.needs(), curves.ladder_spent[-1]
    ends = []
    for method, rows in needs[needs["reward"] == reward].groupby("method", sort=False):
        low, value, high = (
            (np.clip(rows[name], 0, most) / rows["budget"]).to_numpy() for name in ("needs_low", "needs", "needs_high")
        )
        value = np.where(rows["needs"] > most, np.nan, value)
        style, images = method_style(method), rows["budget"].to_numpy() / cost.total(1)
        ax.fill_between(images, low, high, color=style["color"], alpha=0.15, linewidth=0)
        ax.plot(images, value, markersize=4, linewidth=1.6, **style)
        ends.append((images, value, method_label(method), style["color"]))
    baseline = method_style("best_of_n")["color"]
    ax.axhline(1, color=baseline, linestyle="--", linewidth=1)
    ends.append((ends[0][0], np.ones(len(ends[0][0])), method_label("best_of_n"), baseline))
    ax.set_ylabel(f"compute of Best-of-N\nfor the same {reward_label(reward)} (times)")
    _in_images(ax, curves.budgets, cost)
    _name_lines(ax, ends)
    return tidy(ax)


def _in_images(ax: Axes, budgets: np.ndarray, cost: CostModel) -> None:
    """Give a logarithmic axis of budgets in finished images, with the compute on a second one above."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    one = cost.total(1)
    first, last = budgets[0] / one, budgets[-1] / one
    ax.set_xscale("log")
    above = ax.secondary_xaxis("top", functions=(lambda x: np.multiply(x, one), lambda x: np.divide(x, one)))
    for axis in (ax, above):
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, place: f"{x:g}"))
    ax.set_xlim(first / 1.08, last * 1.08)
    ax.set_xlabel("budget per prompt, in finished images")
    above.set_xlabel(f"compute per prompt ({cost.unit})")


def _name_lines(ax: Axes, lines: Sequence[tuple[np.ndarray, np.ndarray, str, str]]) -> None:
    """Write the name of each line (x, y, name, color) beside its end, so that no two names overlap."""
    ends = [
        (x[known[-1]], y[known[-1]], *look) for x, y, *look in lines if len(known := np.flatnonzero(np.isfinite(y)))
    ]
    ax.autoscale_view()
    place = ax.transData.transform([end[:2] for end in ends])[:, 1] * 72 / ax.figure.dpi  # in points
    order = np.argsort(place)
    wanted = place.copy()
    for below, above in itertools.pairwise(order):
        wanted[above] = max(wanted[above], wanted[below] + 11)
    wanted += (place - wanted).mean()
    for (x, y, name, color), shift in zip(ends, wanted - place, strict=True):
        ax.annotate(name, (x, y), (7, shift), textcoords="offset points", va="center", fontsize="small", color=color,
                    annotation_clip=False)  # fmt: skip


def gain_dots(gains: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the relative gain over Best-of-N of each method and reward, as :meth:`Curves.relative_gains` tells them."""
    ax = axes_or_new(ax, (5.2, 0.9 + 0.35 * max(len(gains), 1)))
    rows = np.arange(len(gains))
    ordered = gains.sort_values("reward", kind="stable", key=lambda names: names.map(list(dict.fromkeys(names)).index))
    for y, row in zip(rows, ordered.itertuples(), strict=True):
        style = method_style(row.method)
        ax.hlines(y, row.low, row.high, color=style["color"], linewidth=1.8)
        ax.plot(row.relative_gain, y, marker=style["marker"], color=style["color"], markersize=6)
        ax.annotate(_interval(row.relative_gain, row.low, row.high, ".1f"), (1.02, y), va="center", fontsize=8,
                    xycoords=("axes fraction", "data"))  # fmt: skip
    names = ordered["method"].map(method_label)
    if gains["reward"].nunique() > 1:
        names = names + ", " + ordered["reward"].map(reward_label)
    ax.axvline(0, color="0.25", linewidth=0.8)
    ax.set_yticks(rows, names)
    ax.set_ylim(max(len(gains), 1) - 0.5, -0.5)
    ax.set_xlabel("relative gain over Best-of-N (%)")
    return tidy(ax, "x")


def gains_latex(gains: pd.DataFrame) -> str:
    """Return relative gains as a LaTeX table for booktabs, a row a reward and a column a method: ``21.5 [19.0, 23.8]``."""
    methods = list(dict.fromkeys(gains["method"]))
    lines = [" & ".join(["reward", *(method_label(method) for method in methods)]) + r" \\", r"\midrule"]
    for reward, rows in gains.groupby("reward", sort=False):
        told = {row.method: _interval(row.relative_gain, row.low, row.high, ".1f") for row in rows.itertuples()}
        name = reward_label(reward).replace("_", r"\_")
        lines.append(" & ".join([name, *(told[method] for method in methods)]) + r" \\")
    return "\n".join(
        [rf"\begin{{tabular}}{{l{'r' * len(methods)}}}", r"\toprule", *lines, r"\bottomrule", r"\end{tabular}"]
    )


def tau_per_step(dataset: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Draw the mean per-prompt Kendall tau between the first reward at each step and that of the final image.

    Grey are the steps without noise-aware scores, where TTSnap reads the base reward, as TTSp does.
    """
    ax = axes_or_new(ax, (5.2, 3.4))
    first = dataset[["base", "noise_aware"]].isel(reward=0).transpose("prompt", "image", "step")
    steps, final = dataset["step"].values, first["base"].values[:, :, -1]
    known = noise_aware_steps(dataset)[str(first["reward"].values)]
    plain = [step for step in steps.tolist() if step not in known]
    for k, step in enumerate(plain):
        label = "no noise-aware scores" if not k else None
        ax.axvspan(step - 0.5, step + 0.5, color="0.92", linewidth=0, zorder=0, label=label)
    for variable, label, like in (("base", "base reward", "ttsp"), ("noise_aware", "noise-aware reward", "ttsnap")):
        tau = kendall_tau(first[variable].values, final)
        style = method_style(like)
        there = np.isin(steps, known) if variable == "noise_aware" else np.ones(len(steps), bool)
        low, mean, high = (np.where(there, values, np.nan) for values in (tau.low, tau.mean, tau.high))
        ax.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
        ax.plot(steps, mean, label=label, markersize=4, linewidth=1.6, **style)
    ax.set(xlabel="denoising step", ylabel="Kendall tau with the final reward", ylim=(min(0, ax.get_ylim()[0]), 1.03))
    ax.locator_params(axis="x", integer=True)
    ax.legend(frameon=True, edgecolor="none", framealpha=1, loc="lower right")
    return tidy(ax)


def survivor_funnel(cost: CostModel, schedule: Schedule, n: int, *, ax: Axes | None = None) -> Axes:
    """Draw how many of `n` candidates each stage works on and what the stage costs."""
    ax = axes_or_new(ax, (5.2, 0.9 + 0.55 * (len(schedule) + 1)))
    stages = cost.stages(n, schedule)
    total = cost.total(n, schedule)
    color = method_style("ttsnap")["color"]
    figure: Any = ax.figure
    narrow = figure.get_size_inches()[0] < 4  # a paper's column
    for row, stage in enumerate(stages):
        ax.barh(
            row, stage.candidates, height=0.72, left=-stage.candidates / 2, color=color, alpha=1 - 0.18 * min(row, 4)
        )
        what = "choose one" if row == len(stages) - 1 else f"keep ratio (alpha) {schedule.keep_ratios[row]:g}"
        ax.annotate(f"{stage.candidates:g}", (0, row), ha="center", va="center", fontsize=9, weight="bold",
                    color="white" if stage.candidates > 0.12 * n else "black")  # fmt: skip
        ax.annotate(f"{stage.total / total:.0%} of the compute,{chr(10) if narrow else ' '}then {what}", (1.02, row),
                    xycoords=("axes fraction", "data"), va="center", fontsize=6.5 if narrow else 8)  # fmt: skip
    spans = [(stage.first_step, stage.last_step) for stage in stages]
    names = [f"step {first}" if first == last else f"steps {first}–{last}" for first, last in spans]
    ax.set_yticks(range(len(stages)), names)
    ax.set(xticks=[], xlim=(-n / 2 * 1.02, n / 2 * 1.02))
    flow = [f"{n} seeds", *(f"{stage.candidates:g}" for stage in stages[1:]), "best"]
    ax.set_title(f"{' → '.join(flow)}  ({total:.4g} {cost.unit} per prompt)", fontsize=7 if narrow else 10, loc="left")
    ax.invert_yaxis()
    ax.spines[["top", "right", "bottom", "left"]].set_visible(False)
    ax.tick_params(length=0)
    return ax


def by_budget(curves: Curves, unit: str) -> pd.DataFrame:
    """Return a table of text: a row per reward and budget (in `unit`), a group of columns per method.

    ``N`` is the number of candidates; ``over Best-of-N`` the paired gain in reward with its interval; ``Best-of-N
    needs`` the compute at which Best-of-N reaches the same mean reward, with its interval, as far as the pool reaches
    (:meth:`Curves.needs`).
    """
    import pandas as pd

    frame = curves.frame()
    needs = frame.merge(curves.needs(), how="left", on=["method", "reward", "budget"])
    bounds = zip(needs["needs"], needs["needs_low"], needs["needs_high"], strict=True)
    gains = zip(frame["gain"], frame["gain_low"], frame["gain_high"], strict=True)
    table = pd.DataFrame({
        "reward": frame["reward"].map(reward_label),
        f"budget ({unit})": frame["budget"].map("{:.4g}".format),
        "method": frame["method"].map(method_label),
        "N": frame["n"],
        "mean reward": frame["mean"].map("{:.3f}".format),
        "over Best-of-N": [_interval(*given, "+.3f") for given in gains],
        f"Best-of-N needs ({unit})": [_needs(*given, curves.ladder_spent[-1]) for given in bounds],
    })  # fmt: skip
    keys = list(table.columns[:2])
    wide = table.pivot(index=keys, columns="method").swaplevel(axis=1)
    order = [(method_label(method), column) for method in curves.methods for column in table.columns[3:]]
    baseline = method_label("best_of_n")
    wide = wide[[at for at in order if at[0] != baseline or at[1] in ("N", "mean reward")]]
    return wide.reindex(list(dict.fromkeys(zip(table[keys[0]], table[keys[1]], strict=True)))).rename_axis(
        columns=[None, None]
    )


def flatness_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return what ``compare_schedules`` and ``flatness`` of the optimiser tell, as text."""
    import pandas as pd

    return pd.DataFrame({
        "schedule": table["schedule"].map(str),
        "gain over Best-of-N (%)": _with_interval(table["gain"], table["low"], table["high"]),
        "points behind the first": _with_interval(table["behind"], table["behind_low"], table["behind_high"], ".2f"),
        "as good": table["as_good"],
    })  # fmt: skip


def forest(table: pd.DataFrame, names: Sequence[str] | None = None) -> Figure:
    """Draw what ``compare_schedules`` tells, a row a schedule: its gain over Best-of-N, and how far it trails the first.

    The grey band is the margin within which a schedule counts as good as the first.
    """
    import matplotlib.pyplot as plt

    names = [str(schedule) for schedule in table["schedule"]] if names is None else list(names)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=figure_size(8.6, 0.9 + 0.3 * len(table)), layout="constrained", sharey=True
    )  # fmt: skip
    color, rows = method_style("ttsnap")["color"], np.arange(len(table))
    for ax, name, low, high in ((left, "gain", "low", "high"), (right, "behind", "behind_low", "behind_high")):
        ax.hlines(rows, table[low], table[high], color=color, linewidth=1.6)
        ax.plot(table[name], rows, "o", color=color, markersize=5)
        ax.axvline(0, color="0.25", linewidth=0.8)
        tidy(ax, "x")
        ax.tick_params(axis="y", length=0)
    right.axvspan(-AS_GOOD, AS_GOOD, color="0.9", zorder=0)
    left.set_yticks(rows, names, fontsize=8)
    left.set_ylim(len(table) - 0.5, -0.5)
    left.set_xlabel("gain over Best-of-N (%)")
    right.set_xlabel("points behind the first, paired")
    return figure


def _with_interval(value: pd.Series, low: pd.Series, high: pd.Series, form: str = ".1f") -> pd.Series:
    """Return numbers with their intervals as text."""
    text = [_interval(*given, form) for given in zip(value, low, high, strict=True)]
    return value.astype(object).where(value.isna(), text).where(value.notna(), "cannot run")


def _interval(value: float, low: float, high: float, form: str) -> str:
    known = not np.isnan(low)  # of a single prompt it is not
    return f"{value:{form}} [{low:{form}}, {high:{form}}]" if known else f"{value:{form}} [unknown]"


def _needs(value: float, low: float, high: float, most: float) -> str:
    """Return what Best-of-N needs with its interval; `most` is the cost of the whole pool."""
    if np.isnan(value):  # Best-of-N itself
        return ""
    ends = [f"{x:.3g}" if 0 < x < np.inf else f"> {most:.3g}" if x else "< 1 image" for x in (value, low, high)]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]" if not np.isnan(low) else f"{ends[0]} [unknown]"


def unbroken(table: pd.DataFrame) -> Styler:
    """Return a table for a notebook, numbers right under their heads.

    In groups of columns, which are wide, a group's head stands over its columns and an interval below its value.
    """
    looks: list[Any] = [
        {"selector": "td, th", "props": "white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums"}
    ]
    if table.columns.nlevels > 1:
        looks += [
            {"selector": "th.level0.col_heading", "props": "text-align: center; border-bottom: 1px solid #999"},
            {"selector": "th.level1.col_heading", "props": "white-space: normal; vertical-align: bottom"},
            {"selector": "th.index_name", "props": "white-space: normal"},
            {"selector": "td", "props": "white-space: pre"},
            {"selector": "td, th", "props": "padding: 0.3em 0.4em; font-size: 12px"},
        ]
        table = table.map(lambda cell: cell.replace(" [", "\n[") if isinstance(cell, str) else cell)
    return table.style.set_table_styles(looks)


def pruning_method(dataset: xr.Dataset, methods: Sequence[str], report: Sequence[str] = ()) -> str:
    """Return the one of `methods` to tune a schedule for: TTSnap, else TTSp, else Best-of-N, which has none.

    On a tensor without a step at which every reward that selects is noise-aware, TTSnap is TTSp, and so is the answer.
    Rewards of `report` do not select.
    """
    if "ttsnap" not in methods:
        return "ttsp" if "ttsp" in methods else "best_of_n"
    finetuned = [set(steps) for name, steps in noise_aware_steps(dataset).items() if name not in report]
    shared = set.intersection(*finetuned) if finetuned else set()
    return "ttsnap" if shared - {int(dataset["step"][-1])} else "ttsp"


def optimize_command(
    tensor: str,
    cost: str,
    multiples: Sequence[float],
    rewards: Sequence[str] = (),
    report: Sequence[str] = (),
    method: str = "ttsnap",
) -> str:
    """Return the ``ttsnap optimize`` line for a tensor and its costs, both as the notebooks take them.

    `multiples` are budgets in finished images of Best-of-N; all of them are tuned for. All rewards of the tensor select
    when neither `rewards` (which select) nor `report` (which are only measured) names any.
    """
    words = ["ttsnap", "optimize", tensor, "--cost", cost, "--budgets", ",".join(f"{m:g}" for m in multiples)]
    for option, names in (("--reward", rewards), ("--report", report)):
        for name in names:
            words += [option, name]
    words += ["--method", method] if method == "ttsp" else []
    return shlex.join([*words, "--out", "schedule.yaml"])


def search_command(
    model: str,
    rewards: Sequence[str],
    cost: str,
    candidates: int,
    schedule: Schedule | None = None,
    method: str = "ttsnap",
    prompt: str = "your prompt",
    n_steps: int = 20,
) -> str:
    """Return the ``ttsnap search`` line that runs a simulated schedule for real.

    `model` is what made the tensor (its attribute ``model``): a pocket model gets its shipped adapters and tiny decoder,
    a published tensor its model on the hub. Of `rewards`, which select, the first one is noise-aware under ``ttsnap``;
    where its checkpoints are not shipped, ``NOISE_AWARE`` stands for their folder. `cost` is a preset or a file,
    `candidates` the seeds to try. The schedule is written into the line itself.
    """
    model = "MODEL" if model.startswith("synthetic") else model  # of no diffusion model
    is_pocket = model.startswith("pocket-")
    words = ["ttsnap", "search", prompt, "--model", _PUBLISHED.get(model, model)]
    words += [word for name in rewards for word in ("--reward", name)]
    size = re.search(r"-(512|1024)\b", cost)
    if size and not is_pocket:
        words += ["--size", size[1]]
    words += ["--steps", str(n_steps)] if n_steps != 20 else []
    if method != "best_of_n" and schedule is not None and schedule.steps:
        words += ["--schedule", f"{{steps: {list(schedule.steps)}, keep_ratios: {list(schedule.keep_ratios)}}}"]
        if method == "ttsnap":
            words += ["--adapters", "pocket" if is_pocket else "NOISE_AWARE"]
        if CostModel.load(cost).preview_decode is not None:
            kind = "sdxl" if "sdxl" in cost else "f1"
            words += ["--tiny", "pocket-tiny" if is_pocket else f"madebyollin/tae{kind}"]
    return shlex.join([*words, "--candidates", str(candidates), "--cost", cost, "--out", "best"])
