"""The explorer: move a schedule, a budget or a cost, and see at once what TTSnap gives.

``compute`` and ``draw`` do the work and know no widget; the class joins them to controls. A change is drawn from a
first block of random subsets; while nothing moves, the other blocks follow and the numbers settle.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ipywidgets as ipw

from ttsnap_lib.checks import choice, real
from ttsnap_lib.costs import PRESETS, CostModel
from ttsnap_lib.errors import ConfigError, ScheduleError, TTSnapError
from ttsnap_lib.explorer.pool import Pool
from ttsnap_lib.explorer.result import Result, State, available_mark, compute, jobs
from ttsnap_lib.explorer.view import COPY_FORMATS, SEARCH, STYLE, Panels, copy_text, draw, message_html, numbers_html
from ttsnap_lib.files import SHIPPED_TENSORS, data_cache, shipped_tensor
from ttsnap_lib.runs.run import Run, current_run
from ttsnap_lib.schedule import METHODS, PUBLISHED_SCHEDULE, Schedule
from ttsnap_lib.simulation.plots import search_command
from ttsnap_lib.simulation.pruning import step_positions
from ttsnap_lib.style import METHOD_LABELS, reward_label
from ttsnap_lib.tensors.tensor import open_rewards
from ttsnap_lib.tuning.optimize import OptimizedSchedule, optimize_schedule

if TYPE_CHECKING:
    import xarray as xr


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


_KEPT_POOLS = 3


_OFFERED = 50  # tensors of the data cache in the list, at most


_GIVEN = "given"


class Sources:
    """Tensors and costs behind an explorer's choosers.

    Parameters
    ----------
    controls : Controls
    tensor : str, path or xarray.Dataset
    cost : str or CostModel
    iterations, seed : int
        As :class:`Pool` takes them.

    Attributes
    ----------
    pool : Pool or None
        None when the chosen tensor does not open.
    """

    def __init__(
        self, controls: Controls, tensor: str | Path | xr.Dataset, cost: str | CostModel, *, iterations: int, seed: int
    ) -> None:
        self._controls, self._iterations, self._seed = controls, iterations, seed
        self._pools: OrderedDict[str, Pool] = OrderedDict()
        self._given: dict[str, xr.Dataset] = {}
        self.pool: Pool | None = None
        name = str(tensor)
        if not isinstance(tensor, str | Path):
            name, self._given[_GIVEN] = _GIVEN, tensor
        found = ["synthetic", *(shipped for shipped in SHIPPED_TENSORS if shipped_tensor(shipped).is_dir())]
        found += [str(path) for path in sorted(data_cache().glob("*.zarr"))[:_OFFERED]]
        controls.tensor.options = list(dict.fromkeys([name, *found]))
        controls.tensor.value = name
        self.open(name)

        name = _GIVEN if isinstance(cost, CostModel) else str(cost)
        self._costs = {name: cost if isinstance(cost, CostModel) else CostModel.load(cost), **PRESETS}
        controls.cost.options = list(self._costs)
        controls.cost.value = name

    def connect(self, say: Callable[[str], None], opened: Callable[[], None], changed: Callable[[], None]) -> None:
        """Follow the choosers: `say` tells an error, `opened` and then `changed` follow another tensor."""
        controls = self._controls

        def tensor_chosen(change: Any) -> None:
            try:
                with controls.quiet():
                    self.open(controls.tensor.value)
                opened()
            except TTSnapError as error:
                self.pool, self._error = None, error
            changed()

        def cost_chosen(change: Any) -> None:
            with controls.quiet():
                controls.accounting.value = self.base_cost.accounting
            changed()

        def load_cost(name: str) -> None:
            self._costs[name] = CostModel.load(name)

        controls.tensor.observe(tensor_chosen, names="value")
        controls.cost.observe(cost_chosen, names="value")
        named = [
            (controls.tensor_path, controls.tensor, open_rewards),
            (controls.cost_path, controls.cost, load_cost),
        ]
        for field, chooser, load in named:
            field.observe(lambda change, f=field, c=chooser, load=load: _add(f, c, load, say), names="value")

    def open(self, name: str) -> None:
        """Open a tensor (once) and offer its rewards and steps."""
        if name not in self._pools:
            dataset = self._given[name] if name in self._given else open_rewards(name)
            self._pools[name] = Pool(dataset, iterations=self._iterations, seed=self._seed)
            while len(self._pools) > _KEPT_POOLS:
                self._pools.popitem(last=False)
        self._pools.move_to_end(name)
        self.pool = self._pools[name]
        self._controls.offer_rewards(self.pool.names)
        self._controls.offer_steps(self.pool.steps[:-1])

    def choose_rewards(self, rewards: Sequence[str], shown: str) -> None:
        """Set which rewards select (all when none is named) and which one is drawn."""
        names = cast("Pool", self.pool).names
        for name in [*rewards, *([shown] if shown else [])]:
            choice("rewards", name, names)
        self._controls.rewards.value = tuple(rewards or names)
        self._controls.shown.value = shown or self._controls.rewards.value[0]

    @property
    def base_cost(self) -> CostModel:
        """The chosen cost model as it was loaded."""
        return self._costs[self._controls.cost.value]

    @property
    def cost(self) -> CostModel:
        """The chosen cost model with the chosen accounting, and a preset with the steps of the tensor."""
        changes: dict[str, Any] = {"accounting": self._controls.accounting.value}
        if self._controls.cost.value in PRESETS:  # what a step costs does not depend on how many there are
            changes["n_steps"] = self.opened.steps[-1] + 1
        return dataclasses.replace(self.base_cost, **changes)

    @property
    def opened(self) -> Pool:
        """The pool.

        Raises
        ------
        TensorError
            The chosen tensor did not open.
        """
        if self.pool is None:
            raise self._error
        return self.pool

    def names(self) -> tuple[str, str]:
        """Return how tensor and cost are written down.

        Raises
        ------
        ConfigError
            One of them was given in memory.
        """
        controls = self._controls
        for control, remedy in (
            (controls.tensor, "Save it with save_rewards() and open it by its path."),
            (controls.cost, "Save it with CostModel.save() and open it as a cost file."),
        ):
            if control.value == _GIVEN:
                raise ConfigError(f"{control.description}: got 'given in memory', expected a name or a path. {remedy}")
        return controls.tensor.value, controls.cost.value


def _add(field: ipw.Text, chooser: ipw.Dropdown, load: Callable[[str], Any], say: Callable[[str], None]) -> None:
    """Add a path that was typed to a chooser, if it opens."""
    name = field.value.strip()
    if not name:
        return
    try:
        load(name)
    except TTSnapError as error:
        say(str(error))
        return
    chooser.options = list(dict.fromkeys([*chooser.options, name]))
    chooser.value = name
    field.value = ""


_TOLD_EVERY_S = 0.3


class Actions:
    """Joins the buttons of an explorer to what they do."""

    def __init__(self, explorer: Explorer) -> None:
        self._explorer = explorer
        self._loop = _running_loop()
        self._stop = threading.Event()
        self.thread: threading.Thread | None = None
        controls = explorer.controls
        controls.pin.on_click(lambda button: self.pin())
        controls.unpin.on_click(lambda button: self.back_to_pinned())
        controls.optimise.on_click(lambda button: self.optimise())
        controls.cancel.on_click(lambda button: self._stop.set())
        controls.copy.on_click(lambda button: self.copy())
        controls.save.on_click(lambda button: self.save())

    # -- pinning ------------------------------------------------------------------------------------------------

    def pin(self) -> None:
        """Measure changes against the schedule as it stands."""
        controls = self._explorer.controls
        self._explorer.pinned = (controls.method.value, controls.schedule)
        self._explorer.changed()

    def back_to_pinned(self) -> None:
        """Set the controls to the pinned schedule."""
        controls = self._explorer.controls
        method, schedule = self._explorer.pinned
        with controls.quiet():
            controls.method.value = method
            controls.schedule = schedule
        self._explorer.changed()

    # -- optimising ---------------------------------------------------------------------------------------------

    def optimise(self) -> None:
        """Search for a better schedule in a thread; the one at hand is pinned, so that the gain shows."""
        explorer, controls = self._explorer, self._explorer.controls
        if self.thread is not None and self.thread.is_alive():
            return
        try:
            state = explorer.read()
            if state.method == "best_of_n":
                raise ConfigError(
                    "method: got 'best_of_n', expected TTSp or TTSnap. Choose one: Best-of-N has no schedule."
                )
            budgets = _budgets(state, explorer.pool, controls.objective.value)
        except TTSnapError as error:
            explorer.say(str(error))
            return
        self._stop.clear()
        controls.optimise.disabled, controls.cancel.disabled = True, False
        self._tell("Looking for a schedule ...")
        arguments = (state, explorer.pool, budgets, controls.objective.value, float(controls.seconds.value))
        self.thread = threading.Thread(target=self._search, args=arguments, name="optimise", daemon=True)
        self.thread.start()

    def _search(self, state: State, pool: Pool, budgets: list[float], objective: str, seconds: float) -> None:
        started, told = time.monotonic(), 0.0

        def progress(done: int, wanted: int) -> None:
            nonlocal told
            if self._stop.is_set():
                raise KeyboardInterrupt  # the optimiser's own way to end with the best so far
            now = time.monotonic()
            if now - told > _TOLD_EVERY_S:
                told = now
                self._post(self._tell, f"{done:,} of {wanted:,} schedules tried, {now - started:.0f} s")

        try:
            found = optimize_schedule(
                pool.dataset,
                state.cost,
                budgets,
                state.method,
                objective=objective,
                time_limit_s=seconds,
                combine=state.combine,
                report=[name for name in pool.names if name not in state.rewards],
                progress=progress,
            )
            self._post(self._found, found, state)
        except TTSnapError as error:
            self._post(self._ended, str(error))
        except KeyboardInterrupt:
            self._post(self._ended, "Cancelled before a schedule was found.")
        except Exception as error:  # noqa: BLE001 - the traceback of a thread would be lost: say it in place
            self._post(self._ended, f"The optimiser failed: {type(error).__name__}: {error}")

    def _found(self, found: OptimizedSchedule, state: State) -> None:
        explorer = self._explorer
        explorer.pinned = (state.method, state.schedule)
        with explorer.controls.quiet():
            explorer.controls.method.value = state.method
            explorer.controls.schedule = found.schedule
        explorer.changed()
        self._ended("")
        self._tell(
            f"Found and set; the schedule before it is pinned. {found}. Tuned on even prompts, tested on odd ones."
        )

    def _ended(self, message: str) -> None:
        controls = self._explorer.controls
        controls.optimise.disabled, controls.cancel.disabled = False, True
        self._tell("")
        if message:
            self._explorer.say(message)

    def _tell(self, text: str) -> None:
        self._explorer.progress.value = message_html(text)

    def _post(self, callback: Any, *arguments: Any) -> None:
        """Call on the thread of the widgets."""
        if self._loop is not None and self._loop.is_running():
            self._loop.call_soon_threadsafe(callback, *arguments)
        else:
            callback(*arguments)

    # -- taking it along ----------------------------------------------------------------------------------------

    def copy(self) -> str:
        """Write the state in the chosen format into the field and, where the browser lets it, to the clipboard."""
        explorer, controls = self._explorer, self._explorer.controls
        try:
            kind, parameters = controls.copy_as.value, explorer.parameters()
            if kind == SEARCH:
                text = self._search_line(parameters["cost"])
            else:
                text = copy_text(kind, parameters, controls.method.value, controls.schedule)
        except TTSnapError as error:
            explorer.say(str(error))
            return ""
        controls.copied.layout.display = None
        controls.copied.value = text
        # A fresh random-free value each time would not rerun the same script: clear it first.
        explorer.script.outputs = ()
        explorer.script.outputs = javascript(_CLIPBOARD % json.dumps(text))
        return text

    def _search_line(self, cost: str) -> str:
        state, dataset = cast("State", self._explorer.state), self._explorer.pool.dataset
        schedule = None if state.method == "best_of_n" else state.schedule
        n = state.cost.candidates(state.budget, schedule)
        return search_command(dataset.attrs.get("model", "MODEL"), state.rewards, cost, n, schedule, state.method)

    def save(self) -> Path | None:
        """Save figure and table with all iterations done; return the PNG's path."""
        explorer = self._explorer
        explorer.finish()
        if explorer.result is None:
            explorer.say("Nothing to save: set a schedule and a budget that can run first.")
            return None
        try:
            run = explorer.run or current_run("explore")
            with contextlib.redirect_stdout(io.StringIO()):
                path = run.save_figure(draw(explorer.result)["reward"].figure, "explore")
                run.save_table(explorer.result.frame())
        except TTSnapError as error:
            explorer.say(str(error))
            return None
        self._tell(f"Saved {path}, the same as PDF, and the table results.csv beside it.")
        return path


