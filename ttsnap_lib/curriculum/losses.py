"""Losses of a batch as sums with known divisors: however a batch is split, its parts add up to the same number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from .config import CurriculumConfig

__all__ = ["Part", "TargetScale", "batch_loss"]


@dataclass(frozen=True)
class TargetScale:
    """Center and spread of the targets of a whole batch (0 and 1 without standardization)."""

    center: float = 0.0
    spread: float = 1.0

    @classmethod
    def of(cls, targets: torch.Tensor, standardize: bool) -> TargetScale:
        """Return the scale of the whole batch's targets, the same for every process and part."""
        if not standardize or len(targets) < 2:
            return cls()
        spread = float(targets.double().std())
        return cls(float(targets.double().mean()), spread if spread > 1e-12 else 1.0)


@dataclass(frozen=True)
class Part:
    """Predictions and targets of some whole groups of a batch."""

    scores: torch.Tensor
    """(group * size,), with gradients."""
    targets: torch.Tensor
    """(group * size,)."""
    group_size: int


def batch_loss(
    part: Part, config: CurriculumConfig, whole: int, scale: TargetScale
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return what `part` adds to the loss of a batch of `whole` pictures, and the summands by name.

    Every loss is a mean over pictures: a group of k pictures weighs k, whatever else the batch holds.
    """
    scores = (part.scores.float() - scale.center) / scale.spread
    targets = (part.targets.float() - scale.center) / scale.spread
    rows, wanted = scores.view(-1, part.group_size), targets.view(-1, part.group_size)
    total, told = scores.new_zeros(()), {}
    for name, function in _LOSSES.items():
        weight = getattr(config, name)
        if weight:
            value = function(rows, wanted, config.preference_tau) / whole
            total = total + weight * value
            told[name] = float(value.detach())
    return total, told


def _mse(scores: torch.Tensor, targets: torch.Tensor, tau: float) -> torch.Tensor:
    return (scores - targets).square().sum()


def _centered_mse(scores: torch.Tensor, targets: torch.Tensor, tau: float) -> torch.Tensor:
    """Leave out the prompt's level: pruning compares images of one prompt only. n - 1 of n degrees are left."""
    scores = scores - scores.mean(1, keepdim=True)
    targets = targets - targets.mean(1, keepdim=True)
    size = scores.shape[1]
    return (scores - targets).square().sum() * (size / (size - 1))


def _preference(scores: torch.Tensor, targets: torch.Tensor, tau: float) -> torch.Tensor:
    """Bradley-Terry: the target's probability that one image is the better of two, against the prediction's."""
    size = scores.shape[1]
    first, second = torch.triu_indices(size, size, 1, device=scores.device)
    predicted = (scores[:, first] - scores[:, second]) / tau
    better = torch.sigmoid((targets[:, first] - targets[:, second]) / tau)
    pairs = functional.binary_cross_entropy_with_logits(predicted, better, reduction="none")
    return pairs.mean(1).sum() * size


def _listwise(scores: torch.Tensor, targets: torch.Tensor, tau: float) -> torch.Tensor:
    """ListNet: cross-entropy of the two softmax distributions over the images of a prompt. Ours, not the paper's."""
    wanted = torch.softmax(targets / tau, 1)
    return -(wanted * torch.log_softmax(scores / tau, 1)).sum() * scores.shape[1]


_LOSSES = {"mse": _mse, "centered_mse": _centered_mse, "preference": _preference, "listwise": _listwise}
