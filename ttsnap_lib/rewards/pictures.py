"""The one opener of pictures that are scored or trained on: what a file or an image in memory shows, as upright RGB."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from ttsnap_lib.checks import MAX_PIXELS
from ttsnap_lib.errors import RewardError, TTSnapError
from ttsnap_lib.files import failures_as

FORMATS = ("PNG", "WEBP", "JPEG", "BMP", "TIFF", "GIF")  # the parsers of the others never see a file

_ORIENTATION = 0x0112  # of EXIF
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_CONVERTED = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


def open_picture(
    source: str | Path | IO[bytes],
    name: str,
    *,
    formats: Collection[str] = FORMATS,
    error: type[TTSnapError] = RewardError,
    remedy: str = "Save it as an 8-bit PNG.",
) -> Image.Image:
    """Return the picture in a file as 8-bit RGB, see :func:`as_rgb`; an `error` that says `remedy` when it is broken."""
    broken = f"image {name} is damaged, or no {' or '.join(formats)} file. {remedy}"
    with failures_as(error, broken), Image.open(source, formats=list(formats)) as file:
        return as_rgb(file, name, error)


def as_rgb(image: Image.Image, name: str, error: type[TTSnapError] = RewardError) -> Image.Image:
    """Return an image as 8-bit RGB, the way it is looked at.

    Turned upright by its EXIF orientation; 16-bit grey by its upper 8 bits, as Pillow reads 16-bit colours; what is
    transparent over white; palette and CMYK converted. An `error` for animations, and for floats and 32-bit integers,
    whose range is not known.
    """
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise error(
            f"image {name}: got {image.width} x {image.height} pixels, expected at least one pixel and at most "
            f"{MAX_PIXELS}. Check where the file comes from."
        )
    image.load()
    frames = _frames(image)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG with a preview behind the picture
        raise error(f"image {name}: got {frames} frames or pages, expected one picture. Save the one you mean as PNG.")
    if image.mode not in (*_SIXTEEN, *_CONVERTED):
        raise error(
            f"image {name}: got pixels of mode {image.mode}, whose range is not known, expected 8 bits a channel, or 16 "
            "bits of grey. Scale it to 0..255 and save it as an 8-bit PNG."
        )
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # Pillow has no way from La to RGBA
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image if image.mode == "RGB" else image.convert("RGB")


def _frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except ValueError:  # its file is closed: the frame that was loaded is all there is
        return 1
