"""The manifest of a trajectory folder: what decides its bytes, its prompts, and who wrote it."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ttsnap_lib.checks import MAX_IMAGES, MAX_PIXELS, MAX_STEPS, choice, integer
from ttsnap_lib.errors import PromptError, TrajectoryError
from ttsnap_lib.files import HIDDEN, as_path, read_json, write_json
from ttsnap_lib.trajectories.prompts import check_prompts

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
            raise TrajectoryError(f"image {path} is not a file: got {path}, expected a regular file, no link. {remedy}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Only the two formats in use: the others' parsers never see the file.
            with Image.open(path if content is None else io.BytesIO(content), formats=("PNG", "WEBP")) as image:
                width, height = image.size
                if size is not None and (height, width) != tuple(size):
                    raise TrajectoryError(
                        f"image {path} has another size: got {height} x {width}, expected {size[0]} x {size[1]} "
                        f"(height x width). {remedy}"
                    )
                if width * height > MAX_PIXELS:
                    raise TrajectoryError(
                        f"image {path} is too large: got {height} x {width}, expected at most {MAX_PIXELS} pixels. "
                        "Check where the file comes from."
                    )
                if image.mode != "RGB":
                    raise TrajectoryError(f"image {path} is not RGB: got {image.mode!r}, expected RGB. {remedy}")
                return np.array(image)
    except TrajectoryError:
        raise
    except FileNotFoundError as error:
        raise TrajectoryError(f"image {path} is missing: got {path}, expected an existing file. {remedy}") from error
    except UnidentifiedImageError as error:
        raise TrajectoryError(
            f"{path} is no PNG or WebP image: got {path}, expected a PNG or WebP file. {remedy}"
        ) from error
    except Exception as error:  # Pillow reports damage in many ways, depending on where the file ends
        raise TrajectoryError(
            f"image {path} is truncated or damaged: got {error}, expected a whole image file. {remedy}"
        ) from error


_PROMPT, _IMAGE = re.compile(r"p(\d{4,})"), re.compile(r"id(\d{3,})")


_PART = re.compile(r"\.id(\d{3,})\..+\.(?:part|old)")


def prompt_name(prompt: int) -> str:
    """Return the folder name of a prompt: four digits, more when needed."""
    return f"p{prompt:04d}"


def image_name(image: int) -> str:
    """Return the folder name of an image: three digits, more when needed."""
    return f"id{image:03d}"


def step_name(step: int, image_format: str) -> str:
    """Return the file name of a step: two digits, more when needed."""
    return f"s{step:02d}.{image_format}"


def file_name(prompt: int, image: int, step: int, image_format: str) -> str:
    """Return the path of one step of one image within the trajectory folder."""
    return f"{prompt_name(prompt)}/{image_name(image)}/{step_name(step, image_format)}"


def is_prompt_name(name: str) -> bool:
    """Tell whether `name` looks like a prompt's folder."""
    return _PROMPT.fullmatch(name) is not None


def _index(pattern: re.Pattern[str], name: str, canonical) -> int | None:
    match = pattern.fullmatch(name)
    if match is None or canonical(int(match[1])) != name:  # id0001 is not how this layout writes 1
        return None
    return int(match[1])


@dataclass
class PromptState:
    """What one prompt's folder holds, by names alone: no file is opened."""

    whole: set[int] = field(default_factory=set)
    incomplete: dict[int, list[int]] = field(default_factory=dict)
    """Images with missing steps, and which."""
    foreign: list[Path] = field(default_factory=list)
    parts: dict[Path, int] = field(default_factory=dict)
    """Leftovers of images that were being written when a process ended, and which image."""


def scan_prompt(folder: Path, n_steps: int, image_format: str) -> PromptState:
    """List one prompt's folder; hidden names other than our own leftovers are left to the operating system."""
    state = PromptState()
    expected = {step_name(step, image_format): step for step in range(n_steps)}
    if folder.is_symlink():  # what stands behind a link is not ours to fill or to read
        state.foreign.append(folder)
        return state
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return state
    except NotADirectoryError:
        state.foreign.append(folder)
        return state
    for entry in entries:
        if entry.name.startswith("."):
            if part := _PART.fullmatch(entry.name):
                state.parts[Path(entry.path)] = int(part[1])
            continue
        image = _index(_IMAGE, entry.name, image_name)
        if image is None or not entry.is_dir(follow_symlinks=False):
            state.foreign.append(Path(entry.path))
            continue
        found = set()
        for file in os.scandir(entry.path):
            if file.name in expected and file.is_file(follow_symlinks=False):
                found.add(expected[file.name])
            elif not file.name.startswith("."):
                state.foreign.append(Path(file.path))
        if len(found) == n_steps:
            state.whole.add(image)
        else:
            state.incomplete[image] = sorted(set(range(n_steps)) - found)
    state.foreign.sort()
    return state


