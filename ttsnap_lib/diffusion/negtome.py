"""Negative Token Merging: more variety among the images of a prompt (arXiv 2412.01339).

Every image token of a group of images is pushed away from the token of the group's first image that it resembles
most: ``(1 + alpha) * h - alpha * h_ref`` where their cosine similarity is above a threshold. It works on the outputs
of the stock attention processors through module hooks, so these stay what they are, and taking the hooks away leaves
the pipeline as it was.

>>> with NegToMe(group_size=4).install(pipeline):
...     candidates = denoiser.run(noise, text, last_step=19)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch.nn.functional import normalize

from ttsnap_lib.checks import Plain, choice, integer, real
from ttsnap_lib.diffusion.families import adapter_of
from ttsnap_lib.errors import ConfigError, PipelineError

_PUBLISHED: dict[str, dict[str, Any]] = {
    "FluxPipeline": {"alpha": 1.2, "threshold": 0.65, "start": 1000, "end": 900, "min_features": 1},
    "StableDiffusionXLPipeline": {"alpha": 2.5, "threshold": 0.7, "start": 950, "end": 800, "min_features": 32},
}
_ROUNDING = 1e-3  # of a timestep: 1000 * sigma need not be the whole number it stands for


@dataclass(frozen=True)
class NegToMe(Plain):
    """Settings of Negative Token Merging. None stands for the published value of the pipeline's family.

    Parameters
    ----------
    group_size : int
        Images of a batch that share a reference: images 0 to group_size - 1 the first of them, and so on. Fixed, so
        that an image does not depend on how many groups a batch holds. A batch must hold whole groups.
    alpha : float, optional
        Strength. Published: 1.2 for FLUX, 2.5 for SDXL.
    threshold : float, optional
        Cosine similarity above which a token is moved. Published: 0.65 for FLUX, 0.7 for SDXL.
    start, end : float, optional
        Timesteps between which it works, both included, start being the noisier. Published: 1000 to 900 for FLUX,
        950 to 800 for SDXL (so not at its first step).
    min_features : int, optional
        Least height and width of the features it works on. Published: 32 for SDXL; no bound for FLUX. Smaller
        images than 1024 pixels want a smaller bound, or little or nothing is merged.
    matching : {"paper", "released"}
        ``"paper"``: each token's best match among the reference's tokens. ``"released"``: the index found by the
        released code, which takes the maximum over the wrong axis: at each position of the reference, the token of
        the image that matches it best, then used as a position in the reference.
    """

    group_size: int = 4
    alpha: float | None = None
    threshold: float | None = None
    start: float | None = None
    end: float | None = None
    min_features: int | None = None
    matching: str = "paper"
    _what = "negtome"

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "group_size", integer("negtome.group_size", self.group_size, 1))
        if self.min_features is not None:
            put(self, "min_features", integer("negtome.min_features", self.min_features, 1))
        for name, low, high in (("alpha", 0, None), ("threshold", -1, 1), ("start", 0, 1000), ("end", 0, 1000)):
            if getattr(self, name) is not None:
                put(self, name, real(f"negtome.{name}", getattr(self, name), low, high))
        if self.start is not None and self.end is not None and self.start < self.end:
            raise ConfigError(
                f"negtome.start: got {self.start:g}, expected at least end, {self.end:g}. Timesteps fall: start is the larger."
            )
        choice("negtome.matching", self.matching, ("paper", "released"))

    def resolved(self, pipeline: Any) -> NegToMe:
        """Return the settings with the published values of `pipeline`'s family filled in."""
        family = adapter_of(pipeline).pipeline
        if family not in _PUBLISHED:
            raise PipelineError(f"NegToMe: got a {family}, expected one of {list(_PUBLISHED)}. Leave it out.")
        if getattr(pipeline, "ttsnap_compile", ""):
            raise ConfigError(
                "NegToMe works between the layers, which a compiled model hides. Load it without compile."
            )
        filled = {name: value for name, value in _PUBLISHED[family].items() if getattr(self, name) is None}
        return replace(self, **filled)

    def active_steps(self, pipeline: Any, timesteps: Sequence[float] | torch.Tensor) -> tuple[int, ...]:
        """Return the steps of ``Denoiser.timesteps`` at which it works; prune after the last of them."""
        settings = self.resolved(pipeline)
        return tuple(step for step, timestep in enumerate(timesteps) if settings._covers(float(timestep)))

    def install(self, pipeline: Any) -> Installed:
        """Install NegToMe on `pipeline` until the returned handle is removed, or its ``with`` block ends.

        Load adapters (LoRA) before. Both directions of classifier-free guidance have references of their own.
        """
        return Installed(self.resolved(pipeline), pipeline)

    def _covers(self, timestep: float) -> bool:
        settings: Any = self  # resolved() has filled start and end in
        return settings.end - _ROUNDING <= timestep <= settings.start + _ROUNDING


