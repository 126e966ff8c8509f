"""Results in, matplotlib Axes out. Nothing here computes a result, opens a window or changes global style.

Methods keep one colour, marker and line style everywhere (seaborn's colour-blind palette), so that figures read in
print, on a projector and without colour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._axes import axes_or_new, tidy
from .errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .costs import CostModel
    from .metrics import Estimate
    from .schedule import Schedule

__all__ = ["METHOD_LABELS", "gain_bars", "reward_against_budget", "reward_panels", "survivor_funnel", "tau_per_step"]

METHOD_LABELS = {"best_of_n": "Best-of-N", "ttsp": "TTSp", "ttsnap": "TTSnap"}
_STYLES = {"best_of_n": (7, "s", "--"), "ttsp": (1, "^", "-."), "ttsnap": (0, "o", "-")}
_REWARD_LABELS = {
    "image_reward": "ImageReward",
    "pickscore": "PickScore",
    "hpsv2": "HPSv2",
    "clipscore": "CLIPScore",
    "pocket-clip": "pocket CLIP",
    "oracle_score": "oracle",
}


def reward_label(name: str) -> str:
    """Return how a reward is written in a figure."""
    return _REWARD_LABELS.get(name, name)


def method_style(method: str) -> dict:
    """Return colour, marker and line style of a method, for ``Axes.plot``."""
    import seaborn as sns

    index, marker, line = _STYLES.get(method, (4, "D", ":"))
    return {"color": sns.color_palette("colorblind")[index], "marker": marker, "linestyle": line}


def reward_against_budget(
    frame: pd.DataFrame, reward: str | None = None, *, unit: str = "TFLOPs", ax: Axes | None = None
) -> Axes:
    """Draw the mean reward of each method against the budget, with its interval as a band.

    Parameters
    ----------
    frame : pandas.DataFrame
        As :func:`ttsnap_lib.sweep` returns it.
    reward : str, optional
        Needed when the frame holds several.
    unit : str
        Of the budget.
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
    """
    frame, reward = _one_reward(frame, reward)
    ax = axes_or_new(ax, (5.2, 3.6))
    for method, rows in frame.groupby("method", sort=False):
        rows = rows.sort_values("budget")
        style = method_style(method)
        ax.fill_between(rows["budget"], rows["low"], rows["high"], color=style["color"], alpha=0.18, linewidth=0)
        ax.plot(
            rows["budget"], rows["mean"], label=METHOD_LABELS.get(method, method), markersize=4, linewidth=1.6, **style
        )
    ax.set(xlabel=f"budget per prompt ({unit})", ylabel=f"mean {reward_label(reward)} of the chosen image")
    ax.legend(frameon=False)
    return tidy(ax)


def reward_panels(frame: pd.DataFrame, *, unit: str = "TFLOPs", title: str | None = None) -> Figure:
    """Draw :func:`reward_against_budget` for every reward of the frame, side by side, and return the figure.

    Returns
    -------
    Figure
    """
    import matplotlib.pyplot as plt

    rewards = list(dict.fromkeys(frame["reward"]))
    figure, axes = plt.subplots(1, len(rewards), figsize=(4.8 * len(rewards), 3.6), layout="constrained", squeeze=False)
    for reward, ax in zip(rewards, axes[0], strict=True):
        reward_against_budget(frame, reward, unit=unit, ax=ax)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def gain_bars(gains: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the relative gain over Best-of-N of each method and reward, with intervals.

    Parameters
    ----------
    gains : pandas.DataFrame
        Columns method, reward, relative_gain, low, high, as :meth:`Curves.relative_gains` returns it.
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax, (4.2, 3.2))
    methods = list(dict.fromkeys(gains["method"]))
    rewards = list(dict.fromkeys(gains["reward"]))
    width = 0.8 / max(len(methods), 1)
    for m, method in enumerate(methods):
        rows = gains[gains["method"] == method].set_index("reward").reindex(rewards)
        place = np.arange(len(rewards)) + (m - (len(methods) - 1) / 2) * width
        error = np.abs(rows[["low", "high"]].to_numpy().T - rows["relative_gain"].to_numpy())
        color = method_style(method)["color"]
        ax.bar(place, rows["relative_gain"], width * 0.92, yerr=error, capsize=3, color=color, ecolor="0.25",
               label=METHOD_LABELS.get(method, method))  # fmt: skip
        for x, value, low, high in zip(place, rows["relative_gain"], rows["low"], rows["high"], strict=True):
            above = value >= 0
            ax.annotate(f"{value:.1f}", (x, np.fmax(value, high) if above else np.fmin(value, low)), (0, 3 if above else -3), fontsize=8,
                        textcoords="offset points", ha="center", va="bottom" if above else "top")  # fmt: skip
    ax.axhline(0, color="0.25", linewidth=0.8)
    ax.margins(y=0.15)
    ax.set_xticks(range(len(rewards)), [reward_label(name) for name in rewards])
    ax.set_ylabel("relative gain over Best-of-N (%)")
    if methods:  # Best-of-N alone gains nothing over itself
        ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(methods), borderaxespad=0)
    return tidy(ax)


def tau_per_step(
    base: Estimate, noise_aware: Estimate | None = None, *, steps: np.ndarray | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the mean per-prompt Kendall tau between the reward at each step and the final reward.

    Parameters
    ----------
    base, noise_aware : Estimate
        As :func:`ttsnap_lib.metrics.kendall_tau` returns them, arrays (step,).
    steps : (step,), optional
        Denoising step of each position.
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax, (5.2, 3.4))
    drawn = [(base, "base reward", "ttsp"), (noise_aware, "noise-aware reward", "ttsnap")]
    for estimate, label, like in drawn:
        if estimate is None:
            continue
        x = np.arange(len(estimate.mean)) if steps is None else np.asarray(steps)
        style = method_style(like)
        ax.fill_between(x, estimate.low, estimate.high, color=style["color"], alpha=0.18, linewidth=0)
        ax.plot(x, estimate.mean, label=label, markersize=4, linewidth=1.6, **style)
    ax.set(xlabel="denoising step", ylabel="Kendall tau with the final reward", ylim=(min(0, ax.get_ylim()[0]), 1.03))
    ax.locator_params(axis="x", integer=True)
    ax.legend(frameon=False, loc="lower right")
    return tidy(ax)


def survivor_funnel(cost: CostModel, schedule: Schedule, n: int, *, ax: Axes | None = None) -> Axes:
    """Draw how many candidates each stage works on and what the stage costs.

    Parameters
    ----------
    cost : CostModel
    schedule : Schedule
    n : int
        Candidates at the start.
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax, (5.2, 0.9 + 0.55 * (len(schedule) + 1)))
    stages = cost.stages(n, schedule)
    total = cost.total(n, schedule)
    color = method_style("ttsnap")["color"]
    for row, stage in enumerate(stages):
        ax.barh(
            row, stage.candidates, height=0.72, left=-stage.candidates / 2, color=color, alpha=1 - 0.18 * min(row, 4)
        )
        what = "choose one" if row == len(stages) - 1 else f"keep ratio (alpha) {schedule.keep_ratios[row]:g}"
        ax.annotate(f"{stage.candidates:g}", (0, row), ha="center", va="center", fontsize=9, weight="bold",
                    color="white" if stage.candidates > 0.12 * n else "black")  # fmt: skip
        ax.annotate(f"{stage.total:.4g} {cost.unit} ({stage.total / total:.0%}), then {what}", (1.02, row),
                    xycoords=("axes fraction", "data"), va="center", fontsize=8)  # fmt: skip
    ax.set_yticks(range(len(stages)), [f"steps {stage.first_step}–{stage.last_step}" for stage in stages])
    ax.set(xticks=[], xlim=(-n / 2 * 1.02, n / 2 * 1.02))
    ax.set_title(f"{n} candidates, {total:.4g} {cost.unit} per prompt", fontsize=10, loc="left")
    ax.invert_yaxis()
    ax.spines[["top", "right", "bottom", "left"]].set_visible(False)
    ax.tick_params(length=0)
    return ax


def _one_reward(frame: pd.DataFrame, reward: str | None) -> tuple[pd.DataFrame, str]:
    rewards = list(dict.fromkeys(frame["reward"]))
    if reward is None and len(rewards) > 1:
        raise ConfigError("reward", value=reward, bound=f"one of {rewards}", remedy="Name the reward to draw.")
    reward = rewards[0] if reward is None else reward
    if reward not in rewards:
        raise ConfigError("reward", value=reward, bound=f"one of {rewards}", remedy="Name a reward of the frame.")
    return frame[frame["reward"] == reward], reward
