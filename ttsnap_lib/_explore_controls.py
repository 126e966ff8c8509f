"""The explorer's controls: what stands in them, that step sliders never cross, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as ipw

from ._explore_text import COPY_FORMATS
from .plots import METHOD_LABELS, reward_label
from .schedule import Schedule

__all__ = ["MAX_STAGES", "Controls"]

MAX_STAGES = 4
_WIDE = {"description_width": "145px"}
_ROW = {"width": "392px"}


class Controls:
    """All controls, as plain attributes; `changed` is called after any change that a person or a program makes."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed, self._quiet = changed, False
        self.tensor = ipw.Dropdown(description="tensor", **_layout())
        self.tensor_path = ipw.Text(
            description="or its folder", placeholder="path of a .zarr, then Enter", continuous_update=False, **_layout()
        )
        self.rewards = ipw.SelectMultiple(description="reward(s) that select", rows=3, **_layout())
        self.shown = ipw.Dropdown(description="reward shown", **_layout())
        self.combine = ipw.Dropdown(
            description="several select by",
            options=[("sum of ranks", "rank_sum"), ("mean of z-scores", "z_score")],
            **_layout(),
        )
        self.cost = ipw.Dropdown(description="cost", **_layout())
        self.cost_path = ipw.Text(
            description="or a cost file", placeholder="JSON or YAML, then Enter", continuous_update=False, **_layout()
        )
        self.accounting = ipw.Dropdown(description="accounting", options=["exact", "published"], **_layout())
        self.method = ipw.Dropdown(
            description="method", options=[(label, name) for name, label in METHOD_LABELS.items()], **_layout()
        )
        self.stages = ipw.IntSlider(description="stages", min=0, max=MAX_STAGES, **_layout())
        self.steps = [
            ipw.SelectionSlider(description=f"step {k + 1}", options=[0, 1], continuous_update=True, **_layout())
            for k in range(MAX_STAGES)
        ]
        self.keeps = [
            ipw.FloatSlider(
                description=f"keep ratio (alpha) {k + 1}",
                min=0.01,
                max=1.0,
                value=0.5,
                step=0.01,
                readout_format=".2f",
                **_layout(),
            )
            for k in range(MAX_STAGES)
        ]
        self.multiple = ipw.FloatSlider(
            description="budget (× one image)", min=0.5, max=20, step=0.5, readout_format=".1f", **_layout()
        )
        button = {"layout": ipw.Layout(width="auto")}
        self.pin = ipw.Button(description="Pin this schedule", tooltip="Measure every change against it", **button)
        self.unpin = ipw.Button(description="Back to the pinned", tooltip="Set the pinned schedule again", **button)
        self.optimise = ipw.Button(
            description="Optimise from here", tooltip="Search for a better schedule for this tensor and cost", **button
        )
        self.cancel = ipw.Button(description="Cancel", disabled=True, tooltip="Keep the best found so far", **button)
        self.objective = ipw.Dropdown(
            description="for", options=[("all budgets shown", "area"), ("this budget", "single")], **_layout()
        )
        self.seconds = ipw.BoundedIntText(description="seconds at most", min=1, max=3600, value=15, **_layout())
        self.copy_as = ipw.Dropdown(description="as", options=COPY_FORMATS, **_layout("250px", "20px"))
        self.copy = ipw.Button(description="Copy", tooltip="To the clipboard, and into the field below", **button)
        self.copied = ipw.Textarea(
            placeholder="What is copied also stands here", rows=4, layout=ipw.Layout(width="392px", display="none")
        )
        self.save = ipw.Button(description="Save figure", tooltip="PNG, PDF and the table of the curves", **button)
        self.columns = self._columns()
        for k, slider in enumerate(self.steps):
            slider.observe(lambda change, k=k: self._step_moved(k), names="index")
        self.stages.observe(lambda change: self._stages_moved(), names="value")
        free = [self.rewards, self.shown, self.combine, self.accounting, self.method, self.multiple, *self.keeps]
        for control in free:
            control.observe(lambda change: self._tell(), names="value")

    # -- reading and setting ------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The schedule that the sliders stand for; setting one rounds its keep ratios to 0.01, the sliders' step."""
        active = range(self.stages.value)
        return Schedule(
            tuple(self.steps[k].value for k in active), tuple(round(self.keeps[k].value, 6) for k in active)
        )

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        with self.quiet():
            options = list(self.steps[0].options)
            self.stages.value = len(schedule)
            for k, (step, keep) in enumerate(zip(schedule.steps, schedule.keep_ratios, strict=True)):
                self.steps[k].index = options.index(step)
                self.keeps[k].value = max(0.01, round(keep, 2))  # the browser would snap it to the slider's step anyway
            self._show_stages()
        self._tell()

    def offer_steps(self, steps: Sequence[int]) -> None:
        """Set the steps at which a check may stand, and keep the sliders where they are if they fit."""
        with self.quiet():
            before = [slider.value for slider in self.steps]
            self.stages.max = min(MAX_STAGES, len(steps))
            for k, (slider, value) in enumerate(zip(self.steps, before, strict=True)):
                slider.options = list(steps)
                slider.index = list(steps).index(value) if value in steps else min(k, len(steps) - 1)
            self._in_order()

    def offer_rewards(self, names: Sequence[str]) -> None:
        """Set the rewards to choose from, and keep the choice if it fits."""
        with self.quiet():
            chosen = [name for name in self.rewards.value if name in names]
            shown = self.shown.value
            options = [(reward_label(name), name) for name in names]
            self.rewards.options = self.shown.options = options
            self.rewards.rows = min(4, max(2, len(names)))
            self.rewards.value = tuple(chosen or names)
            self.shown.value = shown if shown in names else names[0]
            several = None if len(names) > 1 else "none"
            for control in (self.rewards, self.shown, self.combine):
                control.layout.display = several

    def quiet(self) -> Any:
        """Return a context in which changes are not told."""
        return _Quiet(self)

    # -- behind -------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        if not self._quiet:
            self._changed()

    def _step_moved(self, k: int) -> None:
        """Stop a step slider at its neighbours."""
        if self._quiet:
            return
        with self.quiet():
            last = self.stages.value - 1
            low = self.steps[k - 1].index + 1 if k else 0
            high = self.steps[k + 1].index - 1 if k < last else len(self.steps[k].options) - 1
            self.steps[k].index = min(max(self.steps[k].index, low), max(low, high))
        self._tell()

    def _stages_moved(self) -> None:
        if self._quiet:
            return
        with self.quiet():
            self._in_order()
            self._show_stages()
        self._tell()

    def _in_order(self) -> None:
        """Give stages that have just appeared a place after the others, and move the others back where they must."""
        active = self.steps[: self.stages.value]
        size = len(self.steps[0].options)
        for k, slider in enumerate(active):
            room = size - (len(active) - k)  # the last place that leaves one for each later stage
            low = active[k - 1].index + 1 if k else 0
            wanted = slider.index if slider.index >= low else low + max(0, (size - 1 - low) // 3)
            slider.index = max(low, min(wanted, room)) if low <= room else room
        for k in range(len(active) - 2, -1, -1):
            active[k].index = min(active[k].index, active[k + 1].index - 1)

    def _show_stages(self) -> None:
        for k in range(MAX_STAGES):
            display = None if k < self.stages.value else "none"
            self.steps[k].layout.display = self.keeps[k].layout.display = display

    def _columns(self) -> ipw.VBox:
        pairs = [control for pair in zip(self.steps, self.keeps, strict=True) for control in pair]
        line = ipw.Layout(flex_flow="row wrap", width="392px")
        return ipw.VBox(
            [
                _head("Schedule"),
                self.method,
                self.stages,
                *pairs,
                ipw.Box([self.pin, self.unpin], layout=line),
                _head("Budget and cost"),
                self.multiple,
                self.cost,
                self.cost_path,
                self.accounting,
                _head("Data"),
                self.tensor,
                self.tensor_path,
                self.rewards,
                self.combine,
                self.shown,
                _head("Optimise"),
                self.objective,
                self.seconds,
                ipw.Box([self.optimise, self.cancel], layout=line),
                _head("Take it along"),
                ipw.Box([self.copy_as, self.copy], layout=line),
                self.copied,
                ipw.Box([self.save], layout=line),
            ],
            layout=ipw.Layout(width="412px", flex="0 0 auto"),
        )


class _Quiet:
    def __init__(self, controls: Controls) -> None:
        self._controls = controls

    def __enter__(self) -> None:
        self._before, self._controls._quiet = self._controls._quiet, True

    def __exit__(self, *error: object) -> None:
        self._controls._quiet = self._before


def _layout(width: str = _ROW["width"], description: str = _WIDE["description_width"]) -> dict[str, Any]:
    return {"layout": ipw.Layout(width=width), "style": {"description_width": description}}


def _head(text: str) -> ipw.HTML:
    return ipw.HTML(f"<div class='ttsnap-head'>{text}</div>", layout=ipw.Layout(width="392px"))
