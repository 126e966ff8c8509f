"""The authors' file layouts, both ways and to the last bit: reward values per step, and ground-truth targets."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._reading import read_yaml
from .checks import integer, plain_name
from .errors import TensorError
from .paths import atomic_write
from .published import SHORT_NAMES, as_float32
from .tensors import FINETUNED, check_rewards

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["export_ground_truth", "export_published", "import_ground_truth"]


def export_published(
    dataset: xr.Dataset,
    folder: str | Path,
    model: str,
    *,
    rewards: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write a reward tensor as the authors publish theirs; `import_published` reads the same tensor back.

    ``<model>_<reward>_val_base/p200_i200_s00.yaml`` and so on, one file per step, and ``..._val_naft`` for the
    noise-aware steps that are finetuned; copies of base values are left out, as in the published folders.

    Parameters
    ----------
    dataset : xarray.Dataset
        A reward tensor whose steps are 0, 1, 2, ...
    folder : str or Path
        Where the folders go.
    model : str
        First part of the folder names, for example ``"flux"``.
    rewards : sequence of str, optional
        Of the tensor; all of them when not given.
    progress : callable, optional
        ``progress(done, total)`` in files.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    TensorError
        Missing values, steps that are not 0, 1, 2, ..., an unknown reward.
    """
    check_rewards(dataset)
    plain_name("model", model, error=TensorError)
    names = [str(name) for name in dataset["reward"].values]
    chosen = names if rewards is None else list(rewards)
    steps = dataset["step"].values
    if not np.array_equal(steps, np.arange(len(steps))):
        raise TensorError(
            "step", value=steps.tolist(), bound="0, 1, 2, ... without gaps", remedy="Score all steps, then export."
        )
    for name in chosen:
        if name not in names:
            raise TensorError("reward", value=name, bound=f"one of {names}", remedy="Check the name.")
    jobs: list[tuple[str, str, int, Path]] = []
    stem = f"p{dataset.sizes['prompt']}_i{dataset.sizes['image']}"
    source = dataset.get("noise_aware_source")
    for name in chosen:
        short = SHORT_NAMES.get(name, (name,))[0]
        plain_name("reward name", short, error=TensorError)
        for step in range(len(steps)):
            file = f"{stem}_s{step:02d}.yaml"
            jobs.append((name, "base", step, Path(folder) / f"{model}_{short}_val_base" / file))
            if source is None or str(source.sel(reward=name).values[step]) == FINETUNED:
                jobs.append((name, "noise_aware", step, Path(folder) / f"{model}_{short}_val_naft" / file))
    for done, (name, variable, step, path) in enumerate(jobs, start=1):
        block = dataset[variable].sel(reward=name).isel(step=step).transpose("prompt", "image").values
        _finite(block, f"{variable} of {name} at step {step}")
        with atomic_write(path, "w") as file:
            file.writelines(
                f"{prompt}:\n" + "".join(f"- {_number(value)}\n" for value in row) for prompt, row in enumerate(block)
            )
        if progress is not None:
            progress(done, len(jobs))
    return [path for *_, path in jobs]


def export_ground_truth(dataset: xr.Dataset, path: str | Path, *, reward: str | None = None, step: int = -1) -> Path:
    """Write the base rewards of clean images as ``p0000: {id000: value}``, the finetuning targets' layout.

    Parameters
    ----------
    dataset : xarray.Dataset
        A reward tensor.
    path : str or Path
        The YAML file.
    reward : str, optional
        Which reward; the only one when not given.
    step : int
        Position on the step axis; the last one is the clean image.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    TensorError
        A reward or step that the tensor lacks, or a missing value.
    """
    check_rewards(dataset)
    names = [str(name) for name in dataset["reward"].values]
    if reward is None and len(names) > 1:
        raise TensorError("reward", value=names, bound="one of them", remedy="Name the reward to export.")
    reward = names[0] if reward is None else reward
    if reward not in names:
        raise TensorError("reward", value=reward, bound=f"one of {names}", remedy="Check the name.")
    size = dataset.sizes["step"]
    step = integer("step", step, -size, size - 1)
    block = dataset["base"].sel(reward=reward).isel(step=step).transpose("prompt", "image")
    _finite(block.values, f"base of {reward}")
    with atomic_write(path, "w") as file:
        for prompt, row in zip(block["prompt"].values, block.values, strict=True):
            file.write(f"p{int(prompt):04d}:\n")
            file.writelines(
                f"  id{int(image):03d}: {_number(value)}\n"
                for image, value in zip(block["image"].values, row, strict=True)
            )
    return Path(path)


