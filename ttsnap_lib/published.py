"""The layout that the authors of TTSnap publish reward values in: one YAML file per step, read exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._reading import as_path, read_json, read_yaml
from .checks import plain_name
from .errors import TensorError
from .tensors import (
    COPIED,
    FINETUNED,
    RepeatedImagesWarning,
    drop_repeats,
    make_rewards,
    repeated_images,
)

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["SHORT_NAMES", "as_float32", "find_published", "import_published", "read_values"]

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
            f"published rewards of model {model!r} in {root}",
            value=find_published(root),
            bound="folders such as flux_imr_val_base",
            remedy="Check the folder and the model's name.",
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
                f"shape of {path}",
                value=values.shape,
                bound=f"{tensor.shape[2:4]} (prompt, image), as in {files[0][3]}",
                remedy="Fetch that file again, or import its folder alone.",
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
        return TensorError(f"{path}: {problem}", value=value, bound=bound, remedy=remedy)

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
        f"published folder of {model} {reward}",
        value=str(root / f"{model}_{shorts[0]}_val_{variant}"),
        bound=f"an existing folder; found {find_published(root)}",
        remedy=f"Check the folder; known rewards are {sorted(SHORT_NAMES)}.",
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
            f"published steps of {model} {reward} in {root}",
            value=(missing or extra or "none"),
            bound=f"base files for steps 0 to {max(n_steps - 1, 0)}, noise-aware ones among them",
            remedy="Fetch the missing files p<prompts>_i<images>_s<step>.yaml.",
        )


def _prompt_text(prompts: Sequence[str] | str | Path | None, n_prompts: int) -> list[str] | None:
    if prompts is None:
        return None
    if isinstance(prompts, str | Path):
        remedy = "Pass the prompt file that the values were made from."
        prompts = read_json(prompts, "prompts", error=TensorError, remedy=remedy, kind=list)
    if not isinstance(prompts, Sequence) or len(prompts) < n_prompts or not all(isinstance(p, str) for p in prompts):
        raise TensorError(
            "prompts",
            value=len(prompts) if isinstance(prompts, Sequence) else type(prompts).__name__,
            bound=f"at least {n_prompts} texts",
            remedy="Pass the prompt file that the values were made from.",
        )
    return list(prompts[:n_prompts])
