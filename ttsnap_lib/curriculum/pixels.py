"""uint8 pictures to model input, fast where no resizing is needed."""

from __future__ import annotations

import numpy as np
import torch

from ttsnap_lib.errors import CurriculumError
from ttsnap_lib.rewards.base import Reward

__all__ = ["model_pixels"]


def model_pixels(reward: Reward, pictures: np.ndarray) -> torch.Tensor:
    """Return the reward's own preprocessing of uint8 (n, height, width, 3), float32 (n, 3, size, size) on the CPU.

    Pictures that have the model's size already take a path without Pillow; the pixels are the same to the bit.

    Raises
    ------
    CurriculumError
        A reward without preprocessing of its own.
    """
    preprocessing = reward.preprocessing
    if preprocessing is None:
        raise CurriculumError(
            f"reward {reward.name} has no preprocessing",
            value=reward.name,
            bound="a reward that says how pictures become its model's input",
            remedy="Give the reward a Preprocessing.",
        )
    if pictures.shape[1:3] == (preprocessing.size, preprocessing.size) and preprocessing.resize_to is None:
        levels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
        # Whole levels need no rounding, so the path without it is exact here.
        return preprocessing.tensor(levels.to(torch.float32) / 255.0, differentiable=True).contiguous()
    from PIL import Image

    return torch.stack([preprocessing.image(Image.fromarray(picture)) for picture in pictures])
