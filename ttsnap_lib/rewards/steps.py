"""Noise-aware weights, one set per denoising step, on one base model: switched, not reloaded."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from ttsnap_lib._reading import as_path, failures_as, read_json
from ttsnap_lib.checks import choice, integer
from ttsnap_lib.errors import CheckpointError

from .attention import keep_base_exact

__all__ = ["StepSeries", "read_curriculum", "step_folders"]

_ADAPTER = "adapter_model.safetensors"
_FULL = "model.safetensors"
_MOST_RANK = 1024  # memory is allocated for what the configuration says, before the weights are looked at


def read_curriculum(folder: str | Path) -> dict[str, Any]:
    """Return ``curriculum.json`` of a run folder.

    Raises
    ------
    CheckpointError
        When the folder or the file is missing or broken.
    """
    path = as_path("run folder", folder, error=CheckpointError) / "curriculum.json"
    remedy = "Check the path; a run folder of `ttsnap finetune` holds step_14 and its like, and curriculum.json."
    return read_json(path, "curriculum", error=CheckpointError, remedy=remedy)


def step_folders(folder: str | Path) -> dict[int, Path]:
    """Return step -> checkpoint folder, ascending; folders without weights (a run cut short) are left out."""
    found: dict[int, Path] = {}
    for path in sorted(Path(folder).glob("step_*")):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and ((path / _ADAPTER).is_file() or (path / _FULL).is_file()):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


class StepSeries:
    """The checkpoints of one run folder, attached to a base module.

    LoRA adapters (``adapter_model.safetensors`` with ``adapter_config.json``) all live in the module and are switched;
    full weights (``model.safetensors``: all keys of the module, or those that were trained) are copied in on a switch
    and the base values kept on the CPU.

    Parameters
    ----------
    module : torch.nn.Module
        The base model. Adapters are injected into it in place; its own weights stop requiring gradients then.
    folder : str or Path
        The run folder.
    reward_name : str, optional
        Refused when ``curriculum.json`` names another reward under ``reward``.

    Raises
    ------
    CheckpointError
        A folder without checkpoints, of another reward, or whose weights do not fit.
    """

    def __init__(self, module: torch.nn.Module, folder: str | Path, *, reward_name: str | None = None) -> None:
        self.folder = Path(folder)
        self.curriculum = read_curriculum(folder)
        trained = self.curriculum.get("reward")
        if reward_name is not None and isinstance(trained, str) and trained != reward_name:
            raise CheckpointError(
                f"checkpoints of {folder} belong to another reward",
                value=trained,
                bound=reward_name,
                remedy=f"Load the reward {trained} with these adapters, or name the folder of {reward_name}.",
            )
        self._folders = step_folders(folder)
        if not self._folders:
            raise CheckpointError(
                "no checkpoints",
                value=str(folder),
                bound="folders step_NN with adapter_model.safetensors or model.safetensors",
                remedy="Finish at least one step of ttsnap finetune.",
            )
        kinds = {(path / _ADAPTER).is_file() for path in self._folders.values()}
        if len(kinds) > 1:
            raise CheckpointError(
                f"checkpoints of {folder} are of two kinds",
                value=[path.name for path in self._folders.values()],
                bound="adapters in all of them, or full weights in all of them",
                remedy="Keep the two runs in folders of their own.",
            )
        self.kind = "lora" if kinds == {True} else "full"
        self._module = module
        self._active: int | None = None
        self._peft: Any = None
        self._base: dict[str, torch.Tensor] = {}
        if self.kind == "lora":
            self._attach_adapters()

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps with weights, ascending."""
        return tuple(self._folders)

    def fingerprint(self, step: int) -> str:
        """Return a digest of the weights file of `step`."""
        path = self._folders[step]
        file = path / (_ADAPTER if self.kind == "lora" else _FULL)
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=8)).hexdigest()

    def base_state(self) -> dict[str, torch.Tensor]:
        """Return the base values of the weights that full checkpoints have replaced so far."""
        return self._base

    def use(self, step: int | None) -> None:
        """Make the weights of `step` (None: the base) the active ones."""
        if step is not None and step not in self._folders:
            raise CheckpointError(
                f"no noise-aware weights for step {step} in {self.folder}",
                value=step,
                bound=f"one of {list(self._folders)} or None",
                remedy="Use one of those steps, or finetune this one.",
            )
        if step == self._active:
            return
        if self.kind == "full":
            self._load_full(step)
        elif step is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            if self._active is None:
                self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(_name(step), inference_mode=True)
        self._active = step

    # -- adapters -----------------------------------------------------------------------------------------------

    def _attach_adapters(self) -> None:
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import safe_open

        device = next(self._module.parameters()).device
        for step, path in self._folders.items():
            name = _name(step)
            _check_adapter(path)
            with failures_as(
                CheckpointError,
                "adapter cannot be attached",
                value=str(path),
                bound="a LoRA adapter of this base model",
                remedy="Use the base model it was trained on, or train it again.",
            ):
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(self._module, str(path), adapter_name=name)
                else:
                    self._peft.load_adapter(str(path), adapter_name=name, torch_device=str(device))
                with safe_open(path / _ADAPTER, framework="pt") as file:
                    stored = set(file.keys())
            wanted = set(get_peft_model_state_dict(self._peft, adapter_name=name))
            if stored != wanted:
                raise CheckpointError(
                    f"adapter of step {step} does not fit: "
                    f"{len(wanted - stored)} missing and {len(stored - wanted)} unexpected keys",
                    value=sorted(stored ^ wanted)[:4],
                    bound="the keys of its own adapter_config.json on this base model",
                    remedy="Use the base model it was trained on, or train it again.",
                )
        keep_base_exact(self._module)
        self._peft.eval()
        self._peft.base_model.disable_adapter_layers()

    # -- full weights -------------------------------------------------------------------------------------------

    def _load_full(self, step: int | None) -> None:
        from safetensors.torch import load_file

        own = self._module.state_dict()
        state: dict[str, torch.Tensor] = {}
        if step is not None:
            path = self._folders[step] / _FULL
            with failures_as(
                CheckpointError,
                "checkpoint cannot be read",
                value=str(path),
                bound="a whole safetensors file",
                remedy="Train this step again, or remove its folder.",
            ):
                state = load_file(path)
            bad = [key for key, value in state.items() if key not in own or own[key].shape != value.shape]
            if bad or not state:
                raise CheckpointError(
                    f"checkpoint of step {step} does not fit the base model",
                    value=bad[:4] or "no weights",
                    bound="names and shapes of the base model",
                    remedy="Use the base model it was trained on, or train it again.",
                )
        for key in state.keys() - self._base.keys():  # touched for the first time: remember the base
            self._base[key] = own[key].detach().to("cpu", copy=True)
        # What this step does not bring comes back from the base, not from the step before.
        self._module.load_state_dict({**self._base, **state}, strict=False)


def _check_adapter(folder: Path) -> None:
    """Refuse an adapter_config.json that is no plain LoRA: some kinds change the base weights as they are attached."""
    path = folder / "adapter_config.json"
    remedy = "Use adapters of ttsnap finetune, or plain LoRA adapters of peft."
    about = read_json(path, "adapter configuration", error=CheckpointError, remedy=remedy)
    choice(f"{path}: peft_type", about.get("peft_type"), ("LORA",), error=CheckpointError)
    integer(f"{path}: r", about.get("r"), 1, _MOST_RANK, error=CheckpointError)
    starts = about.get("init_lora_weights", True)
    choice(f"{path}: init_lora_weights", starts, (True, False, "gaussian"), error=CheckpointError)
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "loftq_config"):
        if about.get(key):
            raise CheckpointError(f"{path}: {key}", value=about[key], bound="none", remedy=remedy)


def _name(step: int) -> str:
    return f"step_{step}"