class Journal:
    """Appends the checksums of written files, one line of JSON per image; a torn last line is harmless."""

    def __init__(self, folder: Path, name: str) -> None:
        path = folder / HIDDEN / "checksums" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115 (kept open; close() ends it)
        if self._file.tell():  # close the line that a killed process may have left open
            self._file.write(b"\n")

    def add(self, prompt: int, image: int, checksums: Mapping[int, int]) -> None:
        """Record the CRC-32 of each step's file."""
        line = json.dumps({"prompt": prompt, "image": image, "crc32": {str(k): v for k, v in checksums.items()}})
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journals(folder: Path, prompts: Iterable[int] | None = None) -> dict[tuple[int, int, int], set[int]]:
    """Return the recorded checksums of (prompt, image, step).

    A set, because an image may have been written by two runs, on machines that differ in the last bit.
    """
    wanted = None if prompts is None else set(prompts)
    known: dict[tuple[int, int, int], set[int]] = {}
    for path in sorted((folder / HIDDEN / "checksums").glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                prompt, image = entry["prompt"], entry["image"]
                sums = {int(step): int(value) for step, value in entry["crc32"].items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
            if wanted is None or prompt in wanted:
                for step, value in sums.items():
                    known.setdefault((prompt, image, step), set()).add(value)
    return known


def checksum(content: bytes) -> int:
    """Return the CRC-32 of a file's content."""
    return zlib.crc32(content)


MANIFEST = "manifest.json"


_SCHEMA = 1


_IDENTITY_BOUNDS = {"n_steps": MAX_STEPS, "height": None, "width": None, "seed": None}


_PROVENANCE_KEPT = 100


@dataclass(frozen=True)
class Manifest:
    """What a trajectory folder holds.

    Parameters
    ----------
    identity : mapping
        What decides the bytes: model, scheduler, sigmas, guidance, size, seed rule, NegToMe, batch, format.
        At least ``n_steps``, ``height``, ``width``, ``image_format`` and ``seed``.
    prompts : sequence of str
        The position is the prompt's index.
    images_per_prompt : int
    provenance : sequence of mappings
        Who wrote: versions, commit, host, device; one entry per distinct writer.
    """

    identity: Mapping[str, Any]
    prompts: tuple[str, ...]
    images_per_prompt: int
    provenance: tuple[Mapping[str, Any], ...] = ()

    @property
    def n_steps(self) -> int:
        """Number of denoising steps, and of files per image."""
        return int(self.identity["n_steps"])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image."""
        return self.identity["height"], self.identity["width"]

    @property
    def image_format(self) -> str:
        """``"png"`` or ``"webp"``."""
        return self.identity["image_format"]

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into `folder`, atomically."""
        write_json(
            folder / MANIFEST,
            {
                "schema": _SCHEMA,
                "identity": dict(self.identity),
                "prompts": list(self.prompts),
                "images_per_prompt": self.images_per_prompt,
                "provenance": [dict(entry) for entry in self.provenance],
            },
        )

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read ``manifest.json`` of `folder`.

        Raises
        ------
        TrajectoryError
            When there is none, or it is broken or of a newer schema.
        """
        path = as_path("trajectory folder", folder, error=TrajectoryError) / MANIFEST
        remedy = "Name a folder that `ttsnap generate` wrote."
        if not path.exists():
            raise TrajectoryError(f"no trajectory folder: got {folder}, expected a {MANIFEST} in it. {remedy}")
        content = read_json(path, "manifest", error=TrajectoryError, remedy=remedy)
        if content.get("schema") != _SCHEMA:
            raise TrajectoryError(
                f"{path} has another schema: got {content.get('schema')!r}, expected {_SCHEMA!s}. Update ttsnap."
            )
        for key, kind in (("identity", dict), ("prompts", list), ("provenance", list)):
            if not isinstance(content.get(key), kind):
                raise TrajectoryError(f"{path}: {key}: got {content.get(key)!r}, expected a {kind.__name__}. {remedy}")
        identity = content["identity"]
        for key, high in _IDENTITY_BOUNDS.items():
            integer(f"{path}: {key}", identity.get(key), 0 if key == "seed" else 1, high, error=TrajectoryError)
        integer(f"{path}: height x width", identity["height"] * identity["width"], 1, MAX_PIXELS, error=TrajectoryError)
        choice(f"{path}: image_format", identity.get("image_format"), IMAGE_FORMATS, error=TrajectoryError)
        batch = identity.get("batch", {"size": 1})
        sizes = list(batch.values()) if isinstance(batch, dict) and "size" in batch else [None]
        for size in sizes:
            integer(f"{path}: batch", size, 1, MAX_IMAGES, error=TrajectoryError)
        if not all(isinstance(entry, dict) for entry in content["provenance"]):
            raise TrajectoryError(
                f"{path}: provenance: got {content['provenance']!r}, expected a list of mappings. {remedy}"
            )
        try:
            prompts = check_prompts(content["prompts"], f"{path}: prompts")
        except PromptError as error:
            raise TrajectoryError(f"{error} {remedy}") from error
        images = integer(
            f"{path}: images_per_prompt", content.get("images_per_prompt"), 1, MAX_IMAGES, error=TrajectoryError
        )
        return cls(identity, tuple(prompts), images, tuple(content["provenance"]))

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """Return one line per setting in which `identity` differs from this one's.

        The model's name does not count when the digests of the weights are known and equal; an unknown digest
        (weights that are not in memory) is not compared.
        """
        old, new = _flat(self.identity), _flat(identity)
        skip = set()
        if old.get("weights") is None or new.get("weights") is None:
            skip = {"weights"}
        elif old["weights"] == new["weights"]:
            skip = {"model", "revision"}
        return [
            f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
            for key in sorted({*old, *new} - skip)
            if old.get(key) != new.get(key)
        ]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def extend(
    folder: str | Path,
    identity: Mapping[str, Any],
    prompts: Sequence[str],
    images_per_prompt: int,
    provenance: Mapping[str, Any] | None = None,
) -> Manifest:
    """Create the manifest of `folder`, or widen the one that is there to more prompts or images.

    Counts only ever grow: asking for fewer leaves the manifest as it is. Call it under a lock when several
    processes may start at once.

    Returns
    -------
    Manifest
        As it is now.

    Raises
    ------
    TrajectoryError
        When the folder holds images of other settings or other prompts; each difference is shown.
    """
    folder = Path(folder)
    identity = json.loads(json.dumps(identity, allow_nan=False))  # as it will be read back
    entry = dict(provenance or {})
    if (folder / MANIFEST).exists():
        old = Manifest.read(folder)
        different = old.differences(identity)
        if different:
            raise TrajectoryError(
                f"{folder} was made with other settings ({'; '.join(different)}): got {folder}, expected the settings "
                "of what is there already. Choose another output folder, or give the settings that it was made with."
            )
        both = min(len(old.prompts), len(prompts))
        changed = next((i for i in range(both) if old.prompts[i] != prompts[i]), None)
        if changed is not None:
            raise TrajectoryError(
                f"{folder} was made with other prompts: prompt {changed} differs: got {prompts[changed]!r}, expected "
                f"{old.prompts[changed]!r}. Choose another output folder. Prompts may be added at the end, not "
                "changed."
            )
        entries = old.provenance
        if entry and not any(_same_writer(entry, known) for known in entries):
            entries = (*entries, entry)[-_PROVENANCE_KEPT:]
        manifest = Manifest(
            old.identity,
            max(old.prompts, tuple(prompts), key=len),
            max(old.images_per_prompt, images_per_prompt),
            entries,
        )
        if manifest != old:
            manifest.write(folder)
        return manifest
    if folder.is_dir() and any(is_prompt_name(path.name) for path in folder.iterdir()):
        raise TrajectoryError(
            f"{folder} holds images but no {MANIFEST}: got {folder}, expected a folder of `ttsnap generate`, or an "
            "empty one. Choose another output folder; these images cannot be told apart from others."
        )
    manifest = Manifest(identity, tuple(prompts), images_per_prompt, (entry,) if entry else ())
    manifest.write(folder)
    return manifest


def _same_writer(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    keys = ({*one} | {*other}) - {"time"}
    return all(one.get(key) == other.get(key) for key in keys)
