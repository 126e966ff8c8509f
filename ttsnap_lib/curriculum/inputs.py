"""What a run learns from: pictures and their targets, to train on and held out; all checked before anything runs."""

from __future__ import annotations

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
    goal = _targets(targets, train, reward, config)
    if held is not None:
        return RunData(train, goal, (held, _targets(validation_targets, held, reward, config)))
    if not config.validation_prompts:
        return RunData(train, goal)
    cut = len(train.prompts) - config.validation_prompts
    if cut < 1:
        raise CurriculumError(
            "validation_prompts",
            value=config.validation_prompts,
            bound=f"fewer than the {len(train.prompts)} prompts",
            remedy="Lower it, or name other pictures for validation.",
        )
    kept, split_off = PromptSubset(train, 0, cut), PromptSubset(train, cut, len(train.prompts))
    return RunData(kept, goal[:cut], (split_off, goal[cut:]))


def _check_steps(config: CurriculumConfig, images: Images) -> None:
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
    targets = np.asarray(given, np.float32)
    if targets.shape != (len(images.prompts), images.n_images) or not np.isfinite(targets).all():
        raise CurriculumError(
            "targets",
            value=targets.shape,
            bound=f"finite numbers ({len(images.prompts)}, {images.n_images}), one per image",
            remedy="Give the targets of these trajectories.",
        )
    return targets
