"""`finetune`: checks everything, computes the targets, and runs the curriculum; it goes on where a killed run stopped."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ttsnap_lib.errors import ConfigError, CurriculumError
from ttsnap_lib.files import atomic_folder, atomic_write, lock, tidy, write_json
from ttsnap_lib.finetuning.batches import Load, Loader, Plan, Stage, batch_loss
from ttsnap_lib.finetuning.config import CurriculumConfig, learning_rate
from ttsnap_lib.finetuning.data import Images, RunData, gather, named_pictures, score_step
from ttsnap_lib.finetuning.report import TABLES, Validation, measures, metrics_table, write_tables
from ttsnap_lib.finetuning.weights import (
    STATE,
    RewardModule,
    Weights,
    array_digest,
    identity,
    open_run,
    read_state_file,
    trainable_module,
    write_curriculum,
)
from ttsnap_lib.rewards.base import Reward, TextBatch, TextCache
from ttsnap_lib.rewards.checkpoints import CURRICULUM, step_folders
from ttsnap_lib.rewards.loading import load_reward

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class CurriculumResult:
    """What a call of :func:`finetune` did.

    Attributes
    ----------
    folder : Path
        The run folder.
    table : pandas.DataFrame
        One row per step, see :func:`ttsnap_lib.finetuning.report.metrics_table`.
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
        Pictures to train on, see :func:`ttsnap_lib.finetuning.data.open_images`; ``config.trajectories`` when None.
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
        raise CurriculumError("trajectories: got None, expected a folder. Say what to train on (--trajectories).")
    held_source = validation if validation is not None else config.validation
    for pictures in (source, held_source):  # before a reward is fetched
        if isinstance(pictures, str | Path):
            named_pictures(pictures)
    lent = reward is not None
    if reward is None:
        reward = load_reward(config.reward, device=device, **(reward_options or {}))
    module = trainable_module(reward)
    accelerator = _accelerator(config, reward)
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
        state = read_state_file(folder)
        if state is not None and state["identity"] != who:
            raise CurriculumError(f"{folder / STATE} is of another run. Delete it, or pass overwrite=True.")
        base = validate(accelerator, reward, data, config.steps, "the start")  # while its weights are the base's
        parameters = sum(p.numel() for p in module.parameters())
        weights = Weights(reward, config, lent=lent)
        if lent:
            stack.callback(weights.release)
        trained = sum(p.numel() for p in weights.parameters.values())
        about = {"trained_parameters": trained, "base_parameters": parameters}
        if accelerator.is_main_process and not (folder / CURRICULUM).exists():
            write_json(folder / "config.json", config.to_dict())
            write_curriculum(folder, reward.name, config, who, [], about)  # last: with it the run has begun
        trainer = Trainer(accelerator, reward, weights, data, config, folder, who, about, base, progress, listener)
        trainer.run(state)
    return CurriculumResult(
        folder=folder,
        table=metrics_table(folder),
        pictures=trainer.pictures,
        training_s=trainer.training_s,
        validation_s=trainer.validation_s,
        elapsed_s=time.perf_counter() - begin,
        wait_share=trainer.loader.waited_s / trainer.training_s if trainer.training_s else 0.0,
        disk_bytes=sum(p.stat().st_size for path in step_folders(folder).values() for p in path.iterdir()),
        trained_parameters=trained,
        base_parameters=parameters,
        peak_memory_bytes=_peak_memory(reward.device),
    )


def _accelerator(config: CurriculumConfig, reward: Reward) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    on_cpu = reward.device.type == "cpu"
    if config.mixed_precision == "fp16" and on_cpu:  # accelerate would go on without a word
        raise ConfigError("mixed_precision: got 'fp16', expected no or bf16 on a CPU. Change it, or use a GPU.")
    # accelerate keeps the precision of its first use in a process; the process group itself stays.
    AcceleratorState._reset_state(reset_partial_state=False)
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.method == "full")
    return Accelerator(mixed_precision=config.mixed_precision, cpu=on_cpu, kwargs_handlers=[unused])


def _remove_run(folder: Path) -> None:
    for path in [*folder.glob("step_*"), *(folder / name for name in (CURRICULUM, STATE, "config.json", *TABLES))]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def validate(
    accelerator: Any, reward: Reward, data: RunData, steps: tuple[int, ...], place: str
) -> dict[int, Validation]:
    """Return step -> measures of the weights as they are now, on what is held out; the processes share the prompts."""
    if data.held is None:
        return {}
    (held, targets), found = data.held, {}
    shard = (accelerator.process_index, accelerator.num_processes)
    for step in steps:
        mine = torch.from_numpy(score_step(reward, held, step, shard=shard)).to(accelerator.device)
        scores = accelerator.reduce(mine, "sum")
        _finite(f"validation at step {step}", float(scores.sum()), place)
        found[step] = measures(scores.cpu().numpy(), targets)
    return found


