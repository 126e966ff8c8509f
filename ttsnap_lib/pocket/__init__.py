"""The pocket world: tiny models, trained by this project, that the whole of it runs on without a download.

``pocket_folder("pocket-flux")`` is an ordinary diffusers folder; so is ``pocket-sdxl``. ``pocket-clip`` is an
ordinary CLIP folder, the pocket PickScore; ``pocket-tiny`` is an ``AutoencoderTiny`` over the latents of both
pipelines. This module loads neither torch nor diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ttsnap_lib.checks import choice

POCKET_MODELS = ("pocket-flux", "pocket-sdxl", "pocket-clip", "pocket-tiny")
"""The shipped models."""

POCKET_DEFAULTS: dict[str, dict[str, Any]] = {
    "pocket-flux": {"height": 32, "width": 32, "n_steps": 20, "guidance": 0.0, "max_sequence_length": 10},
    "pocket-sdxl": {"height": 32, "width": 32, "n_steps": 20, "guidance": 3.0},
}
"""Generation settings of the pipelines. pocket-flux has no guidance embedding, so its guidance has no effect."""


def pocket_folder(name: str) -> Path:
    """Return the folder of a shipped model, for ``from_pretrained``; ConfigError for a name that is not shipped."""
    return Path(__file__).with_name("models") / choice("pocket model", name, POCKET_MODELS)
