"""Draws what the explorer shows: five panels whose artists are made once and then follow the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ._explore_canvas import PANELS, Canvas, new_figure
from ._explore_state import Change, Curve, Result
from .plots import METHOD_LABELS, method_style, reward_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Panels", "draw"]

_MAX_STAGES = 5
_GREY, _INK = "0.35", "0.15"
_PINNED = {"linestyle": ":", "marker": "D"}


def draw(result: Result, ax: Mapping[str, Axes] | None = None) -> dict[str, Axes]:
    """Draw a result onto five axes, named reward, tau, funnel, gain and change; on a new figure when none are given.

    Source of the measures: reward against budget and relative gain, paper section 4; Kendall tau, its appendix.

    Returns
    -------
    dict of str to Axes
    """
    axes = dict(ax) if ax is not None else new_figure(200)[1]
    Panels(axes).update(result)
    return axes


class Panels:
    """Five axes that follow a result.

    Parameters
    ----------
    axes : mapping of str to Axes, optional
        On a figure of their own by default.
    """

    def __init__(self, axes: Mapping[str, Axes] | None = None) -> None:
        self.canvas = Canvas(axes)
        self.axes, self._move = self.canvas.axes, self.canvas.move
        self._context: Any = None
        self._drawn: dict[str, Any] = {}  # what the moving artists of a panel show
        self._fitted: set[str] = set()  # panels whose limits are ours

    # -- following a result -------------------------------------------------------------------------------------

    def update(self, result: Result) -> None:
        """Move the artists to `result`; axes, ticks and labels are made anew only where they have to change."""
        state = result.state
        context = (state.method, state.pinned_method, state.shown, state.cost.unit, state.budgets, id(result.tau[0]))
        if context != self._context:
            self._build(result)
            self._context = context
        for name in PANELS:
            shows = getattr(self, f"_{name}")(result)
            if name not in self._drawn or self._drawn[name] != shows:
                self._drawn[name] = shows
                self.canvas.touched.add(name)

    def png(self) -> bytes:
        """Return the picture; only what has changed is drawn."""
        return self.canvas.png()

    # -- the parts that stay ------------------------------------------------------------------------------------

    def _build(self, result: Result) -> None:
        state = result.state
        self.canvas.forget()
        self._drawn, self._fitted = {}, set()
        for name, ax in self.axes.items():
            ax.clear()
            ax.set_facecolor("white")
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=8.5)
            if name not in ("funnel", "gain"):
                ax.grid(axis="y", color="0.9", linewidth=0.8)
                ax.set_axisbelow(True)
        reward, tau, funnel, gain, change = (self.axes[name] for name in PANELS)
        span = (state.budgets[0], state.budgets[-1])
        margin = 0.03 * (span[1] - span[0])
        for ax in (reward, change):
            ax.set_xlim(span[0] - margin, span[1] + margin)
            ax.set_xlabel(f"budget per prompt ({state.cost.unit})", fontsize=9)

        self._curves = {
            "best_of_n": self._line(reward, method_style("best_of_n"), "Best-of-N"),
            "pinned": self._line(
                reward, method_style("pinned") | _PINNED, f"pinned {METHOD_LABELS[state.pinned_method]}"
            ),
            "current": self._line(
                reward, method_style(state.method), f"this schedule ({METHOD_LABELS[state.method]})", width=2.2
            ),
        }
        handles = [self._curves[name][1] for name in ("current", "pinned", "best_of_n")]
        reward.legend(handles=handles, frameon=False, fontsize=8.5, loc="lower right")
        reward.set_ylabel(f"mean {reward_label(state.shown)}", fontsize=9)
        _title(reward, "Reward of the chosen image against budget")
        self._at = self._move(reward, reward.axvline(state.budget, color=_GREY, linewidth=1, linestyle=(0, (2, 2))))

        for estimate, label, like in zip(
            result.tau, ("base reward", "noise-aware reward"), ("ttsp", "ttsnap"), strict=True
        ):
            style = method_style(like)
            tau.fill_between(result.steps, estimate.low, estimate.high, color=style["color"], alpha=0.18, linewidth=0)
            tau.plot(result.steps, estimate.mean, label=label, markersize=3.5, linewidth=1.4, **style)
        lowest = min(0.0, *(float(np.nanmin(estimate.low)) for estimate in result.tau))
        tau.set(ylim=(lowest, 1.03), xlim=(result.steps[0] - 0.5, result.steps[-1] + 0.5))
        tau.set_xlabel("denoising step (lines: pruning; dotted: pinned)", fontsize=9)
        tau.set_ylabel("Kendall tau", fontsize=9)
        tau.locator_params(axis="x", integer=True)
        tau.legend(frameon=False, fontsize=8.5, loc="lower right")
        _title(tau, "Agreement with the final reward")
        color = method_style(state.method)["color"]
        self._steps = [
            self._move(tau, tau.axvline(0, 0.2, 1, color=color, linewidth=1.6, alpha=0.8))
            for _ in range(_MAX_STAGES - 1)
        ]
        grey = method_style("pinned")["color"]
        self._pinned_steps = [
            self._move(tau, tau.axvline(0, 0.2, 1, color=grey, linewidth=1.4, linestyle=":"))
            for _ in range(_MAX_STAGES - 1)
        ]
        self._build_funnel(funnel, color)
        self._build_gain(gain, state)
        change.axhline(0, color=_GREY, linewidth=0.9)
        self._differences = self._line(change, method_style(state.method), "")
        change.set_ylabel(f"{reward_label(state.shown)}", fontsize=9)
        _title(change, "This schedule minus the pinned one, paired")
        self._no_change = self._move(change, change.text(0.5, 0.5, "", fontsize=9, ha="center", va="bottom",
                                                         color=_GREY, transform=change.transAxes))  # fmt: skip

    def _build_funnel(self, ax: Axes, color: Any) -> None:
        from matplotlib.patches import Rectangle

        ax.set(xlim=(0, 1), ylim=(_MAX_STAGES - 0.5, -0.5))
        ax.set_axis_off()
        _title(ax, "Survivors and what each stage costs")
        self._bars, self._texts = [], []
        for row in range(_MAX_STAGES):
            bar = Rectangle((0, row - 0.36), 0, 0.72, color=color, alpha=0.9 - 0.13 * row, linewidth=0)
            self._bars.append(self._move(ax, ax.add_patch(bar)))
            self._texts.append(self._move(ax, ax.text(0.5, row, "", fontsize=9, va="center", color=_INK)))

    def _build_gain(self, ax: Axes, state: Any) -> None:
        ax.axvline(0, color=_GREY, linewidth=0.9)
        ax.set(ylim=(1.6, -0.6), xlabel="")
        ax.set_yticks([0, 1], ["this schedule", "pinned"], fontsize=9)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("percent of Best-of-N's own gain", fontsize=9)
        _title(ax, "Relative gain over Best-of-N", x=-0.33)
        self._dots = []
        for row, style in enumerate((method_style(state.method), method_style("pinned") | _PINNED)):
            (bar,) = ax.plot([0, 0], [row, row], color=style["color"], linewidth=2.2, solid_capstyle="butt")
            (dot,) = ax.plot([0], [row], color=style["color"], marker=style["marker"], markersize=7)
            text = ax.text(0, row - 0.2, "", fontsize=8.5, ha="center", va="bottom", color=_INK)
            self._dots.append([self._move(ax, artist) for artist in (bar, dot, text)])

    def _line(self, ax: Axes, style: dict, label: str, width: float = 1.5) -> tuple[Any, Any]:
        band = ax.fill_between([0, 1], [0, 0], [0, 0], color=style["color"], alpha=0.18, linewidth=0)
        (line,) = ax.plot([], [], label=label, markersize=4, linewidth=width, **style)
        return self._move(ax, band), self._move(ax, line)

    # -- the parts that move ------------------------------------------------------------------------------------

    # Each returns what it shows, to be compared with what stood there before.

    def _reward(self, result: Result) -> Any:
        curves = {"best_of_n": result.best_of_n, "current": result.current, "pinned": result.pinned}
        drawn = [curve for curve in curves.values() if curve is not None and len(curve.n)]
        for name, curve in curves.items():
            _follow(self._curves[name], curve)
        self._at.set_xdata([result.state.budget] * 2)
        self._fit("reward", min(c.low.min() for c in drawn), max(c.high.max() for c in drawn))
        return object()  # every change of the state shows here

    def _tau(self, result: Result) -> Any:
        state = result.state
        for lines, steps in ((self._steps, state.plan.steps), (self._pinned_steps, state.pinned_plan.steps)):
            for k, line in enumerate(lines):
                line.set_visible(k < len(steps))
                if k < len(steps):
                    line.set_xdata([steps[k]] * 2)
        return state.plan.steps, state.pinned_plan.steps

    def _funnel(self, result: Result) -> Any:
        state, stages = result.state, result.stages
        total = sum(stage.total for stage in stages)
        first = max(stage.candidates for stage in stages)
        for row, (bar, text) in enumerate(zip(self._bars, self._texts, strict=True)):
            bar.set_visible(row < len(stages))
            text.set_visible(row < len(stages))
            if row >= len(stages):
                continue
            stage = stages[row]
            width = 0.42 * stage.candidates / first
            bar.set_x(0.21 - width / 2)
            bar.set_width(width)
            last = row == len(stages) - 1
            then = "the best is chosen" if last else f"keep ratio (alpha) {state.plan.keep_ratios[row]:g}"
            steps = f"step {stage.first_step}" if stage.first_step == stage.last_step else (
                f"steps {stage.first_step}–{stage.last_step}")  # fmt: skip
            cost = f"{stage.total:,.4g}" if stage.total < 1000 else f"{stage.total:,.0f}"
            text.set_text(
                f"{stage.candidates:.4g} at {steps}: {cost} {state.cost.unit} ({stage.total / total:.0%}), {then}"
            )
            text.set_x(0.45)
        return stages, state.plan.keep_ratios

    def _gain(self, result: Result) -> Any:
        found = [result.gain, result.pinned_gain]
        for (bar, dot, text), gain in zip(self._dots, found, strict=True):
            for artist in (bar, dot, text):
                artist.set_visible(gain is not None)
            if gain is not None:
                bar.set_xdata([gain.low, gain.high])
                dot.set_xdata([gain.value])
                text.set_text(f"{gain.value:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]")
                text.set_x(gain.value)
        known = [gain for gain in found if gain is not None]
        if known:
            low, high = min([0.0, *(float(g.low) for g in known)]), max([0.0, *(float(g.high) for g in known)])
            self._fit("gain", low, high, "x", 0.25)
        return found

    def _change(self, result: Result) -> Any:
        change = result.change
        known = same = False
        curve = None
        if change is not None and len(result.change_budgets) > 0:
            known, same = True, not np.any(change.value) and not np.any(change.high)
            curve = _Plain(result.change_budgets, change)
            reach = max(np.abs(change.low).max(), np.abs(change.high).max(), 1e-3)
            self._fit("change", -reach, reach)
        _follow(self._differences, curve)
        words = "" if known and not same else "the same schedule" if known else "nothing to compare"
        self._no_change.set_text(words)
        return words or object()

    def _fit(self, name: str, low: float, high: float, axis: str = "y", margin: float = 0.08) -> None:
        """Widen or tighten an axis, but not at every move: ticks that jump cannot be read, and cost a full drawing."""
        ax = self.axes[name]
        now = ax.get_ylim() if axis == "y" else ax.get_xlim()
        fits = now[0] <= low and high <= now[1] and (high - low) > 0.4 * (now[1] - now[0])
        # The limits right after a build are matplotlib's own and mean nothing.
        if fits and name in self._fitted:
            return
        space = margin * max(high - low, 1e-9)
        (ax.set_ylim if axis == "y" else ax.set_xlim)(low - space, high + space)
        self._fitted.add(name)
        self.canvas.stale.add(name)


class _Plain:
    """A difference in the shape that `_follow` takes."""

    def __init__(self, budgets: np.ndarray, change: Change) -> None:
        self.budgets, self.mean, self.low, self.high = budgets, change.value, change.low, change.high


def _follow(artists: tuple[Any, Any], curve: Curve | _Plain | None) -> None:
    band, line = artists
    for artist in artists:
        artist.set_visible(curve is not None and len(curve.budgets) > 0)
    if curve is not None and len(curve.budgets) > 0:
        line.set_data(curve.budgets, curve.mean)
        band.set_data(curve.budgets, curve.low, curve.high)


def _title(ax: Axes, text: str, x: float = 0.0) -> None:
    ax.set_title(text, fontsize=10, loc="left", x=x, color=_INK, weight="bold")
