"""How images are denoised: the settings of a run, checked against the pipeline they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ._adapters import adapter_of
from ._images import MAX_PIXELS
from ._manifest import MAX_STEPS
from .checks import integer, known_keys, real
from .errors import ConfigError

__all__ = ["Settings", "as_settings", "resolve"]


@dataclass(frozen=True)
class Settings:
    """How images are denoised. None stands for the default of the pipeline (a pocket pipeline brings its own).

    Parameters
    ----------
    n_steps : int
        Denoising steps of a whole trajectory.
    guidance : float, optional
        Guidance strength: the model's own input for guidance-distilled FLUX, classifier-free guidance elsewhere
        (also for FLUX without that input); 1 is none.
    height, width : int, optional
        Size of the images in pixels.
    max_sequence_length : int, optional
        Text tokens of the T5 encoder (FLUX, Stable Diffusion 3).
    negative_prompt : str, optional
        What to steer away from; needs classifier-free guidance.
    true_guidance : float, optional
        Classifier-free guidance on top of FLUX's embedded guidance (``true_cfg_scale``).

    Raises
    ------
    ConfigError
        A value that can be right for no pipeline; :class:`Denoiser` checks the rest.
    """

    n_steps: int = 20
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    max_sequence_length: int | None = None
    negative_prompt: str | None = None
    true_guidance: float | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "n_steps", integer("n_steps", self.n_steps, 1, MAX_STEPS))
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                put(self, name, integer(name, getattr(self, name), 1, MAX_PIXELS))
        if self.height is not None and self.width is not None:
            integer("height x width", self.height * self.width, 1, MAX_PIXELS)
        if self.max_sequence_length is not None:
            put(self, "max_sequence_length", integer("max_sequence_length", self.max_sequence_length, 1, 512))
        for name in ("guidance", "true_guidance"):
            if getattr(self, name) is not None:
                put(self, name, real(name, getattr(self, name), 0))
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise ConfigError(
                "negative_prompt", value=self.negative_prompt, bound="text or None", remedy="Give one text for all."
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, of settings that :func:`resolve` has filled in."""
        if self.height is None or self.width is None:
            raise ConfigError(
                "size", value=(self.height, self.width), bound="two numbers", remedy="Resolve them first."
            )
        return self.height, self.width

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Settings:
        """Build from :meth:`to_dict`'s form; unknown keys are an error."""
        known_keys("settings", content, [field.name for field in fields(cls)])
        return cls(**content)


def as_settings(value: Any) -> Settings:
    """Return `value` when it is a Settings; None is the default ones.

    Raises
    ------
    ConfigError
        Anything else.
    """
    if value is not None and not isinstance(value, Settings):
        raise ConfigError(
            "settings", value=value, bound="a Settings or None", remedy="Pass Settings(...) or Settings.from_dict(...)."
        )
    return value or Settings()


def resolve(settings: Settings, pipeline: Any) -> Settings:
    """Return `settings` with every default filled in, checked against what `pipeline` can take.

    Raises
    ------
    ConfigError
        A size, text length or guidance that this pipeline cannot take.
    """
    adapter = adapter_of(pipeline)
    brought = getattr(pipeline, "ttsnap_defaults", None) or {}
    height, width = adapter.default_size(pipeline)
    standard = {
        "guidance": adapter.default_guidance(pipeline),
        "height": height,
        "width": width,
        "max_sequence_length": adapter.default_sequence_length(pipeline),
    }
    found: dict[str, Any] = {
        name: brought.get(name, value) for name, value in standard.items() if getattr(settings, name) is None
    }
    resolved = replace(settings, **found)
    multiple = adapter.size_multiple(pipeline)
    for name in ("height", "width"):
        value = getattr(resolved, name)
        if value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise ConfigError(
                f"{name} of {type(pipeline).__name__}",
                value=value,
                bound=f"a multiple of {multiple}",
                remedy=f"The nearest is {near}.",
            )
    if adapter.sequence_length is None and settings.max_sequence_length is not None:
        raise ConfigError(
            "max_sequence_length",
            value=settings.max_sequence_length,
            bound=f"None: {type(pipeline).__name__} has no T5 encoder",
            remedy="Leave it out.",
        )
    if settings.true_guidance is not None and not adapter.embedded_guidance(pipeline):
        raise ConfigError(
            "true_guidance",
            value=settings.true_guidance,
            bound="None: this model's guidance is classifier-free already",
            remedy="Set guidance instead.",
        )
    if settings.negative_prompt is not None and not adapter.uses_cfg(pipeline, resolved):
        raise ConfigError(
            "negative_prompt has no effect without classifier-free guidance",
            value=settings.negative_prompt,
            bound="None, or guidance above 1",
            remedy=f"Set {'true_guidance' if adapter.embedded_guidance(pipeline) else 'guidance'} above 1, or leave it out.",
        )
    return resolved
