"""Where the explorer's numbers come from: the tensors and cost models that can be chosen, opened once and kept."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import tensors
from ._explore_controls import Controls
from ._explore_pool import Pool
from .checks import choice
from .costs import PRESETS, CostModel
from .errors import ConfigError, TTSnapError
from .paths import SHIPPED_TENSORS, data_cache, shipped_tensor

if TYPE_CHECKING:
    import ipywidgets as ipw
    import xarray as xr

__all__ = ["Sources"]

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
            (controls.tensor_path, controls.tensor, tensors.open_rewards),
            (controls.cost_path, controls.cost, load_cost),
        ]
        for field, chooser, load in named:
            field.observe(lambda change, f=field, c=chooser, load=load: _add(f, c, load, say), names="value")

    def open(self, name: str) -> None:
        """Open a tensor (once) and offer its rewards and steps."""
        if name not in self._pools:
            dataset = self._given[name] if name in self._given else tensors.open_rewards(name)
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
                raise ConfigError(control.description, value="given in memory", bound="a name or a path", remedy=remedy)
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
