"""The reward tensor: opened, saved, made, checked, cleaned; and a statistical stand-in for first tries without data.

A Zarr store opened as an ``xarray.Dataset``: ``base`` and ``noise_aware``, float32 (reward, prompt, image, step), with
``noise_aware_source(reward, step)`` that says where the second is a copy of the first, and ``status(prompt)``. Where it was
asked for, ``embedding`` is what the image tower of a reward says of each picture, float16 (prompt, image, step, feature).
"""

from __future__ import annotations

import io
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ttsnap_lib.checks import choice, integer, known_keys, text
from ttsnap_lib.errors import TensorError, TTSnapError, shown
from ttsnap_lib.files import SHIPPED_TENSORS, as_path, atomic_folder, failures_as, read_bytes, shipped_tensor

if TYPE_CHECKING:
    import xarray as xr

DIMS = ("reward", "prompt", "image", "step")
FINETUNED, COPIED = "finetuned", "copied_from_base"
SCHEMA_VERSION = 1
PROMPT_CHUNK = 25  # prompts a chunk: a store of one-prompt chunks opens ten times slower

_VARIABLES: dict[str, tuple[str, ...]] = {
    "base": DIMS,
    "noise_aware": DIMS,
    "noise_aware_source": ("reward", "step"),
    "status": ("prompt",),
    "prompt_text": ("prompt",),
    "embedding": ("prompt", "image", "step", "feature"),
}  # all but the first two may be missing


class RepeatedImagesWarning(UserWarning):
    """A pool holds the same trajectory more than once."""


def open_rewards(path: str | Path) -> xr.Dataset:
    """Open a reward tensor lazily: values are read when they are used.

    Parameters
    ----------
    path : path or name
        A Zarr folder; ``"pocket-flux"`` or ``"pocket-sdxl"`` for the shipped pocket tensors; ``"synthetic"`` for the
        statistical stand-in, :func:`synthetic_rewards`.

    Returns
    -------
    xarray.Dataset

    Raises
    ------
    TensorError
        The path is missing or is no reward tensor.
    """
    import xarray as xr

    name = str(path) if isinstance(path, str | os.PathLike) else ""
    if name == "synthetic":
        return synthetic_rewards()
    path = shipped_tensor(name) if name in SHIPPED_TENSORS else as_path("reward tensor", path, error=TensorError)
    remedy = "Check the path; `ttsnap score` and `ttsnap import` write tensors."
    if not (path / "zarr.json").is_file():
        raise TensorError(f"reward tensor: got {path}, expected a Zarr folder of format 3. {remedy}")
    with (
        failures_as(
            TensorError, f"reward tensor: got {path}, which cannot be opened, expected a whole Zarr store. {remedy}"
        ),
        _quiet_zarr(),
    ):
        # Format 3 alone: chunks of format 2 can be pickles. Nothing is a date here, whatever attributes say.
        dataset = xr.open_zarr(
            path, chunks=None, consolidated=False, zarr_format=3, decode_times=False, decode_timedelta=False
        )
        return check_rewards(dataset)


