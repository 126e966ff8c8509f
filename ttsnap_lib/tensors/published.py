"""The authors' file layouts, both ways and to the last bit: reward values per step, and ground-truth targets."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.checks import choice, plain_name
from ttsnap_lib.errors import TensorError
from ttsnap_lib.files import as_path, atomic_write, data_cache, read_json, read_yaml
from ttsnap_lib.tensors.tensor import (
    COPIED,
    FINETUNED,
    RepeatedImagesWarning,
    check_rewards,
    drop_repeats,
    make_rewards,
    repeated_images,
    save_rewards,
)

if TYPE_CHECKING:
    import xarray as xr

# Reward names and what the published folders call them.
SHORT_NAMES = {"image_reward": ("imr",), "pickscore": ("pic", "pick"), "hpsv2": ("hps",)}


def find_published(folder: str | Path) -> dict[str, list[str]]:
    """Return the models of a published folder with their rewards, e.g. ``{"flux": ["image_reward", "pickscore"]}``."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path(folder).glob("*_val_base")):
        model, short = path.name.removesuffix("_val_base").rpartition("_")[::2]
        names = [name for name, shorts in SHORT_NAMES.items() if short in shorts]
        if model and names and names[0] not in found.setdefault(model, []):
            found[model].append(names[0])
    return {model: names for model, names in found.items() if names}


def published_tensor(
    folder: str | Path, model: str = "", *, progress: Callable[[int, int], None] | None = None
) -> tuple[Path, list[str]]:
    """Import a published folder into ``data_cache/published``, in seconds; return the tensor's path and its rewards.

    Of `model`, else of the first that the folder has.
    """
    models = find_published(folder)
    if not models:
        raise TensorError(
            f"values: got {folder}, expected a folder with flux_imr_val_base and the like. Give the one that holds them."
        )
    model = choice("model", model or next(iter(models)), models)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RepeatedImagesWarning)  # told where the tensor is used
        dataset = import_published(folder, model, models[model], progress=progress)
    return save_rewards(dataset, data_cache() / "published" / f"{model}.zarr", overwrite=True), models[model]


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
    files: list[tuple[int, int, int, Path]] = []  # variable, reward, step, file; of a reward, its base files first
    n_steps = 0
    for r, name in enumerate(names):
        base, aware = _steps(root, model, name, "base"), _steps(root, model, name, "naft")
        n_steps = n_steps or len(base)
        if not base or set(base) != set(range(n_steps)) or set(aware) - set(base):
            raise TensorError(
                f"published steps of {model} {name} in {root}: got base files of {sorted(base)} and noise-aware ones of "
                f"{sorted(aware)}, expected base files for steps 0 to {max(n_steps - 1, 0)}, noise-aware ones among "
                f"them, in folders such as {model}_{SHORT_NAMES.get(name, (name,))[0]}_val_base. Fetch what is missing."
            )
        files += [(0, r, step, path) for step, path in base.items()]
        files += [(1, r, step, path) for step, path in aware.items()]

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
        *tensor,
        rewards=names,
        prompt_text=_prompt_text(prompts, tensor.shape[2]),
        noise_aware_source=source,
        attributes={"model": model, "source": "published"},
    )
    if distinct:
        return drop_repeats(dataset)
    n_images = dataset.sizes["image"]
    n_distinct = len(np.unique(repeated_images(dataset)))
    if n_distinct < n_images:
        warnings.warn(
            f"the {model} pool repeats itself: {n_distinct} distinct trajectories of {n_images} per prompt, so random "
            "subsets draw repeats; pass distinct=True to drop them",
            RepeatedImagesWarning,
            stacklevel=2,
        )
    return dataset


