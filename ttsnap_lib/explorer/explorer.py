"""The explorer: move a schedule, a budget or a cost, and see at once what TTSnap gives.

``compute`` and ``Panels`` do the work and know no widget; this file joins them to controls. A move is drawn from a few
random subsets; when the sliders rest, the others follow and the numbers settle.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ipywidgets as ipw
from IPython import get_ipython

from ttsnap_lib.checks import choice, real
from ttsnap_lib.costs import AUTO, PRESETS, CostModel
from ttsnap_lib.errors import ConfigError, ScheduleError, TTSnapError
from ttsnap_lib.explorer.pool import Pool
from ttsnap_lib.explorer.result import PINS, Result, State, compute, lacking
from ttsnap_lib.explorer.view import (
    MAX_STAGES,
    STYLE,
    Panels,
    draw,
    message_html,
    numbers_html,
    plan_label,
    told_html,
)
from ttsnap_lib.files import SHIPPED_TENSORS, data_cache, reason, shipped_tensor
from ttsnap_lib.runs.run import Run, current_run
from ttsnap_lib.schedule import METHODS, PUBLISHED_SCHEDULE, Schedule
from ttsnap_lib.simulation.plots import search_command
from ttsnap_lib.simulation.pruning import step_positions
from ttsnap_lib.style import METHOD_LABELS, reward_label
from ttsnap_lib.tensors.pricing import cost_for, fitting, mismatch
from ttsnap_lib.tensors.tensor import open_rewards
from ttsnap_lib.tuning.optimize import OptimizedSchedule, optimize_schedule

if TYPE_CHECKING:
    import xarray as xr

MULTIPLES = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20)
_COMBINE = {"sum of ranks": "rank_sum", "mean of z-scores": "z_score"}
_SEARCH = "command that runs it"
_COPY_FORMATS = (_SEARCH, "schedule YAML", "papermill parameters", "command line")
_GIVEN = "given"  # a tensor or a cost in memory
_PUBLISHED = "published"  # the cost that prices all models alike
_OFFERED = 50  # tensors of the data cache in the list, at most
_TOGETHER_S, _REST_S = 0.01, 0.15  # moves that come within the first are drawn together; a rest
_AT_ONCE = 4  # numbers of candidates pruned before a move that has come in is looked at
_TOLD_EVERY_S = 0.3
_SHORT = 88  # pixels of a label, where what is chosen is long
# Jupyter binds arrow keys to moves between cells and headings; while a slider's handle has the focus they are its own.
# The attribute is Lumino's; it is set when the focus comes, since the page may build a slider anew.
_KEEP_KEYS = """
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


def explore(tensor: str | Path | xr.Dataset = "synthetic", **options: Any) -> Explorer:
    """Return the explorer of a tensor, ready to be shown; options as of :class:`Explorer`.

    Where nobody watches (``ttsnap run``, papermill) all iterations are done at once, and figure and table are saved.
    """
    explorer = Explorer(tensor, **options)
    if explorer.run is not None and nobody_watches(explorer.run):
        explorer.finish()
        if explorer.result is not None:
            explorer.save()
    return explorer