def save_rewards(dataset: xr.Dataset, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a reward tensor as a Zarr store, whole or not at all, and return its path.

    Parameters
    ----------
    dataset : xarray.Dataset
        A reward tensor.
    path : str or Path
        The Zarr folder to write.
    overwrite : bool
        False refuses a folder that is there.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    TensorError
        The path is taken (and `overwrite` is false), or the dataset is no reward tensor.
    DiskError
        A full disk or a folder that cannot be written.
    """
    path = as_path("reward tensor", path, error=TensorError)
    check_rewards(dataset)
    if path.exists() and not overwrite:
        raise TensorError(f"save_rewards: got {path}, expected a new path. Pass overwrite=True or another path.")
    ordered = dataset.transpose(..., *DIMS, "feature", missing_dims="ignore").copy()
    for variable in ordered.variables.values():
        variable.encoding = {}  # chunks of the store it was read from need not fit
    chunks = tuple(min(PROMPT_CHUNK, size) if dim == "prompt" else size for dim, size in ordered["base"].sizes.items())
    # NaN as fill value: what was never written, or was lost, must not read as zero.
    values = {"chunks": chunks, "dtype": "float32", "_FillValue": np.float32("nan")}
    encoding = {name: dict(values) for name in ("base", "noise_aware")}
    if "embedding" in ordered:
        encoding["embedding"] = embedding_encoding(ordered["embedding"].shape)
    for name in ("noise_aware_source", "status", "prompt_text", "reward"):
        if name in ordered.variables:  # fixed-width text: variable-length strings have no stable Zarr v3 type yet
            ordered[name] = ordered[name].astype(str)
    write_zarr(ordered, path, encoding)
    return path


def embedding_encoding(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return how embeddings (prompt, image, step, feature) are kept: a chunk a prompt, as it is written whole."""
    return {"chunks": (1, *shape[1:]), "dtype": "float16", "_FillValue": np.float16("nan")}


def write_zarr(
    dataset: xr.Dataset, path: Path, encoding: dict[str, Any], more: Callable[[Path], None] | None = None
) -> None:
    """Write a whole store beside `path`, let `more` add to it, and rename it."""
    with atomic_folder(path) as part:
        store = part / "store"
        with _quiet_zarr():
            dataset.to_zarr(store, mode="w", encoding=encoding, consolidated=False, zarr_format=3)
        if more is not None:
            more(store)
        for child in store.iterdir():
            shutil.move(str(child), part / child.name)
        store.rmdir()


def make_rewards(
    base: np.ndarray,
    noise_aware: np.ndarray | None = None,
    *,
    rewards: Sequence[str],
    prompt_text: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    noise_aware_source: np.ndarray | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Build a reward tensor from arrays (reward, prompt, image, step), kept as float32, and names of the `rewards`.

    Without `noise_aware` it is a copy of `base`, and says so; given alone it counts as finetuned throughout, else
    `noise_aware_source` says for each (reward, step) ``"finetuned"`` or ``"copied_from_base"``. `steps` are the denoising
    steps of the last axis, 0, 1, 2, ... by default; `attributes` are kept, for instance model and source. TensorError
    for shapes or names that do not fit.
    """
    import xarray as xr

    base = _float32("base", base)
    default_source = COPIED if noise_aware is None else FINETUNED
    noise_aware = base.copy() if noise_aware is None else _float32("noise_aware", noise_aware)
    if base.ndim != 4 or 0 in base.shape or noise_aware.shape != base.shape:
        raise TensorError(
            f"shapes of base and noise_aware: got {(base.shape, noise_aware.shape)!r}, expected equal shapes (reward, "
            "prompt, image, step), nothing empty. Add the missing axis or stack the rewards first."
        )
    n_rewards, n_prompts, n_images, n_steps = base.shape
    if noise_aware_source is None:
        noise_aware_source = np.full((n_rewards, n_steps), default_source)
    source = np.asarray(noise_aware_source).astype(str)
    if source.shape != (n_rewards, n_steps) or not set(source.flat) <= {FINETUNED, COPIED}:
        raise TensorError(
            f"noise_aware_source: got {source.tolist()!r}, expected {FINETUNED} or {COPIED}, of shape "
            f"{(n_rewards, n_steps)} (reward, step). Say so for every reward and step."
        )
    names = {"rewards": (rewards, n_rewards), "steps": (steps, n_steps), "prompt_text": (prompt_text, n_prompts)}
    for name, (given, size) in names.items():
        if given is not None and len(given) != size:
            raise TensorError(f"{name}: got {len(given)!r}, expected {size} entries. Give one of {name} each.")
    coords: dict[str, Any] = {
        "reward": [str(name) for name in rewards],
        "prompt": np.arange(n_prompts),
        "image": np.arange(n_images),
        "step": np.arange(n_steps) if steps is None else np.asarray(steps, np.int64),
    }
    if prompt_text is not None:
        coords["prompt_text"] = ("prompt", np.array(list(prompt_text), dtype=object))
    dataset = xr.Dataset(
        {
            "base": (DIMS, base),
            "noise_aware": (DIMS, noise_aware),
            "noise_aware_source": (("reward", "step"), source.astype(object)),
            "status": ("prompt", np.full(n_prompts, "scored", dtype=object)),
        },
        coords=coords,
        attrs={"schema_version": SCHEMA_VERSION, **(attributes or {})},
    )
    return check_rewards(dataset)


def from_array(
    rewards: Any,
    *,
    noise_aware: Any = None,
    name: str = "reward",
    steps: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    model: str | None = None,
) -> xr.Dataset:
    """Build a reward tensor from scores of one's own; :func:`import_rewards` does so from a file.

    Parameters
    ----------
    rewards : array (prompt, image, step), mapping, or pandas.DataFrame
        Scores of the x0 estimates; NaN stands for one that is missing. A mapping from reward names to such arrays gives
        several rewards. A frame is a long table: columns ``prompt`` (index or text), ``image``, ``step``, ``reward``
        and, if there are noise-aware scores, ``noise_aware`` (empty at the steps that have none).
    noise_aware : array or mapping, optional
        Noise-aware scores, shaped as `rewards`. A step without any takes the base scores, and says so.
    name : str
        What the reward is called, where no mapping names it.
    steps : sequence of int, optional
        Denoising step (from 0) of each position on the last axis of an array; 0, 1, 2, ... by default.
    prompts : sequence of str, optional
        Prompt texts, by prompt index; more than are needed may be given.
    model : str, optional
        Name of the diffusion model, for titles and commands.

    Returns
    -------
    xarray.Dataset

    Raises
    ------
    TensorError
        Shapes, names or steps that do not fit; a table with a row missing or twice, which is named.
    """
    index: dict[str, Any] = {}
    if hasattr(rewards, "columns"):
        if noise_aware is not None or steps is not None:
            raise TensorError("noise_aware and steps: got them beside a table, expected columns of it. Leave them out.")
        rewards, noise_aware, index, texts = _from_table(rewards)
        steps, prompts = index["step"].tolist(), texts if prompts is None else prompts
    base = {str(key): _axes(f"rewards of {key}", value) for key, value in _by_name(rewards, name).items()}
    aware = {str(key): _axes(f"noise_aware of {key}", value) for key, value in _by_name(noise_aware, name).items()}
    shapes = {key: value.shape for key, value in base.items()}
    for key, value in aware.items():
        choice("noise_aware", key, base, error=TensorError)
        shapes[f"noise-aware {key}"] = value.shape
    if len(set(shapes.values())) != 1:
        raise TensorError(f"shapes: got {shapes}, expected one reward or more, all of one shape (prompt, image, step).")
    stacked, source = (
        np.stack(list(base.values())),
        np.full((len(base), next(iter(shapes.values()))[2]), COPIED, object),
    )
    full = stacked.copy()
    for r, key in enumerate(base):
        if key in aware:
            given = ~np.isnan(aware[key]).all(axis=(0, 1))
            full[r][..., given], source[r, given] = aware[key][..., given], FINETUNED
    ids = index.get("prompt", np.arange(stacked.shape[1]))
    if prompts is not None:
        if isinstance(prompts, str) or len(prompts) <= max(ids):
            raise TensorError(
                f"prompts: got {len(prompts)} entries, expected {max(ids) + 1} texts, one for each prompt index. Give "
                "those that the scores belong to."
            )
        prompts = [text("prompts", prompts[k], error=TensorError) for k in ids]
    dataset = make_rewards(
        stacked, full, rewards=list(base), prompt_text=prompts, steps=steps, noise_aware_source=source,
        attributes={**({"model": model} if model else {}), "source": "own"},
    )  # fmt: skip
    return check_rewards(dataset.assign_coords({k: v for k, v in index.items() if k != "step"}))


def import_rewards(
    path: str | Path, *, name: str = "reward", steps: Sequence[int] | None = None, **options: Any
) -> xr.Dataset:
    """Read scores of one's own from a file; `name`, `steps` and the other options are those of :func:`from_array`.

    ``.npy`` holds an array (prompt, image, step), ``.npz`` arrays called ``reward`` and ``noise_aware``; ``.csv``,
    ``.tsv`` or ``.parquet`` a long table.
    """
    import pandas as pd

    path = as_path("scores", path, error=TensorError)
    ending = choice(
        "ending of the scores", path.suffix.lower(), (".npy", ".npz", ".csv", ".tsv", ".parquet"), error=TensorError
    )
    remedy = "Expected is an array (prompt, image, step), or a table with columns prompt, image, step, reward."
    content = io.BytesIO(read_bytes(path, "scores", error=TensorError, remedy=remedy))
    with failures_as(TensorError, f"scores {path} cannot be read as {ending[1:]}. {remedy}"):
        if ending == ".npz":
            with np.load(content, allow_pickle=False) as file:
                known_keys(f"arrays of {path}", file.files, ("reward", "noise_aware"), error=TensorError)
                options |= {key: file[key] for key in file.files if key != "reward"}
                scores = file["reward"]
        elif ending == ".npy":
            scores = np.load(content, allow_pickle=False)
        elif ending == ".parquet":
            scores = pd.read_parquet(content)
        else:
            header = content.getvalue().partition(b"\n")[0]
            separator = "\t" if b"\t" in header else ";" if b";" in header and b"," not in header else ","
            # "None" is a text, and 17 may be one; an empty score is missing. A prompt of digits is an index.
            kinds = {"dtype": {"prompt": str}, "keep_default_na": False, "float_precision": "round_trip"}
            kinds["decimal"] = (
                "," if separator == ";" else "."
            )  # as spreadsheets write where the comma is the decimal mark
            missing = {"reward": ["", "nan", "NaN"], "noise_aware": ["", "nan", "NaN"]}
            with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # more cells than names
                scores = pd.read_csv(content, sep=separator, na_values=missing, index_col=False, **kinds)
            if "prompt" in scores and scores["prompt"].str.fullmatch(r"\d{1,9}").all():
                scores["prompt"] = scores["prompt"].astype(int)
    return from_array(scores, name=name, steps=steps, **options)


def _by_name(values: Any, name: str) -> dict[str, Any]:
    return {} if values is None else dict(values) if isinstance(values, Mapping) else {name: values}


def _axes(what: str, values: Any) -> np.ndarray:
    """Return scores as float32 (prompt, image, step); named axes are brought into this order."""
    if set(getattr(values, "dims", ())) == set(DIMS[1:]):
        values = values.transpose(*DIMS[1:])
    if isinstance(values, np.ma.MaskedArray):
        values = np.ma.filled(values.astype(float), np.nan)
    array = _float32(what, values)
    if array.ndim != 3 or 0 in array.shape:
        raise TensorError(
            f"{what}: got shape {array.shape}, expected (prompt, image, step), nothing empty. Add the missing axis; "
            "several rewards go in as a mapping from their names."
        )
    return array


def _from_table(table: Any) -> tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray], list[str] | None]:
    """Return a long table as arrays (prompt, image, step), with the values along the axes and the prompts' texts."""
    import pandas as pd

    columns = [*DIMS[1:], "reward"]
    if missing := [name for name in columns if list(table.columns).count(name) != 1]:
        raise TensorError(
            f"table: got columns {shown(list(table.columns))}, expected {', '.join(columns)}, each once, and noise_aware "
            f"where there is one. Rename the column that is {missing[0]}."
        )
    if not len(table):
        raise TensorError("table: got no rows, expected one for each prompt, image and step. Write the scores into it.")
    texts, index, places = None, {}, []
    for dim in DIMS[1:]:
        values = table[dim]
        if dim == "prompt" and not pd.api.types.is_numeric_dtype(values):
            codes, names = pd.factorize(values)  # in the order in which they first stand
            texts = [
                text("table: prompt", one, error=TensorError) for one in [*names, *([None] if -1 in codes else [])]
            ]
            index[dim], place = np.arange(len(texts)), codes
        else:
            numbers = pd.to_numeric(values, errors="coerce").to_numpy(float)
            bad = np.flatnonzero(~((numbers >= 0) & (numbers < 2**31) & (numbers == np.floor(numbers))))
            if len(bad):
                raise TensorError(
                    f"table: {dim} of row {bad[0]}: got {shown(values.tolist()[bad[0]])}, expected a whole number of at "
                    "least 0. Number prompts, images and steps from 0."
                )
            index[dim], place = np.unique(numbers.astype(np.int64), return_inverse=True)
        places.append(place)
    shape = tuple(len(values) for values in index.values())
    count = np.zeros(shape, np.int64)
    np.add.at(count, tuple(places), 1)
    if (count != 1).any():
        where = np.argwhere(count != 1)[0]
        which = ", ".join(f"{dim} {index[dim][k]}" for dim, k in zip(DIMS[1:], where, strict=True))
        raise TensorError(
            f"table: {which}: got {count[tuple(where)]} rows, expected one, as for every prompt, image and step that "
            "stands in it. Number the images of each prompt alike; leave the score empty where there is none."
        )
    arrays = []
    for name in ("reward", "noise_aware"):
        if name in table:
            scores = np.full(shape, np.nan)
            scores[tuple(places)] = numbers_array(f"table: {name}", table[name].to_numpy(na_value=np.nan), TensorError)
            arrays.append(scores)
    return arrays[0], arrays[1] if len(arrays) > 1 else None, index, texts


def check_rewards(dataset: Any) -> xr.Dataset:
    """Return `dataset` when it is a reward tensor, or raise a TensorError; values are not read."""
    remedy = "Make tensors with make_rewards(), import_published() or `ttsnap score`."
    if not hasattr(dataset, "data_vars"):
        raise TensorError(f"reward tensor: got {type(dataset).__name__!r}, expected an xarray.Dataset. {remedy}")
    for name, dims in _VARIABLES.items():
        there = name in dataset.variables
        if not there and dims is not DIMS:
            continue
        if not there or set(dataset[name].dims) != set(dims) or 0 in dataset[name].shape:
            found = dict(dataset[name].sizes) if there else sorted(map(str, dataset.variables))
            raise TensorError(f"variable {name!r}: got {found}, expected one with dims {dims}, nothing empty. {remedy}")
        if dims is DIMS and dataset[name].dtype.kind != "f":
            raise TensorError(f"variable {name!r}: got {dataset[name].dtype}, expected float32. {remedy}")
    for dim in DIMS:
        if dim not in dataset.coords:
            raise TensorError(f"coordinate {dim!r}: got {sorted(map(str, dataset.coords))}, expected it too. {remedy}")
    names = [str(name) for name in dataset["reward"].values]
    if len(set(names)) != len(names):
        raise TensorError(f"reward names: got {names!r}, expected each once. Rename one with assign_coords.")
    for dim in ("prompt", "image"):
        values = dataset[dim].values
        if values.dtype.kind not in "iu" or len(np.unique(values)) != len(values) or values.min() < 0:
            raise TensorError(f"{dim}: got {values!r}, expected distinct integers of at least 0. {remedy}")
    steps = dataset["step"].values
    if steps.dtype.kind not in "iu" or (np.diff(steps) <= 0).any() or steps[0] < 0:
        raise TensorError(f"step: got {steps.tolist()!r}, expected increasing integers of at least 0. Sort by step.")
    version = dataset.attrs.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int | np.integer) or version > SCHEMA_VERSION:
        raise TensorError(
            f"schema_version: got {version!r}, expected at most {SCHEMA_VERSION}. Update ttsnap to read this tensor."
        )
    return dataset


def read_steps(variable: xr.DataArray, positions: Sequence[int]) -> np.ndarray:
    """Return some steps of ``base`` or ``noise_aware`` as (prompt, image, step, reward), read once."""
    block = variable.isel(step=list(positions)).transpose("prompt", "image", "step", "reward")
    message = (
        f"{variable.name} cannot be read: got a damaged chunk, expected a whole Zarr store. Score or import it again."
    )
    with failures_as(TensorError, message):
        values = block.values
    if np.isinf(values).any():
        prompt, image, step, _ = np.argwhere(np.isinf(values))[0].tolist()
        raise TensorError(
            f"{variable.name} of prompt {int(block['prompt'][prompt])}, image {int(block['image'][image])}, step "
            f"{int(block['step'][step])}: got an infinite number, expected finite ones. Score it again, or drop_missing()."
        )
    return values


def noise_aware_steps(dataset: xr.Dataset) -> dict[str, list[int]]:
    """Return the steps at which the noise-aware variable is finetuned, by reward.

    Elsewhere it is a copy of ``base``, and TTSnap is TTSp. A tensor that does not say counts as finetuned throughout.
    """
    steps = dataset["step"].values.tolist()
    if "noise_aware_source" not in dataset:
        return {str(name): steps for name in dataset["reward"].values}
    source = dataset["noise_aware_source"].transpose("reward", "step").values
    return {
        str(name): [step for step, kind in zip(steps, row, strict=True) if kind == FINETUNED]
        for name, row in zip(dataset["reward"].values, source, strict=True)
    }


def describe(dataset: xr.Dataset) -> str:
    """Return what a tensor holds in a line, and in a sentence at which steps it has noise-aware scores."""
    last = int(dataset["step"][-1])  # the clean image, where all methods choose by the base reward
    known = {name: [step for step in steps if step != last] for name, steps in noise_aware_steps(dataset).items()}
    sizes = " x ".join(f"{dataset.sizes[dim]} {dim}{'s' * (dataset.sizes[dim] > 1)}" for dim in DIMS[1:])
    line = f"{sizes}, reward{'s' * (len(known) > 1)} {', '.join(known)}\n"
    if not any(known.values()):
        return f"{line}There are no noise-aware scores: TTSnap equals TTSp here."
    where = {name: _spans(steps) for name, steps in known.items()}
    alike = len(set(where.values())) == 1
    told = next(iter(where.values())) if alike else "; ".join(f"{name}: {spans}" for name, spans in where.items())
    return f"{line}Noise-aware scores exist for {told}. At other checks TTSnap uses the base reward, so it equals TTSp there."


def _spans(steps: Sequence[int]) -> str:
    """Return steps in words, e.g. ``steps 0 to 5 and 9``."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    parts = [word for run in runs for word in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"step{'s' * (len(steps) > 1)} {listed}" if steps else "no step"


def select_rewards(dataset: xr.Dataset, names: Sequence[str], missing: str = "raise") -> xr.Dataset:
    """Return the tensor of the rewards in `names` alone, in that order; all of it when `names` is empty.

    With `missing` set to ``"drop"`` instead of ``"raise"`` also without what :func:`drop_missing` drops.
    """
    known = [str(name) for name in dataset["reward"].values]
    dataset = dataset.sel(reward=[choice("reward", name, known) for name in names]) if len(names) else dataset
    return drop_missing(dataset) if choice("missing", missing, ("raise", "drop")) == "drop" else dataset


def repeated_images(dataset: xr.Dataset) -> np.ndarray:
    """Return for each image the first image with the same rewards in every prompt, step and reward, int64 (image,)."""
    base = dataset["base"].transpose("image", ...).values
    flat = np.ascontiguousarray(base.reshape(base.shape[0], -1))
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(row.tobytes(), k) for k, row in enumerate(flat)])


def drop_repeats(dataset: xr.Dataset) -> xr.Dataset:
    """Return the tensor with the first of each group of repeated images; ``image`` keeps the original indices."""
    return dataset.isel(image=np.unique(repeated_images(dataset)))


def drop_missing(dataset: xr.Dataset) -> xr.Dataset:
    """Return the tensor without the images that miss a finite value anywhere, and without prompts not scored at all."""
    missing = cast("xr.DataArray", ~(np.isfinite(dataset["base"]) & np.isfinite(dataset["noise_aware"])))
    scored = ~missing.all(["reward", "image", "step"])
    dataset, missing = dataset.isel(prompt=scored.values), missing.isel(prompt=scored.values)
    whole = ~missing.any(["reward", "prompt", "step"])
    dataset = dataset.isel(image=whole.values)
    if 0 in dataset["base"].shape:
        raise TensorError("images without a missing value: got 0, expected one or more. Score the tensor again.")
    return dataset


def synthetic_rewards(
    n_prompts: int = 64,
    n_images: int = 200,
    n_steps: int = 20,
    rewards: Sequence[str] = ("image_reward",),
    rng: np.random.Generator | int = 0,
) -> xr.Dataset:
    """Draw a reward tensor whose scores agree better and better with the final ones as the steps go on.

    Every number comes from a normal model, none from a diffusion model: it shows how the tools work, not what TTSnap
    gives. Final rewards are a prompt effect plus a seed effect; the score at a step mixes the seed effect with a
    disturbance that drifts slowly over the steps. The mixing is set so that the expected Kendall tau rises as
    ``x ** 1.4`` over the loop for the base reward and as ``x ** 0.7`` for the noise-aware one (tau of a normal pair
    with correlation r is ``2 / pi * arcsin(r)``), roughly the shape of the published FLUX tensors.
    """
    n_prompts = integer("n_prompts", n_prompts, 1)
    n_images = integer("n_images", n_images, 1)
    n_steps = integer("n_steps", n_steps, 1)
    rng = np.random.default_rng(rng)
    x = np.linspace(0, 1, n_steps) if n_steps > 1 else np.ones(1)
    correlations = [np.sin(np.pi / 2 * np.clip(x**power, 0.02, 1)) for power in (1.4, 0.7)]
    correlations[0][-1] = correlations[1][-1] = 1.0
    shape = (len(rewards), n_prompts, n_images)
    seed_effect = rng.standard_normal(shape, np.float32)
    disturbance = np.empty((*shape, n_steps), np.float32)
    disturbance[..., 0] = rng.standard_normal(shape, np.float32)
    for step in range(1, n_steps):
        fresh = rng.standard_normal(shape, np.float32)
        disturbance[..., step] = 0.9 * disturbance[..., step - 1] + np.sqrt(1 - 0.9**2) * fresh
    prompt_effect = 0.8 * rng.standard_normal((len(rewards), n_prompts, 1, 1), np.float32)
    variants = [
        prompt_effect + 0.6 * (seed_effect[..., None] * r + disturbance * np.sqrt(1 - r**2)).astype(np.float32)
        for r in (correlation.astype(np.float32) for correlation in correlations)
    ]
    variants[1][..., -1] = variants[0][..., -1]
    return make_rewards(*variants, rewards=rewards, attributes={"model": "synthetic stand-in", "source": "synthetic"})


def numbers_array(name: str, value: Any, error: type[TTSnapError]) -> np.ndarray:
    """Return `value` as an array of real numbers."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as failure:
        raise error(f"{name}: got {value!r}, expected numbers in rows of equal length. Fill the rows up.") from failure
    if array.dtype.kind not in "fiu":
        raise error(
            f"{name}: got shape {array.shape} of {array.dtype}, expected numbers, integers where indices are meant. "
            "Convert it with .astype(float) or .astype(int) where that is meant."
        )
    return array


def _float32(name: str, values: Any) -> np.ndarray:
    """Return numbers as float32; what it cannot hold is refused, NaN (not scored yet) is not."""
    given = numbers_array(name, values, TensorError)
    with np.errstate(over="ignore"):
        narrow = given.astype(np.float32, copy=False)
    if np.isinf(narrow).any():
        worst = float(given[np.isinf(narrow)].flat[0])
        raise TensorError(
            f"{name}: got {worst!r}, expected finite numbers that float32 can hold. NaN stands for what is missing."
        )
    return narrow


def _quiet_zarr() -> warnings.catch_warnings:
    """Return a context without zarr's warning that fixed-width text has no stable type in format 3."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)
