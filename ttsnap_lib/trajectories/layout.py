"""What stands in a trajectory folder: pictures, names, checksums, and the manifest that says what decides its bytes."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from ttsnap_lib.checks import MAX_IMAGES, MAX_PIXELS, MAX_STEPS, choice, integer
from ttsnap_lib.errors import TrajectoryError
from ttsnap_lib.files import HIDDEN, as_path, digest, failures_as, read_bytes, read_json, refuse_other, write_json
from ttsnap_lib.rewards.pictures import open_picture
from ttsnap_lib.trajectories.prompts import check_prompts

MANIFEST = "manifest.json"

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

_PROMPT, _IMAGE = re.compile(r"p(\d{4,})"), re.compile(r"id(\d{3,})")
_PART = re.compile(r"\.id(\d{3,})\..+\.(?:part|old)")
_SCHEMA = 1
_GIVEN = "prompt_embeds"  # in an identity: a digest of the embeddings of each prompt, where they were given
_PROVENANCE_KEPT = 100
_START = (
    "model", "weights", "lora", "seed", "guidance", "true_guidance", "height", "width", "max_sequence_length",
    "negative_prompt", "negtome", "prompt_embeds",
)  # fmt: skip


# Pictures


def encode_image(pixels: np.ndarray, image_format: str) -> bytes:
    """Return uint8 `pixels` (height, width, 3) as the bytes of a lossless image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **_OPTIONS[image_format])
    return buffer.getvalue()


def read_image(path: str | Path, size: tuple[int, int] | None = None, content: bytes | None = None) -> np.ndarray:
    """Return the pixels of an image file as uint8 (height, width, 3), opened as every picture that is scored.

    `size` is the height and width that it must have; `content` what the file holds, when it has been read already.
    """
    remedy = "Run `ttsnap verify --repair` on the trajectory folder."
    if content is None:
        content = read_bytes(path, "image", error=TrajectoryError, remedy=remedy)
    image = open_picture(io.BytesIO(content), str(path), formats=("PNG", "WEBP"), error=TrajectoryError, remedy=remedy)
    found = (image.height, image.width)
    if found != tuple(size or found):
        raise TrajectoryError(f"image {path}: got {found} (height, width), expected {size}. {remedy}")
    return np.array(image)


# Names


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


