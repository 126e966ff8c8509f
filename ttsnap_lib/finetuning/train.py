"""`finetune`: checks everything, computes the targets, and runs the curriculum; it goes on where a killed run stopped."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ttsnap_lib.errors import ConfigError, CurriculumError
from ttsnap_lib.files import atomic_folder, lock, tidy, write_json
from ttsnap_lib.finetuning.batches import Load, Loader, Part, Plan, Stage, batch_loss
from ttsnap_lib.finetuning.config import CurriculumConfig, learning_rate
from ttsnap_lib.finetuning.data import Images, RunData, gather, named_pictures, score_step
from ttsnap_lib.finetuning.report import Validation, measures, metrics_table, write_tables
from ttsnap_lib.finetuning.weights import (
    CURRICULUM,
    STATE,
    RewardModule,
    Weights,
    array_digest,
    identity,
    open_run,
    own_randomness,
    read_state_file,
    trainable_module,
    write_curriculum,
    write_state_file,
)
from ttsnap_lib.rewards.base import Reward
from ttsnap_lib.rewards.checkpoints import step_folders
from ttsnap_lib.rewards.loading import load_reward

if TYPE_CHECKING:
    import pandas as pd


Listener = Callable[[dict[str, Any]], None]


class Trainer:
    """Runs the stages of one curriculum. :func:`ttsnap_lib.curriculum.finetune` sets it up."""

    def __init__(
        self,
        accelerator: Any,
        reward: Reward,
        weights: Weights,
        loader: Loader,
        config: CurriculumConfig,
        folder: Path,
        *,
        identity: dict[str, Any],
        about: dict[str, Any],
        validation: tuple[Images, np.ndarray, dict[int, Validation]] | None,
        progress: Callable[[int, int], None] | None,
        listener: Listener | None,
    ) -> None:
        self.accelerator, self.reward, self.weights = accelerator, reward, weights
        self.loader, self.config, self.folder = loader, config, folder
        self.identity, self.about, self.validation = identity, about, validation
        self.progress, self.listener = progress, listener
        self.model = accelerator.prepare_model(RewardModule(reward))
        self.optimizer = self._new_optimizer()
        self.stages = loader.plan.stages()
        self.total = sum(loader.plan.updates(stage) for stage in self.stages)
        self.rows: list[dict[str, Any]] = []
        self.losses: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.pictures, self.training_s, self.validation_s = 0, 0.0, 0.0
        with torch.enable_grad():
            probe = reward.encode_text([loader.images.prompts[0]])
        self._text_is_trained = any(tensor.requires_grad for tensor in probe.tensors.values())

    # -- the whole run ------------------------------------------------------------------------------------------

    def run(self, state: dict[str, Any] | None) -> None:
        """Train all stages, or go on from `state`."""
        position, update = 0, 0
        if state is not None:
            position, update = self._restore(state)
        while position < len(self.stages):
            self._stage(self.stages[position], update)
            position, update = position + 1, 0
            self.best = {}
            self._save(position, 0)

    def _stage(self, stage: Stage, start: int) -> None:
        config, updates = self.config, self.loader.plan.updates(stage)
        begin = time.perf_counter()
        if start == 0:
            if config.restart:
                self.optimizer = self._new_optimizer()
            self.best = {"stale": 0, "trained": 0, "stopped": False, "elapsed_s": 0.0}
            self._validated(stage, 0)
        spent_before = self.best["elapsed_s"]
        done = sum(self.loader.plan.updates(other) for other in self.stages[: stage.position])
        if not self.best["stopped"]:
            every = config.validate_every
            for update, loss in self._updates(stage, start, updates):
                self.best["trained"] = update + 1
                self._tell(stage, update, loss, done + update + 1)
                if update + 1 == updates or (every and (update + 1) % every == 0):
                    self._validated(stage, update + 1)
                    self.best["stopped"] = bool(config.patience and self.best["stale"] >= config.patience)
                self.best["elapsed_s"] = spent_before + time.perf_counter() - begin
                if (update + 1) % config.save_every == 0 and update + 1 < updates:
                    self._save(stage.position, update + 1)
                if self.best["stopped"]:
                    break
        self._finish(stage)

    # -- updates ------------------------------------------------------------------------------------------------

    def _updates(self, stage: Stage, start: int, stop: int):
        """Make the updates and yield each with its loss."""
        told: dict[str, Any] = {}
        total, begin = 0.0, time.perf_counter()
        for load in self.loader.parts(stage, start, stop):
            if load.part == 0:
                rate = learning_rate(self.config, stage.position, start, self.loader.plan.updates(stage))
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                total, told = 0.0, {}
            value, summands = self._part(stage, start, load)
            total += value
            for name, summand in summands.items():
                told[name] = told.get(name, 0.0) + summand
            if not load.last:
                continue
            names = list(told)
            shared = torch.tensor([total, *told.values()], dtype=torch.float64, device=self.accelerator.device)
            shared = self.accelerator.reduce(shared, "sum").tolist()
            self._finite(stage, start, "loss", shared[0], load.pictures)
            if self.config.max_grad_norm:
                every = list(self.weights.parameters.values())
                norm = float(self.accelerator.clip_grad_norm_(every, self.config.max_grad_norm))
                if getattr(self.accelerator, "scaler", None) is None:  # a scaler leaves such an update out
                    self._finite(stage, start, "gradient", norm, load.pictures)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.pictures += load.whole
            self.training_s += time.perf_counter() - begin
            yield start, {"loss": shared[0], **dict(zip(names, shared[1:], strict=True)), "learning_rate": rate}
            start, begin = start + 1, time.perf_counter()

    def _part(self, stage: Stage, update: int, load: Load) -> tuple[float, dict[str, float]]:
        """Forward and backward of one part; return its share of the loss."""
        accelerator, config = self.accelerator, self.config
        device = self.reward.device
        pixels = load.pixels.to(device, non_blocking=True)
        targets = load.targets.to(device, non_blocking=True)
        seed = (config.seed, stage.position, update, load.part, accelerator.process_index)
        sync = nullcontext() if load.last else accelerator.no_sync(self.model)
        random = own_randomness(seed, device) if config.lora_dropout else nullcontext()
        with sync, random:
            text = load.prompts if self._text_is_trained else self._text(load.prompts)
            with accelerator.autocast():
                scores = self.model(pixels, text)
            part = Part(scores, targets, config.group_size)
            loss, told = batch_loss(part, config, load.whole, load.scale)
            loss = loss * load.weight
            # Processes average their gradients; the shares of a batch add up.
            accelerator.backward(loss * accelerator.num_processes)
        return float(loss.detach()), {name: value * load.weight for name, value in told.items()}

    @torch.no_grad()
    def _text(self, prompts: list[str]) -> Any:
        """Encode frozen text once per prompt. The cache is emptied by weight updates, so its own key is kept here."""
        cache = self.__dict__.setdefault("_texts", {})
        for prompt in dict.fromkeys(prompts):
            if prompt not in cache:
                cache[prompt] = self.reward.encode_text([prompt])
        first = cache[prompts[0]]
        return type(first)(
            {key: torch.cat([cache[prompt].tensors[key] for prompt in prompts]) for key in first.tensors}
        )

    def _finite(self, stage: Stage, update: int, what: str, value: float, pictures: Any = None) -> None:
        if math.isfinite(value):
            return
        place = f"{stage.name}, update {update}"
        if pictures is not None:
            place += f" (prompts {sorted({int(prompt) for prompt in pictures[:, 0]})[:8]} among others)"
        raise CurriculumError(
            f"{what} is not finite at {place}: got {value!r}, expected a finite number. Lower learning_rate or use "
            f"mixed_precision bf16 or no. Finished steps and the last saved state in {self.folder} are as they were."
        )

    def _new_optimizer(self) -> Any:
        config = self.config
        plain = torch.optim.AdamW(
            list(self.weights.parameters.values()),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        return self.accelerator.prepare_optimizer(plain)

    # -- validation ---------------------------------------------------------------------------------------------

    def _validated(self, stage: Stage, update: int) -> None:
        """Validate the weights as they are and remember them when they are the best."""
        now: dict[int, Validation] = {}
        if self.validation is not None:
            images, targets, _ = self.validation
            shard = (self.accelerator.process_index, self.accelerator.num_processes)
            begin = time.perf_counter()
            for step in stage.steps:
                scores = score_step(self.reward, images, step, shard=shard)
                whole = self.accelerator.reduce(torch.from_numpy(scores).to(self.accelerator.device), "sum")
                self._finite(stage, update, f"validation at step {step}", float(whole.sum()))
                now[step] = measures(whole.cpu().numpy(), targets)
            self.validation_s += time.perf_counter() - begin
            self._event(
                event="validation", stage=stage.position, step=stage.steps[0], update=update,
                tau=float(np.mean([value.tau for value in now.values()])),
            )  # fmt: skip
        tau = float(np.mean([value.tau for value in now.values()])) if now else -math.inf
        if not math.isfinite(tau):
            tau = -math.inf
        found = {step: vars(value) for step, value in now.items()}
        if update == 0:
            self.best["before"] = found
        better = update == 0 or self.config.keep == "last" or not now or tau > self.best["tau"]
        self.best["stale"] = 0 if update == 0 or not now or tau > self.best["tau"] else self.best["stale"] + 1
        if better:
            top = tau if self.config.keep == "best" else max(tau, self.best.get("tau", tau))
            self.best.update(tau=top, update=update, weights=self.weights.state(), after=found)

    # -- finishing a step ---------------------------------------------------------------------------------------

    def _finish(self, stage: Stage) -> None:
        """Keep the chosen weights as the checkpoint of the stage's steps."""
        for name, value in self.best["weights"].items():
            self._finite(stage, self.best["update"], f"weight {name}", float(value.double().sum()))
        self.weights.load(self.best["weights"])
        losses = [entry["loss"] for entry in self.losses if entry["stage"] == stage.position]
        base = self.validation[2] if self.validation is not None else {}
        for step in stage.steps:
            row: dict[str, Any] = {"step": step, "updates": self.best["trained"], "kept_update": self.best["update"]}
            row |= {"early_stop": self.best["stopped"], "elapsed_s": round(self.best["elapsed_s"], 3)}
            row |= {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
            row |= base[step].row("base") if step in base else {}
            for when in ("before", "after"):
                row |= Validation(**self.best[when][step]).row(when) if step in self.best[when] else {}
            self.rows.append(row)
            self._event(event="step", **row)
        if self.accelerator.is_main_process:
            for step in stage.steps:
                with atomic_folder(self.folder / f"step_{step:02d}") as part:
                    self.weights.save_step(part)
            write_curriculum(self.folder, self.reward.name, self.config, self.identity, self.rows, self.about)
            write_tables(self.folder, self.rows, self.losses)
        self.accelerator.wait_for_everyone()

    # -- state --------------------------------------------------------------------------------------------------

    def _save(self, position: int, update: int) -> None:
        if self.accelerator.is_main_process:
            scaler = getattr(self.accelerator, "scaler", None)
            write_state_file(
                self.folder,
                {
                    "identity": self.identity,
                    "position": position,
                    "update": update,
                    "weights": self.weights.state(),
                    "optimizer": self.optimizer.optimizer.state_dict(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "best": self.best,
                    "rows": self.rows,
                    "losses": self.losses,
                },
            )
        self.accelerator.wait_for_everyone()

    def _restore(self, state: dict[str, Any]) -> tuple[int, int]:
        self.weights.load(state["weights"])
        self.optimizer.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and getattr(self.accelerator, "scaler", None) is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.best, self.rows, self.losses = state["best"], state["rows"], state["losses"]
        return state["position"], state["update"]

    # -- telling ------------------------------------------------------------------------------------------------

    def _tell(self, stage: Stage, update: int, told: dict[str, float], done: int) -> None:
        entry = {"stage": stage.position, "step": stage.steps[0], "update": update, **told}
        self.losses.append(entry)
        self._event(event="update", **entry)
        if self.progress is not None:
            self.progress(done, self.total)
        if self.config.tracker:
            self.accelerator.log({f"train/{name}": value for name, value in told.items()}, step=done)

    def _event(self, **event: Any) -> None:
        if self.listener is not None and self.accelerator.is_main_process:
            self.listener(event)
        if self.config.tracker and event["event"] == "validation":
            self.accelerator.log({"validation/tau": event["tau"], "validation/step": event["step"]})


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
        raise CurriculumError("trajectories: got None, expected a folder. Say what to train on (--trajectories).")
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
                f"{folder / STATE} is of another run: got {folder / STATE}, expected the state of this run. Delete it, "
                "or pass overwrite=True (--overwrite)."
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
                f"tracker: got {config.tracker!r}, expected an installed package. pip install {config.tracker}"
            )
    if config.mixed_precision == "fp16" and reward.device.type == "cpu":  # accelerate would go on without a word
        raise ConfigError("mixed_precision: got 'fp16', expected no or bf16 on a CPU. Change it, or use a GPU.")
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
