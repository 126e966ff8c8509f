"""Several rewards over one image set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ttsnap_lib.errors import ConfigError

from .base import Reward
from .inputs import Images, as_list, open_image, prompt_list

__all__ = ["score_many"]


def score_many(
    rewards: Sequence[Reward], prompts: str | Sequence[str], images: Images, *, batch_size: int | None = None
) -> dict[str, np.ndarray]:
    """Score one image set with several rewards in one pass over the images.

    Files are opened once, and rewards with equal preprocessing share the pixels.

    Parameters
    ----------
    rewards : sequence of Reward
    prompts : str or sequence of str
        One for all images, or one each.
    images
        As :meth:`Reward.score` takes them.
    batch_size : int, optional
        Images per forward; each reward's own when not given.

    Returns
    -------
    dict
        Reward name -> float32 (n,).

    Raises
    ------
    ConfigError
        Two rewards of one name.
    """
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):
        raise ConfigError(
            "rewards", value=names, bound="distinct names", remedy="Give one of them another name with name=."
        )
    if not isinstance(images, torch.Tensor):
        images = as_list(images)
    rows = prompt_list(prompts, len(images))
    size = batch_size or min((reward.batch_size for reward in rewards), default=1)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for start in range(0, len(images), size):
        part = images[start : start + size]
        if not isinstance(part, torch.Tensor):
            part = [open_image(image) for image in part]
        prepared: dict[tuple, torch.Tensor] = {}
        for reward in rewards:
            if reward.preprocessing is None:
                scores = reward.score(rows[start : start + size], part, batch_size=size)
            else:
                key = (reward.preprocessing, reward.device)
                if key not in prepared:
                    prepared[key] = reward.preprocess(part)
                scores = reward.score_pixels(rows[start : start + size], prepared[key])
            parts[reward.name].append(scores)
    return {name: np.concatenate(values) if values else np.empty(0, np.float32) for name, values in parts.items()}