def read_values(path: str | Path) -> np.ndarray:
    """Read one published file as float32 (prompt, image).

    It is a mapping from prompt index, also written as ``p0007``, to a list over images.
    """
    remedy = "Fetch the file again, or export it again with `ttsnap export`."
    content = read_yaml(path, "reward file", error=TensorError, remedy=remedy, fast=True)
    if isinstance(content, dict) and any(isinstance(prompt, str) for prompt in content):
        content = _indexed(content, "p", f"{path}: prompts", remedy)
    if not isinstance(content, dict) or not content or not all(type(prompt) is int for prompt in content):
        raise TensorError(f"{path}: content: got {content!r:.80}, expected a mapping from prompt to rewards. {remedy}")
    width = len(content[0]) if isinstance(content.get(0), list) else 0
    rows = []
    for prompt in range(len(content)):
        if prompt not in content:
            raise TensorError(f"{path}: prompt {prompt} is missing: got {len(content)} others, expected it. {remedy}")
        row = content[prompt]
        if not isinstance(row, list) or not row or len(row) != width:  # a file cut off ends in a short row
            images = f"{len(row)} images" if isinstance(row, list) else repr(row)
            raise TensorError(f"{path}: prompt {prompt}: got {images}, expected {width or 'a list of them'}. {remedy}")
        rows.append(_float32_row(dict(enumerate(row)), f"{path}: prompt {prompt}, image", remedy))
    return np.stack(rows)


def export_published(
    dataset: xr.Dataset, folder: str | Path, model: str, *, rewards: Sequence[str] | None = None
) -> list[Path]:
    """Write a reward tensor as the authors publish theirs and return the files; `import_published` reads it back.

    ``<model>_<reward>_val_base/p200_i200_s00.yaml`` and so on, one file per step, and ``..._val_naft`` for the
    noise-aware steps that are finetuned; copies of base values are left out, as in the published folders. The steps
    have to be 0, 1, 2, ...; all rewards are written when none is named.
    """
    check_rewards(dataset)
    plain_name("model", model, error=TensorError)
    known = [str(name) for name in dataset["reward"].values]
    names = [choice("reward", name, known, error=TensorError) for name in (known if rewards is None else rewards)]
    steps = dataset["step"].values
    if not np.array_equal(steps, np.arange(len(steps))):
        raise TensorError(
            f"step: got {steps.tolist()!r}, expected 0, 1, 2, ... without gaps. Score all steps, then export."
        )
    stem = f"p{dataset.sizes['prompt']}_i{dataset.sizes['image']}"
    source = dataset.get("noise_aware_source")
    files = []
    for name in names:
        short = plain_name("reward name", SHORT_NAMES.get(name, (name,))[0], error=TensorError)
        for step in range(len(steps)):
            finetuned = source is None or str(source.sel(reward=name).values[step]) == FINETUNED
            for variable, kind in (("base", "base"), ("noise_aware", "naft"))[: 1 + finetuned]:
                block = dataset[variable].sel(reward=name).isel(step=step).transpose("prompt", "image").values
                _finite(block, f"{variable} of {name} at step {step}")
                files.append(Path(folder) / f"{model}_{short}_val_{kind}" / f"{stem}_s{step:02d}.yaml")
                with atomic_write(files[-1], "w") as file:
                    for prompt, row in enumerate(block):
                        file.write(f"{prompt}:\n" + "".join(f"- {_number(value)}\n" for value in row))
    return files


def export_ground_truth(dataset: xr.Dataset, path: str | Path, *, reward: str | None = None) -> Path:
    """Write the base rewards of the clean images as ``p0000: {id000: value}``, the finetuning targets' layout.

    A tensor of several rewards needs the name of one.
    """
    check_rewards(dataset)
    names = [str(name) for name in dataset["reward"].values]
    if reward is None and len(names) > 1:
        raise TensorError(f"reward: got {names!r}, expected one of them. Name the reward to export.")
    reward = choice("reward", names[0] if reward is None else reward, names, error=TensorError)
    block = dataset["base"].sel(reward=reward).isel(step=-1).transpose("prompt", "image")
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
    """Read a ground-truth file ``p0000: {id000: value}`` as float32 (prompt, image), with its indices as coordinates."""
    import xarray as xr

    remedy = 'Write lines "p0000:" and below each "  id000: 1.25", or export again with `ttsnap export`.'
    content = read_yaml(path, "ground truth", error=TensorError, remedy=remedy, fast=True)
    table: dict[int, dict[int, Any]] = {}
    for prompt, images in _indexed(content, "p", f"{path}: prompts", remedy).items():
        row = _indexed(images, "id", f"{path}: p{prompt:04d}", remedy)
        table[prompt] = dict(zip(row, _float32_row(row, f"{path}: p{prompt:04d}, id", remedy), strict=True))
    columns = list(next(iter(table.values())))
    for prompt, row in table.items():
        if list(row) != columns:
            raise TensorError(
                f"{path}: images of prompt {prompt}: got {sorted(set(row) ^ set(columns))[:5]!r}, expected the same "
                f"images for every prompt. {remedy}"
            )
    values = np.array([list(row.values()) for row in table.values()], np.float32)
    return xr.DataArray(values, dims=("prompt", "image"), coords={"prompt": list(table), "image": columns}, name="base")


