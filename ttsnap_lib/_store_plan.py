"""What a reward tensor has to look like before scoring begins: widened, compared with what is there, and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import TensorError
from .tensors import COPIED, DIMS, FINETUNED, PROMPT_CHUNK, check_rewards, make_rewards, write_zarr

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["PARTIAL", "PENDING", "SCORED", "RewardPlan", "planned", "write_store"]

PENDING, PARTIAL, SCORED = "pending", "partial", "scored"
_ATTRIBUTE = "scores"  # reward -> {"weights": fingerprint, "noise_aware": {step: fingerprint}}


@dataclass(frozen=True)
class RewardPlan:
    """One reward to be scored: its name, and digests of its weights and of its noise-aware weights per step."""

    name: str
    weights: str
    noise_aware: Mapping[int, str] = field(default_factory=dict)


def planned(
    old: xr.Dataset | None,
    path: Path,
    rewards: Sequence[RewardPlan],
    prompts: list[str],
    n_images: int,
    steps: list[int],
    attributes: dict[str, Any],
) -> xr.Dataset:
    """Return the tensor as it has to stand before scoring begins."""
    names = [plan.name for plan in rewards]
    scores: dict[str, Any] = {}
    if old is not None:
        _check_same(old, path, rewards, prompts, attributes)
        scores = {name: dict(entry) for name, entry in _scores(old, path).items()}
        names = [str(name) for name in old["reward"].values]
        names += [plan.name for plan in rewards if plan.name not in names]
        texts = [str(value) for value in old["prompt_text"].values] if "prompt_text" in old.coords else []
        prompts = max(texts, prompts, key=len)
        n_images = max(n_images, old.sizes["image"])
        steps = sorted({*steps, *(int(step) for step in old["step"].values)})
    shape = (len(names), len(prompts), n_images, len(steps))
    new = make_rewards(
        np.full(shape, np.nan, np.float32),
        rewards=names,
        prompt_text=prompts,
        steps=steps,
        attributes=attributes if old is None else {**attributes, **old.attrs},
    )
    new["status"][:] = PENDING
    source = np.full((len(names), len(steps)), COPIED, dtype=f"<U{len(COPIED)}")
    columns = {step: k for k, step in enumerate(steps)}
    if old is not None:
        index = {
            "reward": np.array([names.index(str(name)) for name in old["reward"].values]),
            "step": np.array([columns[int(step)] for step in old["step"].values]),
        }
        block = np.ix_(index["reward"], old["prompt"].values, old["image"].values, index["step"])
        for variable in ("base", "noise_aware"):
            new[variable].values[block] = old[variable].transpose(*DIMS).values
        source[np.ix_(index["reward"], index["step"])] = old["noise_aware_source"].transpose("reward", "step").values
        new["status"].values[old["prompt"].values] = old["status"].values
        if shape != tuple(old["base"].transpose(*DIMS).shape):
            whole = new["status"].values == SCORED
            new["status"].values[whole] = PARTIAL
    for plan in rewards:
        row = names.index(plan.name)
        entry = scores.setdefault(plan.name, {"weights": plan.weights, "noise_aware": {}})
        for step, digest in plan.noise_aware.items():
            entry["noise_aware"] = {**entry["noise_aware"], str(step): digest}
            if step in columns and source[row, columns[step]] != FINETUNED:
                source[row, columns[step]] = FINETUNED
                new["noise_aware"].values[row, :, :, columns[step]] = np.nan
                new["status"].values[new["status"].values == SCORED] = PARTIAL
    new["noise_aware_source"] = (("reward", "step"), source.astype(object))
    new.attrs[_ATTRIBUTE] = scores
    return new


def _check_same(
    old: xr.Dataset, path: Path, rewards: Sequence[RewardPlan], prompts: list[str], attributes: dict[str, Any]
) -> None:
    other = "Choose another --out, or remove the tensor."
    for dim in ("prompt", "image"):
        if not np.array_equal(old[dim].values, np.arange(old.sizes[dim])):
            raise TensorError(
                f"{path} holds a selection of a tensor",
                value=old[dim].values.tolist(),
                bound=f"{dim} 0 to {old.sizes[dim] - 1}",
                remedy=other,
            )
    texts = [str(value) for value in old["prompt_text"].values] if "prompt_text" in old.coords else None
    if texts is None:
        raise TensorError(
            f"{path} does not say which prompts it holds",
            value=str(path),
            bound="a tensor with prompt_text",
            remedy=other,
        )
    for index, (there, here) in enumerate(zip(texts, prompts, strict=False)):
        if there != here:
            raise TensorError(f"{path}: prompt {index} is another one", value=here, bound=repr(there), remedy=other)
    was, now = old.attrs.get("trajectories"), attributes.get("trajectories")
    if now is not None and was != now:
        raise TensorError(
            f"{path} was scored from other trajectories",
            value=attributes.get("model"),
            bound=f"those of {old.attrs.get('model')} ({was})",
            remedy=other,
        )
    scores = _scores(old, path)
    for plan in rewards:
        if plan.name not in [str(name) for name in old["reward"].values]:
            continue
        remedy = f"Choose another --out, or another name for {plan.name} (name=)."
        entry = scores.get(plan.name)
        if entry is None or entry.get("weights") != plan.weights:
            raise TensorError(
                f"{path} holds scores of {plan.name} by other weights",
                value=plan.weights,
                bound=str(entry.get("weights")) if entry else "scores that this program made",
                remedy=remedy,
            )
        for step, digest in plan.noise_aware.items():
            known = entry["noise_aware"].get(str(step), digest)
            if known != digest:
                raise TensorError(
                    f"{path} holds noise-aware scores of {plan.name} at step {step} by other weights",
                    value=digest,
                    bound=known,
                    remedy=remedy,
                )


def _scores(old: xr.Dataset, path: Path) -> dict[str, dict[str, Any]]:
    """Return what the tensor says about the weights behind its scores."""
    found = old.attrs.get(_ATTRIBUTE, {})
    entries = list(found.values()) if isinstance(found, Mapping) else [None]
    whole = all(isinstance(entry, Mapping) and isinstance(entry.get("noise_aware"), Mapping) for entry in entries)
    if not whole or not {"noise_aware_source", "status"} <= set(old.variables):
        raise TensorError(
            f"{path} does not say how it was scored",
            value=found,
            bound="noise_aware_source, status, and the weights of each reward, as `ttsnap score` writes them",
            remedy="Choose another --out, or remove the tensor.",
        )
    return dict(found)


def write_store(dataset: xr.Dataset, path: Path) -> None:
    """Write the whole store beside and rename."""
    check_rewards(dataset)
    dataset = dataset.copy()
    sizes = dataset.sizes
    for name in ("reward", "status", "prompt_text", "noise_aware_source"):
        dataset[name] = dataset[name].astype(str)
    dataset["status"] = dataset["status"].astype(f"<U{len(PENDING)}")
    dataset["noise_aware_source"] = dataset["noise_aware_source"].astype(f"<U{len(COPIED)}")
    for variable in dataset.variables.values():
        variable.encoding = {}
    prompts = min(PROMPT_CHUNK, sizes["prompt"])
    values = {"chunks": (1, prompts, sizes["image"], sizes["step"]), "dtype": "float32"}
    encoding = {"base": values, "noise_aware": values, "status": {"chunks": (prompts,)}}
    write_zarr(dataset, path, encoding)
