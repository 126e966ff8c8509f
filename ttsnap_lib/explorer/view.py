"""Draws what the explorer shows: five panels whose artists are made once and then follow the result."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.explorer.result import Interval, Result, State
from ttsnap_lib.style import METHOD_LABELS, method_style, reward_label, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = """<style>
.ttsnap-numbers table {border-collapse: collapse; font-size: 13px; line-height: 1.45}
.ttsnap-numbers th, .ttsnap-numbers td {padding: 1px 14px 1px 0; text-align: right; white-space: nowrap}
.ttsnap-numbers th:first-child, .ttsnap-numbers td:first-child {text-align: left; white-space: normal}
.ttsnap-numbers thead th {border-bottom: 1px solid #999; font-weight: 600}
.ttsnap-numbers p {margin: 4px 0; font-size: 13px; line-height: 1.45; white-space: normal}
.ttsnap-note {color: #595959}
.ttsnap-message {border-left: 4px solid #d55e00; padding: 4px 10px; font-size: 13px; line-height: 1.4;
  white-space: normal}
.ttsnap-stale {opacity: 0.35}
.ttsnap-head {font-weight: 600; font-size: 13px; border-bottom: 1px solid #ccc; line-height: 1.6}
</style>"""
# Of each panel: the axes (left, bottom, width, height), and the tile of the picture (left, bottom, right, top) with its
# title, ticks and labels; in parts of the figure.
_PANELS = {
    "reward": ((0.075, 0.565, 0.515, 0.375), (0.0, 0.49, 0.605, 1.0)),
    "tau": ((0.665, 0.565, 0.32, 0.375), (0.605, 0.49, 1.0, 1.0)),
    "funnel": ((0.02, 0.295, 0.965, 0.175), (0.0, 0.255, 1.0, 0.49)),
    "gain": ((0.12, 0.075, 0.30, 0.135), (0.0, 0.0, 0.46, 0.255)),
    "change": ((0.55, 0.075, 0.435, 0.145), (0.46, 0.0, 1.0, 0.255)),
}
MAX_STAGES = 4  # stages that prune, for which there is room
_GREY, _INK = "0.35", "0.15"


def numbers_html(result: Result) -> str:
    """Return the numbers at the chosen budget as a small table, and what follows from them in words."""
    state, unit = result.state, html.escape(result.state.cost.unit)
    head = f"<th>at {_number(state.budget)} {unit} ({state.budget / state.cost.total(1):.3g} &times; one image)</th>"
    head += f"<th>candidates</th><th>spent ({unit})</th><th>mean {html.escape(reward_label(state.shown))}</th>"
    head += "<th>95% interval</th>"
    body = ""
    for name, label in (("current", "this schedule"), ("pinned", "pinned schedule"), ("best_of_n", "Best-of-N")):
        if name in result.at:
            at = result.at[name]
            low, high = at.reward.low[0], at.reward.high[0]
            interval = "unknown" if np.isnan(low) else f"{low:.3f} to {high:.3f}"
            body += f"<tr><td>{label}</td><td>{at.n[0]}</td><td>{_number(at.spent[0])}</td>"
            body += f"<td>{at.reward.value[0]:.3f}</td><td>{interval}</td></tr>"
    over, gains = result.over, result.gains
    words = f"<b>Over Best-of-N</b> at this budget: {_told(over['best_of_n'], '.3f')}"
    if "pinned" in over:
        words += f"; <b>over the pinned schedule</b>: {_told(over['pinned'], '.3f')} (paired)."
    gain = "<b>Relative gain</b>: not defined over these budgets"
    if gains:
        low, high = _number(state.budgets[0]), _number(state.budgets[-1])
        gain = f"<b>Relative gain</b> over {low} to {high} {unit}: {_told(gains['current'], '.1f')} %"
    if "change" in gains:
        gain += f"; against the pinned schedule {_told(gains['change'], '.1f')} points"
    method, plan = state.plans["pinned"]
    pinned = f"<b>Pinned</b>: {METHOD_LABELS[method]}{'' if plan is None else html.escape(f', {plan}')}."
    done = f"{result.iterations} of {result.iterations_wanted} random subsets per prompt"
    done += "." if result.complete else ": a preview, the rest follows."
    note = f"<span class='ttsnap-note'>{' '.join([done, *map(html.escape, result.notes)])}</span>"
    paragraphs = "".join(f"<p>{line}</p>" for line in (words, f"{gain}.", pinned, note))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='ttsnap-numbers'>{table}{paragraphs}</div>"


def message_html(text: str) -> str:
    """Return a plain message that screen readers announce; nothing for an empty one."""
    return f"<div class='ttsnap-message' role='status'>{html.escape(text)}</div>" if text else ""


def draw(result: Result) -> Figure:
    """Return a figure of a result, to be saved.

    Source of the measures: reward against budget and relative gain, paper section 4; Kendall tau, its appendix.
    """
    panels = Panels(dpi=200)
    panels.update(result)
    return panels.figure


class Panels:
    """Five axes on a figure outside pyplot that follow a result.

    What moves with every slider is drawn over a picture of the rest, which is kept: a full drawing takes several times
    as long. A panel whose limits have changed is stale, and drawn anew in its tile of that picture.
    """

    def __init__(self, dpi: float = 100) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(9.2, 7.4), dpi=dpi, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = {name: self.figure.add_axes(place) for name, (place, _) in _PANELS.items()}
        self._context: tuple = ()
        self._background: np.ndarray | None = None  # the picture of what stays
        self._stale: set[str] = set()

    def update(self, result: Result) -> None:
        """Move the artists to `result`; axes, ticks and labels are made anew only where they have to change."""
        state = result.state
        context = (state.method, state.pinned[0], state.shown, state.cost.unit, state.budgets, id(result.tau))
        if context != self._context:
            self._build(result)
            self._context = context
        for follow in self._followers:
            follow(result)

    def png(self) -> bytes:
        """Return the picture."""
        from PIL import Image

        canvas: Any = self.figure.canvas
        if self._background is None:
            canvas.draw()  # leaves the animated artists out
            self._background, self._stale = np.array(canvas.buffer_rgba()), set()
        picture = np.asarray(canvas.buffer_rgba())
        height, width, _ = picture.shape
        for name in self._stale:
            left, bottom, right, top = _PANELS[name][1]
            rows = slice(round((1 - top) * height), round((1 - bottom) * height))
            tile = rows, slice(round(left * width), round(right * width))
            picture[tile] = 255
            self.axes[name].draw(canvas.get_renderer())
            self._background[tile] = picture[tile]
        self._stale = set()
        picture[:] = self._background
        for artist in self._moving:
            if artist.get_visible():
                artist.axes.draw_artist(artist)
        file = io.BytesIO()
        Image.fromarray(picture).convert("RGB").save(file, "PNG", compress_level=3)  # 1 takes longer
        return file.getvalue()

    def _build(self, result: Result) -> None:
        self._background = None
        self._stale = set()
        self._moving: list[Any] = []
        self._limits: dict[str, tuple[float, float]] = {}
        for ax in self.axes.values():
            ax.clear()
            tidy(ax).tick_params(labelsize=8.5)
        state = result.state
        first, last = state.budgets[0], state.budgets[-1]
        margin = 0.03 * (last - first)
        for name in ("reward", "change"):
            self.axes[name].set_xlim(first - margin, last + margin)
            self.axes[name].set_xlabel(f"budget per prompt ({state.cost.unit})", fontsize=9)
        own, pinned = method_style(state.method), method_style("pinned") | {"linestyle": ":", "marker": "D"}
        self._followers = [
            self._reward(state, own, pinned),
            self._tau(result, own, pinned),
            self._funnel(own),
            self._gain(own, pinned),
            self._change(state, own),
        ]

    # Each panel: what stays is drawn, and a function returned that moves the rest

    def _reward(self, state: State, own: dict, pinned: dict) -> Callable[[Result], None]:
        ax = self.axes["reward"]
        curves = {
            "best_of_n": self._line(ax, method_style("best_of_n"), "Best-of-N"),
            "pinned": self._line(ax, pinned, f"pinned {METHOD_LABELS[state.pinned[0]]}"),
            "current": self._line(ax, own, f"this schedule ({METHOD_LABELS[state.method]})", width=2.2),
        }
        handles = [curves[name][1] for name in ("current", "pinned", "best_of_n")]
        ax.legend(handles=handles, frameon=False, fontsize=8.5, loc="lower right")
        ax.set_ylabel(f"mean {reward_label(state.shown)}", fontsize=9)
        _title(ax, "Reward of the chosen image against budget")
        at = self._moves(ax.axvline(state.budget, color=_GREY, linewidth=1, linestyle=(0, (2, 2))))

        def follow(result: Result) -> None:
            for name, artists in curves.items():
                curve = result.curves.get(name)
                _set_line(artists, curve.budgets if curve else (), curve.reward if curve else None)
            at.set_xdata([result.state.budget] * 2)
            self._fit("reward", [curve.reward for curve in result.curves.values()])

        return follow

    def _tau(self, result: Result, own: dict, pinned: dict) -> Callable[[Result], None]:
        ax = self.axes["tau"]
        labels = {"base reward": "ttsp", "noise-aware reward": "ttsnap"}
        for estimate, (label, like) in zip(result.tau, labels.items(), strict=True):
            style = method_style(like)
            ax.fill_between(result.steps, estimate.low, estimate.high, color=style["color"], alpha=0.18, linewidth=0)
            ax.plot(result.steps, estimate.mean, label=label, markersize=3.5, linewidth=1.4, **style)
        lowest = float(np.nanmin([0.0, *result.tau[0].low, *result.tau[1].low]))
        ax.set(ylim=(lowest, 1.03), xlim=(result.steps[0] - 0.5, result.steps[-1] + 0.5))
        ax.set_xlabel("step (lines: pruning; dotted: pinned)", fontsize=9)
        ax.set_ylabel("Kendall tau", fontsize=9)
        ax.locator_params(axis="x", integer=True)
        ax.legend(frameon=False, fontsize=8.5, loc="lower right")
        _title(ax, "Agreement with the final reward")
        looks = {
            "current": {"color": own["color"], "linewidth": 1.6, "alpha": 0.8},
            "pinned": {"color": pinned["color"], "linewidth": 1.4, "linestyle": ":"},
        }
        lines = {
            name: [self._moves(ax.axvline(0, 0.2, 1, **look)) for _ in range(MAX_STAGES)]
            for name, look in looks.items()
        }

        def follow(result: Result) -> None:
            for name, found in lines.items():
                plan = result.state.plans[name][1]
                steps = plan.steps if plan else ()
                for k, line in enumerate(found):
                    line.set_visible(k < len(steps))
                    if k < len(steps):
                        line.set_xdata([steps[k]] * 2)

        return follow

    def _funnel(self, own: dict) -> Callable[[Result], None]:
        from matplotlib.patches import Rectangle

        ax = self.axes["funnel"]
        ax.set(xlim=(0, 1), ylim=(MAX_STAGES + 0.5, -0.5))
        ax.set_axis_off()
        _title(ax, "Survivors and what each stage costs")
        rows = []
        for row in range(MAX_STAGES + 1):
            look = {"color": own["color"], "alpha": 0.9 - 0.13 * row, "linewidth": 0}
            bar = self._moves(ax.add_patch(Rectangle((0, row - 0.36), 0, 0.72, **look)))
            rows.append((bar, self._moves(ax.text(0.45, row, "", fontsize=9, va="center", color=_INK))))

        def follow(result: Result) -> None:
            unit, stages, keeps = result.state.cost.unit, result.stages, result.state.schedule.keep_ratios
            total = sum(stage.total for stage in stages)
            most = max(stage.candidates for stage in stages)
            for row, (bar, text) in enumerate(rows):
                bar.set_visible(row < len(stages))
                text.set_visible(row < len(stages))
            for row, (stage, (bar, text)) in enumerate(zip(stages, rows, strict=False)):
                width = 0.42 * stage.candidates / most
                bar.set(x=0.21 - width / 2, width=width)
                last = row == len(stages) - 1
                then = "the best is chosen" if last else f"keep ratio (alpha) {keeps[row]:g}"
                steps = f"step {stage.first_step}"
                if stage.last_step != stage.first_step:
                    steps = f"steps {stage.first_step}–{stage.last_step}"
                cost = f"{_number(stage.total)} {unit} ({stage.total / total:.0%})"
                text.set_text(f"{stage.candidates:.4g} at {steps}: {cost}, {then}")

        return follow

    def _gain(self, own: dict, pinned: dict) -> Callable[[Result], None]:
        ax = self.axes["gain"]
        ax.grid(visible=False)
        ax.axvline(0, color=_GREY, linewidth=0.9)
        ax.set_ylim(1.6, -0.6)
        ax.set_yticks([0, 1], ["this schedule", "pinned"], fontsize=9)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("percent of Best-of-N's own gain", fontsize=9)
        _title(ax, "Relative gain over Best-of-N", x=-0.33)
        rows = {}
        for row, (name, style) in enumerate((("current", own), ("pinned", pinned))):
            (bar,) = ax.plot([0, 0], [row, row], color=style["color"], linewidth=2.2, solid_capstyle="butt")
            (dot,) = ax.plot([0], [row], color=style["color"], marker=style["marker"], markersize=7)
            text = ax.text(0, row - 0.2, "", fontsize=8.5, ha="center", va="bottom", color=_INK)
            rows[name] = [self._moves(artist) for artist in (bar, dot, text)]

        def follow(result: Result) -> None:
            for name, artists in rows.items():
                for artist in artists:
                    artist.set_visible(name in result.gains)
                if name in result.gains:
                    gain, (bar, dot, text) = result.gains[name], artists
                    bar.set_xdata([gain.low, gain.high])
                    dot.set_xdata([gain.value])
                    text.set(text=_told(gain, ".1f"), x=gain.value)
            known = [result.gains[name] for name in rows if name in result.gains]
            if known:
                self._fit("gain", [Interval(0.0, 0.0, 0.0), *known], margin=0.25)

        return follow

    def _change(self, state: State, own: dict) -> Callable[[Result], None]:
        ax = self.axes["change"]
        ax.axhline(0, color=_GREY, linewidth=0.9)
        difference = self._line(ax, own, "")
        ax.set_ylabel(reward_label(state.shown), fontsize=9)
        _title(ax, "This schedule minus the pinned one, paired")
        words = ax.text(0.5, 0.5, "", fontsize=9, ha="center", va="bottom", color=_GREY, transform=ax.transAxes)
        self._moves(words)

        def follow(result: Result) -> None:
            change = result.change
            _set_line(difference, result.change_budgets, change)
            if change is None:
                words.set_text("nothing to compare")
                return
            reach = np.nanmax(np.abs([change.value, change.low, change.high]))
            words.set_text("" if reach else "the same schedule")
            self._fit("change", [Interval(0.0, -max(reach, 1e-3), max(reach, 1e-3))])

        return follow

    def _line(self, ax: Axes, style: dict, label: str, width: float = 1.5) -> tuple[Any, Any]:
        band = ax.fill_between([0, 1], [0, 0], [0, 0], color=style["color"], alpha=0.18, linewidth=0)
        (line,) = ax.plot([], [], label=label, markersize=4, linewidth=width, **style)
        return self._moves(band), self._moves(line)

    def _moves(self, artist: Any) -> Any:
        artist.set_animated(True)
        self._moving.append(artist)
        return artist

    def _fit(self, name: str, shown: list[Interval], margin: float = 0.08) -> None:
        """Widen or tighten an axis, but not at every move: ticks that jump cannot be read, and cost a drawing."""
        ends = np.concatenate([np.ravel(part) for one in shown for part in (one.value, one.low, one.high)])
        low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
        bottom, top = self._limits.get(name, (np.inf, -np.inf))
        if not (bottom <= low and high <= top and high - low > 0.4 * (top - bottom)):
            space = margin * max(high - low, 1e-9)
            self._limits[name] = low - space, high + space
            ax = self.axes[name]
            (ax.set_xlim if name == "gain" else ax.set_ylim)(self._limits[name])
            self._stale.add(name)


def _set_line(artists: tuple[Any, Any], budgets: Sequence[float] | np.ndarray, reward: Interval | None) -> None:
    band, line = artists
    for artist in artists:
        artist.set_visible(len(budgets) > 0)
    if reward is not None and len(budgets) > 0:
        line.set_data(budgets, reward.value)
        band.set_data(budgets, reward.low, reward.high)


def _title(ax: Axes, text: str, x: float = 0.0) -> None:
    ax.set_title(text, fontsize=10, loc="left", x=x, color=_INK, weight="bold")


def _told(change: Interval, form: str) -> str:
    if np.isnan(change.low):  # of a single prompt it is not known
        return f"{change.value:+{form}} [unknown]"
    return f"{change.value:+{form}} [{change.low:+{form}}, {change.high:+{form}}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"