def import_ground_truth(path: str | Path) -> xr.DataArray:
    """Read a ground-truth file ``p0000: {id000: value}``.

    Returns
    -------
    xarray.DataArray
        float32 (prompt, image), with the indices of the file as coordinates.

    Raises
    ------
    TensorError
        A file that is not of this layout, or whose prompts have different images; prompt and image are named.
    """
    import xarray as xr

    remedy = 'Write lines "p0000:" and below each "  id000: 1.25", or export again with `ttsnap export`.'
    content = read_yaml(path, "ground truth", error=TensorError, remedy=remedy, fast=True)
    if not isinstance(content, dict) or not content:
        raise TensorError(f"{path}", value=content, bound="a mapping from prompts to images", remedy=remedy)
    table: dict[int, dict[int, float]] = {}
    for key, images in content.items():
        prompt = _index(path, "p", key, remedy)
        if not isinstance(images, dict) or not images:
            raise TensorError(f"{path}: {key}", value=images, bound="a mapping from images to rewards", remedy=remedy)
        row: dict[int, float] = {}
        for name, value in images.items():
            if type(value) not in (float, int) or not np.isfinite(as_float32([value])[0]):
                raise TensorError(
                    f"{path}: {key}, {name}", value=value, bound="a finite number of 32 bits", remedy=remedy
                )
            image = _index(path, "id", name, remedy)
            if image in row:  # id7 and id007
                raise TensorError(f"{path}: {key}, image {image}", value=name, bound="each image once", remedy=remedy)
            row[image] = float(value)
        if prompt in table:
            raise TensorError(f"{path}: prompt {prompt}", value=key, bound="each prompt once", remedy=remedy)
        table[prompt] = dict(sorted(row.items()))
    prompts, columns = sorted(table), list(next(iter(table.values())))
    for prompt in prompts:
        if list(table[prompt]) != columns:
            raise TensorError(
                f"{path}: images of prompt {prompt}",
                value=sorted(set(table[prompt]) ^ set(columns))[:5],
                bound="the same images for every prompt",
                remedy=remedy,
            )
    values = np.array([list(table[prompt].values()) for prompt in prompts], np.float64).astype(np.float32)
    return xr.DataArray(values, dims=("prompt", "image"), coords={"prompt": prompts, "image": columns}, name="base")


def _number(value: Any) -> str:
    """Return the shortest YAML float that reads back as the same float64, and so the same float32."""
    shown = repr(float(value))
    mantissa, exponent, power = shown.partition("e")
    return f"{mantissa}.0e{power}" if exponent and "." not in mantissa else shown  # YAML 1.1 takes 1e-05 for text


def _finite(block: np.ndarray, what: str) -> None:
    if not np.isfinite(block).all():
        prompt, image = np.argwhere(~np.isfinite(block))[0].tolist()
        raise TensorError(
            f"{what} has missing values, first at prompt {prompt}, image {image}",
            value=int((~np.isfinite(block)).sum()),
            bound="a number everywhere",
            remedy="Score the rest, or drop those images with tensors.drop_missing().",
        )


def _index(path: str | Path, prefix: str, key: Any, remedy: str) -> int:
    match = re.fullmatch(prefix + r"(\d{1,9})", key) if isinstance(key, str) else None
    if match is None:
        raise TensorError(f"{path}: key", value=key, bound=f"{prefix} and digits, nine at most", remedy=remedy)
    return int(match[1])
