"""Draws what the explorer shows: five panels whose artists are made once and then follow the result."""

from __future__ import annotations

import html
import shlex
import struct
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.explorer.result import Change, Curve, Result
from ttsnap_lib.schedule import Schedule
from ttsnap_lib.style import METHOD_LABELS, method_style, reward_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SEARCH = "command that runs it"


COPY_FORMATS = (SEARCH, "schedule YAML", "papermill parameters", "command line")


_COMMAND = "ttsnap run explore"


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


def numbers_html(result: Result, candidate_cost: float) -> str:
    """Return the numbers at the chosen budget as a small table, and what follows from them in words."""
    state = result.state
    unit = html.escape(state.cost.unit)
    rows = [("this schedule", result.at["current"]), ("Best-of-N", result.at["best_of_n"])]
    if result.pinned is not None:
        rows.insert(1, ("pinned schedule", result.at["pinned"]))
    body = "".join(_row(name, curve) for name, curve in rows)
    head = f"<tr><th>at {_number(state.budget)} {unit} ({state.budget / candidate_cost:.3g} &times; one image)</th>"
    head += f"<th>candidates</th><th>spent ({unit})</th><th>mean {html.escape(reward_label(state.shown))}</th>"
    head += "<th>95% interval</th></tr>"
    lines = [f"<b>Over Best-of-N</b> at this budget: {_change(result.over_best, '.3f')}"]
    if result.over_pinned is not None:
        lines[0] += f"; <b>over the pinned schedule</b>: {_change(result.over_pinned, '.3f')} (paired)."
    if result.gain is not None:
        low, high = state.budgets[0], state.budgets[-1]
        words = f"<b>Relative gain</b> over {_number(low)} to {_number(high)} {unit}: {_change(result.gain, '.1f')} %"
        if result.gain_change is not None:
            words += f"; against the pinned schedule {_change(result.gain_change, '.1f')} points"
        lines.append(words + ".")
    else:
        lines.append("<b>Relative gain</b>: not defined over these budgets.")
    lines.append(f"<b>Pinned</b>: {_plan(state.pinned_method, state.pinned_plan)}.")
    done = f"{result.iterations} of {result.iterations_wanted} random subsets per prompt"
    lines.append(
        f"<span class='ttsnap-note'>{done}{'' if result.complete else ': a preview, the rest follows'}. "
        + " ".join(html.escape(note) for note in result.notes)
        + "</span>"
    )
    paragraphs = "".join(f"<p>{line}</p>" for line in lines)
    return f"<div class='ttsnap-numbers'><table><thead>{head}</thead><tbody>{body}</tbody></table>{paragraphs}</div>"


def message_html(text: str) -> str:
    """Return a plain message that screen readers announce; nothing for an empty one."""
    return f"<div class='ttsnap-message' role='status'>{html.escape(text)}</div>" if text else ""


def copy_text(kind: str, parameters: Mapping[str, Any], method: str, schedule: Schedule) -> str:
    """Return the state in one of :data:`COPY_FORMATS` but :data:`SEARCH`, which needs the tensor's model.

    Parameters
    ----------
    kind : str
    parameters : mapping
        Of the notebook ``explore``.
    method, schedule
        As set.
    """
    import yaml

    if kind == "schedule YAML":
        return f"# {METHOD_LABELS[method]}\n{schedule.to_yaml()}"
    if kind == "command line":
        given = " ".join(f"-p {name} {shlex.quote(_value(value))}" for name, value in parameters.items())
        return f"{_COMMAND} {given}"
    content = yaml.safe_dump(dict(parameters), sort_keys=False, default_flow_style=None, width=1000)
    return f"# papermill notebooks/explore.ipynb out.ipynb -f this-file.yaml\n{content}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _plan(method: str, plan: Schedule) -> str:
    return html.escape(f"{METHOD_LABELS[method]}, {plan}" if method != "best_of_n" else METHOD_LABELS[method])


def _row(name: str, curve: Curve) -> str:
    interval = f"{curve.low[0]:.3f} to {curve.high[0]:.3f}"
    cells = f"<td>{curve.n[0]}</td><td>{_number(curve.spent[0])}</td><td>{curve.mean[0]:.3f}</td><td>{interval}</td>"
    return f"<tr><td>{name}</td>{cells}</tr>"