def nobody_watches(run: Run) -> bool:
    """Tell whether a notebook runs without a front end: ``ttsnap run``, or papermill and others built on nbclient."""
    if run.headless:
        return True
    request = getattr(get_ipython(), "parent_header", None) or {}  # the message that asked for this cell
    asks = request.get("content", {}).get("allow_stdin", True)
    # Not every front end lets a cell ask for input (Lab and VS Code do). They are written in JavaScript, though:
    # only Python's client numbers its messages <session>_<process>_<count>. Voila's executor is such a client, too, and
    # yet has somebody to look on.
    header = request.get("header", {})
    by_python = re.fullmatch(rf"{re.escape(header.get('session', ''))}_\d+_\d+", header.get("msg_id", ""))
    return not asks and by_python is not None and not os.environ.get("SERVER_SOFTWARE", "").startswith("voila")


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
        The schedule to begin with, also pinned as A.
    cost : str or CostModel
        A preset, a cost file, or a model; ``"auto"`` for the preset of the tensor's model, size and reward.
    accounting : {"exact", "published"}, optional
        Instead of the cost's own.
    multiple : float
        The budget, as a multiple of one Best-of-N image.
    multiples : sequence of float
        The range of budgets of the curves and of the relative gain, in the same way.
    shown : str
        The reward that is drawn; the first that selects by default.
    combine, iterations, seed, distinct
        As in :func:`ttsnap_lib.simulate`.
    run : Run, optional
        Where figures are saved; the interactive run of ``explore`` by default.
    """

    def __init__(
        self,
        tensor: str | Path | xr.Dataset = "synthetic",
        *,
        rewards: Sequence[str] = (),
        method: str = "ttsnap",
        steps: Sequence[int] = PUBLISHED_SCHEDULE.steps,
        keep_ratios: Sequence[float] = PUBLISHED_SCHEDULE.keep_ratios,
        cost: str | CostModel = AUTO,
        accounting: str = "",
        multiple: float = 10,
        multiples: Sequence[float] = MULTIPLES,
        shown: str = "",
        combine: str = "rank_sum",
        iterations: int = 200,
        seed: int = 0,
        distinct: bool = False,
        run: Run | None = None,
    ) -> None:
        schedule = Schedule(cast("tuple[int, ...]", steps), cast("tuple[float, ...]", keep_ratios))  # it checks them
        choice("method", method, METHODS)
        choice("combine", combine, _COMBINE.values())
        choice("accounting", accounting, ("", "exact", "published"))
        self.run = run
        self._multiples = tuple(real("multiples", value, 0, open_low=True) for value in multiples)
        self._fixed: dict[str, Any] = {"iterations": iterations, "seed": seed, "distinct": distinct}
        self.state: State | None = None
        self.result: Result | None = None
        self.pins = {PINS[0]: (method, schedule)}
        self._undo: tuple[str, Schedule] | None = None  # what stood there before the optimiser's
        self._timer: asyncio.TimerHandle | None = None
        self._moved = False
        self._panels = Panels()
        self._loop = _running_loop()
        self._stop = threading.Event()
        self.thread: threading.Thread | None = None

        name = str(tensor) if isinstance(tensor, str | Path) else _GIVEN
        self._given = tensor
        self._costs: dict[str, CostModel] = {}  # that are no presets
        self.pool: Pool | None = None

        self.controls = controls = Controls(self.changed)
        with controls.quiet():
            controls.tensor.options = list(dict.fromkeys([name, *_tensors()]))
            controls.tensor.value = name
            pool = self._open(name)
            for reward in [*rewards, *([shown] if shown else [])]:
                choice("rewards", reward, pool.names)
            step_positions(schedule, pool.dataset["step"].values)
            if len(schedule) > controls.stages.max:
                raise ScheduleError(
                    f"stages: got {len(schedule)}, expected at most {controls.stages.max}. Name fewer steps."
                )
            controls.rewards.value = tuple(rewards or pool.names)
            controls.shown.value = shown or controls.rewards.value[0]
            controls.combine.value, controls.method.value, controls.schedule = combine, method, schedule
            chosen = _GIVEN
            if isinstance(cost, CostModel):
                self._costs[chosen] = cost
            else:
                with warnings.catch_warnings(action="ignore"):  # what does not fit is said beside the numbers
                    chosen, model = cost_for(pool.dataset, cost, controls.rewards.value[0])
                if chosen not in PRESETS:
                    self._costs[chosen] = model
            self._offer_costs(chosen)
            controls.accounting.value = accounting or self._model(chosen).accounting
            controls.multiple.max = max(*self._multiples, multiple)
            controls.multiple.value = multiple
        for button, action in (
            (controls.pin, self.pin), (controls.optimise, self.optimise), (controls.cancel, self._stop.set),
            (controls.undo, self.undo), (controls.copy, self.copy), (controls.save, self.save),
            *((row.back, functools.partial(self.back_to, pin)) for pin, row in controls.pins.items()),
            *((row.remove, functools.partial(self.unpin, pin)) for pin, row in controls.pins.items()),
        ):  # fmt: skip
            button.on_click(lambda button, action=action: action())
        controls.show_pins(self.pins)
        for control, handler in (
            (controls.tensor, self._tensor_chosen), (controls.cost, self._cost_chosen),
            (controls.rewards, self._rewards_chosen),
            (controls.tensor_path, functools.partial(self._typed, controls.tensor, open_rewards)),
            (controls.cost_path, functools.partial(self._typed, controls.cost, self._load_cost)),
        ):  # fmt: skip
            control.observe(handler, names="value")

        # No tooltip: on an Image it makes the view fail in the browser (ipywidgets 8.1 looks for a description).
        self.image = ipw.Image(format="png", layout=ipw.Layout(width="100%", max_width="760px"))
        self.image.add_class("ttsnap-picture")
        self.numbers, self.message = ipw.HTML(), ipw.HTML()
        self.script = ipw.Output(outputs=_javascript(_KEEP_KEYS), layout=ipw.Layout(height="0", overflow="hidden"))
        # Side by side from 760 px: 300 for the controls, 440 for the picture.
        right = ipw.VBox([self.message, self.numbers, self.image], layout=ipw.Layout(flex="1 1 440px", min_width="0"))
        layout = ipw.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="0 16px")
        body = ipw.Box([controls.box, right], layout=layout)
        super().__init__([ipw.HTML(STYLE, layout=ipw.Layout(height="0")), body, self.script])
        self._preview()

    # From a change to the screen

    def changed(self) -> None:
        """Draw a preview a moment from now: changes that come in until then are drawn together."""
        if not self._moved:
            self._moved = True
            self._after(_TOGETHER_S, self._preview)

    def finish(self) -> None:
        """Do all iterations now."""
        if self.result is not None and not self.result.complete:
            with self._errors_said(of_state=True):
                self._show(None)

    def say(self, text: str) -> None:
        """Show a plain message in place of a result."""
        self.message.value = message_html(text)

    @contextlib.contextmanager
    def _errors_said(self, beside: ipw.HTML | None = None, *, of_state: bool = False) -> Iterator[None]:
        """Say errors in place; a state that cannot run leaves no result, and the old picture pale."""
        try:
            yield
        except TTSnapError as error:
            (beside or self.message).value = message_html(str(error))
            if of_state:
                self.image.add_class("ttsnap-stale")
                self.numbers.value, self.result = "", None

    def read(self) -> State:
        """Return the state that the controls stand for."""
        controls, cost = self.controls, self._cost()
        one = cost.total(1)
        return State(
            rewards=tuple(controls.rewards.value),
            shown=controls.shown.value,
            cost=cost,
            budgets=tuple(sorted({multiple * one for multiple in self._multiples})),
            budget=controls.multiple.value * one,
            method=controls.method.value,
            schedule=controls.schedule,
            pins=tuple((pin, *plan) for pin, plan in sorted(self.pins.items())),
            combine=controls.combine.value,
        )

    def _after(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call back later, instead of what was waiting; at once where there is no event loop."""
        if self._timer is not None:
            self._timer.cancel()
        loop = _running_loop()
        self._timer = loop.call_later(delay_s, callback) if loop else None
        if loop is None:
            callback()

    def _preview(self) -> None:
        self._moved = False
        with self._errors_said(of_state=True):
            pool, self.state = self._opened(), self.read()
            self._show(pool.preview(len(self.state.rewards) or 1) if lacking(self.state, pool) else None)
        if self.result is not None and not self.result.complete:
            self._after(_REST_S, self._complete)

    def _complete(self) -> None:
        """Prune what is missing part by part, so that a move which comes in meanwhile need not wait for all of it."""
        with self._errors_said(of_state=True):
            state, pool = cast("State", self.state), self._opened()
            missing = lacking(state, pool)
            if not missing:
                self._show(None)
                return
            job = missing[0][0]
            pool.per_prompt(job, [n for other, n in missing if other == job][:_AT_ONCE], pool.iterations)
            self._after(0.001, self._complete)

    def _show(self, iterations: int | None) -> None:
        self.result = compute(cast("State", self.state), self._opened(), iterations)
        self._panels.update(self.result)
        self.image.remove_class("ttsnap-stale")
        self.image.value = self._panels.png()
        self.numbers.value = numbers_html(self.result)
        self.say(mismatch(self._opened().dataset, self.controls.cost.value, self.result.state.rewards[0]))

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Add the picture, for where no widgets can be shown (a notebook run headless, read on the web)."""
        bundle = super()._repr_mimebundle_(**kwargs)
        # Which of the two Colab would choose is nowhere written.
        if isinstance(bundle, dict) and self.image.value and "google.colab" not in sys.modules:
            bundle["image/png"] = base64.b64encode(self.image.value).decode()
        return bundle

    # Tensors and costs behind the choosers

    def _open(self, name: str) -> Pool:
        """Open a tensor and offer its rewards and steps."""
        dataset = cast("xr.Dataset", self._given) if name == _GIVEN else open_rewards(name)
        self.pool = pool = Pool(dataset, **self._fixed)
        self.controls.offer(pool.names, pool.steps[:-1])
        return pool

    def _opened(self) -> Pool:
        if self.pool is None:
            raise self._error
        return self.pool

    def _tensor_chosen(self, change: Any) -> None:
        controls = self.controls
        if controls.is_quiet:
            return
        try:
            with controls.quiet():
                pool = self._open(controls.tensor.value)
            for pin, (method, schedule) in self.pins.items():
                if not set(schedule.steps) <= set(pool.steps[:-1]):  # it has no meaning on these steps
                    self.pins[pin] = method, controls.schedule
            controls.show_pins(self.pins)
            self._offer_costs(controls.cost.value)
        except TTSnapError as error:
            self.pool, self._error = None, error
        self.changed()

    def _rewards_chosen(self, change: Any) -> None:
        if self.pool is not None and not self.controls.is_quiet:  # a check costs what its reward does
            self._offer_costs(self.controls.cost.value)
            self.changed()

    def _offer_costs(self, chosen: str) -> None:
        """Offer the costs of the tensor's model, size and reward, and choose its own where `chosen` is another's preset."""
        controls, pool = self.controls, self._opened()
        rewards = controls.rewards.value
        fits = fitting(pool.dataset, rewards[0]) if rewards else []
        if fits and chosen in PRESETS and chosen not in (*fits, _PUBLISHED):
            chosen = fits[0]
        accounting = controls.accounting.value if chosen == controls.cost.value else self._model(chosen).accounting
        with controls.quiet():
            controls.cost.options = list(dict.fromkeys([*self._costs, *fits, chosen, _PUBLISHED]))
            controls.cost.value = chosen
            controls.accounting.value = accounting

    def _model(self, cost: str) -> CostModel:
        return self._costs[cost] if cost in self._costs else PRESETS[cost]

    def _cost_chosen(self, change: Any) -> None:
        if self.controls.is_quiet:
            return
        with self.controls.quiet():
            self.controls.accounting.value = self._model(self.controls.cost.value).accounting
        self.changed()

    def _load_cost(self, name: str) -> None:
        model = CostModel.load(name)
        if name not in PRESETS:
            self._costs[name] = model

    def _typed(self, chooser: ipw.Dropdown, load: Callable[[str], Any], change: Any) -> None:
        """Add a path that was typed to a chooser, if it opens."""
        field = change["owner"]
        name = field.value.strip()
        if name:
            with self._errors_said():
                load(name)
                before = chooser.value
                with self.controls.quiet():
                    chooser.options, chooser.value = list(dict.fromkeys([*chooser.options, name])), before
                chooser.value = name
                field.value = ""

    def _cost(self) -> CostModel:
        """Return the chosen cost with the chosen accounting, and a preset with the steps of the tensor."""
        controls = self.controls
        changes: dict[str, Any] = {"accounting": controls.accounting.value}
        if controls.cost.value in PRESETS:  # what a step costs does not depend on how many there are
            changes["n_steps"] = self._opened().steps[-1] + 1
        return dataclasses.replace(self._model(controls.cost.value), **changes)

    # Pinning and optimising

    def pin(self) -> None:
        """Measure changes against the schedule as it stands, too."""
        free = [pin for pin in PINS if pin not in self.pins]
        self._pinned(
            {**self.pins, free[0]: (self.controls.method.value, self.controls.schedule)} if free else self.pins
        )

    def unpin(self, pin: str) -> None:
        """Measure changes against a pinned schedule no longer."""
        self._pinned({name: plan for name, plan in self.pins.items() if name != pin})

    def back_to(self, pin: str) -> None:
        """Set the controls to a pinned schedule."""
        self._set(*self.pins[pin])

    def _pinned(self, pins: dict[str, tuple[str, Schedule]]) -> None:
        self.pins = pins
        self.controls.show_pins(pins)
        self.changed()

    def _set(self, method: str, schedule: Schedule) -> None:
        with self.controls.quiet():
            self.controls.method.value, self.controls.schedule = method, schedule
        self.changed()

    def optimise(self) -> None:
        """Search for a better schedule in a thread."""
        controls, objective = self.controls, self.controls.objective.value
        if self.thread is not None and self.thread.is_alive():
            return
        with self._errors_said(controls.optimised):
            state, pool = self.read(), self._opened()
            if state.method == "best_of_n":
                raise ConfigError("method: Best-of-N has no schedule to optimise. Choose TTSp or TTSnap.")
            wanted = state.budgets if objective == "area" else (state.budget,)
            fit = [budget for budget in wanted if 1 <= state.cost.candidates(budget) <= pool.n_images]
            self._stop.clear()
            controls.optimise.disabled, controls.cancel.disabled = True, False
            self._tell("Looking for a schedule ...")
            arguments = (state, pool, fit or list(wanted), objective, float(controls.seconds.value))
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
            then = functools.partial(self._found, found)
        except KeyboardInterrupt:
            then = functools.partial(self._tell, "Cancelled before a schedule was found.")
        except Exception as error:  # noqa: BLE001 - the traceback of a thread would be lost: say it in place
            words = str(error) if isinstance(error, TTSnapError) else f"The optimiser failed: {reason(error)}"
            then = functools.partial(self._fail, words)
        self._post(self._ended, then)

    def _ended(self, then: Callable[[], None]) -> None:
        self.controls.optimise.disabled, self.controls.cancel.disabled = False, True
        then()

    def _found(self, found: OptimizedSchedule) -> None:
        self._undo = self.controls.method.value, self.controls.schedule
        self.controls.undo.disabled = False
        self._set(found.method, found.schedule)
        low, high = found.test_interval
        what = "relative gain" if found.objective == "area" else "gain at this budget, in percent of Best-of-N's own,"
        cut = "" if found.complete else " The search was cut short."
        self._tell(
            f"Found and set: {plan_label(found.method, found.schedule)}. Its {what} on the half of the prompts that the "
            f"search did not see is {found.test_gain:+.1f} % [{low:+.1f}, {high:+.1f}]: this is the number to believe, "
            f"the curves show all prompts.{cut}"
        )

    def undo(self) -> None:
        """Set the schedule again that stood there before the optimiser's."""
        if self._undo is not None:
            self._set(*self._undo)
            self._undo, self.controls.undo.disabled = None, True
            self._tell("The schedule from before is back.")

    def _tell(self, text: str) -> None:
        self.controls.optimised.value = told_html(text)

    def _fail(self, text: str) -> None:
        self.controls.optimised.value = message_html(text)

    def _post(self, callback: Any, *arguments: Any) -> None:
        """Call on the thread of the widgets."""
        if self._loop is not None and self._loop.is_running():
            self._loop.call_soon_threadsafe(callback, *arguments)
        else:
            callback(*arguments)

    # Export

    def copy(self) -> str:
        """Write the state in the chosen format into the field and, where the browser lets it, to the clipboard."""
        text, field = "", self.controls.copied
        self.controls.exported.value = ""
        with self._errors_said(self.controls.exported):
            text = self._text(self.controls.copy_as.value, self.parameters())
            field.layout.display, field.value = None, text
            self.script.outputs = ()  # the same script again would not run
            self.script.outputs = _javascript(_CLIPBOARD % json.dumps(text))
        return text

    def _text(self, kind: str, parameters: dict[str, Any]) -> str:
        import yaml

        state = self.read()
        if kind == _SEARCH:
            plan = state.plans["current"][1]
            model, n = self._opened().dataset.attrs.get("model", "MODEL"), state.cost.candidates(state.budget, plan)
            n_steps = state.cost.n_steps
            return search_command(model, state.rewards, parameters["cost"], n, plan, state.method, n_steps=n_steps)
        if kind == "schedule YAML":
            return f"# {METHOD_LABELS[state.method]}\n{state.schedule.to_yaml()}"
        if kind == "command line":
            words = {name: value if isinstance(value, str) else repr(value) for name, value in parameters.items()}
            return "ttsnap run explore " + " ".join(f"-p {name} {shlex.quote(word)}" for name, word in words.items())
        content = yaml.safe_dump(parameters, sort_keys=False, default_flow_style=None, width=1000)
        return f"# papermill notebooks/explore.ipynb out.ipynb -f this-file.yaml\n{content}"

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of the notebook ``explore`` that lead back to this state, the usual ones left out."""
        controls = self.controls
        for control, save in ((controls.tensor, "save_rewards()"), (controls.cost, "CostModel.save()")):
            if control.value == _GIVEN:
                raise ConfigError(
                    f"{control.description}: got one in memory, expected a name or a path. Save it with {save} and "
                    "open it by its path."
                )
        rewards = list(controls.rewards.value)
        found = {
            "tensor": controls.tensor.value, "rewards": rewards, "shown": controls.shown.value,
            "method": controls.method.value, **controls.schedule.to_dict(), "cost": controls.cost.value,
            "accounting": controls.accounting.value, "multiple": controls.multiple.value,
            "multiples": list(self._multiples), "combine": controls.combine.value, **self._fixed,
        }  # fmt: skip
        usual = {
            "rewards": list(self._opened().names), "shown": rewards[0] if rewards else "",
            "accounting": self._model(controls.cost.value).accounting, "multiples": list(MULTIPLES),
            "combine": "rank_sum",
        }  # fmt: skip
        return {name: value for name, value in found.items() if name not in usual or value != usual[name]}

    def save(self) -> Path | None:
        """Save figure and table with all iterations done; return the PNG's path."""
        self.finish()
        if self.result is None:
            text = "Nothing to save: set a schedule and a budget that can run first."
            self.controls.exported.value = message_html(text)
            return None
        with self._errors_said(self.controls.exported):
            run = self.run or current_run("explore")
            with contextlib.redirect_stdout(io.StringIO()):
                path = run.save_figure(draw(self.result), "explore")
                run.save_table(self.result.frame())
            text = f"Saved {path}, the same as PDF, and the table results.csv beside it."
            self.controls.exported.value = told_html(text)
            return path
        return None


