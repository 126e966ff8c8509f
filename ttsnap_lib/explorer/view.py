"""Draws what the explorer shows: six panels whose artists are made once and then follow the result."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.explorer.result import PINS, Interval, Result, State
from ttsnap_lib.schedule import Schedule
from ttsnap_lib.simulation.plots import headline_of
from ttsnap_lib.style import COLORS, METHOD_LABELS, method_style, reward_label, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Dark themes turn the picture over: a new one from the kernel would come late, and the kernel does not know the theme.
STYLE = """<style>
.ttsnap-numbers table {border-collapse: collapse; font-size: 12px; line-height: 1.5}
.ttsnap-numbers th, .ttsnap-numbers td {padding: 1px 12px 1px 0; text-align: right; white-space: nowrap}
.ttsnap-numbers th:first-child, .ttsnap-numbers td:first-child {text-align: left}
.ttsnap-numbers th {font-weight: 600; vertical-align: bottom; white-space: normal}
.ttsnap-numbers thead th {border-bottom: 1px solid #999}
.ttsnap-numbers p {margin: 4px 0; font-size: 13px; line-height: 1.4; white-space: normal}
.ttsnap-numbers .ttsnap-note {font-size: 12px; opacity: 0.75}
.ttsnap-message, .ttsnap-told {padding: 4px 10px; font-size: 13px; line-height: 1.4; white-space: normal;
  overflow-wrap: anywhere}
.ttsnap-message {border-left: 4px solid #d55e00}
.ttsnap-told {border-left: 4px solid #029e73}
.ttsnap-pin .widget-html-content {font-size: 12px; line-height: 1.3; white-space: normal}
.ttsnap-stale {opacity: 0.35}
.ttsnap-controls .widget-readout {min-width: 34px}
[data-jp-theme-light="false"] .ttsnap-picture, .vscode-dark .ttsnap-picture, [theme="dark"] .ttsnap-picture {
  filter: invert(0.93) hue-rotate(180deg)}
</style>"""
_SIZE = 6.2, 7.4  # inches: to be read beside the controls on a laptop
_ROWS = ((0.0, 2.5), (2.5, 4.15), (4.15, 6.2), (6.2, 7.4))  # inches from the top


def _place(row: int, left: float, width: float, tile: tuple[float, float], *, below: float = 0.42) -> tuple:
    """Return the axes (left, bottom, width, height) of a panel and its tile (left, bottom, right, top), in parts."""
    (top, bottom), (across, down) = _ROWS[row], _SIZE
    height = bottom - top - 0.3 - below
    axes = left / across, 1 - (bottom - below) / down, width / across, height / down
    return axes, (tile[0] / across, 1 - bottom / down, tile[1] / across, 1 - top / down)


# Of each panel: the axes, and the tile of the picture with its title, ticks and labels.
_PANELS = {
    "above": _place(0, 0.7, 5.35, (0, 6.2)),
    "gain": _place(1, 1.0, 1.75, (0, 2.95)),
    "change": _place(1, 3.7, 2.35, (2.95, 6.2)),
    "reward": _place(2, 0.7, 2.65, (0, 3.5)),
    "tau": _place(2, 4.1, 1.95, (3.5, 6.2)),
    "funnel": _place(3, 0.1, 5.95, (0, 6.2), below=0.02),
}
MAX_STAGES = 4  # stages that prune, for which there is room
_PIN_LOOKS = {"A": (4, "D"), "B": (2, "v"), "C": (3, "P")}  # colour and marker
_GREY, _INK = "0.35", "0.15"


def numbers_html(result: Result) -> str:
    """Return the numbers at the chosen budget as a small table, and what follows from them in words."""
    state, unit, shown = (
        result.state,
        html.escape(result.state.cost.unit),
        html.escape(reward_label(result.state.shown)),
    )
    head = f"<th></th><th>candidates</th><th>spent ({unit})</th><th>mean {shown}</th>"
    head += "<th>this schedule minus it, paired [95%]</th>"
    body = ""
    for name in ("current", *PINS, "best_of_n"):
        if name in result.at:
            at = result.at[name]
            over = _told(result.over[name], ".3f") if name in result.over else ""
            body += f"<tr><td>{_name(name)}</td><td>{at.n[0]}</td><td>{_number(at.spent[0])}</td>"
            body += f"<td>{at.reward.value[0]:.3f}</td><td>{over}</td></tr>"
    one, paired = state.cost.total(1), result.over["best_of_n"]
    words = headline_of(
        state.method, state.shown, state.budget / one, int(result.at["current"].n[0]), (paired.value, paired.low, paired.high),
        result.needs / one, result.most / one,
    )  # fmt: skip
    gain = "Relative gain: not defined over these budgets."
    if result.gains:
        low, high = _number(state.budgets[0]), _number(state.budgets[-1])
        gain = f"Relative gain from {low} to {high} {unit}: <b>{_told(result.gains['current'], '.1f')} %</b>"
        gain += "".join(f"; minus {pin}: {_told(over, '.1f')} points" for pin, over in result.gain_changes.items())
        gain += "."
    done = f"{result.iterations} of {result.iterations_wanted} random subsets per prompt"
    done += "." if result.complete else ": a preview, the rest follows."
    note = f"<span class='ttsnap-note'>{' '.join([done, *map(html.escape, result.notes)])}</span>"
    paragraphs = "".join(f"<p>{line}</p>" for line in (gain, note))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='ttsnap-numbers'><p><b>{html.escape(words)}</b></p>{table}{paragraphs}</div>"


def message_html(text: str) -> str:
    """Return a plain message that screen readers announce; nothing for an empty one."""
    return _announced("ttsnap-message", text)


def told_html(text: str) -> str:
    """Return the same for good news beside a button."""
    return _announced("ttsnap-told", text)


def plan_label(method: str, schedule: Schedule) -> str:
    """Return a method and its schedule in one short line."""
    if method == "best_of_n" or not schedule.steps:
        return METHOD_LABELS[method]
    steps, keeps = ", ".join(map(str, schedule.steps)), ", ".join(f"{keep:g}" for keep in schedule.keep_ratios)
    return f"{METHOD_LABELS[method]} at {steps}, keeps {keeps}"


def _announced(kind: str, text: str) -> str:
    return f"<div class='{kind}' role='status'>{html.escape(text)}</div>" if text else ""


def _name(curve: str) -> str:
    return {"current": "this schedule", "best_of_n": "Best-of-N"}.get(curve, curve)


def draw(result: Result) -> Figure:
    """Return a figure of a result, to be saved.

    Source of the measures: reward against budget and relative gain, paper section 4; Kendall tau, its appendix.
    """
    panels = Panels(dpi=200)
    panels.update(result)
    return panels.figure


class Panels:
    """Six axes on a figure outside pyplot that follow a result.

    What moves with every slider is drawn over a picture of the rest, which is kept: a full drawing takes several times
    as long. A panel whose limits have changed is stale, and drawn anew in its tile of that picture.
    """

    def __init__(self, dpi: float = 110) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=_SIZE, dpi=dpi, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = {name: self.figure.add_axes(place) for name, (place, _) in _PANELS.items()}
        self._context: tuple = ()
        self._background: np.ndarray | None = None  # the picture of what stays
        self._stale: set[str] = set()

    def update(self, result: Result) -> None:
        """Move the artists to `result`; axes, ticks and labels are made anew only where they have to change."""
        state = result.state
        context = (
            state.method,
            [pin[:2] for pin in state.pins],
            state.shown,
            state.cost.unit,
            state.budgets,
            id(result.tau),
        )
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
        for name in ("above", "reward", "change"):
            self.axes[name].set_xlim(first - margin, last + margin)
            self.axes[name].set_xlabel(f"budget per prompt ({state.cost.unit})", fontsize=9)
        looks = {"current": method_style(state.method)}
        for pin, _, _ in state.pins:
            color, marker = _PIN_LOOKS[pin]
            looks[pin] = {"color": COLORS[color], "marker": marker, "linestyle": ":"}
        self._followers = [
            self._above(state, looks),
            self._gain(looks),
            self._change(state, looks),
            self._reward(state, looks),
            self._tau(result, looks),
            self._funnel(looks["current"]),
        ]

    # Each panel: what stays is drawn, and a function returned that moves the rest

    def _above(self, state: State, looks: dict[str, dict]) -> Callable[[Result], None]:
        ax = self.axes["above"]
        ax.axhline(0, color=_GREY, linewidth=0.9)
        labels = {"current": f"this schedule ({METHOD_LABELS[state.method]})"}
        labels |= {pin: f"{pin} ({METHOD_LABELS[method]})" for pin, method, _ in state.pins}
        curves = {
            name: self._line(ax, looks[name], label, width=2.2 if name == "current" else 1.5)
            for name, label in reversed(labels.items())  # the schedule at hand on top
        }
        handles = [curves[name][1] for name in labels]
        ax.legend(handles=handles, frameon=False, fontsize=8.5, loc="upper left", ncols=4, columnspacing=1.2)
        ax.set_ylabel(f"gain in {reward_label(state.shown)}", fontsize=9)
        _title(ax, "Gain over Best-of-N at equal budget, paired")
        at = self._moves(ax.axvline(state.budget, 0, 0.86, color=_GREY, linewidth=1, linestyle=(0, (2, 2))))

        def follow(result: Result) -> None:
            shown = [Interval(0.0, 0.0, 0.0)]
            for name, artists in curves.items():
                budgets, gain = result.above.get(name, ((), None))
                _set_line(artists, budgets, gain)
                shown += [gain] if gain is not None and len(budgets) else []
            at.set_xdata([result.state.budget] * 2)
            self._fit("above", shown, margin=0.18)

        return follow

    def _reward(self, state: State, looks: dict[str, dict]) -> Callable[[Result], None]:
        ax = self.axes["reward"]
        curves = {
            name: self._line(ax, style, "Best-of-N", width=2.0 if name == "current" else 1.3, size=3, band=0.1)
            for name, style in {"best_of_n": method_style("best_of_n"), **looks}.items()
        }
        ax.legend(handles=[curves["best_of_n"][1]], frameon=False, fontsize=8.5, loc="lower right")
        ax.set_ylabel(f"mean {reward_label(state.shown)}", fontsize=9)
        _title(ax, "Reward of the chosen image", x=-0.2)

        def follow(result: Result) -> None:
            for name, artists in curves.items():
                curve = result.curves.get(name)
                _set_line(artists, curve.budgets if curve else (), curve.reward if curve else None)
            self._fit("reward", [curve.reward for curve in result.curves.values()])

        return follow

    def _tau(self, result: Result, looks: dict[str, dict]) -> Callable[[Result], None]:
        ax = self.axes["tau"]
        labels = {"base": "ttsp", "noise-aware": "ttsnap"}
        for estimate, (label, like) in zip(result.tau, labels.items(), strict=True):
            style = method_style(like)
            ax.fill_between(result.steps, estimate.low, estimate.high, color=style["color"], alpha=0.18, linewidth=0)
            ax.plot(result.steps, estimate.mean, label=label, markersize=3.5, linewidth=1.4, **style)
        lowest = float(np.nanmin([0.0, *result.tau[0].low, *result.tau[1].low]))
        ax.set(ylim=(lowest, 1.03), xlim=(result.steps[0] - 0.5, result.steps[-1] + 0.5))
        ax.set_xlabel("step (lines: where it prunes)", fontsize=9)
        ax.set_ylabel("Kendall tau", fontsize=9)
        ax.locator_params(axis="x", integer=True)
        ax.legend(frameon=False, fontsize=8.5, loc="lower right")
        _title(ax, "Agreement with the final reward", x=-0.22)
        lines = {}
        for name, look in reversed(looks.items()):
            line = {"linewidth": 1.6} if name == "current" else {"linewidth": 1.4, "linestyle": ":"}
            lines[name] = [self._moves(ax.axvline(0, 0.3, 1, color=look["color"], **line)) for _ in range(MAX_STAGES)]

        def follow(result: Result) -> None:
            for name, found in lines.items():
                plan = result.state.plans[name][1] if name in result.curves else None
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
            rows.append((bar, self._moves(ax.text(0.31, row, "", fontsize=8.5, va="center", color=_INK))))

        def follow(result: Result) -> None:
            unit, stages, keeps = result.state.cost.unit, result.stages, result.state.schedule.keep_ratios
            total = sum(stage.total for stage in stages)
            most = max(stage.candidates for stage in stages)
            for row, (bar, text) in enumerate(rows):
                bar.set_visible(row < len(stages))
                text.set_visible(row < len(stages))
            for row, (stage, (bar, text)) in enumerate(zip(stages, rows, strict=False)):
                width = 0.29 * stage.candidates / most
                bar.set(x=0.145 - width / 2, width=width)
                last = row == len(stages) - 1
                then = "the best is chosen" if last else f"keep ratio (alpha) {keeps[row]:g}"
                steps = f"step {stage.first_step}"
                if stage.last_step != stage.first_step:
                    steps = f"steps {stage.first_step}–{stage.last_step}"
                cost = f"{_number(stage.total)} {unit} ({stage.total / total:.0%})"
                text.set_text(f"{stage.candidates:.4g} at {steps}: {cost}, {then}")

        return follow

    def _gain(self, looks: dict[str, dict]) -> Callable[[Result], None]:
        ax = self.axes["gain"]
        ax.grid(visible=False)
        ax.axvline(0, color=_GREY, linewidth=0.9)
        ax.set_ylim(len(looks) - 0.5, -0.7)
        ax.set_yticks(range(len(looks)), [_name(name) for name in looks], fontsize=9)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("percent of Best-of-N's own gain", fontsize=9)
        _title(ax, "Relative gain over Best-of-N", x=-0.52)
        rows = {}
        for row, (name, style) in enumerate(looks.items()):
            (bar,) = ax.plot([0, 0], [row, row], color=style["color"], linewidth=2.2, solid_capstyle="butt")
            (dot,) = ax.plot([0], [row], color=style["color"], marker=style["marker"], markersize=6)
            text = ax.text(0, row - 0.16, "", fontsize=8, ha="center", va="bottom", color=_INK)
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

    def _change(self, state: State, looks: dict[str, dict]) -> Callable[[Result], None]:
        ax = self.axes["change"]
        ax.axhline(0, color=_GREY, linewidth=0.9)
        differences = {pin: self._line(ax, looks[pin], "", size=3) for pin, _, _ in state.pins}
        ax.set_ylabel(reward_label(state.shown), fontsize=9)
        pins = " and ".join(differences) if len(differences) < 3 else "A, B and C"
        _title(ax, f"This schedule minus {pins}, paired" if differences else "Nothing is pinned", x=-0.3)
        words = ax.text(0.5, 0.6, "", fontsize=9, ha="center", va="bottom", color=_GREY, transform=ax.transAxes)
        self._moves(words)

        def follow(result: Result) -> None:
            known = []
            for pin, artists in differences.items():
                budgets, change = result.changes.get(pin, ((), None))
                _set_line(artists, budgets, change)
                known += [change] if change is not None and len(budgets) else []
            if not known:
                words.set_text("nothing to compare")
                return
            reach = max(np.nanmax(np.abs([change.value, change.low, change.high])) for change in known)
            words.set_text("" if reach else "the same schedule")
            self._fit("change", [Interval(0.0, -max(reach, 1e-3), max(reach, 1e-3))])

        return follow

    def _line(
        self, ax: Axes, style: dict, label: str, width: float = 1.5, size: float = 4, band: float = 0.18
    ) -> tuple[Any, Any]:
        area = ax.fill_between([0, 1], [0, 0], [0, 0], color=style["color"], alpha=band, linewidth=0)
        (line,) = ax.plot([], [], label=label, markersize=size, linewidth=width, **style)
        return self._moves(area), self._moves(line)

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