def javascript(code: str) -> tuple[dict[str, Any], ...]:
    """Return the outputs of an output widget that run `code` in the browser."""
    data = {"application/javascript": code, "text/plain": ""}
    return ({"output_type": "display_data", "data": data, "metadata": {}},)


# Jupyter binds arrow keys to moves between cells and headings; while a slider's handle has the focus they are its own.
# The attribute is Lumino's; it is set when the focus comes, since the page may build a slider anew.
KEEP_KEYS = """
if (!window.ttsnapKeepKeys) {
  window.ttsnapKeepKeys = true;
  document.addEventListener("focusin", function (event) {
    if (event.target.classList.contains("noUi-handle")) {
      event.target.setAttribute("data-lm-suppress-shortcuts", "true");
    }
  }, true);
}
"""


_CLIPBOARD = """
(function () {
  const text = %s;
  const older = function () {
    const field = document.createElement("textarea");
    field.value = text;
    document.body.appendChild(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  };
  if (navigator.clipboard && window.isSecureContext) { navigator.clipboard.writeText(text).catch(older); }
  else { older(); }
})();
"""


def _budgets(state: State, pool: Pool, objective: str) -> list[float]:
    """Return the budgets to tune for: those that Best-of-N can run from the pool."""
    wanted = state.budgets if objective == "area" else (state.budget,)
    return [budget for budget in wanted if 1 <= state.cost.candidates(budget) <= pool.n_images] or list(wanted)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


