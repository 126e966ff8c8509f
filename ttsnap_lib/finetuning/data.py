"""What a run learns from: pictures and their targets, to train on and held out; all checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from ttsnap_lib.checks import as_bytes, integer
from ttsnap_lib.errors import CurriculumError, TrajectoryError
from ttsnap_lib.files import (
    as_path,
    atomic_folder,
    atomic_write,
    data_cache,
    digest,
    failures_as,
    read_json,
    write_json,
)
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.rewards.base import Reward
from ttsnap_lib.trajectories.layout import MANIFEST, holds_pictures
from ttsnap_lib.trajectories.read import Trajectories

_BANK, _PIXELS = "bank.json", "pixels.npy"
_GENERATED = re.compile(
    r"(?P<model>[\w./-]+):(?P<split>\w+):(?P<prompts>\d+)x(?P<images>\d+)(?:@(?P<seed>\d+))?(?P<mirror>\+mirror)?"
)


@dataclass(frozen=True)
class RunData:
    """Pictures to train on and their targets (prompt, image); the same of what is held out, if anything is."""

    train: Images
    targets: np.ndarray
    held: tuple[Images, np.ndarray] | None = None


def gather(
    images: str | Path | Images,
    validation: str | Path | Images | None,
    targets: Any,
    validation_targets: Any,
    reward: Reward,
    config: CurriculumConfig,
) -> RunData:
    """Open pictures and targets as :func:`ttsnap_lib.finetune` takes them.

    Without `validation` the last ``config.validation_prompts`` prompts are held out; the base `reward` gives the targets
    that are not named. A CurriculumError or TrajectoryError for pictures that lack a step and targets that do not fit.
    """
    train = open_images(images, steps=config.steps)
    held = open_images(validation, steps=config.steps) if validation is not None else None
    for pictures in (train, held):
        if pictures is not None:
            _check_steps(config, pictures)
    if held is None and validation_targets is not None:
        raise CurriculumError(
            "validation_targets without validation: held-out prompts have theirs. Name the validation pictures too."
        )
    n_held = config.validation_prompts
    if held is None and n_held and getattr(train, "mirrored", False):
        raise CurriculumError(
            f"validation_prompts: got {n_held}, expected 0 or validation pictures of their own: these would be the "
            "mirror images of pictures trained on. Name other pictures for validation."
        )
    cut = len(train.prompts) - n_held
    if held is None and cut < 1:
        raise CurriculumError(
            f"validation_prompts: got {n_held}, expected fewer than the {len(train.prompts)} prompts. Lower it."
        )
    goal = _targets(targets, train, reward, config)
    if held is not None:
        data = RunData(train, goal, (held, _targets(validation_targets, held, reward, config)))
    elif n_held:
        split_off = PromptSubset(train, cut, len(train.prompts))
        data = RunData(PromptSubset(train, 0, cut), goal[:cut], (split_off, goal[cut:]))
    else:
        return RunData(train, goal)
    if data.held is not None:
        _check_held(data.train, *data.held)
    return data


def _check_steps(config: CurriculumConfig, images: Images) -> None:
    if not images.prompts or images.n_images < 1:
        raise CurriculumError(
            f"pictures: got {len(images.prompts)} prompts x {images.n_images} images, expected some. Generate them first."
        )
    there = images.steps if isinstance(images, ImageBank) else range(images.n_steps)
    missing = [step for step in config.steps if step not in there]
    if missing:
        raise CurriculumError(
            f"step {missing[0]} has no images: got {missing!r}, expected steps of the trajectories, up to {there[-1]}. "
            "Leave these steps out of the curriculum, or generate trajectories that have them."
        )


def _check_held(train: Images, held: Images, targets: np.ndarray) -> None:
    if not np.ptp(targets, axis=1).any():
        raise CurriculumError(
            f"validation targets are the same for all images of every prompt ({held.n_images} each), expected several "
            "images to compare. Look at pictures and targets, or go without validation (validation_prompts 0)."
        )
    shared = set(train.prompts) & set(held.prompts)
    if shared:
        warnings.warn(
            f"{len(shared)} validation prompts are trained on too, {min(shared)!r} for one: what they gain is flattering",
            stacklevel=4,
        )


# Pictures


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


def open_images(
    source: str | Path | Images,
    *,
    steps: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Images:
    """Open pictures to train on.

    `source` is a trajectory folder; a saved :class:`ImageBank`; ``"pocket-flux:train:1000x8"`` for 8 pictures of each of
    the first 1000 captions of a pocket split, made by a pocket pipeline and kept in ``data_cache/pocket/training``
    (``@7`` behind it gives another seed, ``+mirror`` at the end adds the mirror images); or pictures that are open
    already. Of pictures to generate only `steps` and the clean image are made; ``progress(done, total)`` tells how far.
    """
    if isinstance(source, Images):
        return source
    found = named_pictures(source)
    if isinstance(found, Path):
        return ImageBank.load(found) if (found / _BANK).is_file() else FolderImages(found)
    bank = _pocket_bank(found, steps, progress)
    return with_mirror_images(bank) if found["mirror"] else bank


def named_pictures(source: str | Path) -> Path | re.Match[str]:
    """Return the folder that `source` names, or the parts of a name of pictures to generate; nothing is opened yet."""
    path = as_path("trajectories", source, error=CurriculumError)
    if (path / _BANK).is_file() or (path / MANIFEST).is_file() or holds_pictures(path):
        return path
    match = _GENERATED.fullmatch(str(source))
    if match is None:
        raise CurriculumError(
            f"trajectories: got {source}, expected a trajectory folder or pocket-flux:train:1000x8. Check the path."
        )
    return match


class ImageBank:
    """Pictures in memory (or in one mapped file): tiny ones fit, and nothing is decoded twice.

    `pixels` are uint8 (prompt, image, step, height, width, 3), the last step being the clean image; `steps` is the
    denoising step of each position (0, 1, 2, ... when not given), for a bank may leave steps out.
    """

    def __init__(self, pixels: np.ndarray, prompts: Sequence[str], steps: Sequence[int] | None = None) -> None:
        self.prompts = list(prompts)
        given = range(pixels.shape[2]) if steps is None and pixels.ndim == 6 else steps or ()
        self.steps = [integer("steps", step, 0) for step in given]
        shape_is_right = pixels.ndim == 6 and pixels.shape[0] == len(self.prompts) and pixels.shape[-1] == 3
        if pixels.dtype != np.uint8 or not shape_is_right or pixels.shape[2] != len(self.steps):
            raise TrajectoryError(
                f"pictures of a bank: got {pixels.dtype} {pixels.shape} for {len(self.prompts)} prompts and "
                f"{len(self.steps)} steps, expected uint8 (prompt, image, step, height, width, 3). Order the axes so."
            )
        self.pixels = pixels
        self._column = {step: k for k, step in enumerate(self.steps)}
        self.n_images, self.n_steps = pixels.shape[1], self.steps[-1] + 1
        self.mirrored = False  # whether prompts come with the mirror images of others, see with_mirror_images

    def read(self, prompts: np.ndarray, images: np.ndarray, step: int) -> np.ndarray:
        """Return uint8 (n, height, width, 3) of one step; -1 is the clean image."""
        step = self.n_steps + step if step < 0 else step
        if step not in self._column:
            raise TrajectoryError(f"step {step} has no images, expected one of {self.steps}. Generate this step.")
        return self.pixels[prompts, images, self._column[step]]

    def digest(self) -> str:
        """Return a digest of prompts, sizes and the clean pictures; which steps are at hand plays no part."""
        shape = self.pixels.shape
        found = hashlib.sha256(json.dumps([self.prompts, shape[1], shape[3:]]).encode())
        for row in self.pixels[:, :, -1]:
            found.update(row.tobytes())
        return found.hexdigest()[:16]

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
        with failures_as(TrajectoryError, f"bank cannot be read: got {folder}, expected {bound}. {again}"):
            pixels = np.load(Path(folder) / _PIXELS, mmap_mode="r", allow_pickle=False)
            return cls(pixels, about["prompts"], about["steps"])

    @classmethod
    def generated(
        cls,
        pipeline: Any,
        prompts: Sequence[str],
        n_images: int,
        *,
        steps: Sequence[int] | None = None,
        settings: Any = None,
        **options: Any,
    ) -> ImageBank:
        """Generate pictures into memory, with options of `ttsnap_lib.generate`: the given steps and the clean image."""
        from ttsnap_lib.diffusion.denoise import Denoiser
        from ttsnap_lib.trajectories.generate import generate

        found = Denoiser(pipeline, settings).settings
        kept = sorted({*(range(found.n_steps) if steps is None else steps), found.n_steps - 1})
        column = {step: k for k, step in enumerate(kept)}
        pixels = np.empty((len(prompts), n_images, len(kept), *found.size, 3), np.uint8)

        def keep(prompt: int, images: list[int], step: int, made: torch.Tensor) -> None:
            pixels[prompt, images, column[step]] = as_bytes(made).cpu().numpy()

        options = {"batch_size": 64, "cpu_threads": 1, **options}
        given = {"images_per_prompt": n_images, "steps": kept, "settings": settings}
        generate(pipeline, list(prompts), on_batch=keep, **given, **options)
        return cls(pixels, prompts, kept)


def _pocket_bank(match: re.Match[str], steps: Sequence[int] | None, progress: Any) -> ImageBank:
    from ttsnap_lib.diffusion.pipelines import load_pipeline
    from ttsnap_lib.pocket import pocket_folder
    from ttsnap_lib.pocket.world import pocket_prompts

    model, seed = match["model"], int(match["seed"] or 1)
    prompts = pocket_prompts(match["split"], int(match["prompts"]))
    weights = hashlib.sha256()
    for path in sorted(pocket_folder(model).rglob("*.safetensors")):
        weights.update(path.read_bytes())
    wanted = sorted(range(20) if steps is None else steps)
    key = digest([weights.hexdigest(), prompts, match["images"], seed], 10)
    name = f"{model}-{match['split']}-{match['prompts']}x{match['images']}-{key}"
    place = data_cache() / "pocket" / "training"
    folder = place / f"{name}-steps-{digest(wanted, 6)}"
    for found in [folder / _BANK, *sorted(place.glob(f"{name}-steps-*/{_BANK}"))]:  # a bank of more steps will do
        if found.is_file() and set(wanted) <= set((bank := ImageBank.load(found.parent)).steps):
            return bank
    options = {"steps": wanted, "seed": seed, "progress": progress}
    made = ImageBank.generated(load_pipeline(model), prompts, int(match["images"]), **options)
    return ImageBank.load(made.save(folder))


def with_mirror_images(bank: ImageBank) -> ImageBank:
    """Return the bank with the mirror images of all its pictures behind them, as prompts of their own.

    For captions of the pocket world alone: there, "left of" and "right of" are all that a mirror changes.
    """
    swap = {"left of": "right of", "right of": "left of"}
    told = [re.sub("left of|right of", lambda found: swap[found[0]], text) for text in bank.prompts]
    pixels = np.concatenate([bank.pixels, bank.pixels[:, :, :, :, ::-1]])
    mirrored = ImageBank(pixels, [*bank.prompts, *told], bank.steps)
    mirrored.mirrored = True
    return mirrored


class FolderImages:
    """A trajectory folder; pictures are decoded as they are asked for, by several threads."""

    def __init__(self, folder: str | Path, workers: int = 4) -> None:
        self._found = Trajectories(folder)
        self.prompts, self.n_steps = list(self._found.prompts), self._found.n_steps
        self.n_images, self.prompt_numbers = self._found.images_per_prompt, self._found.manifest.prompt_numbers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="ttsnap-train")
        for prompt in range(len(self.prompts)):
            self._found.require_whole(prompt, range(self.n_images))

    def read(self, prompts: np.ndarray, images: np.ndarray, step: int) -> np.ndarray:
        """Return uint8 (n, height, width, 3) of one step; -1 is the clean image."""
        jobs = [(int(prompt), int(image), step) for prompt, image in zip(prompts, images, strict=True)]
        return np.stack(list(self._pool.map(lambda job: self._found.read(*job), jobs)))

    def digest(self) -> str:
        """Return a digest of what decides the pictures."""
        return digest([dict(self._found.manifest.identity), self.prompts, self.n_images])


class PromptSubset:
    """Prompts `start` to `stop` of `images`, without copying."""

    def __init__(self, images: Images, start: int, stop: int) -> None:
        self._images, self._start = images, start
        self.prompts = list(images.prompts[start:stop])
        self.n_images, self.n_steps = images.n_images, images.n_steps
        self._digest = f"{images.digest()}[{start}:{stop}]"

    def read(self, prompts: np.ndarray, images: np.ndarray, step: int) -> np.ndarray:
        """Return uint8 (n, height, width, 3) of one step; -1 is the clean image."""
        return self._images.read(np.asarray(prompts) + self._start, images, step)

    def digest(self) -> str:
        """Return what tells these pictures from others."""
        return self._digest


# Scores


def model_pixels(reward: Reward, pictures: np.ndarray) -> torch.Tensor:
    """Return the reward's own preprocessing of uint8 (n, height, width, 3), float32 (n, 3, size, size) on the CPU.

    Pictures that have the model's size already take a path without Pillow; the pixels are the same to the bit.
    """
    preprocessing: Any = reward.preprocessing
    if pictures.shape[1:3] == (preprocessing.size, preprocessing.size) and preprocessing.resize_to is None:
        levels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
        # Whole levels need no rounding, so the path without it is exact here.
        return preprocessing.tensor(levels.to(torch.float32) / 255.0, differentiable=True).contiguous()
    return torch.stack([preprocessing.image(Image.fromarray(picture)) for picture in pictures])


def score_step(
    reward: Reward,
    images: Images,
    step: int,
    *,
    batch_size: int = 256,
    shard: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """Return the reward, as its weights are now, of all pictures at a step: float32 (prompt, image).

    With a shard (index, count) only every count-th prompt is scored; the others are zero.
    """
    out = np.zeros((len(images.prompts), images.n_images), np.float32)
    mine = np.arange(shard[0], len(images.prompts), shard[1])
    rows = np.stack(np.meshgrid(mine, np.arange(images.n_images), indexing="ij"), -1).reshape(-1, 2)
    for start in range(0, len(rows), batch_size):
        prompts, numbers = rows[start : start + batch_size].T
        out[prompts, numbers] = _scores(reward, images, prompts, numbers, step)
    return out


def _scores(reward: Reward, images: Images, prompts: np.ndarray, numbers: np.ndarray, step: int) -> np.ndarray:
    pixels = model_pixels(reward, images.read(prompts, numbers, step))
    return reward.score_pixels([images.prompts[prompt] for prompt in prompts], pixels).cpu().numpy()


# Targets


def _targets(given: Any, images: Images, reward: Reward, config: CurriculumConfig) -> np.ndarray:
    if given is None:
        return own_targets(reward, images)
    if isinstance(given, str | Path):
        return ground_truth_targets(given, images, reward if config.check_targets else None)
    try:
        targets = np.asarray(given, np.float32)
    except (TypeError, ValueError):  # no numbers, or rows of different lengths
        targets = np.empty(0, np.float32)
    if targets.shape != (len(images.prompts), images.n_images) or not np.isfinite(targets).all():
        raise CurriculumError(
            f"targets: got {targets.shape}, expected finite numbers ({len(images.prompts)}, {images.n_images}), one "
            "per image. Give those of these trajectories."
        )
    return targets


def own_targets(reward: Reward, images: Images) -> np.ndarray:
    """Return the base reward of every clean image, float32 (prompt, image); it is kept in ``data_cache/targets``."""
    key = hashlib.sha256(f"{reward.fingerprint()} {images.digest()}".encode()).hexdigest()[:20]
    path = data_cache() / "targets" / f"{key}.npy"
    if path.is_file():
        try:
            found = np.load(path, allow_pickle=False)
            if found.shape == (len(images.prompts), images.n_images) and found.dtype == np.float32:
                return found
        except (OSError, ValueError):
            pass  # a broken cache file is made again
    with reward.at(None):
        targets = score_step(reward, images, -1)
    reward.clear_cache()  # what is scored next must not differ in the last bits by whether this ran or the file was read
    bad = np.argwhere(~np.isfinite(targets))
    if len(bad):
        raise CurriculumError(
            f"base reward {reward.name} of prompt {bad[0][0]}, image {bad[0][1]}: got {targets[tuple(bad[0])]}, "
            "expected a finite number. Look at the image and the weights."
        )
    with atomic_write(path) as file:
        np.save(file, targets)
    return targets


def ground_truth_targets(path: str | Path, images: Images, reward: Reward | None = None) -> np.ndarray:
    """Return the targets in a ground-truth file ``p0000: {id000: value}``, float32 (prompt, image).

    The file holds the prompts and images of `images`, by their numbers, and may hold more; a base `reward` that is given
    agrees with it on a few of them (correlation above 0.8).
    """
    from ttsnap_lib.tensors.published import import_ground_truth

    found = import_ground_truth(path)
    shape = (len(images.prompts), images.n_images)
    named = list(getattr(images, "prompt_numbers", range(shape[0])))
    for dim, prefix, wanted in (("prompt", "p%04d", named), ("image", "id%03d", range(shape[1]))):
        if missing := sorted({*wanted} - {*found[dim].values.tolist()}):
            raise CurriculumError(
                f"targets {path} belong to another set: got {found.sizes[dim]} {dim}s without {prefix % missing[0]}, "
                f"expected all {len(wanted)} of the pictures. Leave them out: the base reward gives targets."
            )
    targets = found.sel(prompt=named, image=range(shape[1])).values.astype(np.float32)
    if reward is not None:
        flat = np.unique(np.linspace(0, targets.size - 1, min(32, targets.size)).round().astype(int))
        prompts, numbers = np.unravel_index(flat, shape)
        with reward.at(None):
            own, given = _scores(reward, images, prompts, numbers, -1), targets[prompts, numbers]
        comparable = len(own) > 2 and own.std() > 0 and given.std() > 0
        if comparable and (agreement := float(np.corrcoef(own, given)[0, 1])) < 0.8:
            raise CurriculumError(
                f"targets {path}: got a correlation of {agreement:.3f} with the base reward on {len(own)} images, "
                "expected above 0.8. Name the right file; for other targets on purpose set check_targets to false."
            )
    return targets
