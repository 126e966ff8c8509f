"""Rewards that are the cosine similarity of the embeddings of an image and a prompt, times a factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from .base import Reward
from .text import TextBatch

__all__ = ["CosineReward"]


class CosineReward(Reward):
    """A two-tower reward: families fill in how their towers are called.

    Attributes
    ----------
    module : Any
        A model of the family's own class; its library is imported when one is loaded.
    """

    module: Any

    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """Return the text embeddings (n, d)."""
        raise NotImplementedError

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the image embeddings (n, d) of preprocessed images, in the model's type."""
        raise NotImplementedError

    def factor(self) -> torch.Tensor | float:
        """Return what the cosine is multiplied with."""
        raise NotImplementedError

    def encode_text(self, prompts: Sequence[str]) -> TextBatch:
        """Return the normalized text embeddings ``features`` (n, d), float32."""
        return TextBatch({"features": functional.normalize(self.text_features(list(prompts)).float(), dim=-1)})

    def forward(self, pixels: torch.Tensor, text: TextBatch | Sequence[str]) -> torch.Tensor:
        """Return the rewards (n,) of preprocessed images; see :meth:`Reward.forward`."""
        if not isinstance(text, TextBatch):
            text = self.encode_text(text)
        image = functional.normalize(self.image_features(pixels.to(self.dtype)).float(), dim=-1)
        return (image * text.expand(len(pixels)).tensors["features"]).sum(-1) * self.factor()
