"""The authors' file layouts, both ways and to the last bit: reward values per step, and ground-truth targets."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.checks import integer, plain_name
from ttsnap_lib.errors import TensorError
from ttsnap_lib.files import as_path, atomic_write, read_json, read_yaml
from ttsnap_lib.tensors.tensor import (
    COPIED,
    FINETUNED,
    RepeatedImagesWarning,
    check_rewards,
    drop_repeats,
    make_rewards,
    repeated_images,
)

if TYPE_CHECKING:
    import xarray as xr


SHORT_NAMES = {"image_reward": ("imr",), "pickscore": ("pic", "pick"), "hpsv2": ("hps",)}
"""Reward names and what the published folders call them."""


def find_published(folder: str | Path) -> dict[str, list[str]]:
    """Return the models of a published folder with their rewards, e.g. ``{"flux": ["image_reward", "pickscore"]}``."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path(folder).glob("*_val_base")):
        model, short = path.name.removesuffix("_val_base").rpartition("_")[::2]
        names = [name for name, shorts in SHORT_NAMES.items() if short in shorts]
        if model and names and names[0] not in found.setdefault(model, []):
            found[model].append(names[0])
    return {model: names for model, names in found.items() if names}


def import_published(
    folder: str | Path,
    model: str,
    rewards: Sequence[str] | None = None,
    distinct: bool = False,
    *,
    prompts: Sequence[str] | str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Import published reward values, to the last bit.

    Parameters
    ----------
    folder : path
        Holds ``<model>_<reward>_val_base/p200_i200_s00.yaml`` and so on, and ``..._val_naft`` for the noise-aware reward.
        Steps that a ``naft`` folder lacks take the base value; ``noise_aware_source`` says so.
    model : str
        Such as ``"flux"`` or ``"sdxl"``.
    rewards : sequence of str, optional
        Of ``image_reward``, ``pickscore``, ``hpsv2``; all that the folder has for the model by default.
    distinct : bool
        Drop repeated trajectories. The published SDXL pools hold 56 distinct ones of 200.
    prompts : sequence of str or path of a JSON list, optional
        Prompt texts; the first ones are those of the values.
    progress : callable, optional
        Called with (files read, files in all).

    Returns
    -------
    xarray.Dataset
        A reward tensor.

    Raises
    ------
    TensorError
        A missing folder or step, or a file that is not whole; file, prompt and remedy are named.

    Warns
    -----
    RepeatedImagesWarning
        When the pool repeats trajectories and `distinct` is false.
    """
    from joblib import Parallel, delayed

    root = as_path("folder", folder, error=TensorError)
    plain_name("model", model, error=TensorError)
    names = [rewards] if isinstance(rewards, str) else rewards
    names = list(names if names is not None else find_published(root).get(model, []))
    if not names:
        raise TensorError(
            f"published rewards of model {model!r} in {root}: got {find_published(root)!r}, expected folders such as "
            "flux_imr_val_base. Check the folder and the model's name."
        )
    files: list[tuple[int, int, int, Path]] = []  # variable, reward, step, file
    n_steps = 0
    for r, name in enumerate(names):
        base = _steps(_variant_folder(root, model, name, "base"))
        aware = _steps(_variant_folder(root, model, name, "naft", optional=True))
        n_steps = n_steps or len(base)
        _check_steps(root, model, name, base, aware, n_steps)
        files += [(0, r, step, path) for step, path in base.items()] + [
            (1, r, step, path) for step, path in aware.items()
        ]

    # Base values first: noise-aware steps that are not published start as copies of them.
    tensor: Any = None
    source = np.full((len(names), n_steps), COPIED, dtype=object)
    results = Parallel(n_jobs=-1, return_as="generator")(delayed(read_values)(path) for *_, path in files)
    for done, ((variable, r, step, path), values) in enumerate(zip(files, results, strict=True), start=1):
        if tensor is None:
            tensor = np.full((2, len(names), *values.shape, n_steps), np.nan, np.float32)
        if values.shape != tensor.shape[2:4]:
            raise TensorError(
                f"shape of {path}: got {values.shape!r}, expected {tensor.shape[2:4]} (prompt, image), as in "
                f"{files[0][3]}. Fetch that file again, or import its folder alone."
            )
        tensor[variable, r, :, :, step] = values
        if variable:
            source[r, step] = FINETUNED
        if progress is not None:
            progress(done, len(files))
    for r, step in np.argwhere(source == COPIED):
        tensor[1, r, :, :, step] = tensor[0, r, :, :, step]
    dataset = make_rewards(
        tensor[0],
        tensor[1],
        rewards=names,
        prompt_text=_prompt_text(prompts, tensor.shape[2]),
        noise_aware_source=source,
        attributes={"model": model, "source": "published"},
    )
    firsts = repeated_images(dataset)
    n_distinct = len(np.unique(firsts))
    if n_distinct < len(firsts):
        if distinct:
            return drop_repeats(dataset)
        warnings.warn(
            f"the {model} pool repeats itself: {n_distinct} distinct trajectories of {len(firsts)} per prompt, so random "
            "subsets draw repeats; pass distinct=True to drop them",
            RepeatedImagesWarning,
            stacklevel=2,
        )
    return dataset


def read_values(path: str | Path) -> np.ndarray:
    """Read one published file: a mapping from prompt index to a list over images.

    Returns
    -------
    float32 (prompt, image)

    Raises
    ------
    TensorError
        With file, prompt, image and remedy.
    """
    remedy = "Fetch the file again, or export it again with `ttsnap export`."

    def fail(problem: str, value: Any, bound: str) -> TensorError:
        return TensorError(f"{path}: {problem}: got {value!r}, expected {bound}. {remedy}")

    content = read_yaml(path, "reward file", error=TensorError, remedy=remedy, fast=True)
    if not isinstance(content, dict) or not content or not all(type(prompt) is int for prompt in content):
        raise fail("content", type(content).__name__, "a mapping from prompt index to a list of rewards")
    width = None
    rows = []
    for prompt in range(len(content)):
        if prompt not in content:
            raise fail(f"prompt {prompt} is missing", sorted(map(str, content))[:5], f"prompts 0 to {len(content) - 1}")
        row = content[prompt]
        if not isinstance(row, list) or not row:
            raise fail(f"prompt {prompt}", row, "a list of numbers")
        width = len(row) if width is None else width
        if len(row) != width:
            raise fail(f"prompt {prompt}: images", len(row), f"{width}, as of prompt 0 (a truncated end looks so too)")
        for image, value in enumerate(row):
            if type(value) not in (float, int):
                raise fail(f"prompt {prompt}, image {image}", value, "a number")
        values = as_float32(row)
        if not np.isfinite(values).all():
            image = int(np.argmin(np.isfinite(values)))
            raise fail(f"prompt {prompt}, image {image}", row[image], "a finite number of 32 bits")
        rows.append(values)
    return np.stack(rows)


def as_float32(row: Sequence[float]) -> np.ndarray:
    """Return numbers as float32; those that it cannot hold become infinite."""
    try:
        values = np.array(row, dtype=np.float64)
    except OverflowError:  # an integer beyond the largest float
        values = np.array([value if abs(value) < 2**1000 else np.inf for value in row], dtype=np.float64)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _variant_folder(root: Path, model: str, reward: str, variant: str, optional: bool = False) -> Path | None:
    shorts = SHORT_NAMES.get(reward, (reward,))
    for short in shorts:
        candidate = root / f"{model}_{short}_val_{variant}"
        if candidate.is_dir():
            return candidate
    if optional:
        return None
    raise TensorError(
        f"published folder of {model} {reward}: got {root / f'{model}_{shorts[0]}_val_{variant}'}, expected an "
        f"existing folder; found {find_published(root)}. Check the folder; known rewards are {sorted(SHORT_NAMES)}."
    )


def _steps(folder: Path | None) -> dict[int, Path]:
    if folder is None:
        return {}
    found = {}
    for path in sorted(folder.glob("p*_i*_s*.yaml")):
        digits = path.stem.rpartition("_s")[2]
        if digits.isdigit():
            found[int(digits)] = path
    return found


def _check_steps(root: Path, model: str, reward: str, base: dict, aware: dict, n_steps: int) -> None:
    missing = sorted(set(range(n_steps)) ^ set(base))
    extra = sorted(set(aware) - set(base))
    if not base or missing or extra:
        raise TensorError(
            f"published steps of {model} {reward} in {root}: got {missing or extra or 'none'!r}, expected base files "
            f"for steps 0 to {max(n_steps - 1, 0)}, noise-aware ones among them. Fetch the missing files "
            "p<prompts>_i<images>_s<step>.yaml."
        )


def _prompt_text(prompts: Sequence[str] | str | Path | None, n_prompts: int) -> list[str] | None:
    if prompts is None:
        return None
    if isinstance(prompts, str | Path):
        remedy = "Pass the prompt file that the values were made from."
        prompts = read_json(prompts, "prompts", error=TensorError, remedy=remedy, kind=list)
    if not isinstance(prompts, Sequence) or len(prompts) < n_prompts or not all(isinstance(p, str) for p in prompts):
        raise TensorError(
            f"prompts: got {len(prompts) if isinstance(prompts, Sequence) else type(prompts).__name__!r}, expected at "
            f"least {n_prompts} texts. Pass the prompt file that the values were made from."
        )
    return list(prompts[:n_prompts])


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
            f"step: got {steps.tolist()!r}, expected 0, 1, 2, ... without gaps. Score all steps, then export."
        )
    for name in chosen:
        if name not in names:
            raise TensorError(f"reward: got {name!r}, expected one of {names}. Check the name.")
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
        raise TensorError(f"reward: got {names!r}, expected one of them. Name the reward to export.")
    reward = names[0] if reward is None else reward
    if reward not in names:
        raise TensorError(f"reward: got {reward!r}, expected one of {names}. Check the name.")
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
        raise TensorError(f"{path}: got {content!r}, expected a mapping from prompts to images. {remedy}")
    table: dict[int, dict[int, float]] = {}
    for key, images in content.items():
        prompt = _index(path, "p", key, remedy)
        if not isinstance(images, dict) or not images:
            raise TensorError(f"{path}: {key}: got {images!r}, expected a mapping from images to rewards. {remedy}")
        row: dict[int, float] = {}
        for name, value in images.items():
            if type(value) not in (float, int) or not np.isfinite(as_float32([value])[0]):
                raise TensorError(
                    f"{path}: {key}, {name}: got {value!r}, expected a finite number of 32 bits. {remedy}"
                )
            image = _index(path, "id", name, remedy)
            if image in row:  # id7 and id007
                raise TensorError(f"{path}: {key}, image {image}: got {name!r}, expected each image once. {remedy}")
            row[image] = float(value)
        if prompt in table:
            raise TensorError(f"{path}: prompt {prompt}: got {key!r}, expected each prompt once. {remedy}")
        table[prompt] = dict(sorted(row.items()))
    prompts, columns = sorted(table), list(next(iter(table.values())))
    for prompt in prompts:
        if list(table[prompt]) != columns:
            raise TensorError(
                f"{path}: images of prompt {prompt}: got {sorted(set(table[prompt]) ^ set(columns))[:5]!r}, expected "
                f"the same images for every prompt. {remedy}"
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
            f"{what} has missing values, first at prompt {prompt}, image {image}: got "
            f"{int((~np.isfinite(block)).sum())!r}, expected a number everywhere. Score the rest, or drop those images "
            "with tensors.drop_missing()."
        )


def _index(path: str | Path, prefix: str, key: Any, remedy: str) -> int:
    match = re.fullmatch(prefix + r"(\d{1,9})", key) if isinstance(key, str) else None
    if match is None:
        raise TensorError(f"{path}: key: got {key!r}, expected {prefix} and digits, nine at most. {remedy}")
    return int(match[1])
