"""Reward models behind one interface; heavy families load on first use.

>>> reward = load_reward("pocket-clip")
>>> reward.score("a red circle", images)          # (n,) float32
>>> pixels = reward.preprocess(images)            # the training path
>>> text = reward.encode_text(["a red circle"])
>>> loss = (reward.forward(pixels, text) - target).square().mean()
"""

from __future__ import annotations

from ttsnap_lib._lazy import lazy_names

_NAMES = {
    "CallableReward": "callable",
    "ClipReward": "clip",
    "ImageRewardModel": "image_reward",
    "OpenClipReward": "hpsv2",
    "Preprocessing": "preprocess",
    "REWARDS": "loading",
    "Reward": "base",
    "StepSeries": "steps",
    "TextBatch": "text",
    "load_reward": "loading",
    "score_many": "several",
    "step_folders": "steps",
}

__all__ = list(_NAMES)

__getattr__, __dir__ = lazy_names(__name__, _NAMES)
