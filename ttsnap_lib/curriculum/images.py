"""Pictures to train on: a trajectory folder, or a bank of pictures in memory; both give uint8 arrays by index."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ttsnap_lib._reading import as_path, failures_as, read_json
from ttsnap_lib.checks import integer
from ttsnap_lib.errors import CurriculumError, TrajectoryError
from ttsnap_lib.paths import atomic_folder, data_cache, write_json
from ttsnap_lib.trajectories import MANIFEST, Trajectories

__all__ = ["FolderImages", "ImageBank", "Images", "named_pictures", "open_images"]

_BANK, _PIXELS = "bank.json", "pixels.npy"
_GENERATED = re.compile(
    r"(?P<model>[\w./-]+):(?P<split>\w+):(?P<prompts>\d+)x(?P<images>\d+)(?:@(?P<seed>\d+))?(?P<mirror>\+mirror)?"
)


@runtime_checkable
class Images(Protocol):
    """What training reads pictures from."""

    prompts: list[str]
    n_images: int
    n_steps: int

    def read(self, prompts: np.ndarray, images: np.ndarray, step: int) -> np.ndarray:
        """Return uint8 (n, height, width, 3) of one step; -1 is the clean image."""
        ...

    def digest(self) -> str:
        """Return what tells these pictures from others."""
        ...


class ImageBank:
    """Pictures in memory (or in one mapped file): tiny ones fit, and nothing is decoded twice.

    Parameters
    ----------
    pixels : uint8 (prompt, image, step, height, width, 3)
        The last step is the clean image.
    prompts : sequence of str
    steps : sequence of int, optional
        Denoising step of each position; 0, 1, 2, ... when not given. A bank may leave steps out.
    """

    def __init__(self, pixels: np.ndarray, prompts: Sequence[str], steps: Sequence[int] | None = None) -> None:
        self.prompts = list(prompts)
        given = range(pixels.shape[2]) if steps is None and pixels.ndim == 6 else steps or ()
        self.steps = [integer("steps", step, 0) for step in given]
        shape_is_right = pixels.ndim == 6 and pixels.shape[0] == len(self.prompts) and pixels.shape[-1] == 3
        if pixels.dtype != np.uint8 or not shape_is_right or pixels.shape[2] != len(self.steps):
            raise TrajectoryError(
                "pictures of a bank",
                value=f"{pixels.dtype} {pixels.shape} for {len(self.prompts)} prompts and {len(self.steps)} steps",
                bound="uint8 (prompt, image, step, height, width, 3)",
                remedy="Bring the axes into this order.",
            )
        self.pixels = pixels
        self._column = {step: k for k, step in enumerate(self.steps)}
        self.n_images, self.n_steps = pixels.shape[1], self.steps[-1] + 1
        self.mirrored = False  # whether prompts come with the mirror images of others, see with_mirror_images

    def read(self, prompts: np.ndarray, images: np.ndarray, step: int) -> np.ndarray:
        """Return uint8 (n, height, width, 3) of one step; -1 is the clean image."""
        step = self.n_steps + step if step < 0 else step
        if step not in self._column:
            raise TrajectoryError(
                f"step {step} has no images", value=step, bound=f"one of {self.steps}", remedy="Generate this step."
            )
        return self.pixels[prompts, images, self._column[step]]

    def digest(self) -> str:
        """Return a digest of prompts, sizes and the clean pictures; which steps are at hand plays no part."""
        shape = self.pixels.shape
        digest = hashlib.sha256(json.dumps([self.prompts, shape[1], shape[3:]]).encode())
        for row in self.pixels[:, :, -1]:
            digest.update(row.tobytes())
        return digest.hexdigest()[:16]

    def select(self, prompts: slice | Sequence[int]) -> ImageBank:
        """Return the bank of some of the prompts."""
        chosen = np.arange(len(self.prompts))[prompts]
        kept = self.pixels[prompts] if isinstance(prompts, slice) else self.pixels[chosen]
        return ImageBank(kept, [self.prompts[k] for k in chosen], self.steps)

    def save(self, folder: str | Path) -> Path:
        """Write the bank as a folder that :meth:`load` maps."""
        with atomic_folder(folder) as part:
            np.save(part / _PIXELS, self.pixels)
            write_json(part / _BANK, {"schema": 1, "prompts": self.prompts, "steps": self.steps})
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> ImageBank:
        """Open a saved bank; the pixels stay on disk until they are read."""
        again = "Make it again."
        about = read_json(Path(folder) / _BANK, "bank", error=TrajectoryError, remedy=again)
        bound = "a bank as ImageBank.save() writes it"
        with failures_as(TrajectoryError, "bank cannot be read", value=str(folder), bound=bound, remedy=again):
            pixels = np.load(Path(folder) / _PIXELS, mmap_mode="r", allow_pickle=False)
            return cls(pixels, about["prompts"], about["steps"])

    @classmethod
    def from_folder(cls, folder: str | Path, **options: Any) -> ImageBank:
        """Decode a whole trajectory folder into memory."""
        found = Trajectories(folder)
        shape = (len(found.prompts), found.images_per_prompt, found.n_steps, *found.manifest.size, 3)
        pixels = np.empty(shape, np.uint8)
        for batch in found.batches(batch_size=found.n_steps, **options):
            pixels[batch.prompt, batch.image, batch.step] = batch.pixels
        return cls(pixels, found.prompts)

    @classmethod
    def generated(
        cls,
        pipeline: Any,
        prompts: Sequence[str],
        n_images: int,
        *,
        steps: Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int = 64,
        cpu_threads: int | None = 1,
        settings: Any = None,
        negtome: Any = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ImageBank:
        """Generate the pictures into memory with :func:`ttsnap_lib.generate.generate`.

        The clean image is kept besides the given `steps`.
        """
        from ttsnap_lib.denoise import Denoiser
        from ttsnap_lib.generate import generate

        found = Denoiser(pipeline, settings).settings
        kept = sorted({*(range(found.n_steps) if steps is None else steps), found.n_steps - 1})
        column = {step: k for k, step in enumerate(kept)}
        pixels = np.empty((len(prompts), n_images, len(kept), *found.size, 3), np.uint8)

        def keep(prompt: int, images: list[int], step: int, tensor: Any) -> None:
            levels = (tensor.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
            pixels[prompt, images, column[step]] = levels.cpu().numpy()

        generate(
            pipeline,
            list(prompts),
            on_batch=keep,
            images_per_prompt=n_images,
            steps=kept,
            seed=seed,
            batch_size=batch_size,
            cpu_threads=cpu_threads,
            settings=settings,
            negtome=negtome,
            progress=progress,
        )
        return cls(pixels, prompts, kept)


class FolderImages:
    """A trajectory folder; pictures are decoded as they are asked for, by several threads."""

    def __init__(self, folder: str | Path, workers: int = 4) -> None:
        self._found = Trajectories(folder)
        self.prompts, self.n_steps = self._found.prompts, self._found.n_steps
        self.n_images = self._found.images_per_prompt
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="ttsnap-train")
        whole = [self._found.state(prompt).whole for prompt in range(len(self.prompts))]
        for prompt, images in enumerate(whole):
            missing = sorted(set(range(self.n_images)) - set(images))
            if missing:
                raise TrajectoryError(
                    f"{self._found.path(prompt, missing[0], 0).parent} is missing or incomplete",
                    value=f"{len(missing)} of {self.n_images} images of prompt {prompt}",
                    bound="every image, with all its steps",
                    remedy="Run the same `ttsnap generate` again: it goes on where it stopped.",
                )

    def read(self, prompts: np.ndarray, images: np.ndarray, step: int) -> np.ndarray:
        """Return uint8 (n, height, width, 3) of one step; -1 is the clean image."""
        jobs = [(int(prompt), int(image), step) for prompt, image in zip(prompts, images, strict=True)]
        return np.stack(list(self._pool.map(lambda job: self._found.read(*job), jobs)))

    def digest(self) -> str:
        """Return a digest of what decides the pictures."""
        content = [dict(self._found.manifest.identity), self.prompts, self.n_images]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def open_images(
    source: str | Path | Images,
    *,
    steps: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Images:
    """Open pictures to train on.

    Parameters
    ----------
    source : str, Path or Images
        A trajectory folder; a saved :class:`ImageBank`; ``"pocket-flux:train:1000x8"`` for 8 pictures of each of the
        first 1000 captions of a pocket split, made by a pocket pipeline and kept in ``data_cache/pocket/training``
        (``@7`` behind it gives another seed, ``+mirror`` at the end adds the mirror images); or pictures that are
        open already.
    steps : sequence of int, optional
        Steps that are needed; only these and the clean image are generated.
    progress : callable, optional
        ``progress(done, total)`` while pictures are generated.

    Returns
    -------
    Images

    Raises
    ------
    CurriculumError
        Nothing of these kinds.
    """
    if isinstance(source, Images):
        return source
    match = named_pictures(source)
    if isinstance(match, Path):
        return ImageBank.load(match) if (match / _BANK).is_file() else FolderImages(match)
    bank = _pocket_bank(match, steps, progress)
    if match["mirror"]:
        from .mirror import with_mirror_images

        return with_mirror_images(bank)
    return bank


def named_pictures(source: str | Path) -> Path | re.Match[str]:
    """Return the folder that `source` names, or the parts of a name of pictures to generate; nothing is opened yet.

    Raises
    ------
    CurriculumError
        Nothing of these kinds.
    """
    path = as_path("trajectories", source, error=CurriculumError)
    if (path / _BANK).is_file() or (path / MANIFEST).is_file():
        return path
    match = _GENERATED.fullmatch(str(source))
    if match is None:
        raise CurriculumError(
            "trajectories",
            value=str(source),
            bound="a trajectory folder, a saved bank, or pocket-flux:train:1000x8",
            remedy="Run `ttsnap generate` first, or check the path.",
        )
    return match


def _pocket_bank(match: re.Match[str], steps: Sequence[int] | None, progress: Any) -> ImageBank:
    from ttsnap_lib.pipelines import load_pipeline
    from ttsnap_lib.pocket import pocket_folder, pocket_prompts

    model, seed = match["model"], int(match["seed"] or 1)
    prompts = pocket_prompts(match["split"], int(match["prompts"]))
    weights = hashlib.sha256()
    for path in sorted(pocket_folder(model).rglob("*.safetensors")):
        weights.update(path.read_bytes())
    wanted = sorted(range(20) if steps is None else steps)
    key = hashlib.sha256(json.dumps([weights.hexdigest(), prompts, match["images"], seed]).encode()).hexdigest()[:10]
    name = f"{model}-{match['split']}-{match['prompts']}x{match['images']}-{key}"
    place = data_cache() / "pocket" / "training"
    folder = place / f"{name}-steps-{hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:6]}"
    for found in [folder / _BANK, *sorted(place.glob(f"{name}-steps-*/{_BANK}"))]:  # a bank of more steps will do
        if found.is_file() and set(wanted) <= set((bank := ImageBank.load(found.parent)).steps):
            return bank
    bank = ImageBank.generated(
        load_pipeline(model), prompts, int(match["images"]), steps=wanted, seed=seed, progress=progress
    )
    bank.save(folder)
    return ImageBank.load(folder)
