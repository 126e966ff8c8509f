"""How different the images of a prompt are from each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import TrajectoryError
from .trajectories import Trajectories

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["folder_diversity", "pairwise_distances"]


def pairwise_distances(images: np.ndarray, embed: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
    """Return the distance of every pair of images.

    Parameters
    ----------
    images : numpy.ndarray
        uint8 (n, height, width, 3).
    embed : callable, optional
        Turns the images into features (n, d), such as a CLIP image tower does. The distance is then one minus the
        cosine similarity; without it, the root mean square difference of the pixels, of which 0 is black and 1 white.

    Returns
    -------
    numpy.ndarray
        float64 (n * (n - 1) / 2,), in the order of :func:`numpy.triu_indices`.
    """
    one, other = np.triu_indices(len(images), k=1)
    if embed is None:
        flat = images.reshape(len(images), -1).astype(np.float64) / 255
        return np.array([np.sqrt(np.mean((flat[i] - flat[j]) ** 2)) for i, j in zip(one, other, strict=True)])
    features = np.asarray(embed(images), dtype=np.float64)
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    return 1 - (features @ features.T)[one, other]


def folder_diversity(
    folders: dict[str, str | Path],
    *,
    step: int = -1,
    prompts: Iterable[int] | None = None,
    embed: Callable[[np.ndarray], np.ndarray] | None = None,
) -> pd.DataFrame:
    """Return the mean pairwise distance within each prompt, for each of several trajectory folders.

    Parameters
    ----------
    folders : dict
        Name of a setting to its folder.
    step : int
        Which step's pictures; the final images by default.
    prompts : iterable of int, optional
        Which prompts; all of them when not given.
    embed : callable, optional
        As in :func:`pairwise_distances`.

    Returns
    -------
    pandas.DataFrame
        Columns ``setting``, ``prompt``, ``images``, ``distance``.

    Raises
    ------
    TrajectoryError
        When an image is missing, or a folder has fewer than two images per prompt.
    """
    import pandas as pd

    chosen = None if prompts is None else list(prompts)
    rows = []
    for setting, folder in folders.items():
        found = Trajectories(folder)
        n = found.images_per_prompt
        if n < 2:
            raise TrajectoryError(
                f"diversity of {folder}", value=f"{n} image per prompt", bound="two or more", remedy="Generate more."
            )
        for batch in found.batches([step], n, prompts=chosen):
            distances = pairwise_distances(batch.pixels, embed)
            rows.append({"setting": setting, "prompt": batch.prompt, "images": n, "distance": distances.mean()})
    return pd.DataFrame(rows)
