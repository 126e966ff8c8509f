"""Encoded prompts, and a cache that encodes each distinct prompt once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ttsnap_lib.errors import RewardError

__all__ = ["TextBatch", "TextCache"]

_CACHED_PROMPTS = 4096  # at most 16 MB for the largest text tower
_ENCODED_AT_ONCE = 256


@dataclass
class TextBatch:
    """Encoded prompts: named tensors with one row per prompt, whatever the family needs."""

    tensors: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Any) -> TextBatch:
        """Return the given rows (an index tensor, a slice or a list of integers)."""
        return TextBatch({name: tensor[rows] for name, tensor in self.tensors.items()})

    def expand(self, n: int) -> TextBatch:
        """Return `n` rows: one row is repeated without copying."""
        if len(self) == n:
            return self
        if len(self) != 1:
            raise RewardError(
                "prompts and images differ in number",
                value=f"{len(self)} prompts, {n} images",
                bound="one prompt per image, or one for all",
                remedy="Pass a list of prompts as long as the images.",
            )
        return TextBatch({name: tensor.expand(n, *tensor.shape[1:]) for name, tensor in self.tensors.items()})


class TextCache:
    """Rows of encoded prompts, kept as long as what decides them stays the same."""

    def __init__(self) -> None:
        self._rows: OrderedDict[str, TextBatch] = OrderedDict()
        self._valid_for: Hashable = None

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()

    def rows(
        self, prompts: Sequence[str], encode: Callable[[Sequence[str]], TextBatch], valid_for: Hashable
    ) -> TextBatch:
        """Return one row per prompt; only those not seen since `valid_for` changed are encoded."""
        if self._valid_for != valid_for:
            self._rows.clear()
            self._valid_for = valid_for
        distinct = list(dict.fromkeys(prompts))
        missing = [prompt for prompt in distinct if prompt not in self._rows]
        for start in range(0, len(missing), _ENCODED_AT_ONCE):
            part = missing[start : start + _ENCODED_AT_ONCE]
            encoded = encode(part)
            for row, prompt in enumerate(part):
                self._rows[prompt] = encoded[row : row + 1]
        if len(distinct) == 1:
            self._rows.move_to_end(distinct[0])
            text = self._rows[distinct[0]].expand(len(prompts))
        else:
            rows = [self._rows[prompt] for prompt in prompts]
            text = TextBatch({key: torch.cat([row.tensors[key] for row in rows]) for key in rows[0].tensors})
        while len(self._rows) > _CACHED_PROMPTS:
            self._rows.popitem(last=False)
        return text
