"""The layout of a trajectory folder: names, what a prompt's folder holds, and the journal of checksums."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

__all__ = [
    "HIDDEN",
    "Journal",
    "PromptState",
    "checksum",
    "file_name",
    "image_name",
    "is_prompt_name",
    "prompt_name",
    "read_journals",
    "scan_prompt",
    "step_name",
]

HIDDEN = ".ttsnap"
"""Folder for locks and checksums inside a trajectory folder."""
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
