"""What the noise-aware reward should say: the base reward of the clean image, computed once, or a file of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ttsnap_lib.errors import CurriculumError
from ttsnap_lib.paths import atomic_write, data_cache
from ttsnap_lib.rewards.base import Reward

from .images import Images
from .pixels import model_pixels

__all__ = ["ground_truth_targets", "own_targets", "score_step"]

_SAMPLE = 32  # pictures on which a file is compared with the base reward


def score_step(
    reward: Reward,
    images: Images,
    step: int,
    *,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """Return the reward, as its weights are now, of all pictures at a step: float32 (prompt, image).

    With a shard (index, count) only every count-th prompt is scored; the others are zero.
    """
    out = np.zeros((len(images.prompts), images.n_images), np.float32)
    mine = np.arange(shard[0], len(images.prompts), shard[1])
    rows = np.stack(np.meshgrid(mine, np.arange(images.n_images), indexing="ij"), -1).reshape(-1, 2)
    for start in range(0, len(rows), batch_size):
        prompts, numbers = rows[start : start + batch_size].T
        pixels = model_pixels(reward, images.read(prompts, numbers, step))
        out[prompts, numbers] = reward.score_pixels([images.prompts[prompt] for prompt in prompts], pixels)
        if progress is not None:
            progress(min(start + batch_size, len(rows)), len(rows))
    return out


def own_targets(
    reward: Reward,
    images: Images,
    *,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Return the base reward of every clean image, float32 (prompt, image).

    Kept in ``data_cache/targets``, or the folder `cache`, under a name made of the weights and the pictures.

    Parameters
    ----------
    reward : Reward
        The base reward.
    images : Images
    cache : str or Path, optional
        Another folder for the values.
    progress : callable, optional
        ``progress(done, total)`` in pictures.

    Raises
    ------
    CurriculumError
        When the base model gives something that is not finite; prompt and image are named.
    """
    reward.use_step(None)
    key = hashlib.sha256(f"{reward.fingerprint()} {images.digest()}".encode()).hexdigest()[:20]
    path = Path(cache if cache is not None else data_cache() / "targets") / f"{key}.npy"
    shape = (len(images.prompts), images.n_images)
    if path.is_file():
        try:
            found = np.load(path, allow_pickle=False)
            if found.shape == shape and found.dtype == np.float32:
                return found
        except (OSError, ValueError):
            pass  # a broken cache file is made again
    targets = score_step(reward, images, -1, progress=progress)
    reward.clear_cache()  # what is scored next must not differ in the last bits by whether this ran or the file was read
    _finite(targets, f"base reward {reward.name}")
    with atomic_write(path) as file:
        np.save(file, targets)
    return targets


def ground_truth_targets(
    path: str | Path, images: Images, reward: Reward | None = None, *, check: bool = True
) -> np.ndarray:
    """Read targets from a ground-truth file ``p0000: {id000: value}``, float32 (prompt, image).

    Parameters
    ----------
    path : str or Path
        The YAML file.
    images : Images
        The file must hold exactly their prompts and at least their images.
    reward : Reward, optional
        The base reward; with `check` the file must agree with it on a few images (correlation above 0.8).
    check : bool
        False skips that test.

    Returns
    -------
    ndarray (prompt, image)
        float32.

    Raises
    ------
    CurriculumError
        A file of another set.
    """
    from ttsnap_lib.interop import import_ground_truth

    found = import_ground_truth(path)
    shape = (len(images.prompts), images.n_images)
    fits = list(found["prompt"].values) == list(range(shape[0])) and set(range(shape[1])) <= set(found["image"].values)
    if not fits:
        raise CurriculumError(
            f"targets {path} belong to another set",
            value=f"{found.sizes['prompt']} prompts x {found.sizes['image']} images",
            bound=f"prompts 0 to {shape[0] - 1}, images 0 to {shape[1] - 1} of the trajectories",
            remedy="Name the ground truth of these trajectories, or leave it out: the base reward is the target then.",
        )
    targets = found.sel(image=range(shape[1])).values.astype(np.float32)
    if check and reward is not None:
        _agrees(path, targets, images, reward)
    return targets


def _agrees(path: str | Path, targets: np.ndarray, images: Images, reward: Reward) -> None:
    total = targets.size
    flat = np.unique(np.linspace(0, total - 1, min(_SAMPLE, total)).round().astype(int))
    prompts, numbers = np.unravel_index(flat, targets.shape)
    reward.use_step(None)
    pixels = model_pixels(reward, images.read(prompts, numbers, -1))
    own = reward.score_pixels([images.prompts[prompt] for prompt in prompts], pixels)
    given = targets[prompts, numbers]
    if own.std() == 0 or given.std() == 0 or len(own) < 3:
        return
    agreement = float(np.corrcoef(own, given)[0, 1])
    if agreement < 0.8:
        raise CurriculumError(
            f"targets {path} are not those of these images: correlation with the base reward on {len(own)} of them",
            value=round(agreement, 3),
            bound="above 0.8",
            remedy="Name the right file; if it holds another kind of target on purpose, set check_targets to false.",
        )


def _finite(targets: np.ndarray, what: str) -> None:
    bad = np.argwhere(~np.isfinite(targets))
    if len(bad):
        raise CurriculumError(
            f"{what} of prompt {bad[0][0]}, image {bad[0][1]}",
            value=float(targets[tuple(bad[0])]),
            bound="a finite number",
            remedy="Look at the image and the weights.",
        )
