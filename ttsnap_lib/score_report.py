"""What a reward tensor looks like: summaries per step, agreement of rewards and steps, best and worst images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .checks import choice, integer
from .errors import TensorError
from .tensors import check_rewards

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["best_and_worst", "pocket_trajectories", "rank_correlation", "step_summary"]


def step_summary(dataset: xr.Dataset) -> pd.DataFrame:
    """Return one row per reward, variant and step: mean, quartiles, spread within a prompt, missing values."""
    import pandas as pd

    check_rewards(dataset)
    rows = []
    for name in map(str, dataset["reward"].values):
        for variant in ("base", "noise_aware"):
            block = dataset[variant].sel(reward=name).transpose("step", "prompt", "image").values
            for step, values in zip(dataset["step"].values, block, strict=True):
                found = values[~np.isnan(values)]
                low, middle, high = np.quantile(found, [0.25, 0.5, 0.75]) if found.size else (np.nan,) * 3
                within = np.nanmean(np.nanstd(values, axis=1)) if found.size else np.nan
                rows.append(
                    {
                        "reward": name,
                        "variant": variant,
                        "step": int(step),
                        "mean": float(found.mean()) if found.size else np.nan,
                        "quartile_1": float(low),
                        "median": float(middle),
                        "quartile_3": float(high),
                        "sd_within_prompt": float(within),
                        "missing": int(np.isnan(values).sum()),
                    }
                )
    return pd.DataFrame(rows)


def rank_correlation(dataset: xr.Dataset, *, variant: str = "base", every: int = 1) -> pd.DataFrame:
    """Return Spearman's rank correlation within prompts between every two (reward, step), averaged over prompts.

    Prompts with a missing value, or where a reward is the same for all images, do not count for the pairs concerned.

    Parameters
    ----------
    dataset : xarray.Dataset
        A reward tensor.
    variant : {"base", "noise_aware"}
    every : int
        Take every so many-th step, and the last one.

    Returns
    -------
    pandas.DataFrame
        Square, symmetric; rows and columns indexed by (reward, step).

    Raises
    ------
    TensorError
        Fewer than two images per prompt.
    """
    import pandas as pd
    from scipy.stats import rankdata

    check_rewards(dataset)
    choice("variant", variant, ("base", "noise_aware"))
    every = integer("every", every, 1)
    if dataset.sizes["image"] < 2:
        raise TensorError("images per prompt", value=1, bound="2 or more", remedy="Ranks need images to compare.")
    positions = sorted({*range(0, dataset.sizes["step"], every), dataset.sizes["step"] - 1})
    block = dataset[variant].isel(step=positions).transpose("prompt", "reward", "step", "image").values
    keys = pd.MultiIndex.from_product(
        [[str(name) for name in dataset["reward"].values], dataset["step"].values[positions].tolist()],
        names=["reward", "step"],
    )
    block = block.reshape(block.shape[0], len(keys), block.shape[-1]).astype(np.float64)
    ranks = rankdata(block, axis=-1)
    ranks[np.isnan(block).any(-1)] = np.nan
    ranks -= ranks.mean(-1, keepdims=True)
    length = np.sqrt((ranks**2).sum(-1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        ranks /= np.where(length == 0, np.nan, length)
    pairs = np.einsum("pki,pli->pkl", ranks, ranks)
    counted = ~np.isnan(pairs)
    mean = np.where(counted, pairs, 0).sum(0) / np.where(counted.any(0), counted.sum(0), np.nan)
    return pd.DataFrame(mean, index=keys, columns=keys)


def best_and_worst(dataset: xr.Dataset, prompt: int, *, reward: str | None = None, n: int = 4) -> pd.DataFrame:
    """Return the `n` best and the `n` worst final images of a prompt by the base reward.

    Returns
    -------
    pandas.DataFrame
        Columns ``which`` (best or worst), ``place`` (from 1), ``image``, ``value``; the lower index first among equals.
    """
    import pandas as pd

    check_rewards(dataset)
    names = [str(name) for name in dataset["reward"].values]
    reward = choice("reward", names[0] if reward is None else reward, names)
    n = integer("n", n, 1)
    values = dataset["base"].sel(reward=reward, prompt=prompt).isel(step=-1).values
    images = dataset["image"].values
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(-values[known], kind="stable")]
    n = min(n, len(order))
    rows = [("best", k + 1, int(images[i]), float(values[i])) for k, i in enumerate(order[:n])]
    rows += [("worst", k + 1, int(images[i]), float(values[i])) for k, i in enumerate(order[::-1][:n])]
    return pd.DataFrame(rows, columns=["which", "place", "image", "value"])


def pocket_trajectories(
    folder: str | Path | None = None, *, model: str = "pocket-flux", prompts: int = 6, images: int = 8
) -> Path:
    """Return a small folder of pocket trajectories, generated on the first use: something to try scoring on."""
    from .generate import generate
    from .paths import data_cache
    from .pipelines import load_pipeline
    from .pocket import pocket_prompts
    from .trajectories import MANIFEST

    path = Path(folder) if folder is not None else data_cache() / "trajectories" / f"{model}-{prompts}x{images}"
    if not (path / MANIFEST).exists() or not _whole(path):
        generate(load_pipeline(model), pocket_prompts(n=prompts), path, images_per_prompt=images)
    return path


def _whole(path: Path) -> bool:
    from .trajectories import Trajectories

    found = Trajectories(path)
    return all(len(found.state(prompt).whole) >= found.images_per_prompt for prompt in range(len(found.prompts)))
