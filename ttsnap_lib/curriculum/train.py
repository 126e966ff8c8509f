"""`finetune`: checks everything, computes the targets, and runs the curriculum; it goes on where a killed run stopped."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ttsnap_lib.errors import ConfigError, CurriculumError
from ttsnap_lib.paths import lock, tidy, write_json
from ttsnap_lib.rewards.base import Reward
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.rewards.steps import step_folders

from .batches import Loader, Plan
from .config import CurriculumConfig
from .images import Images, named_pictures
from .inputs import RunData, gather
from .loop import Trainer
from .report import metrics_table
from .state import CURRICULUM, STATE, array_digest, identity, open_run, read_state_file, write_curriculum
from .targets import score_step
from .validation import measures
from .weights import Weights, trainable_module

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CurriculumResult", "finetune"]

_TABLES = ("metrics.csv", "metrics.parquet", "losses.csv", "losses.parquet")


@dataclass
class CurriculumResult:
    """What a call of :func:`finetune` did.

    Attributes
    ----------
    folder : Path
        The run folder.
    table : pandas.DataFrame
        One row per step, see :func:`ttsnap_lib.curriculum.metrics_table`.
    pictures : int
        Pictures trained on in this sitting.
    training_s, validation_s, elapsed_s : float
        Time of the updates alone, of the validation, of all.
    wait_share : float
        Share of the updates' time spent waiting for data.
    disk_bytes : int
        Of all steps' checkpoints.
    trained_parameters, base_parameters : int
    peak_memory_bytes : int
        Of the accelerator, else of this process.
    """

    folder: Path
    table: pd.DataFrame
    pictures: int
    training_s: float
    validation_s: float
    elapsed_s: float
    wait_share: float
    disk_bytes: int
    trained_parameters: int
    base_parameters: int
    peak_memory_bytes: int

    @property
    def pictures_per_s(self) -> float:
        """Pictures per second of training."""
        return self.pictures / self.training_s if self.training_s else 0.0

    def __str__(self) -> str:
        return (
            f"{len(self.table)} steps in {self.folder}: {self.pictures} pictures in {self.training_s:.0f} s "
            f"({self.pictures_per_s:.0f}/s, {self.wait_share:.1%} of it waiting for data), validation "
            f"{self.validation_s:.0f} s; {self.trained_parameters:,} of {self.base_parameters:,} parameters trained, "
            f"{self.disk_bytes / 1e6:.2f} MB on disk, peak memory {self.peak_memory_bytes / 1e9:.2f} GB"
        )


def finetune(
    images: str | Path | Images | None,
    folder: str | Path,
    config: CurriculumConfig | None = None,
    *,
    reward: Reward | None = None,
    reward_options: Mapping[str, Any] | None = None,
    validation: str | Path | Images | None = None,
    targets: str | Path | np.ndarray | None = None,
    validation_targets: str | Path | np.ndarray | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    listener: Callable[[dict[str, Any]], None] | None = None,
) -> CurriculumResult:
    """Finetune a reward to be noise-aware, one checkpoint per step, into a run folder.

    The same call goes on where an earlier one was stopped or killed, and ends with the same weights. Under
    ``accelerate launch`` the processes share every batch.

    Parameters
    ----------
    images : str, Path or Images
        Pictures to train on, see :func:`ttsnap_lib.curriculum.open_images`; ``config.trajectories`` when None.
    folder : str or Path
        The run folder: ``step_14/ ... curriculum.json metrics.csv losses.csv``.
    config : CurriculumConfig
        The settings; defaults when not given.
    reward : Reward, optional
        A base reward that is loaded already; it comes back as it was. `config.reward` is loaded when not given.
    reward_options : mapping, optional
        For loading, such as ``{"weights": "ImageReward.pt"}``.
    validation : str, Path or Images, optional
        Pictures of held-out prompts; ``config.validation``, else the last ``config.validation_prompts`` prompts.
    targets, validation_targets : path or ndarray (prompt, image), optional
        Ground truth; the base reward of the clean images when not given.
    device : str or torch.device, optional
        Of the reward that is loaded here.
    overwrite : bool
        Delete an earlier run in `folder`.
    progress : callable, optional
        ``progress(done, total)`` in updates.
    listener : callable, optional
        Gets a mapping for each update, validation and finished step: for live plots.

    Returns
    -------
    CurriculumResult

    Raises
    ------
    ConfigError, CurriculumError, TrajectoryError, RewardError, CheckpointError
        Bad input before anything is trained; a loss that is not finite, with step and batch.
    DiskError
        A full disk, a folder that cannot be written, or another process in this folder. What is finished stays.
    """
    begin = time.perf_counter()
    config = config or CurriculumConfig()
    folder = Path(folder)
    source = images if images is not None else config.trajectories
    if source is None:
        raise CurriculumError(
            "trajectories", value=None, bound="a folder", remedy="Say what to train on (--trajectories)."
        )
    held_source = validation if validation is not None else config.validation
    for pictures in (source, held_source):  # before a reward is fetched
        if isinstance(pictures, str | Path):
            named_pictures(pictures)
    lent = reward is not None
    if reward is None:
        reward = load_reward(config.reward, device=device, **(reward_options or {}))
    module = trainable_module(reward)
    accelerator = _accelerator(config, reward, folder)
    with accelerator.main_process_first():  # one process generates or scores, the others find its cache
        data = gather(source, held_source, targets, validation_targets, reward, config)
    train, (held, held_targets) = data.train, data.held or (None, None)

    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(lock(folder / ".lock"))
            tidy(folder)
            if overwrite:
                _remove_run(folder)
        accelerator.wait_for_everyone()
        who = identity(
            config,
            reward=reward.fingerprint(),
            pictures=train.digest(),
            targets=array_digest(data.targets),
            validation=None if held is None else held.digest(),
            validation_targets=array_digest(held_targets),
        )
        open_run(folder, who)
        base = _base_validation(accelerator, reward, data, config)
        parameters = sum(p.numel() for p in module.parameters())
        weights = Weights(reward, config, lent=lent)
        if lent:
            stack.callback(weights.release)
        plan = Plan(config, len(train.prompts), train.n_images)
        loader = Loader(
            plan, train, data.targets, reward, process=accelerator.process_index, processes=accelerator.num_processes
        )
        trained = sum(p.numel() for p in weights.parameters.values())
        about = {"trained_parameters": trained, "base_parameters": parameters}
        if accelerator.is_main_process and not (folder / CURRICULUM).exists():
            write_json(folder / "config.json", config.to_dict())
            write_curriculum(folder, reward.name, config, who, [], about)  # last: with it the run has begun
        trainer = Trainer(
            accelerator, reward, weights, loader, config, folder, identity=who, about=about,
            validation=None if data.held is None else (*data.held, base), progress=progress, listener=listener,
        )  # fmt: skip
        if config.tracker:
            plain = {key: value for key, value in config.to_dict().items() if isinstance(value, int | float | str)}
            accelerator.init_trackers("ttsnap-finetune", config=plain)
        state = read_state_file(folder)
        if state is not None and state["identity"] != who:
            raise CurriculumError(
                f"{folder / STATE} is of another run",
                value=str(folder / STATE),
                bound="the state of this run",
                remedy="Delete it, or pass overwrite=True (--overwrite).",
            )
        trainer.run(state)
        if config.tracker:
            accelerator.end_training()
    return CurriculumResult(
        folder=folder,
        table=metrics_table(folder),
        pictures=trainer.pictures,
        training_s=trainer.training_s,
        validation_s=trainer.validation_s,
        elapsed_s=time.perf_counter() - begin,
        wait_share=loader.waited_s / trainer.training_s if trainer.training_s else 0.0,
        disk_bytes=sum(p.stat().st_size for path in step_folders(folder).values() for p in path.iterdir()),
        trained_parameters=trained,
        base_parameters=parameters,
        peak_memory_bytes=_peak_memory(reward.device),
    )


def _accelerator(config: CurriculumConfig, reward: Reward, folder: Path) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    if config.tracker:
        there = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}[config.tracker]()
        if not there:
            raise ConfigError(
                "tracker", value=config.tracker, bound="an installed package", remedy=f"pip install {config.tracker}"
            )
    if config.mixed_precision == "fp16" and reward.device.type == "cpu":  # accelerate would go on without a word
        raise ConfigError(
            "mixed_precision", value="fp16", bound="no or bf16 on a CPU", remedy="Change it, or use a GPU."
        )
    # accelerate keeps the precision of its first use in a process; the process group itself stays.
    AcceleratorState._reset_state(reset_partial_state=False)
    return Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=reward.device.type == "cpu",
        log_with=config.tracker,
        project_dir=str(folder / "tracker"),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.method == "full")],
    )


def _base_validation(accelerator: Any, reward: Reward, data: RunData, config: CurriculumConfig) -> dict[int, Any]:
    if data.held is None:
        return {}
    (held, targets), found = data.held, {}
    shard = (accelerator.process_index, accelerator.num_processes)
    for step in config.steps:
        scores = torch.from_numpy(score_step(reward, held, step, shard=shard)).to(accelerator.device)
        found[step] = measures(accelerator.reduce(scores, "sum").cpu().numpy(), targets)
    return found


def _remove_run(folder: Path) -> None:
    for path in [
        *folder.glob("step_*"),
        *(folder / name for name in (CURRICULUM, STATE, "config.json", "tracker", *_TABLES)),
    ]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
