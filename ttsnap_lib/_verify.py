"""Checks every file of a trajectory folder: what is missing, damaged, changed, foreign or left over."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ._images import read_image
from ._layout import checksum, file_name, image_name, prompt_name, read_journals, scan_prompt
from ._manifest import MANIFEST, Manifest
from .checks import integer
from .errors import TrajectoryError

__all__ = ["Finding", "VerifyReport", "verify"]


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

    Parameters
    ----------
    folder : str or Path
    progress : callable, optional
        Called with the number of prompts checked and their total.
    workers : int
        Reading threads.

    Returns
    -------
    VerifyReport
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    findings: list[Finding] = []
    n_prompts = len(manifest.prompts)
    names = {prompt_name(prompt) for prompt in range(n_prompts)}
    for path in sorted(folder.iterdir()):
        if path.name not in names and path.name != MANIFEST and not path.name.startswith("."):
            findings.append(Finding("foreign", path.name, "not part of the layout"))
    checksums, checked = read_journals(folder), 0

    def check(item: tuple[int, int, int]) -> Finding | None:
        name = file_name(*item, manifest.image_format)
        path = folder / name
        try:
            content = path.read_bytes()
            if checksum(content) in checksums.get(item, ()):  # what was written: no need to decode it
                return None
            read_image(path, manifest.size, content)
        except (TrajectoryError, OSError) as error:
            return Finding("damaged", name, str(error), *item)
        if item in checksums:
            return Finding("changed", name, "not the file that was written", *item)
        return None

    with ThreadPoolExecutor(integer("workers", workers, 1), thread_name_prefix="ttsnap-verify") as pool:
        for prompt in range(n_prompts):
            state = scan_prompt(folder / prompt_name(prompt), manifest.n_steps, manifest.image_format)
            items = []
            for image in range(manifest.images_per_prompt):
                gone = [] if image in state.whole else state.incomplete.get(image, list(range(manifest.n_steps)))
                for step in gone:
                    name = file_name(prompt, image, step, manifest.image_format)
                    findings.append(Finding("missing", name, "", prompt, image, step))
                items += [(prompt, image, step) for step in range(manifest.n_steps) if step not in gone]
            extra = [image for image in {*state.whole, *state.incomplete} if image >= manifest.images_per_prompt]
            foreign = [*state.foreign, *(folder / prompt_name(prompt) / image_name(image) for image in sorted(extra))]
            for kind, paths in (("foreign", foreign), ("leftover", state.parts)):
                findings += [Finding(kind, str(path.relative_to(folder))) for path in paths]
            findings += [finding for finding in pool.map(check, items) if finding is not None]
            checked += len(items)
            if progress is not None:
                progress(prompt + 1, n_prompts)
    return VerifyReport(folder, tuple(findings), checked)