class PinRow:
    """A pinned schedule in words, with what can be done with it."""

    def __init__(self, pin: str) -> None:
        self.text = ipw.HTML(layout=ipw.Layout(flex="1 1 0", min_width="0", width="auto"))
        self.text.add_class("ttsnap-pin")
        self.back = _button("Set", f"Set the controls to schedule {pin}")
        self.remove = _button("\u00d7", f"Remove pin {pin}")
        self.box = ipw.HBox([self.text, self.back, self.remove], layout=ipw.Layout(align_items="center"))


class Controls:
    """All controls, as plain attributes; `changed` is called after any change that a person or a program makes."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed, self.is_quiet = changed, False
        self._rows: list[ipw.Widget] = []  # of the section at hand, in the order in which they are shown
        self.sections: dict[str, tuple[ipw.Button, ipw.VBox]] = {}

        methods = [(label, name) for name, label in METHOD_LABELS.items()]
        help_ = "TTSnap prunes by the noise-aware reward, TTSp by the plain one; Best-of-N does not prune."
        self.method = self._row(ipw.Dropdown, "method", help_, options=methods)
        self.stages = self._row(ipw.IntSlider, "stages", "How often candidates are pruned", min=0, max=MAX_STAGES)
        ratio: dict[str, Any] = {"min": 0.01, "max": 1.0, "value": 0.5, "step": 0.01, "readout_format": ".2f"}
        self.steps: list[ipw.SelectionSlider] = []
        self.keeps: list[ipw.FloatSlider] = []
        for k in range(1, MAX_STAGES + 1):
            help_ = f"Denoising step, counted from 0, after which candidates are pruned for time {k}"
            self.steps.append(self._row(ipw.SelectionSlider, f"step {k}", help_, options=[0, 1]))
            help_ = f"Fraction of the candidates that is kept at step {k} (the paper's alpha)"
            self.keeps.append(self._row(ipw.FloatSlider, f"keep ratio (alpha) {k}", help_, **ratio))
        self.pin = _button("Pin this schedule", "Measure every change against it: up to three stay as A, B and C")
        self._beside(self.pin)
        self.pins = {pin: PinRow(pin) for pin in PINS}
        self._rows += [row.box for row in self.pins.values()]
        self._section("Schedule")

        multiple: dict[str, Any] = {"min": 0.5, "max": 20, "step": 0.5, "readout_format": ".1f"}
        help_ = "Compute per prompt: the price of so many finished images of Best-of-N"
        self.multiple = self._row(ipw.FloatSlider, "budget in images", help_, **multiple)
        help_ = "What a denoising step and a check of an estimate cost: for a model, a size and a reward"
        self.cost = self._row(ipw.Dropdown, "cost", help_, label=_SHORT)
        help_ = "Another preset, or a file that `ttsnap cost` measured on your own machine"
        options = {"options": tuple(PRESETS), "placeholder": "preset or file, then Enter", "continuous_update": False}
        self.cost_path = self._row(ipw.Combobox, "or another", help_, label=_SHORT, **options)
        help_ = "exact: with decoding and whole candidates; published: the formula of the released code"
        self.accounting = self._row(ipw.Dropdown, "accounting", help_, label=_SHORT, options=["exact", "published"])
        self._section("Budget and cost")

        help_ = "Recorded rewards of every prompt, image and step (a reward tensor)"
        self.tensor = self._row(ipw.Dropdown, "tensor", help_, label=_SHORT)
        help_ = "A folder that `ttsnap score` or `ttsnap import` wrote"
        self.tensor_path = self._path("or its folder", help_, "path of a .zarr, then Enter")
        self.rewards = self._row(ipw.SelectMultiple, "reward(s) that select", "They choose the image together", rows=3)
        help_ = "How several rewards choose together"
        self.combine = self._row(ipw.Dropdown, "combine rewards by", help_, options=list(_COMBINE.items()))
        help_ = "The reward that is drawn; it need not be one that selects"
        self.shown = self._row(ipw.Dropdown, "reward shown", help_)
        self._section("Data")

        objectives = [("all budgets shown", "area"), ("this budget", "single")]
        help_ = "Tuned on every second prompt, and reported on the others"
        self.objective = self._row(ipw.Dropdown, "optimise for", help_, options=objectives)
        help_ = "The search ends then, with the best so far"
        self.seconds = self._row(ipw.BoundedIntText, "seconds at most", help_, min=1, max=3600, value=15)
        self.optimise = _button(
            "Optimise from here", "Search for a better schedule for this tensor and cost, and set it"
        )
        self.cancel = _button("Cancel", "Keep the best found so far", disabled=True)
        self.undo = _button("Undo", "Set the schedule from before again", disabled=True)
        self._beside(self.optimise, self.cancel, self.undo)
        self.optimised = self._told()
        self._section("Optimise")

        help_ = "The state as text: a command, a file, parameters of this notebook"
        self.copy_as = self._row(ipw.Dropdown, "export as", help_, label=_SHORT, options=_COPY_FORMATS)
        self.copy = _button("Copy", "To the clipboard, and into the field below")
        self.save = _button("Save figure", "PNG, PDF and the table of the curves")
        self._beside(self.copy, self.save)
        hidden = ipw.Layout(width="auto", display="none")
        self.copied = ipw.Textarea(placeholder="What is copied also stands here", rows=4, layout=hidden)
        self._rows.append(self.copied)
        self.exported = self._told()
        self._section("Export")

        boxes = [part for section in self.sections.values() for part in section]
        self.box = ipw.VBox(boxes, layout=ipw.Layout(width="300px", flex="0 0 auto"))
        self.box.add_class("ttsnap-controls")
        self.open("Schedule")
        for k, slider in enumerate(self.steps):
            slider.observe(lambda change, k=k: self._moved(k), names="index")
        self.stages.observe(lambda change: self._moved(None), names="value")
        free = [self.rewards, self.shown, self.combine, self.accounting, self.method, self.multiple, *self.keeps]
        for control in free:
            control.observe(lambda change: self._tell(), names="value")

    def _row(self, kind: Any, description: str, tooltip: str, *, label: int = 140, **options: Any) -> Any:
        style, layout = {"description_width": f"{label}px"}, ipw.Layout(width="auto")
        self._rows.append(kind(description=description, tooltip=tooltip, style=style, layout=layout, **options))
        return self._rows[-1]

    def _path(self, description: str, tooltip: str, placeholder: str) -> ipw.Text:
        options = {"placeholder": placeholder, "continuous_update": False}
        return self._row(ipw.Text, description, tooltip, label=_SHORT, **options)

    def _beside(self, *controls: ipw.Widget) -> None:
        self._rows.append(ipw.Box(controls, layout=ipw.Layout(flex_flow="row wrap")))

    def _told(self) -> ipw.HTML:
        """Add a place for what becomes of a button."""
        self._rows.append(ipw.HTML(layout=ipw.Layout(width="auto")))
        return self._rows[-1]

    def _section(self, title: str) -> None:
        """Put the rows so far under a heading that opens and closes them: a button, which the Tab key reaches."""
        layout = ipw.Layout(width="auto", display="flex", justify_content="flex-start", align_items="center")
        heading = ipw.Button(description=title, icon="caret-right", style={"font_weight": "bold"}, layout=layout)
        heading.on_click(lambda button: self.open(title))
        self.sections[title] = heading, ipw.VBox(self._rows, layout=ipw.Layout(display="none"))
        self._rows = []

    def open(self, title: str) -> None:
        """Open a section, or close it where it is open."""
        heading, box = self.sections[title]
        closed = box.layout.display == "none"
        box.layout.display, heading.icon = (None, "caret-down") if closed else ("none", "caret-right")

    def show_pins(self, pins: Mapping[str, tuple[str, Schedule]]) -> None:
        """Show what is pinned."""
        for pin, row in self.pins.items():
            row.box.layout.display = None if pin in pins else "none"
            row.text.value = f"<b>{pin}</b> {plan_label(*pins[pin])}" if pin in pins else ""
        self.pin.disabled = len(pins) == len(PINS)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Return a context in which changes are not told."""
        before, self.is_quiet = self.is_quiet, True
        try:
            yield
        finally:
            self.is_quiet = before

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
            self.stages.value = len(schedule)
            for k, (step, keep) in enumerate(zip(schedule.steps, schedule.keep_ratios, strict=True)):
                self.steps[k].value = step
                self.keeps[k].value = max(0.01, round(keep, 2))  # the browser would snap it to the slider's step anyway
            self._show_stages()
        self._tell()

    def offer(self, rewards: Sequence[str], steps: Sequence[int]) -> None:
        """Set the rewards and the steps to choose from, and keep what is chosen where it fits."""
        with self.quiet():
            chosen, shown = [name for name in self.rewards.value if name in rewards], self.shown.value
            self.rewards.options = self.shown.options = [(reward_label(name), name) for name in rewards]
            self.rewards.rows = min(4, max(2, len(rewards)))
            self.rewards.value = tuple(chosen or rewards)
            self.shown.value = shown if shown in rewards else rewards[0]
            for control in (self.rewards, self.shown, self.combine):
                control.layout.display = None if len(rewards) > 1 else "none"
            before = [slider.value for slider in self.steps]
            self.stages.max = min(MAX_STAGES, len(steps))
            for k, (slider, value) in enumerate(zip(self.steps, before, strict=True)):
                slider.options = list(steps)
                slider.index = list(steps).index(value) if value in steps else min(k, len(steps) - 1)
            self._in_order()

    def _tell(self) -> None:
        if not self.is_quiet:
            self._changed()

    def _moved(self, k: int | None) -> None:
        """Stop step slider `k` at its neighbours; None when stages come or go."""
        if self.is_quiet:
            return
        with self.quiet():
            if k is None:
                self._in_order()
                self._show_stages()
            else:
                last = self.stages.value - 1
                low = self.steps[k - 1].index + 1 if k else 0
                high = self.steps[k + 1].index - 1 if k < last else len(self.steps[k].options) - 1
                self.steps[k].index = min(max(self.steps[k].index, low), max(low, high))
        self._tell()

    def _in_order(self) -> None:
        """Give stages that have just appeared a place after the others, and move the others back where they must."""
        active, end = self.steps[: self.stages.value], len(self.steps[0].options)
        places: list[int] = []
        for slider in active:
            low = places[-1] + 1 if places else 0
            places.append(slider.index if slider.index >= low else low + max(0, (end - 1 - low) // 3))
        for slider, place in zip(reversed(active), reversed(places), strict=True):
            end = slider.index = min(place, end - 1)

    def _show_stages(self) -> None:
        for k in range(MAX_STAGES):
            display = None if k < self.stages.value else "none"
            self.steps[k].layout.display = self.keeps[k].layout.display = display


def _button(description: str, tooltip: str, **options: Any) -> ipw.Button:
    return ipw.Button(description=description, tooltip=tooltip, layout=ipw.Layout(width="auto"), **options)


def _tensors() -> list[str]:
    """Return the tensors to choose from: the shipped ones, and those that stand in the data cache."""
    shipped = [name for name in SHIPPED_TENSORS if shipped_tensor(name).is_dir()]
    folders = [data_cache(), data_cache() / "published", data_cache() / "trajectories"]  # where the package writes them
    found = [str(path) for folder in folders for path in sorted(folder.glob("*.zarr"))]
    return ["synthetic", *shipped, *found[:_OFFERED]]


def _javascript(code: str) -> tuple[dict[str, Any], ...]:
    """Return the outputs of an output widget that run `code` in the browser."""
    data = {"application/javascript": code, "text/plain": ""}
    return ({"output_type": "display_data", "data": data, "metadata": {}},)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
