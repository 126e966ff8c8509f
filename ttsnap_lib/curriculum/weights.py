"""What is trained and how it is kept: LoRA adapters in the reward's own module, or its weights themselves."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ttsnap_lib.errors import CheckpointError, CurriculumError
from ttsnap_lib.rewards.attention import keep_base_exact
from ttsnap_lib.rewards.base import Reward

from .config import CurriculumConfig

__all__ = ["RewardModule", "Weights", "checkpoint_blocks", "own_randomness", "trainable_module"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
    """Return the module of a base reward.

    Raises
    ------
    CurriculumError
        A reward without weights, or with noise-aware ones already.
    """
    if reward.module is None:
        raise CurriculumError(
            f"reward {reward.name} has no weights to train",
            value=reward.name,
            bound="a reward with weights",
            remedy="Finetune a model reward, not a function.",
        )
    if reward.adapter_steps:
        raise CurriculumError(
            f"reward {reward.name} has noise-aware weights already",
            value=reward.adapter_steps,
            bound="a base reward",
            remedy="Load it without adapters.",
        )
    if any("lora_" in name for name, _ in reward.module.named_parameters()):
        raise CurriculumError(
            f"reward {reward.name} has adapters in its module already",
            value="lora",
            bound="a base reward",
            remedy="Load it again: its scores would be wrong as targets.",
        )
    return reward.module


class Weights:
    """The trained parameters of a reward.

    Parameters
    ----------
    reward : Reward
        A base reward. LoRA layers are put into its module; parameters that are not trained stop requiring gradients.
    config : CurriculumConfig
    lent : bool
        Remember what :meth:`release` needs to give the reward back as it was.

    Raises
    ------
    CurriculumError
        A reward without weights, or with noise-aware ones already; targets that match nothing.
    """

    def __init__(self, reward: Reward, config: CurriculumConfig, *, lent: bool = False) -> None:
        module = trainable_module(reward)
        self.reward, self.config, self.module = reward, config, module
        self._peft: Any = None
        self._required = {name: p.requires_grad for name, p in module.named_parameters()}
        if config.method == "lora":
            self._inject()
        else:
            self._choose()
        self._base = self.state() if lent and self._peft is None else {}
        # Dropout of the base stays off: the target is what the base says without it.
        module.eval()
        for name, part in module.named_modules():
            if "lora_dropout" in name:
                part.train()
        if config.gradient_checkpointing:
            checkpoint_blocks(module)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, torch.Tensor]:
        """Return a copy of the trained values, on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put trained values back."""
        own = self.parameters
        if {name: p.shape for name, p in own.items()} != {name: value.shape for name, value in state.items()}:
            raise CheckpointError(
                "saved state of another model",
                value=sorted(state.keys() ^ own.keys())[:4] or "other shapes",
                bound="the parameters that this configuration trains",
                remedy="Resume with the reward and the settings that it was made with, or use another folder.",
            )
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(state[name])

    def save_step(self, folder: Path) -> None:
        """Write the weights as the checkpoint of a step into `folder`, readable by peft and by `attach_steps`."""
        from safetensors.torch import save_file

        dtype = _DTYPES[self.config.save_dtype]
        if self._peft is not None:
            from peft import get_peft_model_state_dict

            about = self._peft.peft_config["default"]
            about.base_model_name_or_path = None  # else peft asks the hub about it whenever it is loaded
            inference, about.inference_mode = about.inference_mode, True
            about.save_pretrained(str(folder))
            about.inference_mode = inference
            state, name = (
                get_peft_model_state_dict(self._peft, save_embedding_layers=False),
                "adapter_model.safetensors",
            )
        else:
            state, name = self.parameters, "model.safetensors"
        out = {key: value.detach().to("cpu", dtype, copy=True).contiguous() for key, value in state.items()}
        save_file(out, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)

    def release(self) -> None:
        """Give a lent reward back as it was taken: without adapters, with the base's values."""
        if self._peft is not None:
            self._peft.unload()
        elif self._base:
            self.load(self._base)
        for part in self.module.modules():
            if hasattr(vars(part).get("forward"), "__wrapped__"):  # what checkpoint_blocks put there
                del part.forward
        for name, p in self.module.named_parameters():
            p.requires_grad_(self._required[name])
        self.reward.clear_cache()

    # -- inside -------------------------------------------------------------------------------------------------

    def _inject(self) -> None:
        from peft import LoraConfig, get_peft_model

        targets = self.config.lora_targets or self.reward.default_lora_targets
        names = [name for name, _ in self.module.named_modules() if name]
        matched = [name for name in names if targets and re.fullmatch(targets, name)]
        if not matched:
            raise CurriculumError(
                f"LoRA targets match no layer of {self.reward.name}",
                value=targets,
                bound="a regular expression that matches whole names of layers",
                remedy=f"Layers are called for example {_examples(self.module)}.",
            )
        about = LoraConfig(
            r=self.config.lora_rank,
            lora_alpha=self.config.lora_alpha,  # type: ignore[arg-type]  # any number works
            lora_dropout=self.config.lora_dropout,
            target_modules=targets,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            try:
                self._peft = get_peft_model(self.module, about)
            except ValueError as error:
                raise CurriculumError(
                    f"LoRA cannot be put into {self.reward.name} ({str(error)[:200]})",
                    value=targets,
                    bound="names of linear, convolution or attention layers",
                    remedy=f"Layers are called for example {_examples(self.module)}.",
                ) from error
        keep_base_exact(self.module)

    def _choose(self) -> None:
        chosen = 0
        for name, parameter in self.module.named_parameters():
            wanted = self.config.trainable is None or re.fullmatch(self.config.trainable, name) is not None
            parameter.requires_grad_(wanted and parameter.is_floating_point())
            chosen += wanted
        if not chosen:
            raise CurriculumError(
                f"trainable matches no parameter of {self.reward.name}",
                value=self.config.trainable,
                bound="a regular expression that matches whole names of parameters",
                remedy=f"They are called for example {[n for n, _ in self.module.named_parameters()][:3]}.",
            )


def _examples(module: torch.nn.Module) -> list[str]:
    found = [name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    return found[:: max(1, len(found) // 3)][:3]


def checkpoint_blocks(module: torch.nn.Module) -> int:
    """Make every block of every stack of blocks compute its activations again in the backward pass.

    Works alike for all families, in training and in evaluation mode.

    Returns
    -------
    int
        How many blocks.
    """
    stacks = [
        (name, part)
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.ModuleList | torch.nn.Sequential) and len(part) > 1
    ]
    outer = [part for name, part in stacks if not any(name.startswith(f"{other}.") for other, _ in stacks)]
    blocks = [block for stack in outer for block in stack if sum(1 for _ in block.children()) > 1]
    for block in blocks:
        block.forward = _recomputed(block.forward)
    return len(blocks)


def _recomputed(forward: Any) -> Any:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


@contextmanager
def own_randomness(seed: tuple[int, ...], device: torch.device) -> Iterator[None]:
    """Seed dropout by counters, and leave the global generators as they were: a resumed run draws the same."""
    import numpy as np

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
        yield
