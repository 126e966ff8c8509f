"""A trajectory folder for reading: its pictures, whether it is whole, how different its images are."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ttsnap_lib.checks import integer
from ttsnap_lib.errors import TrajectoryError
from ttsnap_lib.files import prefetch
from ttsnap_lib.trajectories.layout import (
    MANIFEST,
    Manifest,
    PromptState,
    image_name,
    read_image,
    read_journals,
    scan_prompt,
)
from ttsnap_lib.trajectories.prompts import PromptList

if TYPE_CHECKING:
    import pandas as pd


class Trajectories:
    """A trajectory folder opened for reading: ``manifest.json`` and ``p0000/id000/s00.png`` and so on."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(folder)

    @property
    def prompts(self) -> PromptList:
        """The prompts, with their metadata; the position is the index."""
        return PromptList(self.manifest.prompts, [dict(entry) for entry in self.manifest.metadata] or None)

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
        return self.folder / self.manifest.file(prompt, image, step)

    def state(self, prompt: int) -> PromptState:
        """Return which images of a prompt are whole, by file names alone."""
        return scan_prompt(self.folder / self.manifest.prompt_folder(prompt), self.n_steps, self.manifest.image_format)

    def require_whole(self, prompt: int, images: Iterable[int]) -> None:
        """Raise a TrajectoryError that names the first file that one of `images` lacks."""
        state, images = self.state(prompt), list(images)
        missing = [image for image in images if image not in state.whole]
        if missing:
            gone = state.incomplete.get(missing[0], [0])[0]
            imported = self.manifest.identity.get("imported")
            remedy = "Fetch it again." if imported else "Run the same `ttsnap generate` again: it goes on."
            raise TrajectoryError(
                f"{self.path(prompt, missing[0], gone)} is missing: got {len(images) - len(missing)} of {len(images)} "
                f"images of prompt {prompt} with all steps. {remedy}"
            )

    def read(self, prompt: int, image: int, step: int) -> np.ndarray:
        """Return one picture as uint8 (height, width, 3); negative steps count from the end."""
        return read_image(self.path(prompt, image, range(self.n_steps)[step]), self.manifest.size)

    def pictures(
        self, prompt: int, images: Iterable[int] | None = None, steps: Iterable[int] | None = None, *, workers: int = 4
    ) -> np.ndarray:
        """Return pictures of a prompt, read by several threads: uint8 (image, step, height, width, 3).

        `images` and `steps` say which ones, in this order; all of them when not given. Negative steps count from the
        end. A TrajectoryError names the file that is missing or damaged.
        """
        n_prompts, n_images, n_steps = len(self.manifest.prompts), self.images_per_prompt, self.n_steps
        integer("prompt", prompt, 0, n_prompts - 1)
        rows = [integer("images", image, 0, n_images - 1) for image in (range(n_images) if images is None else images)]
        columns = [
            integer("steps", step, -n_steps, n_steps - 1) for step in (range(n_steps) if steps is None else steps)
        ]
        self.require_whole(prompt, rows)
        found = prefetch(lambda slot: self.read(prompt, *slot), itertools.product(rows, columns), workers=workers)
        return np.stack(list(found)).reshape(len(rows), len(columns), *self.manifest.size, 3)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong in a trajectory folder."""

    kind: str
    """``"missing"``, ``"damaged"``, ``"changed"``, ``"foreign"`` or ``"leftover"``."""
    path: str
    detail: str = ""
    prompt: int | None = None
    image: int | None = None
    step: int | None = None


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found."""

    folder: Path
    findings: tuple[Finding, ...]
    checked: int
    """Files that were read."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def repairs(self) -> dict[tuple[int, int], list[int]]:
        """Return the steps to make again for each (prompt, image)."""
        wanted: dict[tuple[int, int], list[int]] = {}
        for finding in self.findings:
            if finding.prompt is not None and finding.image is not None and finding.step is not None:
                wanted.setdefault((finding.prompt, finding.image), []).append(finding.step)
        return wanted

    def count(self, kind: str) -> int:
        """Return the number of findings of a kind."""
        return sum(finding.kind == kind for finding in self.findings)

    def __str__(self) -> str:
        kinds = ("missing", "damaged", "changed", "foreign", "leftover")
        counts = ", ".join(f"{self.count(kind)} {kind}" for kind in kinds if self.count(kind))
        return f"{self.folder}: {self.checked} files read, {counts or 'all whole'}"


def verify(folder: str | Path, *, workers: int = 4, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check every file of a trajectory folder against the manifest and the recorded checksums.

    Finds images and steps that are missing, files that are truncated, no image or of another size
    (``"damaged"``), files whose content is not what was written (``"changed"``), names that do not belong
    (``"foreign"``) and parts of images left by a process that was killed (``"leftover"``). Nothing is changed.
    `progress` is called with the number of prompts checked and their total.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    findings: list[Finding] = []
    n_prompts = len(manifest.prompts)
    names = {manifest.prompt_folder(prompt) for prompt in range(n_prompts)}
    for path in sorted(folder.iterdir()):
        if path.name not in names and path.name != MANIFEST and not path.name.startswith("."):
            findings.append(Finding("foreign", path.name, "not part of the layout"))
    checksums, checked = read_journals(folder), 0

    def check(item: tuple[int, int, int]) -> Finding | None:
        name = manifest.file(*item)
        path = folder / name
        try:
            content = path.read_bytes()
            if zlib.crc32(content) in checksums.get(item, ()):  # what was written: no need to decode it
                return None
            read_image(path, manifest.size, content)
        except (TrajectoryError, OSError) as error:
            return Finding("damaged", name, str(error), *item)
        if item in checksums:
            return Finding("changed", name, "not the file that was written", *item)
        return None

    with ThreadPoolExecutor(integer("workers", workers, 1), thread_name_prefix="ttsnap-verify") as pool:
        for prompt in range(n_prompts):
            place = folder / manifest.prompt_folder(prompt)
            state = scan_prompt(place, manifest.n_steps, manifest.image_format)
            items = []
            for image in range(manifest.images_per_prompt):
                gone = [] if image in state.whole else state.incomplete.get(image, list(range(manifest.n_steps)))
                for step in gone:
                    findings.append(Finding("missing", manifest.file(prompt, image, step), "", prompt, image, step))
                items += [(prompt, image, step) for step in range(manifest.n_steps) if step not in gone]
            extra = [image for image in {*state.whole, *state.incomplete} if image >= manifest.images_per_prompt]
            foreign = [*state.foreign, *(place / image_name(image) for image in sorted(extra))]
            for kind, paths in (("foreign", foreign), ("leftover", state.parts)):
                findings += [Finding(kind, str(path.relative_to(folder))) for path in paths]
            findings += [finding for finding in pool.map(check, items) if finding is not None]
            checked += len(items)
            if progress is not None:
                progress(prompt + 1, n_prompts)
    return VerifyReport(folder, tuple(findings), checked)


def pairwise_distances(images: np.ndarray) -> np.ndarray:
    """Return the distance of every pair of uint8 images (n, height, width, 3), in the order of `numpy.triu_indices`.

    It is the root mean square difference of the pixels, of which 0 is black and 1 white.
    """
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    pairs = zip(*np.triu_indices(len(images), k=1), strict=True)
    return np.array([np.sqrt(np.mean((flat[i] - flat[j]) ** 2)) for i, j in pairs])


def folder_diversity(
    folders: dict[str, str | Path],
    *,
    step: int = -1,
    prompts: Iterable[int] | None = None,
) -> pd.DataFrame:
    """Return the mean pairwise distance within each prompt, for each of several trajectory folders.

    `folders` is the name of a setting to its folder, `step` says which pictures (the final images by default), and the
    columns are ``setting``, ``prompt``, ``images``, ``distance``. At least two images per prompt are needed.
    """
    import pandas as pd

    chosen = None if prompts is None else list(prompts)
    rows = []
    for setting, folder in folders.items():
        found = Trajectories(folder)
        n = found.images_per_prompt
        if n < 2:
            raise TrajectoryError(f"{folder}: got {n} image per prompt, expected two or more. Generate more.")
        for prompt in range(len(found.prompts)) if chosen is None else chosen:
            distances = pairwise_distances(found.pictures(prompt, steps=[step])[:, 0])
            rows.append({"setting": setting, "prompt": prompt, "images": n, "distance": distances.mean()})
    return pd.DataFrame(rows)