def _change(change: Change, form: str) -> str:
    return f"{change.value:+{form}} [{change.low:+{form}}, {change.high:+{form}}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"


PANELS = ("reward", "tau", "funnel", "gain", "change")


_TILES = {  # left, bottom, right, top in parts of the figure: an axes with its title, ticks and labels
    "reward": (0.0, 0.49, 0.605, 1.0),
    "tau": (0.605, 0.49, 1.0, 1.0),
    "funnel": (0.0, 0.255, 1.0, 0.49),
    "gain": (0.0, 0.0, 0.46, 0.255),
    "change": (0.46, 0.0, 1.0, 0.255),
}


def new_figure(dpi: float = 100) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure outside pyplot and its five axes by name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 7.4), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    places = {
        "reward": (0.075, 0.565, 0.515, 0.375),
        "tau": (0.665, 0.565, 0.32, 0.375),
        "funnel": (0.02, 0.295, 0.965, 0.175),
        "gain": (0.12, 0.075, 0.30, 0.135),
        "change": (0.55, 0.075, 0.435, 0.145),
    }
    return figure, {name: figure.add_axes(place) for name, place in places.items()}


class Canvas:
    """Five axes, and the picture of them.

    Parameters
    ----------
    axes : mapping of str to Axes, optional
        On a figure of their own by default.

    Attributes
    ----------
    stale : set of str
        Panels whose part that stays has to be drawn anew.
    touched : set of str
        Panels whose moving artists have to be drawn anew.
    """

    def __init__(self, axes: Mapping[str, Axes] | None = None) -> None:
        self.axes = dict(axes) if axes is not None else new_figure()[1]
        self.figure = self.axes["reward"].figure
        self._own = axes is None
        self._names = {ax: name for name, ax in self.axes.items()}
        self.forget()

    def forget(self) -> None:
        """Start anew: no artist moves, and nothing has been drawn."""
        self.stale, self.touched = set(PANELS), set(PANELS)
        self._moving: dict[str, list[Any]] = {name: [] for name in PANELS}
        self._background: np.ndarray | None = None  # the parts that stay, (height, width, RGBA)

    def move(self, ax: Axes, artist: Any) -> Any:
        """Take `artist` as one that moves: it is left out of what stays, and drawn on top of it. Return it."""
        artist.set_animated(True)
        name = self._names[ax]
        self._moving[name].append(artist)
        if self._own and not artist.get_clip_on():  # text may not reach into another panel's tile: it would stay there
            from matplotlib.transforms import Bbox, TransformedBbox

            artist.set_clip_box(TransformedBbox(Bbox(np.reshape(_TILES[name], (2, 2))), self.figure.transFigure))
            artist.set_clip_on(True)
        return artist

    def png(self) -> bytes:
        """Return the picture; only what has changed is drawn. The figure must be one of :func:`new_figure`."""
        canvas: Any = self.figure.canvas  # Agg
        if self._background is None:
            canvas.draw()  # leaves the animated artists out
        picture = np.asarray(canvas.buffer_rgba())
        tiles = {name: self._tile(name) for name in self.touched | self.stale}
        if self._background is None:
            self._background = picture.copy()
        else:
            for name in self.stale:
                picture[tiles[name]] = 255
                self.axes[name].draw(canvas.get_renderer())
                self._background[tiles[name]] = picture[tiles[name]]
        for name, tile in tiles.items():
            picture[tile] = self._background[tile]
            for artist in self._moving[name]:
                if artist.get_visible():
                    self.axes[name].draw_artist(artist)
        self.stale, self.touched = set(), set()
        return _png(picture)

    def _tile(self, name: str) -> tuple[slice, slice]:
        left, bottom, right, top = _TILES[name]
        width, height = self.figure.canvas.get_width_height(physical=True)
        rows = slice(round((1 - top) * height), round((1 - bottom) * height))
        return rows, slice(round(left * width), round(right * width))


def _png(rgba: np.ndarray) -> bytes:
    """Encode without row filters at the lowest level: a chart packs well anyway, three times quicker than Pillow."""
    height, width, _ = rgba.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)
    rows[:, 1:] = rgba[:, :, :3].reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows.tobytes(), 1)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


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