def prompt_folders(folder: Path) -> dict[int, Path]:
    """Return the folders of prompts by their number, ascending; names such as p007 are not ours."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := _PROMPT.fullmatch(path.name))}
    return {number: path for number, path in sorted(found.items()) if path.name == prompt_name(number)}


def holds_pictures(folder: Path) -> bool:
    """Return whether there are folders of prompts."""
    return folder.is_dir() and bool(prompt_folders(folder))


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
        match = _IMAGE.fullmatch(entry.name)
        # id0001 is not how this layout writes 1
        if match is None or image_name(int(match[1])) != entry.name or not entry.is_dir():
            state.foreign.append(Path(entry.path))
            continue
        image, found = int(match[1]), set()
        for file in os.scandir(entry.path):
            if file.name in expected and file.is_file():
                found.add(expected[file.name])
            elif not file.name.startswith("."):
                state.foreign.append(Path(file.path))
        if len(found) == n_steps:
            state.whole.add(image)
        else:
            state.incomplete[image] = sorted(set(range(n_steps)) - found)
    state.foreign.sort()
    return state


# Checksums


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


def read_journals(folder: Path) -> dict[tuple[int, int, int], set[int]]:
    """Return the recorded checksums of (prompt, image, step).

    A set, because an image may have been written by two runs, on machines that differ in the last bit.
    """
    known: dict[tuple[int, int, int], set[int]] = {}
    for path in sorted((folder / HIDDEN / "checksums").glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                prompt, image = entry["prompt"], entry["image"]
                for step, value in entry["crc32"].items():
                    known.setdefault((prompt, image, int(step)), set()).add(int(value))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
    return known


# The manifest


@dataclass(frozen=True)
class Manifest:
    """What a trajectory folder holds."""

    identity: Mapping[str, Any]
    """What decides the bytes: model, scheduler, sigmas, guidance, size, seed rule, NegToMe, batch, format."""
    prompts: tuple[str, ...]
    images_per_prompt: int
    provenance: tuple[Mapping[str, Any], ...] = ()
    """Who wrote: versions, commit, host, device; one entry per distinct writer."""
    metadata: tuple[Mapping[str, Any], ...] = ()
    """What the prompt file tells about each prompt beside its words; empty where there is nothing."""

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

    @property
    def prompt_numbers(self) -> Sequence[int]:
        """The number in the folder name of each prompt; other than its index in imported folders alone."""
        return self.identity.get("prompt_numbers") or range(len(self.prompts))

    def prompt_folder(self, prompt: int) -> str:
        """Return the folder name of the prompt at an index."""
        return prompt_name(self.prompt_numbers[prompt])

    def file(self, prompt: int, image: int, step: int) -> str:
        """Return the path within the folder of one step of one image of the prompt at an index."""
        return file_name(self.prompt_numbers[prompt], image, step, self.image_format)

    def refuse_imported(self, folder: str | Path) -> None:
        """Raise a TrajectoryError when other code made the pictures: they cannot be made again, nor added to."""
        if self.identity.get("imported"):
            raise TrajectoryError(
                f"{folder} was imported, so how its pictures were made is not known: got none of the settings, expected "
                "them to make more or repair some. Fetch missing pictures again, or generate into another folder."
            )

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into `folder`, atomically."""
        content = {
            "schema": _SCHEMA,
            "identity": dict(self.identity),
            "prompts": list(self.prompts),
            "images_per_prompt": self.images_per_prompt,
            "provenance": [dict(entry) for entry in self.provenance],
        }
        if any(self.metadata):
            content["metadata"] = [dict(entry) for entry in self.metadata]
        write_json(folder / MANIFEST, content)

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read ``manifest.json`` of `folder`; a TrajectoryError when there is none, or a broken one."""
        path = as_path("trajectory folder", folder, error=TrajectoryError) / MANIFEST
        remedy = "Name a folder that `ttsnap generate` wrote."
        if holds_pictures(path.parent):
            remedy = "Pictures of the released code get one by `ttsnap import-trajectories`."
        if not path.exists():
            raise TrajectoryError(f"no trajectory folder: got {folder}, expected a {MANIFEST} in it. {remedy}")
        content = read_json(path, "manifest", error=TrajectoryError, remedy=remedy)
        if content.get("schema") != _SCHEMA:
            raise TrajectoryError(f"{path}: got schema {content.get('schema')!r}, expected {_SCHEMA}. Update ttsnap.")
        with failures_as(TrajectoryError, f"manifest {path} is not as it was written. {remedy}"):
            identity = dict(content["identity"])
            integer("n_steps", identity["n_steps"], 1, MAX_STEPS)
            for key in ("height", "width"):
                integer(key, identity[key], 1)
            integer("height x width", identity["height"] * identity["width"], 1, MAX_PIXELS)
            if not identity.get("imported"):
                integer("seed", identity["seed"], 0)
            choice("image_format", identity["image_format"], IMAGE_FORMATS)
            batch = identity.get("batch", {"size": 1})
            for key in ("size", *batch):
                integer(f"batch {key}", batch[key], 1)
            prompts = tuple(check_prompts(content["prompts"]))
            for number in (numbers := identity.get("prompt_numbers", range(len(prompts)))):
                integer("prompt number", number, 0)
            integer("count of prompt numbers", len(numbers), len(prompts), len(prompts))
            metadata = tuple(dict(entry) for entry in content.get("metadata", ()))
            integer("count of metadata", len(metadata), len(prompts) if metadata else 0, len(prompts))
            return cls(
                identity,
                prompts,
                integer("images_per_prompt", content["images_per_prompt"], 1, MAX_IMAGES),
                tuple(dict(entry) for entry in content["provenance"]),
                metadata,
            )


def extend(
    folder: str | Path,
    identity: Mapping[str, Any],
    prompts: Sequence[str],
    images_per_prompt: int,
    provenance: Mapping[str, Any] | None = None,
) -> Manifest:
    """Create the manifest of `folder`, or widen the one that is there to more prompts or images.

    Counts only ever grow: asking for fewer leaves the manifest as it is. Metadata of a PromptList is kept; where a prompt
    comes with some, it takes the place of what was there. A TrajectoryError when the folder holds images
    of other settings or other prompts; each difference is shown. Call it under a lock when several processes may start
    at once.
    """
    folder = Path(folder)
    identity = json.loads(json.dumps(identity, allow_nan=False))  # as it will be read back
    entry = dict(provenance or {})
    metadata = tuple(getattr(prompts, "metadata", ()))
    metadata = metadata if any(metadata) else ()
    if not (folder / MANIFEST).exists():
        if holds_pictures(folder):
            raise TrajectoryError(
                f"{folder} holds images but no {MANIFEST}. Choose another output folder, or give it one by "
                "`ttsnap import-trajectories`."
            )
        manifest = Manifest(identity, tuple(prompts), images_per_prompt, (entry,) if entry else (), metadata)
        manifest.write(folder)
        return manifest
    old = Manifest.read(folder)
    old.refuse_imported(folder)
    remedy = "Choose another output folder, or give the settings that it was made with."
    refuse_other(folder, *comparable(old.identity, identity), TrajectoryError, remedy)
    for index, (there, here) in enumerate(zip(old.prompts, prompts, strict=False)):
        if there != here:
            raise TrajectoryError(
                f"{folder}: prompt {index} differs: got {here!r}, expected {there!r}. Choose another output folder; "
                "prompts may be added at the end, not changed."
            )
    entries = old.provenance
    if entry and not any({**known, "time": None} == {**entry, "time": None} for known in entries):
        entries = (*entries, entry)[-_PROVENANCE_KEPT:]
    texts = max(old.prompts, tuple(prompts), key=len)
    same = max(old.identity, identity, key=lambda one: len(one.get(_GIVEN, ())))  # but for more embeddings
    kept = {**old.identity, _GIVEN: same[_GIVEN]} if _GIVEN in same else old.identity
    told = [
        metadata[k] if k < len(metadata) and metadata[k] else old.metadata[k] if k < len(old.metadata) else {}
        for k in range(len(texts))
    ]
    beside = tuple(told) if any(told) else old.metadata
    manifest = Manifest(kept, texts, max(old.images_per_prompt, images_per_prompt), entries, beside)
    if manifest != old:
        manifest.write(folder)
    return manifest


_NAMES = ("model", "revision", "base", "lora_from")  # of weights, which a digest tells better


def comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two identities without what does not count between them.

    An unknown digest of the weights (they are not in memory) is not compared, nor how the VAE scales latents and the
    timesteps where an older folder does not tell; when both digests are known and equal, names do not count: a model
    may have moved.
    """
    digests = [old.get("weights"), new.get("weights")]
    skip = ["weights"] if None in digests else list(_NAMES) if digests[0] == digests[1] else []
    if _GIVEN in old and _GIVEN in new:  # a digest per prompt: there may be more prompts now
        n = min(len(old[_GIVEN]), len(new[_GIVEN]))
        old, new = ({**one, _GIVEN: one[_GIVEN][:n]} for one in (old, new))
    skip += [key for key in ("vae", "timesteps") if key not in old or key not in new]
    return {key: old[key] for key in old if key not in skip}, {key: new[key] for key in new if key not in skip}


def start_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an identity a draft of fewer steps has to share with the full run; long values as digests.

    Not the scheduler: its configuration gains keys with versions of diffusers.
    """
    told = {name: identity[name] for name in _START if identity.get(name) not in (None, {}, [])}
    return {name: value if isinstance(value, int | float | str) else digest(value) for name, value in told.items()}
