"""What a reward tensor holds, as tables and figures: distributions per step, rank correlations, best and worst images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.checks import choice, integer
from ttsnap_lib.errors import TensorError
from ttsnap_lib.style import COLORS, axes_or_new, figure_size, reward_label
from ttsnap_lib.tensors.tensor import check_rewards
from ttsnap_lib.trajectories.read import Trajectories

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
                row: dict[str, Any] = {"reward": name, "variant": variant, "step": int(step)}
                row["mean"] = float(found.mean()) if found.size else np.nan
                row |= {"quartile_1": float(low), "median": float(middle), "quartile_3": float(high)}
                rows.append({**row, "sd_within_prompt": float(within), "missing": int(np.isnan(values).sum())})
    return pd.DataFrame(rows)


def rank_correlation(dataset: xr.Dataset, *, every: int = 1) -> pd.DataFrame:
    """Return Spearman's rank correlation of base values between every two (reward, step), averaged over prompts.

    Prompts with a missing value, or where a reward is the same for all images, do not count for the pairs concerned.
    It takes `every` so many-th step, and the last one. The frame is square, its rows and columns indexed by (reward, step).
    """
    import pandas as pd
    from scipy.stats import rankdata

    check_rewards(dataset)
    every = integer("every", every, 1)
    if dataset.sizes["image"] < 2:
        raise TensorError("images per prompt: got 1, expected 2 or more. Ranks need images to compare.")
    positions = sorted({*range(0, dataset.sizes["step"], every), dataset.sizes["step"] - 1})
    block = dataset["base"].isel(step=positions).transpose("prompt", "reward", "step", "image").values
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

    Columns are ``which`` (best or worst), ``place`` (from 1), ``image`` and ``value``; of equals the lower index first.
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


def pocket_trajectories() -> Path:
    """Return a small folder of pocket trajectories, generated on the first use: something to try scoring on."""
    from ttsnap_lib.diffusion.pipelines import load_pipeline
    from ttsnap_lib.files import data_cache
    from ttsnap_lib.pocket.world import pocket_prompts
    from ttsnap_lib.trajectories.generate import generate
    from ttsnap_lib.trajectories.layout import MANIFEST

    path = data_cache() / "trajectories" / "pocket-flux-6x8"
    found = Trajectories(path) if (path / MANIFEST).exists() else None
    if found is None or any(len(found.state(prompt).whole) < 8 for prompt in range(6)):
        generate(load_pipeline("pocket-flux"), pocket_prompts(n=6), path, images_per_prompt=8)
    return path


def reward_histograms(dataset: xr.Dataset, *, bins: int | None = None) -> Figure:
    """Draw how rewards differ among the images of a prompt: each less the mean of its prompt at that step.

    Only these differences choose; those between prompts are left out. Base filled, noise-aware as a line. A row per step (up to
    six, evenly spread), a column per reward; the number is the standard deviation within a prompt, of the base reward. There are
    so many `bins`, of equal width over all steps, that some images fall into each; 40 at most. The outermost hold what lies beyond.
    """
    from matplotlib import pyplot as plt

    names, every = [str(name) for name in dataset["reward"].values], dataset["step"].values
    steps = every[np.unique(np.linspace(0, len(every) - 1, 6).round().astype(int))]
    size = figure_size(1.4 + 5 * len(names), 0.75 * len(steps) + 0.9)
    figure, axes = plt.subplots(len(steps), len(names), figsize=size, sharex="col", squeeze=False, layout="constrained")
    for column, name in zip(axes.T, names, strict=True):
        _histogram_column(column, dataset.sel(reward=name, step=steps), bins)
        column[-1].set_xlabel(f"{reward_label(name)}, less the prompt's mean")
    for ax, step in zip(axes[:, 0], steps, strict=True):
        ax.set_ylabel(f"step {int(step)}", rotation=0, ha="right", va="center")
    return figure


def _histogram_column(axes: Sequence[Axes], chosen: xr.Dataset, bins: int | None) -> None:
    centred = {name: chosen[name] - chosen[name].mean("image") for name in ("base", "noise_aware")}
    values = np.concatenate([one.values.ravel() for one in centred.values()])
    values = values[np.isfinite(values)]
    if bins is None:
        bins = int(np.clip(2 * np.sqrt(chosen["base"].isel(step=0).size), 8, 40))
    low, high = np.quantile(values, [0.002, 0.998])  # a single stray image would squeeze all others
    edges = np.linspace(low, high + 1e-9, bins + 1).tolist()
    handles: dict[str, Any] = {}
    for k, ax in enumerate(axes):
        base, aware = (
            np.clip(centred[name].isel(step=k).values.ravel(), low, high) for name in ("base", "noise_aware")
        )
        ax.hist(base, bins=edges, color=COLORS[7], alpha=0.75, label="base")
        at = chosen.isel(step=k)
        source = str(at["noise_aware_source"].values) if "noise_aware_source" in at else "finetuned"
        if source == "finetuned":
            ax.hist(aware, bins=edges, histtype="step", color=COLORS[0], linewidth=1.5, label="noise-aware")
        within = float(chosen["base"].isel(step=k).std("image").mean())
        ax.annotate(
            f"sd {within:.3g}", (1, 0.9), xycoords="axes fraction", ha="right", va="top", fontsize=8, color="0.35"
        )
        ax.axvline(0, color="0.25", linewidth=1, linestyle=":")
        ax.set_yticks([])
        ax.spines[["top", "right", "left"]].set_visible(False)
        shown, labels = ax.get_legend_handles_labels()
        handles |= dict(zip(labels, shown, strict=True))
    axes[0].legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="upper left")


def correlation_heatmap(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the rank correlation between rewards and steps: a frame of :func:`rank_correlation`."""
    import seaborn as sns

    steps = [str(step) for _, step in frame.index]
    rewards = [reward for reward, _ in frame.index]
    side = 1.6 + 0.27 * len(frame)
    ax = axes_or_new(ax, (side + 0.9, side))
    sns.heatmap(
        frame.to_numpy(), vmin=min(0.0, float(frame.to_numpy().min())), vmax=1, cmap="viridis", square=True, ax=ax,
        xticklabels=steps, yticklabels=steps,
        cbar_kws={"label": "Spearman within a prompt, mean over prompts", "shrink": 0.8},
        annot=len(frame) <= 16, fmt=".2f", annot_kws={"fontsize": 6},
    )  # fmt: skip
    ax.tick_params(length=0, labelsize=8, rotation=0)
    starts = [k for k in range(len(rewards)) if k == 0 or rewards[k] != rewards[k - 1]]
    for k in starts[1:]:
        ax.axhline(k, color="black", linewidth=1.2)
        ax.axvline(k, color="black", linewidth=1.2)
    for start, end in zip(starts, [*starts[1:], len(rewards)], strict=True):
        label = textwrap.shorten(reward_label(rewards[start]), 24, placeholder="...")
        ax.annotate(label, ((start + end) / 2, 0), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=9)
        ax.annotate(
            label, (0, (start + end) / 2), xytext=(-22, 0), textcoords="offset points", rotation=90, ha="right",
            va="center", fontsize=9,
        )  # fmt: skip
    ax.set(xlabel="denoising step")
    return ax


