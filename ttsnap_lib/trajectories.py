"""The trajectory folder ``p0000/id000/s00.png``, read in batches. Its manifest and `verify` have modules of their own."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._images import read_image
from ._layout import PromptState, file_name, image_name, prompt_name, scan_prompt
from ._manifest import MANIFEST, MAX_IMAGES, Manifest, extend
from ._verify import Finding, VerifyReport, verify
from .checks import choice, integer
from .errors import TrajectoryError

__all__ = [
    "MANIFEST",
    "MAX_IMAGES",
    "Batch",
    "Finding",
    "Manifest",
    "Trajectories",
    "VerifyReport",
    "extend",
    "read_batches",
    "verify",
]


@dataclass(frozen=True)
class Batch:
    """Images of one prompt, ready to be scored."""

    prompt: int
    text: str
    image: np.ndarray
    """Image indices, int64 (n,)."""
    step: np.ndarray
    """Steps, int64 (n,)."""
    pixels: np.ndarray
    """uint8 (n, height, width, 3)."""

    def pil(self) -> list[Any]:
        """Return the pictures as PIL images."""
        from PIL import Image

        return [Image.fromarray(pixels) for pixels in self.pixels]


class Trajectories:
    """A trajectory folder opened for reading.

    Parameters
    ----------
    folder : str or Path
        Holds ``manifest.json`` and ``p0000/id000/s00.png`` and so on.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)

    @property
    def prompts(self) -> list[str]:
        """The prompts; the position is the index."""
        return list(self.manifest.prompts)

    @property
    def n_steps(self) -> int:
        """Number of steps per image."""
        return self.manifest.n_steps

    @property
    def images_per_prompt(self) -> int:
        """Number of images per prompt, when the folder is whole."""
        return self.manifest.images_per_prompt

    def path(self, prompt: int, image: int, step: int) -> Path:
        """Return the file of one step of one image."""
        return self.folder / file_name(prompt, image, step, self.manifest.image_format)

    def state(self, prompt: int) -> PromptState:
        """Return which images of a prompt are whole, by file names alone."""
        return scan_prompt(self.folder / prompt_name(prompt), self.n_steps, self.manifest.image_format)

    def read(self, prompt: int, image: int, step: int) -> np.ndarray:
        """Return one picture as uint8 (height, width, 3); negative steps count from the end."""
        path = self.path(prompt, image, range(self.n_steps)[step])
        for folder in (path.parent, path.parent.parent):
            if folder.is_symlink():  # `generate` makes none: who made it could show any file as a picture of this set
                raise TrajectoryError(
                    f"{folder} is a symbolic link",
                    value=str(path),
                    bound="a folder of pictures",
                    remedy="Put the folder itself there; the whole trajectory folder may be behind a link.",
                )
        return read_image(path, self.manifest.size)

    def batches(
        self,
        steps: Iterable[int] | None = None,
        batch_size: int = 32,
        *,
        prompts: Iterable[int] | None = None,
        images: Iterable[int] | None = None,
        on_missing: str = "raise",
        workers: int = 4,
        prefetch: int = 4,
    ) -> Iterator[Batch]:
        """Read the pictures in batches, ahead of use.

        A batch never mixes prompts; within a prompt the order is image by image, step by step, so that the
        composition of the batches is the same in every run.

        Parameters
        ----------
        steps, prompts, images : iterable of int, optional
            Which ones, in this order; all of them when not given. Negative steps count from the end.
        batch_size : int
            Pictures per batch; the last of a prompt may be smaller.
        on_missing : {"raise", "skip"}
            What to do about an image that is not there.
        workers, prefetch : int
            Reading threads, and batches read ahead.

        Raises
        ------
        TrajectoryError
            When an image is missing, or a file is truncated, damaged or of another size; the file is named.
        """
        batch_size = integer("batch_size", batch_size, 1)
        workers, prefetch = integer("workers", workers, 1), integer("prefetch", prefetch, 1)
        choice("on_missing", on_missing, ("raise", "skip"))
        chosen_steps, chosen_prompts, chosen_images = (
            _indices(name, given, n)
            for name, given, n in (
                ("steps", steps, self.n_steps),
                ("prompts", prompts, len(self.manifest.prompts)),
                ("images", images, self.images_per_prompt),
            )
        )
        return self._batches(chosen_steps, chosen_prompts, chosen_images, batch_size, on_missing, workers, prefetch)

    def _batches(self, steps, prompts, images, batch_size, on_missing, workers, prefetch) -> Iterator[Batch]:
        def jobs() -> Iterator[tuple[int, list[tuple[int, int]]]]:
            for prompt in prompts:
                whole = self.state(prompt).whole
                missing = [image for image in images if image not in whole]
                if missing and on_missing == "raise":
                    raise TrajectoryError(
                        f"{self.folder / prompt_name(prompt) / image_name(missing[0])} is missing or incomplete",
                        value=f"{len(missing)} of {len(images)} images of prompt {prompt}",
                        bound="every image that is asked for, with all its steps in files and folders of its own",
                        remedy="Run the same `ttsnap generate` again: it goes on where it stopped.",
                    )
                wanted = [(image, step) for image in images if image in whole for step in steps]
                for start in range(0, len(wanted), batch_size):
                    yield prompt, wanted[start : start + batch_size]

        with ThreadPoolExecutor(workers, thread_name_prefix="ttsnap-read") as pool:
            ahead: deque = deque()
            todo = jobs()
            try:
                while True:
                    for prompt, wanted in itertools.islice(todo, prefetch + 1 - len(ahead)):
                        ahead.append((prompt, wanted, [pool.submit(self.read, prompt, *item) for item in wanted]))
                    if not ahead:
                        return
                    prompt, wanted, reads = ahead.popleft()
                    pixels = np.stack([read.result() for read in reads])
                    image, step = np.array(wanted, dtype=np.int64).T
                    yield Batch(prompt, self.manifest.prompts[prompt], image, step, pixels)
            finally:  # a consumer that stops early, or an error, must not wait for what was read ahead
                pool.shutdown(wait=False, cancel_futures=True)


def _indices(name: str, given: Iterable[int] | None, n: int) -> list[int]:
    if given is None:
        return list(range(n))
    found = [integer(name, value, -n if name == "steps" else 0, n - 1) for value in given]
    return [value % n for value in found]


def read_batches(
    folder: str | Path, steps: Iterable[int] | None = None, batch_size: int = 32, **options: Any
) -> Iterator[Batch]:
    """Return the batches of `folder`; see :meth:`Trajectories.batches`."""
    return Trajectories(folder).batches(steps, batch_size, **options)