MULTIPLES = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20)


# A first move is drawn at once. Moves that follow closely wait, so that those which queue up are drawn together.
_DEBOUNCE_S, _REST_S, _SETTLE_S = 0.02, 0.15, 0.15


def explore(tensor: str | Path | xr.Dataset = "synthetic", **options: Any) -> Explorer:
    """Return the explorer of a tensor, ready to be shown; options as of :class:`Explorer`.

    Headless (papermill, ``ttsnap run``) all iterations are done at once, and figure and table are saved.
    """
    explorer = Explorer(tensor, **options)
    if explorer.run is not None and (explorer.run.headless or "JPY_SESSION_NAME" not in os.environ):
        explorer.finish()
        if explorer.result is not None:
            explorer.actions.save()
    return explorer


class Explorer(ipw.VBox):
    """Widgets over precomputed reward tensors.

    Parameters
    ----------
    tensor : str, path or xarray.Dataset
        As :func:`ttsnap_lib.open_rewards` takes it, or a tensor in memory.
    rewards : sequence of str
        Rewards that select; all when empty.
    method : {"ttsnap", "ttsp", "best_of_n"}
    steps, keep_ratios
        The schedule to begin with, also the first pinned one.
    cost : str or CostModel
        A preset, a cost file, or a model.
    accounting : {"exact", "published"}, optional
        Instead of the cost's own.
    multiple : float
        The budget, as a multiple of one Best-of-N image.
    multiples : sequence of float
        The range of budgets of the curves and of the relative gain, in the same way.
    shown : str
        The reward that is drawn; the first that selects by default.
    combine, iterations, seed
        As in :func:`ttsnap_lib.simulate.simulate`.
    run : Run, optional
        Where figures are saved; the interactive run of ``explore`` by default.
    later : callable, optional
        ``later(delay_s, callback)`` calls back once and returns a handle with ``cancel()``, or returns None where it
        cannot. The running event loop by default; without one every change is computed to the end at once.

    Attributes
    ----------
    controls : Controls
    actions : Actions
    pinned : (str, Schedule)
    result : Result or None
    state : State or None
    """

    def __init__(
        self,
        tensor: str | Path | xr.Dataset = "synthetic",
        *,
        rewards: Sequence[str] = (),
        method: str = "ttsnap",
        steps: Sequence[int] = PUBLISHED_SCHEDULE.steps,
        keep_ratios: Sequence[float] = PUBLISHED_SCHEDULE.keep_ratios,
        cost: str | CostModel = "flux-512+image_reward",
        accounting: str = "",
        multiple: float = 10,
        multiples: Sequence[float] = MULTIPLES,
        shown: str = "",
        combine: str = "rank_sum",
        iterations: int = 200,
        seed: int = 0,
        run: Run | None = None,
        later: Callable[[float, Callable[[], None]], Any] | None = None,
    ) -> None:
        self.run, self._later = run, later or _on_event_loop
        self._multiples = tuple(real("multiples", value, 0, open_low=True) for value in multiples)
        self._fixed = {"iterations": iterations, "seed": seed}
        schedule = Schedule(cast("tuple[int, ...]", steps), cast("tuple[float, ...]", keep_ratios))  # it checks them
        choice("method", method, METHODS)
        choice("combine", combine, ("rank_sum", "z_score"))
        choice("accounting", accounting, ("", "exact", "published"))
        self.state: State | None = None
        self.result: Result | None = None
        self.pinned = (method, schedule)
        self._mark = 0
        self._pending: Any = None  # handles of what `later` will call
        self._settling: Any = None
        self._resting: Any = None
        self._panels = Panels()

        self.controls = controls = Controls(self.changed)
        with controls.quiet():
            self.sources = Sources(controls, tensor, cost, **self._fixed)
            self.sources.choose_rewards(rewards, shown)
            _check_stages(schedule, self.pool, controls.stages.max)
            controls.combine.value = combine
            controls.accounting.value = accounting or self.sources.base_cost.accounting
            controls.method.value = method
            controls.schedule = schedule
            controls.multiple.max = max(*self._multiples, multiple)
            controls.multiple.value = multiple

        # No tooltip: on an Image it makes the view fail in the browser (ipywidgets 8.1 looks for a description).
        self.image = ipw.Image(format="png", layout=ipw.Layout(width="100%", max_width="920px"))
        self.numbers, self.message, self.progress = ipw.HTML(), ipw.HTML(), ipw.HTML()
        self.script = ipw.Output(outputs=javascript(KEEP_KEYS), layout=ipw.Layout(height="0", overflow="hidden"))
        right = ipw.VBox(
            [self.message, self.numbers, self.image, self.progress], layout=ipw.Layout(flex="1 1 560px", min_width="0")
        )
        body = ipw.Box([controls.columns, right], layout=ipw.Layout(flex_flow="row wrap", align_items="flex-start"))
        super().__init__([ipw.HTML(STYLE, layout=ipw.Layout(height="0")), body, self.script])
        self.sources.connect(self.say, self._opened, self.changed)
        self.actions = Actions(self)
        self._refresh()

    # -- from a change to the screen ----------------------------------------------------------------------------

    def changed(self) -> None:
        """Redraw at once after a rest, else a moment from now: changes that come in between are drawn together."""
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        if self._pending is None:
            self._pending = self._later(0.0 if self._resting is None else _DEBOUNCE_S, self._refresh)
            if self._pending is None:
                self._refresh()

    def _refresh(self) -> None:
        self._pending = None
        try:
            self.state = self.read()
            self._show(available_mark(self.state, self.pool))
        except TTSnapError as error:
            self.say(str(error))
            self.image.add_class("ttsnap-stale")
            self.numbers.value = ""
            self.result = None
            return
        finally:
            if self._resting is not None:
                self._resting.cancel()
            self._resting = self._later(_REST_S, self._rested)
        self._settle(_SETTLE_S)

    def _rested(self) -> None:
        self._resting = None

    def _settle(self, delay_s: float) -> None:
        if self.result is None or self.result.complete:
            self._settling = None
            return
        self._settling = self._later(delay_s, self._idle)
        if self._settling is None:
            self.finish()

    def _idle(self) -> None:
        """Do one block of what is still to do, and draw when all that is compared has got equally far."""
        if self.state is None:
            return
        found, block = jobs(self.state, self.pool)
        target = min(mark for mark in self.pool.marks(block) if mark > self._mark)
        worked = any(self.pool.done(job) < target and self.pool.advance(job, block, target) for job in found)
        if not worked:
            self._show(target)
        self._settle(0.001)

    def finish(self) -> None:
        """Do all iterations now."""
        if self.state is not None and self.result is not None and not self.result.complete:
            _, block = jobs(self.state, self.pool)
            self._show(self.pool.marks(block)[-1])

    def _show(self, mark: int) -> None:
        state = cast("State", self.state)
        self.result = compute(state, self.pool, mark)
        self._mark = mark
        self._panels.update(self.result)
        self.image.remove_class("ttsnap-stale")
        self.image.value = self._panels.png()
        self.numbers.value = numbers_html(self.result, state.cost.total(1))
        self.say("")

    def say(self, text: str) -> None:
        """Show a plain message in place of a result."""
        self.message.value = message_html(text)

    def read(self) -> State:
        """Return the state that the controls stand for."""
        controls = self.controls
        cost = self.sources.cost
        one = cost.total(1)
        return State(
            rewards=tuple(controls.rewards.value),
            shown=controls.shown.value,
            cost=cost,
            budgets=tuple(sorted({multiple * one for multiple in self._multiples})),
            budget=controls.multiple.value * one,
            method=controls.method.value,
            schedule=controls.schedule,
            pinned_method=self.pinned[0],
            pinned=self.pinned[1],
            combine=controls.combine.value,
        )

    @property
    def pool(self) -> Pool:
        """The tensor at hand, held ready."""
        return self.sources.opened

    def _opened(self) -> None:
        if not set(self.pinned[1].steps) <= set(self.pool.steps[:-1]):  # it has no meaning on these steps
            self.pinned = (self.pinned[0], self.controls.schedule)

    # -- taking it along ----------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of the notebook ``explore`` that lead back to this state.

        Raises
        ------
        ConfigError
            A tensor or cost that was given in memory has no name to be written down.
        """
        controls = self.controls
        tensor, cost = self.sources.names()
        schedule = controls.schedule.to_dict()
        found: dict[str, Any] = {"tensor": tensor}
        if len(controls.rewards.value) < len(self.pool.names):
            found["rewards"] = list(controls.rewards.value)
        if controls.shown.value != (controls.rewards.value or ("",))[0]:
            found["shown"] = controls.shown.value
        found |= {"method": controls.method.value, **schedule, "cost": cost}
        if controls.accounting.value != self.sources.base_cost.accounting:
            found["accounting"] = controls.accounting.value
        found |= {"multiple": controls.multiple.value}
        if self._multiples != MULTIPLES:
            found["multiples"] = list(self._multiples)
        if controls.combine.value != "rank_sum":
            found["combine"] = controls.combine.value
        return found | self._fixed

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Add the picture, for where no widgets can be shown (a notebook run headless, read on the web)."""
        bundle = super()._repr_mimebundle_(**kwargs)
        if isinstance(bundle, dict) and self.image.value:
            bundle["image/png"] = base64.b64encode(self.image.value).decode()
        return bundle


def _check_stages(schedule: Schedule, pool: Pool, most: int) -> None:
    step_positions(schedule, pool.dataset["step"].values)
    if len(schedule) > most:
        raise ScheduleError(f"stages: got {len(schedule)!r}, expected at most {most}. Name fewer steps.")


def _on_event_loop(delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle | None:
    try:
        return asyncio.get_running_loop().call_later(delay_s, callback)
    except RuntimeError:
        return None
