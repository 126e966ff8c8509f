"""The explorer's buttons: pin, optimise (in a thread, with a cancel), copy, save."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
import time
from typing import TYPE_CHECKING, Any, cast

from ._current_run import current_run
from ._explore_pool import Pool
from ._explore_state import State
from ._explore_text import SEARCH, copy_text, message_html
from ._explore_view import draw
from .answers import search_command
from .errors import ConfigError, TTSnapError
from .optimize import OptimizedSchedule, optimize_schedule

if TYPE_CHECKING:
    from pathlib import Path

    from .widgets import Explorer

__all__ = ["KEEP_KEYS", "Actions", "javascript"]

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
                    "method", value="best_of_n", bound="TTSp or TTSnap", remedy="Choose one: Best-of-N has no schedule."
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