def _steps(root: Path, model: str, reward: str, variant: str) -> dict[int, Path]:
    """Return the published files of a variant by step; none where its folder is missing."""
    for short in SHORT_NAMES.get(reward, (reward,)):
        folder = root / f"{model}_{short}_val_{variant}"
        if folder.is_dir():
            ends = {path: path.stem.rpartition("_s")[2] for path in sorted(folder.glob("p*_i*_s*.yaml"))}
            return {int(step): path for path, step in ends.items() if step.isdigit()}
    return {}


def _prompt_text(prompts: Any, n_prompts: int) -> list[str] | None:
    """Return the first texts of a list or a JSON file."""
    if prompts is None:
        return None
    remedy = "Pass the prompt file that the values were made from."
    is_file = isinstance(prompts, str | Path)
    texts = list(read_json(prompts, "prompts", error=TensorError, remedy=remedy, kind=list) if is_file else prompts)
    if len(texts) < n_prompts or not all(isinstance(text, str) for text in texts):
        raise TensorError(f"prompts: got {len(texts)} entries, expected at least {n_prompts} texts. {remedy}")
    return texts[:n_prompts]


def _float32_row(row: dict[int, Any], what: str, remedy: str) -> np.ndarray:
    """Return numbers, by image, as float32; what is none, or beyond its range, is refused."""
    numbers = [
        value if type(value) is float or (type(value) is int and abs(value) < 2**128) else np.nan
        for value in row.values()
    ]
    with np.errstate(over="ignore"):
        values = np.array(numbers, np.float64).astype(np.float32)
    if not np.isfinite(values).all():
        image = list(row)[int(np.argmin(np.isfinite(values)))]
        raise TensorError(f"{what} {image}: got {row[image]!r:.80}, expected a finite number of 32 bits. {remedy}")
    return values


def _indexed(content: Any, prefix: str, what: str, remedy: str) -> dict[int, Any]:
    """Return a mapping from ``p0007`` or ``id007`` by its numbers, in their order."""
    if not isinstance(content, dict) or not content:
        raise TensorError(f"{what}: got {content!r:.80}, expected a mapping from {prefix} and digits. {remedy}")
    found = {}
    for key, value in content.items():
        match = re.fullmatch(prefix + r"(\d{1,9})", key) if isinstance(key, str) else None
        if match is None or int(match[1]) in found:  # id7 and id007 are the same image
            raise TensorError(f"{what}: key: got {key!r}, expected {prefix} and digits, each number once. {remedy}")
        found[int(match[1])] = value
    return dict(sorted(found.items()))


def _finite(block: np.ndarray, what: str) -> None:
    """Refuse to write missing values."""
    if not np.isfinite(block).all():
        prompt, image = np.argwhere(~np.isfinite(block))[0].tolist()
        raise TensorError(
            f"{what} lacks {int((~np.isfinite(block)).sum())} values, the first at prompt {prompt}, image {image}. Score "
            "the rest, or drop those images with tensors.drop_missing()."
        )


def _number(value: Any) -> str:
    """Return the shortest YAML float that reads back as the same float64, and so the same float32."""
    shown = repr(float(value))
    mantissa, exponent, power = shown.partition("e")
    return f"{mantissa}.0e{power}" if exponent and "." not in mantissa else shown  # YAML 1.1 takes 1e-05 for text