class Installed:
    """NegToMe at work on a pipeline; a context manager. Made by :meth:`NegToMe.install`."""

    def __init__(self, settings: NegToMe, pipeline: Any) -> None:
        self.settings = settings  # with every value filled in
        self.merges = 0  # how many times an attention output was merged
        self._pipeline = pipeline
        self._adapter = adapter_of(pipeline)
        self._model = self._adapter.component(pipeline)
        if getattr(self._model, "_negtome", None) is not None:
            raise PipelineError(
                f"NegToMe is installed on this {type(pipeline).__name__} already. Call remove() on the first one."
            )
        self._model._negtome = self
        self._active = self._too_small = False  # in the window of timesteps now; met features below min_features
        self._large = True  # whether the present features are large enough
        self._image_tokens = 0
        self._hooks = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._flux = self._adapter.pipeline == "FluxPipeline"
        self._hooks += self._flux_hooks() if self._flux else self._unet_hooks()

    def remove(self) -> None:
        """Take all hooks away; the pipeline is what it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if getattr(self._model, "_negtome", None) is self:
            del self._model._negtome
        if self._too_small and not self.merges:
            self._too_small = False
            warnings.warn(
                f"NegToMe never worked: all features are smaller than min_features={self.settings.min_features}. "
                "Set a smaller min_features.",
                stacklevel=2,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    # Hooks

    def _begin(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before each run of the model: is this timestep in the window, and how is the batch made up."""
        # FLUX hands its model the timestep in low precision; the pipeline keeps the exact one.
        timestep = self._pipeline._current_timestep if self._flux else args[1]
        self._active = self.settings._covers(float(torch.as_tensor(timestep).flatten()[0]))
        if not self._active:
            return
        hidden = kwargs["hidden_states"] if self._flux else args[0]
        self._image_tokens = hidden.shape[1]
        halves = 2 if not self._flux and self._pipeline.do_classifier_free_guidance else 1
        images = len(hidden) // halves
        if images % self.settings.group_size:
            raise PipelineError(
                f"NegToMe: got a batch of {images}, expected a multiple of group_size={self.settings.group_size}. Fill "
                "the batch up, or choose another group_size; prune candidates after its window only."
            )

    def _flux_hooks(self) -> list[Any]:
        """Between attention and its output projection, on image tokens."""
        model = self._model
        dual = [block.attn.to_out[0] for block in model.transformer_blocks]
        # Single blocks project attention and MLP together; the attention's output is what goes in.
        single = [block.attn for block in model.single_transformer_blocks]
        return [
            *(module.register_forward_pre_hook(self._before_projection) for module in dual),
            *(module.register_forward_hook(self._after_joint_attention) for module in single),
        ]

    def _unet_hooks(self) -> list[Any]:
        """After the output projection of self- and cross-attention in the up blocks."""
        towers = [tower for block in self._model.up_blocks for tower in getattr(block, "attentions", None) or ()]
        blocks = [block for tower in towers for block in tower.transformer_blocks]
        attentions = [
            attention for block in blocks for attention in (block.attn1, block.attn2) if attention is not None
        ]
        return [
            *(tower.register_forward_pre_hook(self._note_size, with_kwargs=True) for tower in towers),
            *(attention.register_forward_hook(self._after_attention) for attention in attentions),
        ]

    def _before_projection(self, module: Any, args: tuple) -> tuple | None:
        return (self._merged(args[0]), *args[1:]) if self._active else None

    def _after_joint_attention(self, module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not self._active:
            return None
        text = output.shape[1] - self._image_tokens  # text tokens come first and stay
        return torch.cat([output[:, :text], self._merged(output[:, text:])], dim=1)

    def _note_size(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        features = args[0] if args else kwargs["hidden_states"]
        self._large = min(features.shape[-2:]) >= self.settings.min_features
        self._too_small |= self._active and not self._large

    def _after_attention(self, module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        return self._merged(output) if self._active and self._large else None

    def _merged(self, tokens: torch.Tensor) -> torch.Tensor:
        self.merges += 1
        # Groups are consecutive images, so those of the two guidance halves never mix.
        settings: Any = self.settings
        return merge(tokens, settings.group_size, settings.alpha, settings.threshold, settings.matching)


def merge(
    tokens: torch.Tensor, group_size: int, alpha: float, threshold: float, matching: str = "paper"
) -> torch.Tensor:
    """Push the tokens of each image away from their matches in the first image of its group, which keeps its bits.

    `tokens` are (images, tokens, channels), images a multiple of `group_size`; the others are as in :class:`NegToMe`.
    """
    n, count, channels = tokens.shape
    if group_size == 1:
        return tokens
    groups = tokens.reshape(n // group_size, group_size, count, channels)
    reference, others = groups[:, :1], groups[:, 1:]
    unit = normalize(groups, dim=-1)
    # (groups, others, tokens of the image, tokens of the reference)
    similarity = unit[:, 1:] @ unit[:, :1].transpose(-1, -2)
    best, index = similarity.max(dim=-1 if matching == "paper" else -2)
    matched = reference.expand_as(others).gather(2, index.unsqueeze(-1).expand_as(others))
    pushed = torch.where((best > threshold).unsqueeze(-1), (1 + alpha) * others - alpha * matched, others)
    return torch.cat([reference, pushed], dim=1).reshape(n, count, channels)
