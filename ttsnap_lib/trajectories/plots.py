"""Pictures in, matplotlib Axes out: contact sheets, and how different the images of a prompt are."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ttsnap_lib.style import axes_or_new
from ttsnap_lib.trajectories.read import Trajectories

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_CELL_INCHES = 0.62
_GAP = 0.06  # between pictures, as a share of their size


def contact_sheet(
    folder: str | Path | Trajectories,
    prompt: int = 0,
    *,
    images: Iterable[int] | None = None,
    steps: Iterable[int] | None = None,
    max_pixels: int = 128,
    ax: Axes | None = None,
) -> Axes:
    """Draw the estimates of one prompt: steps across, seeds down.

    `images` and `steps` say which ones (all by default). Of pictures larger than `max_pixels` every k-th pixel is shown.
    """
    found = folder if isinstance(folder, Trajectories) else Trajectories(folder)
    rows = list(range(found.images_per_prompt) if images is None else images)
    columns = list(range(found.n_steps) if steps is None else steps)
    columns = [range(found.n_steps)[step] for step in columns]
    pixels = found.pictures(prompt, rows, columns)
    thin = -(-max(pixels.shape[2:4]) // max_pixels)
    pixels = pixels[:, :, ::thin, ::thin]
    height, width = pixels.shape[2:4]
    gap = max(1, round(_GAP * max(height, width)))
    sheet = np.full((len(rows) * (height + gap) - gap, len(columns) * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i in range(len(rows)):
        for j in range(len(columns)):
            top, left = i * (height + gap), j * (width + gap)
            sheet[top : top + height, left : left + width] = pixels[i, j]
    size = _CELL_INCHES * len(columns) + 0.6, _CELL_INCHES * len(rows) * height / width + 0.8
    ax = axes_or_new(ax, (max(size[0], 3.2), size[1]))
    ax.imshow(sheet, interpolation="nearest")
    ax.set_xticks([j * (width + gap) + width / 2 for j in range(len(columns))], [str(step) for step in columns])
    ax.set_yticks([i * (height + gap) + height / 2 for i in range(len(rows))], [str(image) for image in rows])
    ax.tick_params(length=0, labelsize=8)
    ax.set(xlabel="denoising step", ylabel="image (seed)")
    ax.set_title(textwrap.shorten(f"{prompt}: {found.prompts[prompt]}", 90, placeholder=" ..."), fontsize=9, loc="left")
    for side in ax.spines.values():
        side.set_visible(False)
    return ax


def diversity_bars(frame: pd.DataFrame, *, label: str = "mean pairwise pixel distance", ax: Axes | None = None) -> Axes:
    """Draw the mean distance within a prompt for each setting, one bar per setting and a dot per prompt.

    `frame` is one of :func:`ttsnap_lib.trajectories.read.folder_diversity`; `label` says what the distance is.
    """
    import seaborn as sns

    settings = list(dict.fromkeys(frame["setting"]))
    ax = axes_or_new(ax, (1.2 + 1.1 * len(settings), 3.4))
    colors = sns.color_palette("colorblind")
    table = frame.pivot(index="prompt", columns="setting", values="distance")[settings]
    means = table.mean()
    ax.bar(range(len(settings)), means, width=0.6, color=[colors[i % 10] for i in range(len(settings))], alpha=0.55)
    # A line per prompt: whether each prompt gained shows in its slope.
    ax.plot(range(len(settings)), table.to_numpy().T, color="0.35", linewidth=0.7, marker="o", markersize=3, alpha=0.7)
    for k, mean in enumerate(means):
        ax.annotate(f"{mean:.3f}", (k, 0), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9)
    ax.set_xticks(range(len(settings)), settings)
    ax.set(ylabel=label, ylim=(0, None), xlim=(-0.6, len(settings) - 0.4))
    ax.set_title(f"within a prompt, {len(table)} prompts", fontsize=9)
    sns.despine(ax=ax)
    return ax
