"""The explorer: move a schedule, a budget or a cost, and see at once what TTSnap gives.

``compute`` and ``draw`` do the work and know no widget; the class joins them to controls. A change is drawn from a
first block of random subsets; while nothing moves, the other blocks follow and the numbers settle.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ipywidgets as ipw

from ._current_run import Run
from ._explore import available_mark, compute, jobs
from ._explore_actions import KEEP_KEYS, Actions, javascript
from ._explore_controls import Controls
from ._explore_pool import Pool
from ._explore_sources import Sources
from ._explore_state import Result, State
from ._explore_text import STYLE, message_html, numbers_html
from ._explore_view import Panels, draw
from ._inputs import step_positions
from .checks import choice, real
from .costs import CostModel
from .errors import ScheduleError, TTSnapError
from .schedule import PUBLISHED_SCHEDULE, Schedule
from .simulate import METHODS

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Explorer", "State", "compute", "draw", "explore"]

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
        raise ScheduleError("stages", value=len(schedule), bound=f"at most {most}", remedy="Name fewer steps.")


def _on_event_loop(delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle | None:
    try:
        return asyncio.get_running_loop().call_later(delay_s, callback)
    except RuntimeError:
        return None
