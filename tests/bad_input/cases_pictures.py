"""Trajectory folders: their manifests and their pictures."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from tests.bad_input.drill import Cases
from ttsnap_lib.trajectories.layout import MANIFEST, Manifest, read_image
from ttsnap_lib.trajectories.read import Trajectories, verify

CASES = Cases()

# -- manifests ---------------------------------------------------------------------------------------------------------

IDENTITY = {"n_steps": 2, "height": 4, "width": 6, "image_format": "png", "seed": 0}
GOOD = {"schema": 1, "identity": IDENTITY, "prompts": ["a cat"], "images_per_prompt": 2, "provenance": []}


def manifest(folder: Path, **changes: Any) -> Manifest:
    """Read a manifest with changes, of its identity where they belong there; "gone" takes a key out."""
    content = {**GOOD, "identity": dict(IDENTITY)}
    for key, value in changes.items():
        part = content["identity"] if key in (*IDENTITY, "batch") and isinstance(content["identity"], dict) else content
        part[key] = value
        if value == "gone":
            del part[key]
    (folder / MANIFEST).write_text(json.dumps(content))
    return Manifest.read(folder)


for what, changes, names in [
    ("another schema", {"schema": 2}, "schema"),
    ("no schema", {"schema": "gone"}, "schema"),
    ("no identity", {"identity": "gone"}, "identity"),
    ("identity a list", {"identity": list(IDENTITY)}, "not as it was written"),
    ("prompts one text", {"prompts": "a cat"}, "prompts"),
    ("prompts of numbers", {"prompts": [5]}, "prompt 0"),
    ("prompts blank", {"prompts": [" "]}, "prompt 0"),
    ("no prompts", {"prompts": []}, "prompt"),
    ("no images", {"images_per_prompt": 0}, "images_per_prompt"),
    ("a billion images", {"images_per_prompt": 10**9}, "1000000"),
    ("images as text", {"images_per_prompt": "2"}, "images_per_prompt"),
    ("a billion steps", {"n_steps": 10**9}, "n_steps"),
    ("steps negative", {"n_steps": -2}, "n_steps"),
    ("steps as text", {"n_steps": "2"}, "n_steps"),
    ("no steps", {"n_steps": "gone"}, "n_steps"),
    ("a picture of 10^12 pixels", {"height": 10**6, "width": 10**6}, "height x width"),
    ("no height", {"height": "gone"}, "height"),
    ("width negative", {"width": -6}, "width"),
    ("format that climbs", {"image_format": "/../../../outside/secret.txt"}, "image_format"),
    ("format not in use", {"image_format": "bmp"}, "image_format"),
    ("format a list", {"image_format": ["png"]}, "image_format"),
    ("seed as text", {"seed": "0"}, "seed"),
    ("batch a number", {"batch": 8}, "not as it was written"),
    ("batch of none", {"batch": {"size": 0}}, "batch"),
    ("provenance of texts", {"provenance": ["me"]}, "not as it was written"),
]:
    CASES.add("manifest", what, lambda folder, changes=changes: manifest(folder, **changes), names)

# -- pictures and trajectory folders -----------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int, height: int, data: bytes | None = None, extra: bytes = b"", depth: int = 8, color: int = 2
) -> bytes:
    """Return the bytes of a PNG that claims a size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = zlib.compress(bytes((width * 3 + 1) * height)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def saved(image: Image.Image, **options: Any) -> bytes:
    """Return an image's file."""
    import io

    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


SVG = '<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
PICTURES = [
    ("no bytes", b"", "no PNG"),
    ("text", "hello", "no PNG"),
    ("a bomb of 60000 x 60000", png(60_000, 60_000, zlib.compress(bytes(10_000_000))), "damaged"),
    ("a bomb in a text chunk", png(6, 4, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))), "damaged"),
    ("half of it", png(6, 4)[:40], "damaged|no PNG"),
    ("no picture data", png(6, 4, b""), "damaged"),
    ("another size", png(6, 5), r"\(5, 6\)"),
    ("size zero", png(0, 0, b""), "no PNG"),
    ("gray", saved(Image.new("L", (6, 4)), format="PNG"), "RGB"),
    ("a palette", saved(Image.new("P", (6, 4)), format="PNG"), "RGB"),
    ("with transparency", saved(Image.new("RGBA", (6, 4)), format="PNG"), "RGB"),
    ("a JPEG by the name of PNG", saved(Image.new("RGB", (6, 4)), format="JPEG"), "no PNG"),
    ("a TIFF by the name of PNG", saved(Image.new("RGB", (6, 4)), format="TIFF"), "no PNG"),
    ("a vector graphic", SVG, "no PNG"),
    ("PostScript", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n", "no PNG"),
    ("WebP header alone", b"RIFF\x10\x00\x00\x00WEBPVP8L", "damaged"),
]
CASES.files("picture", "s00.png", lambda path: read_image(path, (4, 6)), PICTURES)
CASES.files(
    "picture",
    "big.png",
    read_image,
    [("a bomb, where no size is known", png(60_000, 60_000, zlib.compress(bytes(10_000_000))), "large|damaged")],
)


def trajectories(folder: Path) -> Path:
    """Fill a small trajectory folder by hand."""
    folder.mkdir(exist_ok=True)
    manifest(folder)
    for image in range(2):
        (folder / "p0000" / f"id{image:03d}").mkdir(parents=True)
        for step in range(2):
            (folder / "p0000" / f"id{image:03d}" / f"s{step:02d}.png").write_bytes(png(6, 4))
    return folder


CASES.add("trajectory folder", "no folder", lambda folder: Trajectories(folder / "none"), "no trajectory folder")
CASES.add(
    "trajectory folder", "a step out of range", lambda f: Trajectories(trajectories(f)).pictures(0, steps=[2]), "steps"
)
CASES.add("trajectory folder", "a prompt out of range", lambda f: Trajectories(trajectories(f)).pictures(1), "prom")


def broken_journal(folder: Path) -> bool:
    journal = trajectories(folder) / ".ttsnap" / "checksums" / "x.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_bytes(
        b'{"prompt": 0}\n[1]\n\xff\xfe\n{"prompt": [], "image": {}, "crc32": {"a": 1}}\n' + b"[" * 100_000
    )
    return verify(folder).ok


CASES.add(
    "trajectory folder",
    "a journal of checksums that is garbage",
    broken_journal,
    skip="lines that are no checksums are passed over; pictures are decoded instead",
)
