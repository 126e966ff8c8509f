"""The one interface of all reward models: prompts and images in, one number each out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ttsnap_lib._devices import as_device, default_device, memory_errors
from ttsnap_lib.checks import integer
from ttsnap_lib.errors import CheckpointError, RewardError

from .inputs import Images, as_list, check_tensor, open_image, prompt_list
from .preprocess import Preprocessing
from .text import TextBatch, TextCache
from .weights import sampled_digest

if TYPE_CHECKING:
    from .steps import StepSeries

__all__ = ["Reward"]


class Reward:
    """A reward model.

    Families fill in :meth:`encode_text` and :meth:`forward`; everything else is shared.

    Attributes
    ----------
    name : str
        The name under which scores are kept.
    module : torch.nn.Module or None
        What holds the weights, and what peft adapts; None when there is nothing to train.
    default_lora_targets : str or None
        Regular expression for ``peft.LoraConfig(target_modules=...)``: the linear layers of the image tower (and of
        the cross-attention, where the text looks at the image). Noise is in the image, so the text towers stay.
    preprocessing : Preprocessing or None
        How images become model input.
    device : torch.device
        Where the weights are.
    dtype : torch.dtype
        Type of weights and activations; scores are always float32.
    step : int or None
        The denoising step whose noise-aware weights are active; None is the base model.
    batch_size : int
        Images per forward of :meth:`score` unless the call says otherwise.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module | None = None,
        *,
        preprocessing: Preprocessing | None = None,
        default_lora_targets: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        self.name, self.module, self.preprocessing = name, module, preprocessing
        self.default_lora_targets = default_lora_targets
        self.device = as_device(device) if device is not None else default_device()
        self.dtype = dtype
        self.batch_size = integer("batch_size", batch_size, 1)
        self.step: int | None = None
        self._series: StepSeries | None = None
        self._texts = TextCache()
        self._compiled: Any = None

    # -- what a family fills in ---------------------------------------------------------------------------------

    def encode_text(self, prompts: Sequence[str]) -> TextBatch:
        """Return the encoded prompts, one row each, on the device; gradients flow where the family has a text tower."""
        raise NotImplementedError

    def forward(self, pixels: torch.Tensor, text: TextBatch | Sequence[str]) -> torch.Tensor:
        """Return the rewards of preprocessed images, with gradients to weights and pixels.

        Parameters
        ----------
        pixels : Tensor (n, 3, size, size)
            What :meth:`preprocess` returns.
        text : TextBatch or list of str
            What :meth:`encode_text` returns, with n rows or one row for all images; or the prompts themselves.

        Returns
        -------
        Tensor (n,)
            float32.
        """
        raise NotImplementedError

    # -- shared -------------------------------------------------------------------------------------------------

    def preprocess(self, images: Images, *, differentiable: bool = False) -> torch.Tensor:
        """Return images as model input, float32 (n, 3, size, size) on the reward's device.

        PIL images (or paths of image files) go through the published preprocessing to the pixel; float tensors
        (n, 3, H, W) in [0, 1] stay on their device, see :meth:`Preprocessing.tensor` for the tolerance.
        """
        if self.preprocessing is None:
            raise RewardError(
                f"reward {self.name} has no preprocessing of its own",
                value=self.name,
                bound="a reward with preprocessing",
                remedy="Call score() with images instead.",
            )
        if isinstance(images, torch.Tensor):
            return self.preprocessing.tensor(check_tensor(images).to(self.device), differentiable=differentiable)
        opened = [open_image(image) for image in as_list(images)]
        if not opened:
            return torch.empty(0, 3, self.preprocessing.size, self.preprocessing.size, device=self.device)
        return torch.stack([self.preprocessing.image(image) for image in opened]).to(self.device)

    def score(
        self,
        prompts: str | Sequence[str],
        images: Images,
        *,
        batch_size: int | None = None,
        check: bool = True,
    ) -> np.ndarray:
        """Return the reward of each image.

        Parameters
        ----------
        prompts : str or list of str
            One prompt for all images, or one each. Each distinct prompt is encoded once and kept while the weights
            stay the same.
        images : list of PIL images or paths, one PIL image, or Tensor (n, 3, H, W)
            Tensors are float in [0, 1] and never leave their device; they are rounded to 256 levels as a PNG is.
        batch_size : int, optional
            Images per forward.
        check : bool
            Refuse scores that are not finite; False returns them as they are.

        Returns
        -------
        ndarray (n,)
            float32.

        Raises
        ------
        RewardError
            Prompts that do not match the images, an image that cannot be used, a score that is not finite.
        DeviceError
            When the device runs out of memory.
        """
        if not isinstance(images, torch.Tensor):
            images = as_list(images)
        n = len(images)
        rows = prompt_list(prompts, n)
        size = self.batch_size if batch_size is None else integer("batch_size", batch_size, 1)
        parts = []
        with self._scoring(min(n, size)):
            for start in range(0, n, size):
                part = images[start : start + size]
                parts.append(self._score_batch(rows[start : start + size], part))
        scores = np.concatenate(parts) if parts else np.empty(0, np.float32)
        if check and not np.isfinite(scores).all():
            bad = np.flatnonzero(~np.isfinite(scores))
            raise RewardError(
                f"reward {self.name} gave a score that is not finite for image {bad[0]} (prompt {rows[bad[0]]!r})",
                value=[float(scores[i]) for i in bad[:8]],
                bound="finite numbers",
                remedy="Look at the image and the weights; in bfloat16 or float16 try float32.",
            )
        return scores

    def score_pixels(self, prompts: str | Sequence[str], pixels: torch.Tensor) -> np.ndarray:
        """Return the scores (n,) of images that are preprocessed already, without checks of the values."""
        rows = prompt_list(prompts, len(pixels))
        with self._scoring(len(rows)):
            return self._score_batch(rows, pixels, ready=True)

    def use_step(self, step: int | None) -> Reward:
        """Switch to the noise-aware weights of a denoising step, or to the base model with None; return self.

        Raises
        ------
        CheckpointError
            When there are no weights for `step`.
        """
        if step is not None or self._series is not None:
            if self._series is None:
                raise CheckpointError(
                    f"reward {self.name} has no noise-aware weights",
                    value=step,
                    bound="None",
                    remedy="Load it with adapters=<run folder of ttsnap finetune>.",
                )
            self._series.use(step)
        self.step = step
        return self

    @property
    def adapter_steps(self) -> tuple[int, ...]:
        """Steps that have noise-aware weights, ascending; empty for a base reward."""
        return self._series.steps if self._series is not None else ()

    @property
    def series_kind(self) -> str | None:
        """Kind of the noise-aware weights: ``"lora"`` is fast to switch, ``"full"`` slow; None without any."""
        return self._series.kind if self._series is not None else None

    def step_fingerprint(self, step: int) -> str:
        """Return a digest of the noise-aware weights of `step`."""
        if self._series is None or step not in self.adapter_steps:
            raise CheckpointError(
                f"reward {self.name} has no noise-aware weights for step {step}",
                value=step,
                bound=f"one of {list(self.adapter_steps)}",
                remedy="Attach a series that has them.",
            )
        return self._series.fingerprint(step)

    def attach_steps(self, folder: str | Path) -> Reward:
        """Add the noise-aware weights of a run folder (``step_14/ ... curriculum.json``); return self."""
        from .steps import StepSeries

        if self.module is None:
            raise RewardError(
                f"reward {self.name} has no weights to adapt",
                value=self.name,
                bound="a reward with weights",
                remedy="Attach checkpoints to a model reward.",
            )
        if self._series is not None:
            self.use_step(None)
        self._series = StepSeries(self.module, folder, reward_name=self.name)
        return self

    def compile(self) -> Reward:
        """Compile the forward pass with `torch.compile` on its first use; return self."""
        self._compiled = torch.compile(self.forward)
        return self

    def fingerprint(self) -> str:
        """Return a short digest of what decides the base scores: architecture, weights (sampled), type, settings.

        It tells scores of one model from those of another when a tensor is resumed; it is no security measure.
        """
        about = f"{type(self).__name__} {self.preprocessing} {self.dtype} {self._settings()}"
        state = self._base_state()
        if self.series_kind == "lora":  # the adapters wrap the base weights, and are not among them
            state = {key.replace(".base_layer", ""): value for key, value in state.items() if ".lora_" not in key}
        return sampled_digest(about, state)

    def _settings(self) -> str:
        """Return the settings of the family that change the scores."""
        return f"scale={getattr(self, 'scale', None)} standardize={getattr(self, 'standardize', None)}"

    def _base_state(self) -> dict[str, torch.Tensor]:
        if self.module is None:
            return {}
        own = {key: value for key, value in self.module.state_dict().items() if value.is_floating_point()}
        return {**own, **(self._series.base_state() if self._series is not None else {})}

    def clear_cache(self) -> None:
        """Forget encoded prompts. Needed only after weights were replaced without an in-place update."""
        self._texts.clear()

    def __call__(self, prompts: str | Sequence[str], images: Images, **options: Any) -> np.ndarray:
        """Score images; the same as :meth:`score`."""
        return self.score(prompts, images, **options)

    def __repr__(self) -> str:
        steps = f", adapter_steps={self.adapter_steps}" if self.adapter_steps else ""
        return f"{type(self).__name__}({self.name!r}, device={str(self.device)!r}, dtype={self.dtype}{steps})"

    # -- inside -------------------------------------------------------------------------------------------------

    def _score_batch(self, prompts: list[str], images: Any, *, ready: bool = False) -> np.ndarray:
        pixels = images.to(self.device) if ready else self.preprocess(images)
        text = self._cached_text(prompts)
        forward = self._compiled or self.forward
        scores = forward(pixels, text)
        if scores.shape != (len(images),):
            raise RewardError(
                f"reward {self.name} gave scores of the wrong shape",
                value=tuple(scores.shape),
                bound=f"({len(images)},)",
                remedy="Return one number per image.",
            )
        return scores.float().cpu().numpy()

    def _cached_text(self, prompts: list[str]) -> TextBatch:
        # In-place updates (an optimizer's step, load_state_dict) raise a parameter's version: no stale rows.
        versions = sum(p._version for p in self.module.parameters()) if self.module is not None else 0
        return self._texts.rows(prompts, self.encode_text, (self.step, versions))

    @contextlib.contextmanager
    def _scoring(self, n: int) -> Iterator[None]:
        """For `n` images at once: no gradients, no dropout; training mode comes back afterwards."""
        training = [part for part in self.module.modules() if part.training] if self.module is not None else []
        remedy = "Use a smaller batch_size, or dtype bfloat16."
        try:
            for part in training:
                part.training = False
            with (
                torch.no_grad(),
                memory_errors(n, doing=f" while scoring with {self.name} on {self.device}", remedy=remedy),
            ):
                yield
        finally:
            for part in training:
                part.training = True
