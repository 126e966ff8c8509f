"""Drafts beside a reward tensor: all candidates in a few steps, the best of them in full, from the same seeds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.checks import integer, known_keys
from ttsnap_lib.errors import ConfigError, TensorError
from ttsnap_lib.schedule import Draft
from ttsnap_lib.tensors.tensor import check_rewards, open_rewards, read_steps

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, eq=False)
class Drafts:
    """A method for :func:`ttsnap_lib.simulate` and :func:`ttsnap_lib.sweep`: n drafts, of which the best run in full.

    Parameters
    ----------
    tensor : xarray.Dataset
        Rewards of the drafts, of the prompts and seeds of the full pool (``ttsnap generate --draft 4 --score drafts.zarr``).
        Its last step is read.
    finish : int
        How many run in full.

    Examples
    --------
    >>> sweep(dataset, ["ttsnap", Drafts(open_rewards("drafts.zarr"), finish=2)], budgets, cost, schedule)
    """

    tensor: xr.Dataset
    finish: int

    def __post_init__(self) -> None:
        check_rewards(self.tensor)
        integer("finish", self.finish, 1)

    @property
    def plan(self) -> Draft:
        """Steps of a draft, and how many run in full."""
        return Draft(int(self.tensor["step"][-1]) + 1, self.finish)

    def __str__(self) -> str:
        return str(self.plan)

    def beside(self, dataset: xr.Dataset) -> np.ndarray:
        """Return the drafts' rewards (prompt, image, reward) for the pool of `dataset`; refuse those of another one."""
        self.plan.check(int(dataset["step"][-1]) + 1)
        picked = self.tensor
        for dim in ("reward", "prompt", "image"):
            lacking = np.setdiff1d(dataset[dim].values, picked[dim].values)
            if len(lacking):
                raise TensorError(
                    f"drafts without the {dim} {lacking[0]} and {len(lacking) - 1} more of the full pool, expected drafts of "
                    f"all. Record them, or select what both have: dataset.sel({dim}=drafts[{dim!r}])."
                )
            picked = picked.sel({dim: dataset[dim].values})
        for what, full, draft in _identities(dataset, picked):
            if full != draft:
                raise TensorError(
                    f"drafts of another pool: got {what} {draft!r}, expected {full!r}. Record them from the prompts, seeds and "
                    "model of the full one."
                )
        if not ("made_with" in dataset.attrs and "made_with" in picked.attrs):
            warnings.warn(
                "a tensor does not tell its seeds and settings, as older ones do not: see that drafts and full pool have the "
                "same (--seed, --guidance)",
                stacklevel=4,
            )
        return read_steps(picked["base"], [-1])[:, :, 0, :]


def as_methods(given: Sequence[Any]) -> list[str | Drafts]:
    """Return methods as notebooks name them: a mapping ``{"drafts": tensor, "finish": k}`` becomes :class:`Drafts`."""
    found: list[str | Drafts] = []
    for one in given:
        if isinstance(one, Mapping):
            known_keys("method", one, ["drafts", "finish"], error=ConfigError)
            if len(one) != 2:
                raise ConfigError(f"method: got {dict(one)}, expected drafts and finish. Give both.")
            one = Drafts(open_rewards(one["drafts"]), one["finish"])
        found.append(one)
    return found


def _identities(full: xr.Dataset, draft: xr.Dataset) -> list[tuple[str, Any, Any]]:
    """Return what both tensors tell, as (what, full, draft)."""
    found: list[tuple[str, Any, Any]] = []
    if "prompt_text" in full.variables and "prompt_text" in draft.variables:
        texts = zip(full["prompt"].values, full["prompt_text"].values, draft["prompt_text"].values, strict=True)
        found += [(f"prompt {index}", str(one), str(other)) for index, one, other in texts]
    found += [(name, full.attrs[name], draft.attrs[name]) for name in ("model", "size") if _both(full, draft, name)]
    if _both(full, draft, "made_with"):
        one, other = full.attrs["made_with"], draft.attrs["made_with"]
        found += [(name, one.get(name), other.get(name)) for name in sorted({*one, *other})]
    if _both(full, draft, "scores"):
        for name in full["reward"].values:
            weights = [_weights(part.attrs["scores"], str(name)) for part in (full, draft)]
            found += [(f"weights of {name}", *weights)] if None not in weights else []
    return found


def _both(full: xr.Dataset, draft: xr.Dataset, name: str) -> bool:
    return name in full.attrs and name in draft.attrs


def _weights(scores: Mapping[str, Any], reward: str) -> Any:
    return scores.get(reward, {}).get("weights")
