"""A reward tensor that is filled prompt by prompt: created, widened and written in place, resumed, shared by shards.

Chunks hold one reward and `PROMPT_CHUNK` prompts, those of embeddings one prompt. A shard owns whole chunks, so several processes write side by side.
What is still NaN is what is left to do; nothing else has to be kept.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ttsnap_lib.errors import TensorError
from ttsnap_lib.files import others_at_work, require_space, shard_lock, tidy, typed_disk_errors
from ttsnap_lib.tensors.tensor import (
    COPIED,
    DIMS,
    FINETUNED,
    PROMPT_CHUNK,
    check_rewards,
    make_rewards,
    open_rewards,
    write_zarr,
)

if TYPE_CHECKING:
    import xarray as xr
    import zarr

PENDING, PARTIAL, SCORED = "pending", "partial", "scored"
EMBEDDING = "embedding"  # the variable, and the attribute that says of which reward
_ATTRIBUTE = "scores"  # reward -> {"weights": fingerprint, "noise_aware": {step: fingerprint}}


@dataclass(frozen=True)
class RewardPlan:
    """One reward to be scored: its name, and digests of its weights and of its noise-aware weights per step."""

    name: str
    weights: str
    noise_aware: Mapping[int, str] = field(default_factory=dict)


@contextlib.contextmanager
def open_store(
    path: str | Path,
    rewards: Sequence[RewardPlan],
    prompts: Sequence[str],
    n_images: int,
    steps: Sequence[int],
    *,
    shard: tuple[int, int] = (0, 1),
    attributes: Mapping[str, Any] | None = None,
    embedding: Mapping[str, Any] | None = None,
) -> Iterator[RewardStore]:
    """Create the tensor at `path`, or widen the one that is there, and hold this shard of it.

    Rewards, prompts, images and steps that the tensor lacks are added; values that it has stay. Steps of a noise-aware
    series that were copies of the base value become open again. `embedding` says of which reward embeddings are kept beside
    the scores, by which weights, and how many features they have. A TensorError for a tensor of other prompts,
    trajectories or weights, a DiskError when another process writes this shard.
    """
    path = Path(path)
    # Locks and their like stand beside the store: it is replaced as a whole when it is widened.
    beside = path.parent / f".{path.name}"
    with contextlib.ExitStack() as stack:
        with shard_lock(beside, shard) as held:
            tidy(path.parent, glob.escape(path.name))
            # Embeddings may be large: they stay on the disk.
            old = open_rewards(path).drop_vars(EMBEDDING, errors="ignore").load() if path.exists() else None
            new = _planned(old, path, rewards, list(prompts), n_images, sorted(steps), dict(attributes or {}))
            _plan_embedding(old, new, path, embedding)
            if old is None or not old.identical(new):
                if shard[1] > 1 and old is not None and others_at_work(beside, shard):
                    raise TensorError(
                        f"{path} cannot be widened while other shards write it. Start all shards with the same settings."
                    )
                _write_store(new, path, old)
            elif not others_at_work(beside, shard):
                for leftover in path.rglob("*.partial"):  # a chunk that was being written when a process ended
                    leftover.unlink()
        stack.enter_context(held)
        yield RewardStore(path, shard)


class RewardStore:
    """An open tensor; see :func:`open_store`."""

    def __init__(self, path: Path, shard: tuple[int, int]) -> None:
        import zarr

        self.path = path
        self._group = zarr.open_group(str(path), mode="r+")
        dataset = open_rewards(path)
        self.rewards = [str(name) for name in dataset["reward"].values]
        self.steps = [int(step) for step in dataset["step"].values]
        self.n_prompts, self.n_images = dataset.sizes["prompt"], dataset.sizes["image"]
        source = dataset["noise_aware_source"].transpose("reward", "step").values == FINETUNED
        self._finetuned = {name: source[k] for k, name in enumerate(self.rewards)}
        chunks = range(0, self.n_prompts, PROMPT_CHUNK)
        self.chunks = [
            list(range(start, min(start + PROMPT_CHUNK, self.n_prompts)))
            for k, start in enumerate(chunks)
            if k % shard[1] == shard[0]
        ]
        """Prompts of this shard, chunk by chunk."""

    def read(self, variable: str, reward: str, prompt: int) -> np.ndarray:
        """Return ``base`` or ``noise_aware`` of one prompt, float32 (image, step)."""
        return np.asarray(self._array(variable)[self.rewards.index(reward), prompt])

    def todo(self, reward: str, prompt: int, steps: Sequence[int], n_images: int) -> tuple[list[int], list[int]]:
        """Return the steps whose base, and whose finetuned values, are not whole yet."""
        columns = [self.steps.index(step) for step in steps]
        open_steps = []
        for variable in ("base", "noise_aware"):
            gaps = np.isnan(self.read(variable, reward, prompt)[:n_images][:, columns]).any(0)
            if variable == "noise_aware":
                gaps &= self._finetuned[reward][columns]
            open_steps.append([step for step, gap in zip(steps, gaps, strict=True) if gap])
        return open_steps[0], open_steps[1]

    def without_embedding(self, prompt: int, steps: Sequence[int], n_images: int) -> list[int]:
        """Return the steps at which an image has no embedding yet."""
        columns = [self.steps.index(step) for step in steps]
        gaps = np.isnan(np.asarray(self._array(EMBEDDING)[prompt])[:n_images, columns, 0]).any(0)
        return [step for step, gap in zip(steps, gaps, strict=True) if gap]

    @property
    def embedding_bytes(self) -> int:
        """Bytes of all embeddings before compression; 0 without any."""
        return 2 * int(np.prod(self._array(EMBEDDING).shape)) if EMBEDDING in self._group else 0

    def write(
        self, prompt: int, values: Mapping[tuple[str, str], np.ndarray], embedding: np.ndarray | None = None
    ) -> None:
        """Write scores of one prompt: (reward, ``"base"`` or ``"noise_aware"``) -> (image, step) of the whole tensor.

        `embedding` is (image, step, feature). What is there stays, and NaN is no value. Copies of base values are kept up
        here.
        """
        if embedding is not None:
            known = np.asarray(self._array(EMBEDDING)[prompt])
            with typed_disk_errors(self.path):
                self._array(EMBEDDING)[prompt] = np.where(np.isnan(known), embedding, known)
        for reward in dict.fromkeys(name for name, _ in values):
            row = self.rewards.index(reward)
            base, aware = self.read("base", reward, prompt), self.read("noise_aware", reward, prompt)
            for variable, kept in (("base", base), ("noise_aware", aware)):
                given = values.get((reward, variable))
                if given is not None:
                    np.copyto(kept, given.astype(np.float32), where=np.isnan(kept) & ~np.isnan(given))
            copied = ~self._finetuned[reward]
            aware[:, copied] = base[:, copied]
            # In this order: a process that ends in between leaves a base value open, and does the prompt again.
            with typed_disk_errors(self.path):
                self._array("noise_aware")[row, prompt] = aware
                self._array("base")[row, prompt] = base
        self.settle(prompt)

    def settle(self, prompt: int) -> None:
        """Bring ``status`` of a prompt up to date."""
        gaps = np.isnan(np.stack([np.asarray(self._array(name)[:, prompt]) for name in ("base", "noise_aware")]))
        status = PENDING if gaps.all() else PARTIAL if gaps.any() else SCORED
        if self._array("status")[prompt] != status:
            with typed_disk_errors(self.path):
                self._array("status")[prompt] = status

    def _array(self, name: str) -> zarr.Array:
        return cast("zarr.Array", self._group[name])


# The tensor as it has to stand before scoring begins


def _planned(
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
        scores = _check_same(old, path, rewards, prompts, attributes)
        names = [str(name) for name in old["reward"].values]
        names += [plan.name for plan in rewards if plan.name not in names]
        prompts = max([str(text) for text in old["prompt_text"].values], prompts, key=len)
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
        old = old.transpose(*DIMS, ...)
        at = np.array([columns[int(step)] for step in old["step"].values])
        was = np.arange(old.sizes["reward"])  # new rewards come after those that are there
        for variable in ("base", "noise_aware"):
            new[variable].values[np.ix_(was, old["prompt"].values, old["image"].values, at)] = old[variable].values
        source[np.ix_(was, at)] = old["noise_aware_source"].values
        new["status"].values[old["prompt"].values] = old["status"].values
        if shape != old["base"].shape:
            new["status"].values[new["status"].values == SCORED] = PARTIAL
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


def _plan_embedding(old: xr.Dataset | None, new: xr.Dataset, path: Path, wanted: Mapping[str, Any] | None) -> None:
    """Note in the planned tensor of what its embeddings are; those of two rewards in one tensor are refused."""
    there = None if old is None else old.attrs.get(EMBEDDING)
    if wanted is not None and there not in (None, dict(wanted)):
        raise TensorError(
            f"{path} has other embeddings: got {dict(wanted)}, expected {there}. Name the reward that they are of first, or "
            "choose another --out."
        )
    if wanted is not None:
        new.attrs[EMBEDDING] = dict(wanted)


def _check_same(
    old: xr.Dataset, path: Path, rewards: Sequence[RewardPlan], prompts: list[str], attributes: dict[str, Any]
) -> dict[str, Any]:
    """Return what the tensor says about the weights behind its scores; refuse one of other pictures or weights."""
    other = "Choose another --out, or remove the tensor."
    scores = old.attrs.get(_ATTRIBUTE, {})
    if not {"noise_aware_source", "status", "prompt_text"} <= set(old.variables) or not isinstance(scores, Mapping):
        raise TensorError(f"{path} does not say how it was scored, expected a tensor of `ttsnap score`. {other}")
    for dim in ("prompt", "image"):
        if not np.array_equal(old[dim].values, np.arange(old.sizes[dim])):
            raise TensorError(f"{path} holds a selection of a tensor, expected every {dim} from 0 on. {other}")
    for index, (there, here) in enumerate(zip(old["prompt_text"].values, prompts, strict=False)):
        if str(there) != here:
            raise TensorError(f"{path}: prompt {index} is another one: got {here!r}, expected {str(there)!r}. {other}")
    was, now = old.attrs.get("trajectories"), attributes.get("trajectories")
    if now is not None and was != now:
        raise TensorError(
            f"{path} was scored from other trajectories: got {now} of {attributes.get('model')}, expected {was} of "
            f"{old.attrs.get('model')}. {other}"
        )
    names = [str(name) for name in old["reward"].values]
    for plan in rewards:
        if plan.name not in names:
            continue
        entry = scores.get(plan.name, {"weights": "scores of `ttsnap score`", "noise_aware": {}})
        digests = [("scores", entry["weights"], plan.weights)]
        for step, digest in plan.noise_aware.items():
            digests.append((f"noise-aware scores at step {step}", entry["noise_aware"].get(str(step), digest), digest))
        for what, there, here in digests:
            if there != here:
                raise TensorError(
                    f"{path}: {plan.name}: {what} by other weights: got {here!r}, expected {there!r}. Choose another "
                    "--out, or another name for the reward (name=)."
                )
    return {name: dict(entry) for name, entry in scores.items()}


def _write_store(dataset: xr.Dataset, path: Path, old: xr.Dataset | None) -> None:
    """Write the whole store beside and rename; embeddings of the `old` one at `path` are taken over."""
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
    wanted = dataset.attrs.get(EMBEDDING)
    if wanted is None:
        write_zarr(dataset, path, encoding)
        return
    shape = (*(sizes[dim] for dim in DIMS[1:]), int(wanted["features"]))
    require_space(path.parent, 2 * np.prod(shape, dtype=float), "embeddings")
    moved = path if old is not None and EMBEDDING in old.attrs else None

    def add(store: Path) -> None:
        """Add the embeddings: open ones take no space, those that are there come along prompt by prompt."""
        import zarr

        array = zarr.open_group(str(store), mode="r+").create_array(
            EMBEDDING, shape=shape, chunks=(1, *shape[1:]), dtype="float16", fill_value=np.nan,
            dimension_names=(*DIMS[1:], "feature"),
        )  # fmt: skip
        if moved is not None and old is not None:
            there = cast("zarr.Array", zarr.open_group(str(moved), mode="r")[EMBEDDING])
            at = np.searchsorted(dataset["step"].values, old["step"].values)
            for prompt in range(there.shape[0]):
                block = np.full(shape[1:], np.nan, np.float16)
                block[: there.shape[1], at] = np.asarray(there[prompt])
                array[prompt] = block

    write_zarr(dataset, path, encoding, add)
