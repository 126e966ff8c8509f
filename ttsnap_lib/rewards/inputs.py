"""Images and prompts in the forms a reward takes, checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ttsnap_lib.errors import RewardError

__all__ = ["Images", "as_list", "check_tensor", "open_image", "prompt_list"]

Images = Sequence[Image.Image | str | Path] | Image.Image | torch.Tensor


def as_list(images: Any) -> list:
    """Return images as a list; one image is a list of one."""
    if isinstance(images, Image.Image | str | Path):
        return [images]
    return list(images)


def open_image(image: Any) -> Image.Image:
    """Return a PIL image, opening a path.

    Raises
    ------
    RewardError
        No picture, or one that cannot be read.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        try:
            with Image.open(image) as file:
                file.load()
                return file
        except (OSError, SyntaxError, ValueError) as error:
            raise RewardError(
                "image cannot be read", value=str(image), bound="a whole image file", remedy="Generate it again."
            ) from error
    raise RewardError(
        "images",
        value=type(image).__name__,
        bound="PIL images, paths or a float tensor (n, 3, H, W)",
        remedy="Convert.",
    )


def check_tensor(images: torch.Tensor) -> torch.Tensor:
    """Return a batch of images (n, 3, H, W), or raise with its shape and type.

    Raises
    ------
    RewardError
        Another shape or type.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise RewardError(
            "image tensor",
            value=f"{images.dtype} {tuple(images.shape)}",
            bound="a float tensor (n, 3, height, width) in [0, 1]",
            remedy="Scale 8-bit images by 1/255 and put the channels second.",
        )
    return images


def prompt_list(prompts: str | Sequence[str], n: int) -> list[str]:
    """Return one prompt per image.

    Raises
    ------
    RewardError
        Another number of prompts, or a prompt that is no text.
    """
    if isinstance(prompts, str):
        return [prompts] * n
    rows = list(prompts)
    if any(not isinstance(prompt, str) for prompt in rows):
        raise RewardError("prompts", value=rows, bound="text", remedy="Pass strings.")
    if len(rows) == 1:
        return rows * n
    if len(rows) != n:
        raise RewardError(
            "prompts and images differ in number",
            value=f"{len(rows)} prompts, {n} images",
            bound="one prompt per image, or one for all",
            remedy="Pass a list of prompts as long as the images.",
        )
    return rows
