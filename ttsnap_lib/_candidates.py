"""Images on their way, the text they follow, and the seeds they start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ._segments import History
from .checks import integer
from .errors import ConfigError

__all__ = ["Candidates", "Conditioning", "image_generator", "image_seed"]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: the embeddings a pipeline call takes, by name, each with one row per image."""

    embeds: Mapping[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.embeds.values())))

    def take(self, indices: Sequence[int]) -> Conditioning:
        """Return the rows `indices`."""
        return Conditioning({name: _rows(value, indices) for name, value in self.embeds.items()})

    def repeat(self, n: int) -> Conditioning:
        """Return each row `n` times in a row: all candidates of the first prompt, then those of the second."""
        return Conditioning({name: value.repeat_interleave(n, dim=0) for name, value in self.embeds.items()})

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Return the rows of all `parts`, in order."""
        return cls({name: torch.cat([part.embeds[name] for part in parts]) for name in parts[0].embeds})


@dataclass(frozen=True)
class Candidates:
    """Images on their way: their latents after `step`, and what a multistep solver remembers.

    Attributes
    ----------
    latents : torch.Tensor
        (n, ...), in the layout that the pipeline's loop works in.
    step : int
        The last step that has run; -1 is pure noise.
    history : dict, optional
        Earlier model outputs, for multistep schedulers.
    """

    latents: torch.Tensor
    step: int = -1
    history: History | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, indices: Sequence[int]) -> Candidates:
        """Return the candidates `indices`: the survivors of a pruning step."""
        history = None if self.history is None else {k: _rows(v, indices) for k, v in self.history.items()}
        return replace(self, latents=_rows(self.latents, indices), history=history)

    @classmethod
    def cat(cls, parts: Sequence[Candidates]) -> Candidates:
        """Return the candidates of all `parts`, in order; they must stand at one step."""
        steps = sorted({part.step for part in parts})
        if len(steps) != 1:
            raise ConfigError(
                "candidates of several steps cannot be joined",
                value=steps,
                bound="parts that have run to one step",
                remedy="Run them to the same step first.",
            )
        kept = [part.history or {} for part in parts]
        history = None if parts[0].history is None else {name: _joined([one[name] for one in kept]) for name in kept[0]}
        return cls(torch.cat([part.latents for part in parts]), steps[0], history)


def image_seed(base_seed: int, prompt_index: int, image_index: int) -> int:
    """Return the seed of one image; it depends on these three numbers alone.

    The low 63 bits of ``numpy.random.SeedSequence([base, prompt, image]).generate_state(1, uint64)``.
    """
    numbers = [
        integer(name, value, 0)
        for name, value in (("base_seed", base_seed), ("prompt_index", prompt_index), ("image_index", image_index))
    ]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) & (2**63 - 1)


def image_generator(base_seed: int, prompt_index: int, image_index: int) -> torch.Generator:
    """Return the CPU generator of one image, seeded with :func:`image_seed`."""
    return torch.Generator().manual_seed(image_seed(base_seed, prompt_index, image_index))


def _rows(value: Any, indices: Sequence[int]) -> Any:
    if isinstance(value, list):
        return [_rows(one, indices) for one in value]
    if not isinstance(value, torch.Tensor) or value.ndim == 0:  # a timestep, a count, an empty place
        return value
    return value[torch.as_tensor(indices, dtype=torch.long, device=value.device)]


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [_joined(list(parts)) for parts in zip(*values, strict=True)]
    return torch.cat(values) if isinstance(values[0], torch.Tensor) and values[0].ndim else values[0]
