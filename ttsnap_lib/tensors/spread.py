"""What rewards tell within a prompt: those of one value say nothing there, those of a large scale outvote the others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

MOST = 10.0
"""Spreads within prompts that differ by more are told where rewards are added up."""


class SpreadWarning(UserWarning):
    """Rewards that say nothing within prompts, or that outvote the others of a weighted sum."""


def flat(values: np.ndarray) -> np.ndarray:
    """Return where the scores along the last axis are all equal or missing."""
    known = ~np.isnan(values)
    high = np.where(known, values, -np.inf).max(-1)
    return ~(high > np.where(known, values, np.inf).min(-1))


def tell_flat(found: Mapping[str, tuple[int, int]], *, stacklevel: int = 2) -> None:
    """Warn of rewards that are flat; `found` says in how many prompts of how many."""
    told = [f"{name} in {n} of {of} prompts" for name, (n, of) in found.items() if n]
    if told:
        warnings.warn(
            f"scores that are all equal or missing within a prompt say nothing there: {', '.join(told)}. Look at the reward, "
            "or leave it out.",
            SpreadWarning,
            stacklevel=stacklevel + 1,
        )


def tell_spreads(
    values: np.ndarray,
    names: Sequence[str],
    selecting: Sequence[int],
    weights: np.ndarray | None,
    *,
    stacklevel: int = 2,
) -> None:
    """Warn of rewards (prompt, image, reward) that are flat, and of a weighted sum in which one outvotes another.

    `weights` are those of the rewards `selecting` in a weighted sum, None for other rules.
    """
    if values.shape[1] < 2:
        return
    by_prompt = flat(np.moveaxis(values, 1, -1))
    tell_flat(
        {name: (int(by_prompt[:, r].sum()), len(by_prompt)) for r, name in enumerate(names)}, stacklevel=stacklevel + 1
    )
    if weights is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a prompt without any score
        spreads = np.nanmean(np.nanstd(values[:, :, selecting], axis=1), axis=0) * np.abs(weights)
    shares = {names[r]: float(spread) for r, spread in zip(selecting, spreads, strict=True) if spread > 0}
    if len(shares) > 1 and max(shares.values()) > MOST * min(shares.values()):
        told = ", ".join(f"{name} {spread:.3g}" for name, spread in shares.items())
        warnings.warn(
            f"combine weighted_sum adds up rewards of different scale: spread within a prompt times weight is {told}, so "
            f"{max(shares, key=shares.__getitem__)} decides nearly alone. Take combine z_score, which puts them on one "
            "scale, or other weights.",
            SpreadWarning,
            stacklevel=stacklevel + 1,
        )
