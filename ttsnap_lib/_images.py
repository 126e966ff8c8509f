"""Encoding and safe opening of one lossless image file."""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ._reading import as_path
from .errors import TrajectoryError

__all__ = ["IMAGE_FORMATS", "MAX_PIXELS", "RAW_SHARE", "encode_image", "read_image"]

# Speed over size: on a 512 px photograph PNG level 1 takes 29 ms and 55% of the raw bytes, level 6 takes 108 ms and
# 52%; lossless WebP takes 18 ms and 39%, at its slowest 412 ms and 33%. Both encoders release the interpreter lock.
_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1},
    "webp": {"format": "WEBP", "lossless": True, "quality": 20, "method": 0},
}
IMAGE_FORMATS = tuple(_OPTIONS)
"""Lossless formats that trajectories are written in."""
RAW_SHARE = {"png": 0.56, "webp": 0.39}
"""Encoded bytes over raw bytes, measured on a 512 x 512 photograph with the settings above."""
MAX_PIXELS = 2**26
"""Images above this are not opened: a small file can claim a huge picture."""


def encode_image(pixels: np.ndarray, image_format: str) -> bytes:
    """Return uint8 `pixels` (height, width, 3) as the bytes of a lossless image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **_OPTIONS[image_format])
    return buffer.getvalue()


def read_image(path: str | Path, size: tuple[int, int] | None = None, content: bytes | None = None) -> np.ndarray:
    """Return the pixels of an image file as uint8 (height, width, 3).

    Parameters
    ----------
    path : str or Path
        A PNG or WebP file; names the image in errors.
    size : (int, int), optional
        Height and width that the image must have.
    content : bytes, optional
        What the file holds, when it has been read already.

    Raises
    ------
    TrajectoryError
        A file that is missing, truncated, no image, too large, of another size or not RGB.
    """
    remedy = "Run `ttsnap verify --repair` on the trajectory folder."
    path = as_path("image", path, error=TrajectoryError)
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):  # a link may lead anywhere, and a pipe never ends
            raise TrajectoryError(
                f"image {path} is not a file", value=str(path), bound="a regular file, no link", remedy=remedy
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Only the two formats in use: the others' parsers never see the file.
            with Image.open(path if content is None else io.BytesIO(content), formats=("PNG", "WEBP")) as image:
                width, height = image.size
                if size is not None and (height, width) != tuple(size):
                    raise TrajectoryError(
                        f"image {path} has another size",
                        value=f"{height} x {width}",
                        bound=f"{size[0]} x {size[1]} (height x width)",
                        remedy=remedy,
                    )
                if width * height > MAX_PIXELS:
                    raise TrajectoryError(
                        f"image {path} is too large",
                        value=f"{height} x {width}",
                        bound=f"at most {MAX_PIXELS} pixels",
                        remedy="Check where the file comes from.",
                    )
                if image.mode != "RGB":
                    raise TrajectoryError(f"image {path} is not RGB", value=image.mode, bound="RGB", remedy=remedy)
                return np.array(image)
    except TrajectoryError:
        raise
    except FileNotFoundError as error:
        raise TrajectoryError(
            f"image {path} is missing", value=str(path), bound="an existing file", remedy=remedy
        ) from error
    except UnidentifiedImageError as error:
        raise TrajectoryError(
            f"{path} is no PNG or WebP image", value=str(path), bound="a PNG or WebP file", remedy=remedy
        ) from error
    except Exception as error:  # Pillow reports damage in many ways, depending on where the file ends
        raise TrajectoryError(
            f"image {path} is truncated or damaged", value=str(error), bound="a whole image file", remedy=remedy
        ) from error
