"""The weights of a run: trained, written for each step, saved for going on; full checkpoints from elsewhere."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttsnap_lib.checks import as_dtype, integer
from ttsnap_lib.errors import CheckpointError, CurriculumError, RewardError
from ttsnap_lib.files import as_path, atomic_folder, failures_as, refuse_other, write_json
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.rewards.base import Reward
from ttsnap_lib.rewards.checkpoints import (
    ADAPTER,
    CURRICULUM,
    FULL,
    check_fit,
    keep_base_exact,
    read_curriculum,
    read_state,
)

STATE = "state.pt"

_FREE = ("trajectories", "validation", "save_every", "accumulation")  # how a run is carried out, not what comes of it
_FILE = re.compile(r"(?:ct|step_?|s)(\d+)\.(?:pt|pth|bin|safetensors)", re.IGNORECASE)
_PREFIXES = ("", "module.", "_orig_mod.", "model.")
_CONSTANT = (r"(.*\.)?position_ids", r"(.*\.)?attn_mask")


class RewardModule(torch.nn.Module):
    """A reward's forward as a module, so that accelerate can wrap it."""

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.module = reward.module
        self._reward = [reward]  # in a list: the reward is no module

    def forward(self, pixels: torch.Tensor, text: Any) -> torch.Tensor:
        """Return the rewards (n,)."""
        return self._reward[0].forward(pixels, text)


def trainable_module(reward: Reward) -> torch.nn.Module:
    """Return the module of a base reward."""
    if reward.module is None:
        raise CurriculumError(f"reward {reward.name} has no weights to train. Finetune a model, not a function.")
    if reward.preprocessing is None:
        raise CurriculumError(
            f"reward {reward.name} takes pictures as they are, expected one that makes pixels of one size of them, which "
            "training keeps in memory. Finetune a CLIP or BLIP reward."
        )
    if reward.outputs or reward.reads_metadata:
        raise CurriculumError(
            f"reward {reward.name} gives several numbers, or reads metadata: got {reward.names}, expected one number of "
            "image and prompt. Finetune another reward."
        )
    if reward.adapter_steps or any("lora_" in name for name, _ in reward.module.named_parameters()):
        raise CurriculumError(
            f"reward {reward.name} has noise-aware weights or adapters already. Load the base reward, without adapters."
        )
    return reward.module


class Weights:
    """The trained parameters of a base reward: its own, or those of LoRA layers that are put into its module.

    What is not trained stops requiring gradients. A `lent` reward can be given back as it was, see :meth:`release`.
    """

    def __init__(self, reward: Reward, config: CurriculumConfig, *, lent: bool = False) -> None:
        self.reward, self.config, self.module = reward, config, trainable_module(reward)
        self._peft: Any = None
        self._required = {name: p.requires_grad for name, p in self.module.named_parameters()}
        if config.method == "lora":
            self._inject()
        else:
            for parameter in self.module.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
        self._base = self.state() if lent and self._peft is None else {}
        self.module.eval()  # no dropout: the target is what the base says without it

    def _inject(self) -> None:
        from peft import LoraConfig, get_peft_model

        targets = self.reward.default_lora_targets
        if not targets:
            raise CurriculumError(
                f"reward {self.reward.name} names no layers for LoRA (default_lora_targets). Set method to full."
            )
        about = LoraConfig(
            r=self.config.lora_rank,
            lora_alpha=self.config.lora_alpha,  # type: ignore[arg-type]  # any number works
            target_modules=targets,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers 5 renamed
            torch.manual_seed(self.config.seed)
            self._peft = get_peft_model(self.module, about)
        keep_base_exact(self.module)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, torch.Tensor]:
        """Return a copy of the trained values, on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put trained values back."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state[name])

    def save_step(self, folder: Path) -> None:
        """Write the weights as the checkpoint of a step into `folder`, readable by peft and by `attach_steps`."""
        state: Mapping[str, torch.Tensor] = self.parameters
        if self._peft is not None:
            from peft import get_peft_model_state_dict

            about = self._peft.peft_config["default"]
            about.base_model_name_or_path = None  # else peft asks the hub about it whenever it is loaded
            inference, about.inference_mode = about.inference_mode, True
            about.save_pretrained(str(folder))
            about.inference_mode = inference
            state = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        _save(state, folder / (FULL if self._peft is None else ADAPTER), as_dtype(self.config.save_dtype))

    def release(self) -> None:
        """Give a lent reward back as it was taken: without adapters, with the base's values."""
        if self._peft is not None:
            self._peft.unload()
        elif self._base:
            self.load(self._base)
        for name, p in self.module.named_parameters():
            p.requires_grad_(self._required[name])
        self.reward.clear_cache()


