"""Figures of a curriculum, and a listener that draws while it trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap_lib._axes import axes_or_new, tidy
from ttsnap_lib._reading import failures_as
from ttsnap_lib.errors import CheckpointError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LiveCurves", "gain_by_step", "loss_curves", "losses_table", "tau_by_step"]


def losses_table(folder: str | Path) -> pd.DataFrame:
    """Return the loss of every update of a run folder."""
    import pandas as pd

    with failures_as(
        CheckpointError,
        "losses cannot be read",
        value=str(Path(folder) / "losses.csv"),
        bound="the table of a run folder",
        remedy="Finish at least one step of ttsnap finetune.",
    ):
        return pd.read_csv(Path(folder) / "losses.csv")


def loss_curves(losses: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the loss of every update, one stretch per step, a light dot each and a smoothed line.

    Returns
    -------
    Axes
    """
    from matplotlib.ticker import LogFormatter

    ax = axes_or_new(ax, (5.2, 3.2))
    offset = 0
    for k, (step, rows) in enumerate(losses.groupby("step", sort=False)):
        x = offset + rows["update"].to_numpy()
        ax.plot(x, rows["loss"], ".", color=f"C{k % 2}", markersize=2, alpha=0.35)
        ax.plot(x, rows["loss"].ewm(halflife=max(1, len(rows) / 12)).mean(), color=f"C{k % 2}", linewidth=1.4)
        ax.annotate(str(step), (x.mean(), 1.0), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8)
        offset = x[-1] + 1
    ax.set(xlabel="update (numbers above: denoising step)", ylabel="loss")
    if (losses["loss"] > 0).all():
        ax.set_yscale("log")
        # Plain numbers: a loss seldom spans a power of ten.
        ax.yaxis.set_major_formatter(LogFormatter())
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    return tidy(ax)


def tau_by_step(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the validation tau of each step: the base, what the step started with, what it ended with.

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax, (5.2, 3.2))
    table = table.sort_values("step")
    styles = {"base": ("0.45", "s", "--"), "before": ("C1", "^", ":"), "after": ("C0", "o", "-")}
    labels = {"base": "base reward", "before": "before this step", "after": "noise-aware"}
    for name, (color, marker, line) in styles.items():
        if f"{name}_tau" in table:
            ax.plot(table["step"], table[f"{name}_tau"], color=color, marker=marker, linestyle=line, markersize=4,
                    linewidth=1.5, label=labels[name])  # fmt: skip
    ax.set(xlabel="denoising step", ylabel="Kendall tau with the clean reward")
    ax.locator_params(axis="x", integer=True)
    ax.legend(frameon=False, loc="lower right")
    return tidy(ax)


def gain_by_step(comparison: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the gain in tau on fresh prompts with its interval, as :func:`compare_at_steps` returns it.

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax, (5.2, 3.0))
    ax.axhline(0, color="0.25", linewidth=0.8)
    ax.fill_between(
        comparison["step"], comparison["gain_low"], comparison["gain_high"], color="C0", alpha=0.2, linewidth=0
    )
    ax.plot(comparison["step"], comparison["gain"], color="C0", marker="o", markersize=4, linewidth=1.5)
    ax.set(xlabel="denoising step", ylabel="gain in Kendall tau")
    ax.locator_params(axis="x", integer=True)
    return tidy(ax)


class LiveCurves:
    """Draws loss and validation tau in the notebook while :func:`finetune` runs; pass it as `listener`.

    Parameters
    ----------
    every_s : float
        Least time between two drawings; each costs a tenth of a second or two.
    """

    def __init__(self, every_s: float = 4.0) -> None:
        self.every_s, self._drawn = every_s, time.monotonic()
        self.losses: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self._handle: Any = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Take an event of the run."""
        if event["event"] == "update":
            self.losses.append(event)
        elif event["event"] == "step":
            self.rows.append(event)
        # The end of a step is always drawn, or the last one would be missing from the picture that stays.
        due = event["event"] == "step" or time.monotonic() - self._drawn > self.every_s
        if self.losses and due:
            self._show()
            self._drawn = time.monotonic()

    def figure(self) -> Figure:
        """Return the figure of what has happened so far."""
        import matplotlib.pyplot as plt
        import pandas as pd

        figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.2), layout="constrained")
        if self.losses:
            loss_curves(pd.DataFrame(self.losses), ax=axes[0])
        if self.rows:
            tau_by_step(pd.DataFrame(self.rows), ax=axes[1])
        return figure

    def _show(self) -> None:
        import matplotlib.pyplot as plt
        from IPython.display import display

        figure = self.figure()
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)
        plt.close(figure)
