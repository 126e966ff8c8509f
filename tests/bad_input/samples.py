"""Good input, to be spoilt."""

from __future__ import annotations

import functools
import io
import json
import os
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from tests.worlds import save_clip
from ttsnap_lib.runs.parameters import declared_parameters
from ttsnap_lib.trajectories.layout import MANIFEST

IDENTITY = {"n_steps": 2, "height": 4, "width": 6, "image_format": "png", "seed": 0}
GOOD = {"schema": 1, "identity": IDENTITY, "prompts": ["a cat"], "images_per_prompt": 2, "provenance": []}


def saved(image: Image.Image, **options: Any) -> bytes:
    """Return an image's file."""
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes | None = None) -> bytes:
    """Return the bytes of a black PNG that claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = zlib.compress(bytes((width * 3 + 1) * height)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def trajectories(folder: Path) -> Path:
    """Fill a small trajectory folder by hand."""
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(GOOD))
    for image in range(2):
        place = folder / "p0000" / f"id{image:03d}"
        place.mkdir(parents=True)
        for step in range(2):
            (place / f"s{step:02d}.png").write_bytes(png(6, 4))
    return folder


def notebook(source: str, **changes: Any) -> dict[str, Any]:
    """Return a notebook whose parameters cell is `source`."""
    cell = {"cell_type": "code", "source": source, "metadata": {"tags": ["parameters"]}}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell], **changes}


DECLARED = declared_parameters(
    notebook(
        "count: int = 3\nratio: float = 0.5\nname: str = 'x'\nflag: bool = False\nsteps: list[int] = [2, 6]\n"
        "extra: dict[str, float] = {}\nlimit: float | None = None\nloose = None\n"
    )
)


@functools.cache
def clip_folder() -> Path:
    """Return the folder of a tiny CLIP reward, made once."""
    return save_clip(Path(tempfile.mkdtemp(prefix="bad-input-")) / "clip")


@functools.cache
def reward() -> Any:
    """Return that reward, loaded once."""
    from ttsnap_lib.rewards.loading import load_reward

    return load_reward(clip_folder(), name="tiny", device="cpu")


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder.parent / 'outside' / 'owned'}"

    def __reduce__(self):
        return os.system, (self.command,)