def _finite(what: str, value: float, place: str) -> None:
    if not math.isfinite(value):
        raise CurriculumError(
            f"{what} is not finite at {place}: got {value!r}. Lower learning_rate, or use mixed_precision bf16 or no; "
            "finished steps and the last saved state are as they were."
        )


class Trainer:
    """Runs the stages of one curriculum; :func:`finetune` sets it up."""

    def __init__(
        self,
        accelerator: Any,
        reward: Reward,
        weights: Weights,
        data: RunData,
        config: CurriculumConfig,
        folder: Path,
        who: dict[str, Any],
        about: dict[str, Any],
        base: dict[int, Validation],
        progress: Callable[[int, int], None] | None,
        listener: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.accelerator, self.reward, self.weights, self.data = accelerator, reward, weights, data
        self.config, self.folder, self.who, self.about, self.base = config, folder, who, about, base
        self.progress, self.listener = progress, listener
        self.plan = Plan(config, len(data.train.prompts), data.train.n_images)
        self.loader = Loader(
            self.plan, data.train, data.targets, reward,
            process=accelerator.process_index, processes=accelerator.num_processes,
        )  # fmt: skip
        self.stages = self.plan.stages()
        self.model = accelerator.prepare_model(RewardModule(reward))
        self.optimizer = self._new_optimizer()
        self.rows: list[dict[str, Any]] = []  # of the metrics table, one per finished step
        self.losses: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}  # of the stage: its weights so far, how they did, the time spent
        self.pictures, self.training_s, self.validation_s = 0, 0.0, 0.0
        self._text_is_trained = False
        if reward.reads_prompt:
            with torch.enable_grad():
                probe = reward.encode_text([data.train.prompts[0]])
            self._text_is_trained = any(tensor.requires_grad for tensor in probe.tensors.values())
        # One text at a time: encoded together their last bits would hang on where a killed run went on.
        self._texts = TextCache(at_once=1)

    def run(self, state: dict[str, Any] | None) -> None:
        """Train all stages, or go on from `state`."""
        position, update = 0, 0
        if state is not None:
            self.weights.load(state["weights"])
            self.optimizer.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"] is not None and self._scaler is not None:
                self._scaler.load_state_dict(state["scaler"])
            self.best, self.rows, self.losses = state["best"], state["rows"], state["losses"]
            position, update = state["position"], state["update"]
        while position < len(self.stages):
            self._stage(self.stages[position], update)
            position, update = position + 1, 0
            self.best = {}
            self._save(position, 0)

    def _stage(self, stage: Stage, start: int) -> None:
        begin, updates = time.perf_counter(), self.plan.updates(stage)
        total = sum(self.plan.updates(other) for other in self.stages)
        done = sum(self.plan.updates(other) for other in self.stages[: stage.position])
        if start == 0:
            self.optimizer = self._new_optimizer()
            self.best = {"elapsed_s": 0.0}
            self._validate(stage, 0)
        spent_before = self.best["elapsed_s"]
        for update, told in self._updates(stage, start, updates):
            entry = {"stage": stage.position, "step": stage.steps[0], "update": update, **told}
            self.losses.append(entry)
            self._event(event="update", **entry)
            if self.progress is not None:
                self.progress(done + update + 1, total)
            self.best["elapsed_s"] = spent_before + time.perf_counter() - begin
            if (update + 1) % self.config.save_every == 0 and update + 1 < updates:
                self._save(stage.position, update + 1)
        self._validate(stage, updates)
        self.best["elapsed_s"] = spent_before + time.perf_counter() - begin
        self._finish(stage)

    def _updates(self, stage: Stage, update: int, stop: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Make the updates and yield each with its losses and learning rate."""
        config, told = self.config, dict[str, float]()
        begin = time.perf_counter()
        for load in self.loader.parts(stage, update, stop):
            if load.part == 0:
                rate = learning_rate(config, update, stop)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                told = {}
            for name, value in self._backward(load).items():
                told[name] = told.get(name, 0.0) + value
            if not load.last:
                continue
            prompts = np.unique(load.pictures[:, 0])[:8].tolist()
            place = f"{stage.name}, update {update} (prompts {prompts} among others)"
            sums = torch.tensor(list(told.values()), dtype=torch.float64, device=self.accelerator.device)
            told = dict(zip(told, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
            _finite("loss", told["loss"], place)
            if config.max_grad_norm:
                every = list(self.weights.parameters.values())
                norm = float(self.accelerator.clip_grad_norm_(every, config.max_grad_norm))
                if self._scaler is None:  # a scaler leaves such an update out
                    _finite("gradient", norm, place)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.pictures += load.whole
            self.training_s += time.perf_counter() - begin
            yield update, {**told, "learning_rate": rate}
            update, begin = update + 1, time.perf_counter()

    def _backward(self, load: Load) -> dict[str, float]:
        """Forward and backward of one part; return its share of the loss, whole and by summand."""
        accelerator, device = self.accelerator, self.reward.device
        pixels = load.pixels.to(device, non_blocking=True)
        targets = load.targets.to(device, non_blocking=True)
        # Gradients are exchanged once, with the last part.
        with contextlib.nullcontext() if load.last else accelerator.no_sync(self.model):
            text = load.prompts if self._text_is_trained else self._text(load.prompts)
            with accelerator.autocast():
                scores = self.model(pixels, text)
            loss, told = batch_loss(scores, targets, self.config, load.whole, load.scale)
            loss = loss * load.weight
            # Processes average their gradients; the shares of a batch add up.
            accelerator.backward(loss * accelerator.num_processes)
        return {"loss": float(loss.detach()), **{name: value * load.weight for name, value in told.items()}}

    @torch.no_grad()
    def _text(self, prompts: list[str]) -> TextBatch | None:
        if not self.reward.reads_prompt:
            return None
        return self._texts.rows(prompts, self.reward.encode_text, None)

    def _validate(self, stage: Stage, update: int) -> None:
        """Validate the weights that a stage starts or ends with, and remember them when they are the better ones."""
        begin = time.perf_counter()
        now = validate(self.accelerator, self.reward, self.data, stage.steps, f"{stage.name}, update {update}")
        self.validation_s += time.perf_counter() - begin
        tau = float(np.mean([value.tau for value in now.values()])) if now else math.nan
        if now:
            self._event(event="validation", stage=stage.position, step=stage.steps[0], update=update, tau=tau)
        tau = tau if math.isfinite(tau) else -math.inf
        found = {step: vars(value) for step, value in now.items()}
        if update == 0:
            self.best["before"] = found
        if update == 0 or self.config.keep == "last" or not now or tau > self.best["tau"]:
            self.best.update(tau=tau, update=update, weights=self.weights.state(), after=found)

    def _finish(self, stage: Stage) -> None:
        """Keep the chosen weights as the checkpoint of the stage's steps."""
        for name, value in self.best["weights"].items():
            _finite(f"weight {name}", float(value.double().sum()), f"{stage.name}, update {self.best['update']}")
        self.weights.load(self.best["weights"])
        losses = [entry["loss"] for entry in self.losses if entry["stage"] == stage.position]
        for step in stage.steps:
            row: dict[str, Any] = {"step": step, "updates": len(losses), "kept_update": self.best["update"]}
            row |= {"elapsed_s": round(self.best["elapsed_s"], 3), "first_loss": losses[0], "last_loss": losses[-1]}
            row |= self.base[step].row("base") if step in self.base else {}
            for when in ("before", "after"):
                row |= Validation(**self.best[when][step]).row(when) if step in self.best[when] else {}
            self.rows.append(row)
            self._event(event="step", **row)
        if self.accelerator.is_main_process:
            for step in stage.steps:
                with atomic_folder(self.folder / f"step_{step:02d}") as part:
                    self.weights.save_step(part)
            write_curriculum(self.folder, self.reward.name, self.config, self.who, self.rows, self.about)
            write_tables(self.folder, self.rows, self.losses)
        self.accelerator.wait_for_everyone()

    def _save(self, position: int, update: int) -> None:
        """Write the state from which a killed run goes on."""
        if self.accelerator.is_main_process:
            state = {
                "identity": self.who,
                "position": position,
                "update": update,
                "weights": self.weights.state(),
                "optimizer": self.optimizer.optimizer.state_dict(),
                "scaler": self._scaler.state_dict() if self._scaler is not None else None,
                "best": self.best,
                "rows": self.rows,
                "losses": self.losses,
            }
            with atomic_write(self.folder / STATE) as file:
                torch.save(state, file)
        self.accelerator.wait_for_everyone()

    @property
    def _scaler(self) -> Any:
        return getattr(self.accelerator, "scaler", None)

    def _new_optimizer(self) -> Any:
        betas, decay = (self.config.beta1, self.config.beta2), self.config.weight_decay
        trained = list(self.weights.parameters.values())  # the rate is set at each update
        return self.accelerator.prepare_optimizer(torch.optim.AdamW(trained, betas=betas, weight_decay=decay))

    def _event(self, **event: Any) -> None:
        if self.listener is not None and self.accelerator.is_main_process:
            self.listener(event)
