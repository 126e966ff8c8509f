"""What a run learns from: pictures and their targets, to train on and held out; all checked before anything runs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ttsnap_lib.errors import CurriculumError
from ttsnap_lib.rewards.base import Reward

from .config import CurriculumConfig
from .images import ImageBank, Images, open_images
from .subset import PromptSubset
from .targets import ground_truth_targets, own_targets

__all__ = ["RunData", "gather"]


@dataclass(frozen=True)
class RunData:
    """Pictures to train on and their targets (prompt, image); the same of what is held out, if anything is."""

    train: Images
    targets: np.ndarray
    held: tuple[Images, np.ndarray] | None = None


def gather(
    images: str | Path | Images,
    validation: str | Path | Images | None,
    targets: Any,
    validation_targets: Any,
    reward: Reward,
    config: CurriculumConfig,
) -> RunData:
    """Open pictures and targets as :func:`ttsnap_lib.curriculum.finetune` takes them.

    Parameters
    ----------
    images, validation, targets, validation_targets
        As there. Without `validation` the last ``config.validation_prompts`` prompts are held out.
    reward : Reward
        The base reward, which gives the targets that are not named.
    config : CurriculumConfig

    Returns
    -------
    RunData
        ``train`` and ``targets``; ``held`` is the pair of both for held-out prompts, or None.

    Raises
    ------
    CurriculumError, TrajectoryError
        Pictures that lack a step, targets that do not fit, more prompts held out than there are.
    """
    train = open_images(images, steps=config.steps)
    held = open_images(validation, steps=config.steps) if validation is not None else None
    for pictures in (train, held):
        if pictures is not None:
            _check_steps(config, pictures)
    if held is None and validation_targets is not None:
        raise CurriculumError(
            "validation_targets without validation",
            value=type(validation_targets).__name__,
            bound="targets of pictures that are named",
            remedy="Name the validation pictures too; prompts held out of the training pictures have its targets.",
        )
    if held is not None or config.validation_prompts:
        _check_comparable(train if held is None else held)
    goal = _targets(targets, train, reward, config)
    if held is not None:
        _tell_overlap(train, held)
        held_goal = _targets(validation_targets, held, reward, config)
        _check_spread(held_goal)
        return RunData(train, goal, (held, held_goal))
    if not config.validation_prompts:
        return RunData(train, goal)
    if getattr(train, "mirrored", False):
        raise CurriculumError(
            "validation_prompts of mirrored pictures",
            value=config.validation_prompts,
            bound="0, or validation pictures of their own",
            remedy="Name other pictures for validation: these would be the mirror images of pictures trained on.",
        )
    cut = len(train.prompts) - config.validation_prompts
    if cut < 1:
        raise CurriculumError(
            "validation_prompts",
            value=config.validation_prompts,
            bound=f"fewer than the {len(train.prompts)} prompts",
            remedy="Lower it, or name other pictures for validation.",
        )
    kept, split_off = PromptSubset(train, 0, cut), PromptSubset(train, cut, len(train.prompts))
    _tell_overlap(kept, split_off)
    _check_spread(goal[cut:])
    return RunData(kept, goal[:cut], (split_off, goal[cut:]))


def _check_comparable(held: Images) -> None:
    if held.n_images < 2:
        raise CurriculumError(
            "images per prompt for validation",
            value=held.n_images,
            bound="2 or more: validation compares the images of a prompt",
            remedy="Generate more images per prompt, or go without validation (validation_prompts 0).",
        )


def _check_spread(targets: np.ndarray) -> None:
    if not np.ptp(targets, axis=1).any():
        raise CurriculumError(
            "validation targets",
            value="the same for all images of every prompt",
            bound="targets that differ between the images of a prompt",
            remedy="Look at the pictures and the targets, or go without validation (validation_prompts 0).",
        )


def _tell_overlap(train: Images, held: Images) -> None:
    shared = set(train.prompts) & set(held.prompts)
    if shared:
        warnings.warn(
            f"{len(shared)} validation prompts are trained on too, {min(shared)!r} for one: what they gain is flattering",
            stacklevel=4,
        )


def _check_steps(config: CurriculumConfig, images: Images) -> None:
    if not images.prompts or images.n_images < 1:
        raise CurriculumError(
            "pictures", value=f"{len(images.prompts)} prompts x {images.n_images} images", bound="at least one of each",
            remedy="Generate trajectories first.",
        )  # fmt: skip
    there = images.steps if isinstance(images, ImageBank) else range(images.n_steps)
    missing = [step for step in config.steps if step not in there]
    if missing:
        raise CurriculumError(
            f"step {missing[0]} has no images",
            value=missing,
            bound=f"steps of the trajectories: {list(there)[:3]} ... {list(there)[-1]}",
            remedy="Leave these steps out of the curriculum, or generate trajectories that have them.",
        )


def _targets(given: Any, images: Images, reward: Reward, config: CurriculumConfig) -> np.ndarray:
    if given is None:
        return own_targets(reward, images)
    if isinstance(given, str | Path):
        return ground_truth_targets(given, images, reward, check=config.check_targets)
    try:
        targets = np.asarray(given, np.float32)
    except (TypeError, ValueError):  # no numbers, or rows of different lengths
        targets = np.empty(0, np.float32)
    if targets.shape != (len(images.prompts), images.n_images) or not np.isfinite(targets).all():
        raise CurriculumError(
            "targets",
            value=targets.shape,
            bound=f"finite numbers ({len(images.prompts)}, {images.n_images}), one per image",
            remedy="Give the targets of these trajectories.",
        )
    return targets
