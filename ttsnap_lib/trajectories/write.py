"""Writes the images of a trajectory folder from a pool of threads, each image whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np

from ttsnap_lib.errors import DiskError
from ttsnap_lib.files import atomic_write, typed_disk_errors
from ttsnap_lib.trajectories.layout import Journal, encode_image, image_name, prompt_name, step_name


class ImageWriter:
    """Encode and write pictures in the background; a full queue makes the caller wait.

    An image folder appears under its name only when all its steps are written. When writing fails (a DiskError when the
    disk is full or refuses), the error is raised by the next call, what is whole stays, and what is not leaves no trace.
    Each process that writes at the same time needs a `journal` of its own for the checksums.
    """

    def __init__(self, folder: Path, image_format: str, journal: str, workers: int = 4) -> None:
        self._folder, self._format = folder, image_format
        self._open: dict[tuple[int, int], _Image] = {}
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(4 * workers)  # bounds the memory of pictures that wait
        self._error: BaseException | None = None
        self.bytes_written = 0
        with typed_disk_errors(folder):
            self._journal = Journal(folder, journal)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="ttsnap-write")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(discard=kind is not None)

    def start(self, prompt: int, image: int, steps: Iterable[int]) -> None:
        """Announce an image and the steps that will come for it."""
        folder = self._folder / prompt_name(prompt) / image_name(image)
        with typed_disk_errors(folder):
            self._open[prompt, image] = _Image(folder, steps)

    def put(self, prompt: int, image: int, step: int, pixels: Callable[[], np.ndarray]) -> None:
        """Hand over a picture: `pixels`, called in a writing thread, returns uint8 (height, width, 3).

        Steps that were not announced are left out.
        """
        self._raise()
        entry = self._open.get((prompt, image))
        if entry is None or step not in entry.left:
            return
        self._room.acquire()
        self._pool.submit(self._write, entry, prompt, image, step, pixels)

    def close(self, *, discard: bool = False) -> None:
        """Wait for what is under way (drop it, when `discard`), tidy up, and raise the first error."""
        self._pool.shutdown(wait=True, cancel_futures=discard)
        for entry in self._open.values():
            if entry.part is not None:
                shutil.rmtree(entry.part, ignore_errors=True)
        self._open.clear()
        try:
            with typed_disk_errors(self._folder):
                self._journal.close()
        except DiskError as error:
            self._error = self._error or error
        if not discard:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self, entry: _Image, prompt: int, image: int, step: int, pixels: Callable[[], np.ndarray]) -> None:
        try:
            if self._error is None:
                self._write_file(entry, prompt, image, step, pixels)
        except BaseException as error:  # noqa: BLE001 - the next call raises it in the caller's thread
            with self._lock:
                self._error = self._error or error
        finally:
            self._room.release()

    def _write_file(self, entry: _Image, prompt: int, image: int, step: int, pixels: Callable[[], np.ndarray]) -> None:
        content = encode_image(pixels(), self._format)
        name = step_name(step, self._format)
        if entry.part is None:
            with atomic_write(entry.folder / name) as file:
                file.write(content)
        else:
            with typed_disk_errors(entry.folder), open(entry.part / name, "wb") as file:
                file.write(content)
        with self._lock, typed_disk_errors(entry.folder):
            entry.checksums[step] = zlib.crc32(content)
            self.bytes_written += len(content)
            entry.left.discard(step)
            if not entry.left:
                # The checksums first: an image that is there always has them.
                self._journal.add(prompt, image, entry.checksums)
                if entry.part is not None:
                    _publish(entry.part, entry.folder)
                del self._open[prompt, image]


class _Image:
    """An image on its way: where its files go until it is whole, and what is still to come."""

    def __init__(self, folder: Path, steps: Iterable[int]) -> None:
        self.folder = folder
        self.left = set(steps)
        self.checksums: dict[int, int] = {}
        # An image that is there already, with steps missing or damaged, is mended in place, file by file: whatever
        # else stands in its folder stays.
        self.part: Path | None = None
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
            os.chmod(self.part, 0o755)


def _publish(part: Path, folder: Path) -> None:
    try:
        os.rename(part, folder)
    except OSError:
        # Another process wrote the same image meanwhile: the same bytes, keep the ones that are there.
        if not folder.is_dir():
            raise
        shutil.rmtree(part, ignore_errors=True)


def remove_leftovers(parts: Iterable[Path]) -> None:
    """Remove what a killed process left of images it was writing."""
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