def _save(state: Mapping[str, torch.Tensor], path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    out = {key: value.detach().to("cpu", dtype, copy=True).contiguous() for key, value in state.items()}
    save_file(out, path, metadata={"format": "pt"})
    path.chmod(0o644)


# The run folder: what it is a run of, and the state from which it goes on


def identity(config: CurriculumConfig, **digests: Any) -> dict[str, Any]:
    """Return what decides a run's result: settings, weights, pictures and targets."""
    kept = {name: value for name, value in config.to_dict().items() if name not in _FREE}
    return json.loads(json.dumps({"config": kept, **digests}))


def array_digest(array: np.ndarray | None) -> str | None:
    """Return a digest of an array's content."""
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def open_run(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another run."""
    remedy = "Choose another folder, or pass overwrite=True (--overwrite) to begin anew."
    if (folder / CURRICULUM).is_file():
        refuse_other(folder, read_curriculum(folder).get("identity") or {}, wanted, CurriculumError, remedy)
    elif any(folder.glob("step_*")):
        raise CurriculumError(f"{folder} holds checkpoints without {CURRICULUM}. {remedy}")


def read_state_file(folder: Path) -> dict[str, Any] | None:
    """Return the saved state, or None when there is none."""
    path = folder / STATE
    if not path.is_file():
        return None
    with failures_as(CheckpointError, f"saved state {path} cannot be read. Delete it: the run begins anew."):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["identity"]
        return state


def write_curriculum(
    folder: Path, reward: str, config: CurriculumConfig, who: Mapping[str, Any], rows: list[dict], about: Mapping
) -> None:
    """Write ``curriculum.json``: what the series is, and how each step came out."""
    content = {
        "schema": 1,
        "reward": reward,
        "method": config.method,
        "steps": sorted({row["step"] for row in rows}),
        "identity": dict(who),
        "metrics": [{name: None if np.isnan(value) else value for name, value in row.items()} for row in rows],
        **about,
    }
    write_json(folder / CURRICULUM, content)


# Full checkpoints from elsewhere


def import_series(
    checkpoints: str | Path | Mapping[int, str | Path],
    folder: str | Path,
    reward: Reward,
    *,
    dtype: str = "float32",
) -> Path:
    """Turn full state dicts, one per step, into a series that every reward and command takes; return the run folder.

    `checkpoints` is a folder of ``Ct14.pt`` and so on (the authors' names), or step -> file; they are read as plain
    tensors, and pickled code is never run. Every key and shape must fit the base `reward`. `folder` is written whole or
    not at all, in `dtype`: ``step_14/model.safetensors`` and ``curriculum.json``.
    """
    kept, own = as_dtype(dtype), trainable_module(reward).state_dict()
    files = checkpoints if isinstance(checkpoints, Mapping) else find_checkpoints(checkpoints)
    if not files:
        raise CheckpointError(
            f"no checkpoints to import in {checkpoints}, expected files like Ct14.pt. Check the folder."
        )
    sources = {
        integer("checkpoint's step", step, 0, error=CheckpointError): as_path("checkpoint", path, error=CheckpointError)
        for step, path in files.items()
    }
    folder = as_path("run folder", folder, error=CheckpointError)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty: steps of two series must not mix. Choose another folder.")
    with atomic_folder(folder) as part:
        for step, path in sources.items():
            place = part / f"step_{step:02d}"
            place.mkdir()
            _save(_fitted(step, path, own), place / FULL, kept)
        about = {"schema": 1, "reward": reward.name, "method": "full", "steps": sorted(sources)}
        write_json(part / CURRICULUM, {**about, "imported_from": [path.name for path in sources.values()]})
    return folder


def find_checkpoints(folder: str | Path) -> dict[int, Path]:
    """Return step -> file of a folder of full checkpoints, ``Ct14.pt`` and its like, in descending order of steps."""
    found: dict[int, Path] = {}
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []:
        match = _FILE.fullmatch(path.name)
        if match and found.setdefault(int(match[1]), path) != path:
            both = f"{found[int(match[1])].name} and {path.name}"
            raise CheckpointError(f"two checkpoints for step {match[1]}: got {both}. Move one of them away.")
    return dict(sorted(found.items(), reverse=True))


def _fitted(step: int, path: Path, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read a state dict and bring its keys to the model's own."""
    try:
        given = read_state(path)
    except RewardError as error:
        raise CheckpointError(f"checkpoint of step {step}: {error}") from error
    best = max(_PREFIXES, key=lambda prefix: len({k.removeprefix(prefix) for k in given} & own.keys()))
    state = {key.removeprefix(best): value for key, value in given.items()}
    try:
        check_fit(own, state, source=path.name, constants=_CONSTANT)
    except RewardError as error:
        raise CheckpointError(
            f"checkpoint of step {step} is of another model: {error} Name the reward that it was made from."
        ) from error
    kept = {key: value for key, value in state.items() if key in own and value.is_floating_point()}
    bad = [key for key, value in kept.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"checkpoint of step {step} holds weights that are not finite: {bad[:4]}. Get the file again."
        )
    return kept
