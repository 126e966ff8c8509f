"""Some of the prompts of other pictures."""

from __future__ import annotations

import numpy as np

from .images import Images

__all__ = ["PromptSubset"]


class PromptSubset:
    """Prompts `start` to `stop` of `images`, without copying."""

    def __init__(self, images: Images, start: int, stop: int) -> None:
        self._images, self._start = images, start
        self.prompts = list(images.prompts[start:stop])
        self.n_images, self.n_steps = images.n_images, images.n_steps
        self._digest = f"{images.digest()}[{start}:{stop}]"

    def read(self, prompts: np.ndarray, images: np.ndarray, step: int) -> np.ndarray:
        """Return uint8 (n, height, width, 3) of one step; -1 is the clean image."""
        return self._images.read(np.asarray(prompts) + self._start, images, step)

    def digest(self) -> str:
        """Return what tells these pictures from others."""
        return self._digest
