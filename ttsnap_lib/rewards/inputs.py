"""Images and prompts in the forms a reward takes, checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ttsnap_lib._images import MAX_PIXELS
from ttsnap_lib._reading import failures_as
from ttsnap_lib.errors import RewardError

__all__ = ["Images", "as_list", "check_tensor", "open_image", "prompt_list"]

_FORMATS = ("PNG", "WEBP", "JPEG", "BMP", "TIFF", "GIF")  # the parsers of the others never see a file
_SLACK = 0.01  # decoders overshoot a little

Images = Sequence[Image.Image | str | Path] | Image.Image | torch.Tensor


def as_list(images: Any) -> list:
    """Return images as a list; one image is a list of one.

    Raises
    ------
    RewardError
        Something that is no picture and no list of them.
    """
    if isinstance(images, Image.Image | str | Path):
        return [images]
    if not hasattr(images, "__iter__"):
        raise RewardError(
            "images", value=type(images).__name__, bound="images or a list of them", remedy="Pass PIL images or paths."
        )
    return list(images)


def open_image(image: Any) -> Image.Image:
    """Return a PIL image, opening a path.

    Raises
    ------
    RewardError
        No picture, or one that cannot be read.
    """
    if isinstance(image, Image.Image):
        _check_pixels(image, "given in memory")
        return image
    if isinstance(image, str | Path):
        remedy = "Generate it again, or save it as PNG."
        bound = f"a whole image file, one of {', '.join(_FORMATS)}"
        with failures_as(RewardError, "image cannot be read", value=str(image), bound=bound, remedy=remedy):
            if not Path(image).is_file():
                raise RewardError("image", value=str(image), bound="an existing image file", remedy=remedy)
            with Image.open(image, formats=_FORMATS) as file:
                _check_pixels(file, str(image))
                file.load()
                return file
    raise RewardError(
        "images",
        value=type(image).__name__,
        bound="PIL images, paths or a float tensor (n, 3, H, W)",
        remedy="Convert arrays with PIL.Image.fromarray.",
    )


def _check_pixels(image: Image.Image, name: str) -> None:
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise RewardError(
            f"image {name}",
            value=f"{image.width} x {image.height} pixels",
            bound=f"at least one pixel and at most {MAX_PIXELS}",
            remedy="Check where the file comes from.",
        )


def check_tensor(images: torch.Tensor) -> torch.Tensor:
    """Return a batch of images (n, 3, H, W), or raise with its shape and type, or with values out of [0, 1].

    Raises
    ------
    RewardError
        Another shape or type, or values outside [0, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape[2:]:
        raise RewardError(
            "image tensor",
            value=f"{images.dtype} {tuple(images.shape)}",
            bound="a float tensor (n, 3, height, width) in [0, 1]",
            remedy="Scale 8-bit images by 1/255 and put the channels second.",
        )
    if len(images):
        low, high = (float(value) for value in torch.aminmax(images.detach()))
        if not (low >= -_SLACK and high <= 1 + _SLACK):  # NaN fails too
            raise RewardError(
                "values of the image tensor",
                value=(low, high),
                bound="all in [0, 1]",
                remedy="Scale 8-bit images by 1/255, and [-1, 1] by x / 2 + 0.5.",
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
    if not isinstance(prompts, Sequence) and not hasattr(prompts, "__iter__"):
        raise RewardError("prompts", value=prompts, bound="text, or a list of texts", remedy="Pass strings.")
    rows = list(prompts)
    if any(not isinstance(prompt, str) for prompt in rows):
        raise RewardError("prompts", value=rows, bound="text, or a list of texts", remedy="Pass strings.")
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
