"""Mirror images of pocket pictures, with captions that tell them so: twice the pictures to train on."""

from __future__ import annotations

import dataclasses

import numpy as np

from .images import ImageBank

__all__ = ["with_mirror_images"]

_SWAP = {"left of": "right of", "right of": "left of"}


def with_mirror_images(bank: ImageBank) -> ImageBank:
    """Return the bank with the mirror images of all its pictures behind them, as prompts of their own.

    For captions of the pocket world alone: there, "left of" and "right of" are all that a mirror changes.
    """
    from ttsnap_lib.pocket.world import caption, parse_caption

    scenes = [parse_caption(text) for text in bank.prompts]
    told = [
        caption(dataclasses.replace(scene, relation=_SWAP.get(scene.relation or "", scene.relation)))
        for scene in scenes
    ]
    pixels = np.concatenate([bank.pixels, bank.pixels[:, :, :, :, ::-1]])
    mirrored = ImageBank(pixels, [*bank.prompts, *told], bank.steps)
    mirrored.mirrored = True
    return mirrored
