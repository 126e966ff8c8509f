"""How a reward is finetuned: the settings, the configurations that ship, and the learning rate of every update."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttsnap_lib.checks import Plain, choice, integer, real, text
from ttsnap_lib.errors import ConfigError
from ttsnap_lib.files import as_path, read_yaml

_CONFIGS = Path(__file__).with_name("configs")
_LOSSES = ("mse", "centered_mse", "preference", "listwise")
_LOWEST = {
    "validation_prompts": 0, "epochs_per_step": 1, "lora_rank": 1, "batch_size": 1, "group_size": 1, "accumulation": 1,
    "warmup_updates": 0, "save_every": 1,
}  # fmt: skip
_REALS: dict[str, dict[str, Any]] = {
    **{name: {"low": 0} for name in (*_LOSSES, "weight_decay", "max_grad_norm")},
    **{name: {"low": 0, "open_low": True} for name in ("lora_alpha", "preference_tau", "learning_rate")},
    "beta1": {"low": 0, "high": 0.9999},
    "beta2": {"low": 0, "high": 0.999999},
    "decay_floor": {"low": 0, "high": 1},
}
_CHOICES = {
    "method": ("lora", "full"),
    "decay": ("linear", "cosine", "exponential", "constant"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "keep": ("best", "last"),
    "save_dtype": ("float32", "float16", "bfloat16"),
    **dict.fromkeys(("curriculum", "standardize", "check_targets"), (True, False)),
}


@dataclass(frozen=True)
class CurriculumConfig(Plain):
    """How a reward is finetuned.

    Parameters
    ----------
    reward : str
        What :func:`ttsnap_lib.load_reward` takes.
    trajectories, validation : str, optional
        Where the pictures come from when the call does not say, see :func:`ttsnap_lib.finetuning.data.open_images`.
    validation_prompts : int
        Training prompts held out for validation (the last ones) when there is no `validation`; 0 goes without.
    steps : tuple of int
        Denoising steps in descending order; each starts from the weights of the one before.
    curriculum : bool
        False trains one model on all the steps mixed, and writes it for each of them: the ablation.
    epochs_per_step : int
        Passes over the training pictures at each step.
    max_updates_per_step : int, optional
        Stops a step early, for trials.
    method : {"lora", "full"}
        Adapters, or the weights themselves.
    lora_rank, lora_alpha
        Of the adapters.
    mse, centered_mse, preference, listwise : float
        Weights of the losses: squared error to the target; the same after both lost their mean over the images of
        the prompt in the batch; Bradley-Terry on pairs of one prompt; cross-entropy of the softmax over the images
        of one prompt. The last three need `group_size` of 2 and more.
    preference_tau : float
        Temperature of the last two, in units of the reward (of its deviation with `standardize`).
    standardize : bool
        Measure targets and predictions in deviations of the batch's targets from their mean.
    batch_size : int
        Pictures per update, over all processes and accumulated parts.
    group_size : int
        Pictures of one prompt that come together; 1 shuffles freely.
    accumulation : int
        Parts that a batch is processed in, each on its own: less memory, the same result.
    learning_rate, weight_decay, beta1, beta2
        Of AdamW. Rate and optimizer start anew at each step.
    warmup_updates : int
        Updates over which the rate rises.
    decay : {"linear", "cosine", "exponential", "constant"}
        How the rate falls after that.
    decay_floor : float
        Where it ends, as a fraction of the starting rate (exponential: 1e-4 at least).
    max_grad_norm : float
        Gradients are clipped to this norm; 0 leaves them.
    mixed_precision : {"no", "bf16", "fp16"}
        Of activations.
    seed : int
        Of the adapters' start and the order of the data.
    keep : {"best", "last"}
        Which weights a step ends with: the better ones by validation tau, of those it started with and the last; or
        the last.
    save_every : int
        Updates between saved states, from which a killed run goes on.
    save_dtype : {"float32", "float16", "bfloat16"}
        Type of the weights in the checkpoints of the steps.
    check_targets : bool
        Refuse a ground-truth file that does not agree with the base reward on a few images.

    Raises
    ------
    ConfigError
        A value that cannot be right, with its bound.
    """

    _what = "finetuning settings"

    reward: str = "pocket-clip"
    trajectories: str | None = None
    validation: str | None = None
    validation_prompts: int = 32
    steps: tuple[int, ...] = tuple(range(14, -1, -1))
    curriculum: bool = True
    epochs_per_step: int = 1
    max_updates_per_step: int | None = None
    method: str = "lora"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    mse: float = 1.0
    centered_mse: float = 0.0
    preference: float = 0.0
    listwise: float = 0.0
    preference_tau: float = 0.5
    standardize: bool = False
    batch_size: int = 100
    group_size: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_updates: int = 0
    decay: str = "linear"
    decay_floor: float = 0.5
    max_grad_norm: float = 5.0
    mixed_precision: str = "no"
    seed: int = 0
    keep: str = "best"
    save_every: int = 200
    save_dtype: str = "float32"
    check_targets: bool = True

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {name: integer(name, getattr(self, name), low) for name, low in _LOWEST.items()}
        checked |= {name: real(name, getattr(self, name), **bounds) for name, bounds in _REALS.items()}
        checked["seed"] = integer("seed", self.seed, 0, 2**63 - 1)  # what torch takes
        if self.max_updates_per_step is not None:
            checked["max_updates_per_step"] = integer("max_updates_per_step", self.max_updates_per_step, 1)
        checked["steps"] = _steps(self.steps)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name, options in _CHOICES.items():
            choice(name, getattr(self, name), options)
        for name in ("reward", "trajectories", "validation"):
            if name == "reward" or getattr(self, name) is not None:
                text(name, getattr(self, name))
        if self.batch_size % self.group_size:
            raise ConfigError(
                f"batch_size: got {self.batch_size}, expected a multiple of group_size ({self.group_size}). Change one."
            )
        if self.accumulation > self.batch_size // self.group_size:
            raise ConfigError(
                f"accumulation: got {self.accumulation}, expected at most batch_size / group_size. Lower accumulation."
            )
        used = [name for name in _LOSSES if getattr(self, name)]
        if not used:
            raise ConfigError(f"losses: got 0, expected a weight above 0 for one of {_LOSSES}. Set mse to 1.")
        if used != ["mse"] and self.group_size < 2:
            raise ConfigError(
                f"group_size with {used[-1]}: got {self.group_size}, expected 2 or more images to compare. Set it to 8."
            )

    def replace(self, **changes: Any) -> CurriculumConfig:
        """Return a copy with other values; unknown names are an error."""
        return type(self).from_dict({**self.to_dict(), **changes})


def _steps(given: Any) -> tuple[int, ...]:
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        raise ConfigError(f"steps: got {given!r}, expected a list of steps. Write [14, 13, 12], for example.")
    steps = tuple(integer("steps", step, 0) for step in given)
    if not steps or list(steps) != sorted(set(steps), reverse=True):
        raise ConfigError(
            f"steps: got {steps!r}, expected distinct steps in descending order, from clean to noisy. Sort them."
        )
    return steps


def shipped_configs() -> list[str]:
    """Return the names of the configurations that come with the package."""
    return sorted(path.stem for path in _CONFIGS.glob("*.yaml"))


def load_config(source: str | Path, **changes: Any) -> CurriculumConfig:
    """Load settings from a YAML file or one of :func:`shipped_configs`, such as ``"flux-pickscore"``, changed by `changes`.

    A ConfigError for no such file or name, broken YAML, an unknown key, a bad value.
    """
    path = as_path("finetuning configuration", source)
    if not path.suffix and (_CONFIGS / f"{source}.yaml").is_file():
        path = _CONFIGS / f"{source}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(str(source), shipped_configs(), n=1)
        raise ConfigError(
            f"finetuning configuration: got {source}, expected a YAML file or one of {shipped_configs()}. "
            f"{f'Did you mean {close[0]!r}?' if close else 'Check the path.'}"
        )
    values = read_yaml(path, "finetuning configuration", remedy="Write lines of `name: value`.")
    try:
        return CurriculumConfig.from_dict(values).replace(**changes)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def learning_rate(config: CurriculumConfig, update: int, updates: int) -> float:
    """Return the rate of an update of a step that has `updates`; a pure function, so that a resumed run has it too."""
    if update < config.warmup_updates:
        return config.learning_rate * (update + 1) / config.warmup_updates
    span = updates - config.warmup_updates
    progress = min(1.0, (update - config.warmup_updates) / (span - 1)) if span > 1 else 0.0
    floor = config.decay_floor
    if config.decay == "linear":
        factor = 1 - (1 - floor) * progress
    elif config.decay == "cosine":
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    elif config.decay == "exponential":
        factor = max(floor, 1e-4) ** progress
    else:
        factor = 1.0
    return config.learning_rate * factor