def extreme_images(folder: str | Path, extremes: pd.DataFrame, prompt: int, *, title: str = "") -> Figure:
    """Draw the best images of a prompt above the worst ones, each with its reward.

    `folder` is the trajectory folder that was scored and `extremes` a frame of :func:`best_and_worst`; `title` stands
    before the prompt.
    """
    from matplotlib import pyplot as plt

    found = Trajectories(folder)
    columns = int(extremes["place"].max())
    figure, axes = plt.subplots(2, columns, figsize=(1.25 * columns + 0.5, 3.4), squeeze=False, layout="constrained")
    for ax in axes.ravel():
        ax.set(xticks=[], yticks=[])
        for side in ax.spines.values():
            side.set_visible(False)
    spread = float(np.ptp(extremes["value"]))
    decimals = int(np.clip(1 - np.floor(np.log10(spread)), 0, 6)) if spread > 0 else 3  # so that neighbours differ
    for entry in extremes.itertuples():
        ax = axes[("best", "worst").index(entry.which), entry.place - 1]
        ax.imshow(found.read(prompt, entry.image, -1), interpolation="nearest")
        ax.set_title(f"image {entry.image}: {entry.value:.{decimals}f}", fontsize=8)
    for row, which in enumerate(("best", "worst")):
        axes[row, 0].set_ylabel(which, fontsize=9)
    heading = textwrap.shorten(f"{prompt}: {found.prompts[prompt]}", 80, placeholder=" ...")
    figure.suptitle(f"{reward_label(title)}{', ' if title else ''}{heading}", fontsize=9)
    return figure
