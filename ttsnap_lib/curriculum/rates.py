"""The learning rate of every update, a pure function: a resumed run has it too."""

from __future__ import annotations

import math

from .config import CurriculumConfig

__all__ = ["learning_rate"]


def learning_rate(config: CurriculumConfig, position: int, update: int, updates: int) -> float:
    """Return the learning rate of one update.

    Parameters
    ----------
    config : CurriculumConfig
    position : int
        Position of the step in the curriculum, from 0.
    update : int
        Update within the step, from 0.
    updates : int
        Updates that the step has.
    """
    start = config.learning_rate * config.step_rate_decay**position
    if not config.restart and config.curriculum:  # one run of the rate over all steps, of as many updates each
        update, updates = position * updates + update, updates * len(config.steps)
    if update < config.warmup_updates:
        return start * (update + 1) / config.warmup_updates
    span = updates - config.warmup_updates
    progress = min(1.0, (update - config.warmup_updates) / (span - 1)) if span > 1 else 0.0
    floor = config.decay_floor
    if config.decay == "linear":
        factor = 1 - (1 - floor) * progress
    elif config.decay == "cosine":
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    elif config.decay == "exponential":
        factor = max(floor, 1e-4) ** progress
    else:
        factor = 1.0
    return start * factor
