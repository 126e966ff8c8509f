"""Saving of the pocket models as ordinary diffusers and transformers folders, in half precision, without local paths."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ttsnap_lib.files import atomic_folder


def ship(training: Any, models: Path) -> None:
    """Write ``pocket-flux``, ``pocket-sdxl``, ``pocket-clip`` and ``pocket-tiny`` under `models`."""
    from ttsnap_lib.pocket.training.clip import clip_processor

    def write(name: str, *parts: Any) -> None:
        with atomic_folder(models / name) as folder:
            for part in parts:
                part.save_pretrained(folder)
            halve(folder)
            forget_paths(folder)

    write("pocket-flux", training.flux)
    write("pocket-sdxl", training.sdxl)
    write("pocket-clip", training.preferences, clip_processor())
    write("pocket-tiny", copy.deepcopy(training.tiny).to(memory_format=torch.contiguous_format))


def halve(folder: Path) -> None:
    """Rewrite all weights below `folder` as float16; ``from_pretrained`` gives them back as float32."""
    for file in sorted(folder.rglob("*.safetensors")):
        weights = {key: value.half() if value.is_floating_point() else value for key, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})


def forget_paths(folder: Path) -> None:
    """Drop from all configurations below `folder` where their models were loaded from."""
    for file in sorted(folder.rglob("*config.json")):
        config = json.loads(file.read_text("utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
