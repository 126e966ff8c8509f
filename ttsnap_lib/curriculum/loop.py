"""The training loop: stages in descending order, validation, the best weights kept, a state to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttsnap_lib.errors import CurriculumError
from ttsnap_lib.paths import atomic_folder
from ttsnap_lib.rewards.base import Reward

from .batches import Load, Loader, Stage
from .config import CurriculumConfig
from .images import Images
from .losses import Part, batch_loss
from .rates import learning_rate
from .report import write_tables
from .state import write_curriculum, write_state_file
from .targets import score_step
from .validation import Validation, measures
from .weights import RewardModule, Weights, own_randomness

__all__ = ["Trainer"]

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
            f"{what} is not finite at {place}",
            value=value,
            bound="a finite number",
            remedy="Lower learning_rate or use mixed_precision bf16 or no. Finished steps and the last saved state in "
            f"{self.folder} are as they were.",
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
