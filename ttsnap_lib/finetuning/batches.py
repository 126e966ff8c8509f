"""Which pictures every update sees, a pure function of the seed; the losses; pictures read ahead by a thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from ttsnap_lib.errors import CurriculumError
from ttsnap_lib.files import prefetch
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.finetuning.data import Images, model_pixels
from ttsnap_lib.rewards.base import Reward


def target_scale(targets: torch.Tensor, standardize: bool) -> tuple[float, float]:
    """Return center and spread of a whole batch's targets (0 and 1 without `standardize`), the same for every part."""
    if not standardize or len(targets) < 2:
        return 0.0, 1.0
    spread = float(targets.double().std())
    return float(targets.double().mean()), spread if spread > 1e-12 else 1.0


def batch_loss(
    scores: torch.Tensor, targets: torch.Tensor, config: CurriculumConfig, whole: int, scale: tuple[float, float]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return what some whole groups add to the loss of a batch of `whole` pictures, and the summands by name.

    Every loss is a mean over pictures: a group of k pictures weighs k, whatever else the batch holds.
    """
    center, spread = scale
    rows = ((scores.float() - center) / spread).view(-1, config.group_size)
    wanted = ((targets.float() - center) / spread).view(-1, config.group_size)
    total, told = rows.new_zeros(()), {}
    for name, function in _LOSSES.items():
        weight = getattr(config, name)
        if weight:
            value = function(rows, wanted, config.preference_tau) / whole
            total = total + weight * value
            told[name] = float(value.detach())
    return total, told


def _mse(scores: torch.Tensor, targets: torch.Tensor, tau: float) -> torch.Tensor:
    return (scores - targets).square().sum()


def _centered_mse(scores: torch.Tensor, targets: torch.Tensor, tau: float) -> torch.Tensor:
    """Leave out the prompt's level: pruning compares images of one prompt only. n - 1 of n degrees are left."""
    scores = scores - scores.mean(1, keepdim=True)
    targets = targets - targets.mean(1, keepdim=True)
    size = scores.shape[1]
    return (scores - targets).square().sum() * (size / (size - 1))


def _preference(scores: torch.Tensor, targets: torch.Tensor, tau: float) -> torch.Tensor:
    """Bradley-Terry: the target's probability that one image is the better of two, against the prediction's."""
    size = scores.shape[1]
    first, second = torch.triu_indices(size, size, 1, device=scores.device)
    predicted = (scores[:, first] - scores[:, second]) / tau
    better = torch.sigmoid((targets[:, first] - targets[:, second]) / tau)
    pairs = functional.binary_cross_entropy_with_logits(predicted, better, reduction="none")
    return pairs.mean(1).sum() * size


def _listwise(scores: torch.Tensor, targets: torch.Tensor, tau: float) -> torch.Tensor:
    """ListNet: cross-entropy of the two softmax distributions over the images of a prompt. Ours, not the paper's."""
    wanted = torch.softmax(targets / tau, 1)
    return -(wanted * torch.log_softmax(scores / tau, 1)).sum() * scores.shape[1]


_LOSSES = {"mse": _mse, "centered_mse": _centered_mse, "preference": _preference, "listwise": _listwise}


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum: the steps it trains on (one, unless everything is mixed)."""

    position: int
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        """How the stage is called in messages."""
        return f"step {self.steps[0]}" if len(self.steps) == 1 else f"steps {self.steps[0]} to {self.steps[-1]}"


class Plan:
    """Groups of pictures for every update, the same for every number of processes."""

    def __init__(self, config: CurriculumConfig, n_prompts: int, n_images: int) -> None:
        if n_images < config.group_size:
            raise CurriculumError(
                f"group_size: got {config.group_size}, expected at most the {n_images} images per prompt. Lower it."
            )
        self.config, self.n_prompts, self.n_images = config, n_prompts, n_images
        self.groups = n_prompts * (n_images // config.group_size)
        self.groups_per_batch = config.batch_size // config.group_size
        self.batches = -(-self.groups // self.groups_per_batch)

    def stages(self) -> list[Stage]:
        """Return the stages in training order."""
        if self.config.curriculum:
            return [Stage(k, (step,)) for k, step in enumerate(self.config.steps)]
        return [Stage(0, self.config.steps)]

    def updates(self, stage: Stage) -> int:
        """Return the number of updates of a stage."""
        per_step = self.batches * self.config.epochs_per_step
        if self.config.max_updates_per_step is not None:
            per_step = min(per_step, self.config.max_updates_per_step)
        return per_step * len(stage.steps)

    def batch(self, stage: Stage, update: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the groups of an update: (group, group_size, 2) of prompt and image, and the step of each group."""
        epoch, place = divmod(update, self.batches)
        groups, steps = self._epoch(stage, epoch)
        chosen = slice(place * self.groups_per_batch, (place + 1) * self.groups_per_batch)
        return groups[chosen], steps[chosen]

    def _epoch(self, stage: Stage, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if getattr(self, "_kept", (None,))[0] != (stage, epoch):
            rng = np.random.default_rng(np.random.SeedSequence([self.config.seed, stage.position, epoch]))
            size = self.config.group_size
            used = self.n_images // size * size  # images left over take their turn in other epochs
            order = rng.permuted(np.tile(np.arange(self.n_images), (self.n_prompts, 1)), axis=1)[:, :used]
            prompts = np.broadcast_to(np.arange(self.n_prompts)[:, None], order.shape)
            groups = np.stack([prompts, order], -1).reshape(-1, size, 2)
            steps = rng.choice(np.array(stage.steps), len(groups))
            mixed = rng.permutation(len(groups))
            self._kept = ((stage, epoch), groups[mixed], steps[mixed])
        return self._kept[1], self._kept[2]


@dataclass
class Load:
    """One part of a batch, ready for the model."""

    pixels: torch.Tensor
    prompts: list[str]
    targets: torch.Tensor
    weight: float
    """0 for the stand-in of a process that has nothing to do in this part, else 1."""
    whole: int
    """Pictures of the whole batch."""
    scale: tuple[float, float]
    part: int
    last: bool
    pictures: np.ndarray
    """(n, 2), prompt and image of each."""


class Loader:
    """Reads and preprocesses the parts of this process ahead of use; `waited_s` is how long training waited for them."""

    def __init__(
        self, plan: Plan, images: Images, targets: np.ndarray, reward: Reward, *, process: int = 0, processes: int = 1
    ) -> None:
        self.plan, self.images, self.targets, self.reward = plan, images, targets, reward
        self.process, self.processes = process, processes
        self.waited_s = 0.0

    def parts(self, stage: Stage, start: int, stop: int) -> Iterator[Load]:
        """Yield the parts of updates `start` to `stop`, in order."""
        accumulation = self.plan.config.accumulation
        jobs = ((update, part) for update in range(start, stop) for part in range(accumulation))
        loads = prefetch(lambda job: self._load(stage, *job), jobs)
        while True:
            begin = time.perf_counter()
            load = next(loads, None)
            self.waited_s += time.perf_counter() - begin
            if load is None:
                return
            yield load

    def _load(self, stage: Stage, update: int, part: int) -> Load:
        accumulation = self.plan.config.accumulation
        groups, steps = self.plan.batch(stage, update)
        whole = groups.reshape(-1, 2)
        scale = target_scale(torch.from_numpy(self.targets[whole[:, 0], whole[:, 1]]), self.plan.config.standardize)
        shares = np.array_split(np.arange(len(groups)), accumulation * self.processes)
        # Parts of one batch go round the processes, so that uneven shares meet different ones.
        mine = shares[part * self.processes + self.process]
        weight = 1.0 if len(mine) else 0.0
        mine = mine if len(mine) else np.zeros(1, int)
        rows, at = groups[mine].reshape(-1, 2), np.repeat(steps[mine], groups.shape[1])
        pixels = model_pixels(self.reward, self._read(rows, at))
        targets = torch.from_numpy(self.targets[rows[:, 0], rows[:, 1]])
        if self.reward.device.type == "cuda":
            pixels, targets = pixels.pin_memory(), targets.pin_memory()
        texts = [self.images.prompts[prompt] for prompt in rows[:, 0]]
        return Load(pixels, texts, targets, weight, len(whole), scale, part, part == accumulation - 1, rows)

    def _read(self, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        found = np.unique(at)
        if len(found) == 1:
            return self.images.read(rows[:, 0], rows[:, 1], int(found[0]))
        parts = [self.images.read(rows[at == step, 0], rows[at == step, 1], int(step)) for step in found]
        out = np.empty((len(rows), *parts[0].shape[1:]), np.uint8)
        for step, pictures in zip(found, parts, strict=True):
            out[at == step] = pictures
        return out
