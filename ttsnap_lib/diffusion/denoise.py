"""Run a stock diffusers pipeline from one step to another, with the x0 estimate at each step.

The pipeline's own ``__call__`` does the work: it is handed a scheduler that shows it a part of the schedule
(:mod:`ttsnap_lib.diffusion.schedulers`), the prompts as embeddings that were computed once, and the latents of the candidates
that are still in the running. Between two parts candidates may be dropped.

>>> denoiser = Denoiser(load_pipeline("pocket-flux"), Settings(n_steps=20))
>>> text = denoiser.encode(["a small red ring on a white background"]).repeat(8)
>>> candidates = denoiser.noise([image_generator(0, 0, image) for image in range(8)])
>>> candidates = denoiser.run(candidates, text, last_step=6)
>>> best = [2, 5]
>>> candidates = denoiser.run(candidates.take(best), text.take(best), last_step=19)
>>> images = denoiser.final(candidates)

Nothing here depends on the device, the precision or offload. Tested are the CPU in fp32, bf16 and fp16
and ``cuda`` in bf16, with whole components offloaded too; ``mps`` is untested, and has tests marked ``device``. One denoiser at a time drives a pipeline;
decoding may overlap with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ttsnap_lib.checks import MAX_PIXELS, MAX_STEPS, Plain, integer, known_keys, memory_errors, real
from ttsnap_lib.diffusion.compiling import padded
from ttsnap_lib.diffusion.families import adapter_of
from ttsnap_lib.diffusion.modular import faced
from ttsnap_lib.diffusion.schedulers import History, history_of, make_segment, noise_levels, prepare
from ttsnap_lib.errors import ConfigError, PipelineError

# What models call the width of their text embeddings; the first that is there.
_TEXT_WIDTHS = ("caption_channels", "cap_feat_dim", "joint_attention_dim", "cross_attention_dim")
_SMALLER = "Use a smaller batch, a smaller size, or load_pipeline(..., offload='model')."


@dataclass(frozen=True)
class Settings(Plain):
    """How images are denoised. None stands for the default of the pipeline (a pocket pipeline brings its own).

    Parameters
    ----------
    n_steps : int
        Denoising steps of a whole trajectory.
    guidance : float, optional
        Guidance strength: the model's own input for guidance-distilled FLUX, classifier-free guidance elsewhere
        (also for FLUX without that input); 1 is none, for Z-Image 0.
    height, width : int, optional
        Size of the images in pixels.
    max_sequence_length : int, optional
        Text tokens, where the pipeline lets one choose (not SDXL and Stable Diffusion 1.5).
    negative_prompt : str, optional
        What to steer away from; needs classifier-free guidance.
    true_guidance : float, optional
        Classifier-free guidance on top of FLUX's embedded guidance (``true_cfg_scale``).
    """

    n_steps: int = 20
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    max_sequence_length: int | None = None
    negative_prompt: str | None = None
    true_guidance: float | None = None

    def __post_init__(self) -> None:
        bounds = {"n_steps": MAX_STEPS, "height": MAX_PIXELS, "width": MAX_PIXELS, "max_sequence_length": 8192}
        for name, high in bounds.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, integer(name, getattr(self, name), 1, high))
        if self.height is not None and self.width is not None:
            integer("height x width", self.height * self.width, 1, MAX_PIXELS)
        for name in ("guidance", "true_guidance"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, real(name, getattr(self, name), 0))
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise ConfigError(
                f"negative_prompt: got {self.negative_prompt!r}, expected one text. It serves all images."
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, of settings that :func:`resolve` has filled in."""
        if self.height is None or self.width is None:
            raise ConfigError("size: height and width are not known yet. Take the settings of a Denoiser.")
        return self.height, self.width


def as_settings(value: Any) -> Settings:
    """Return `value` as Settings: a mapping of some of them, or None for the default ones."""
    if isinstance(value, Mapping):
        return Settings.from_dict(value)
    if value is not None and not isinstance(value, Settings):
        raise ConfigError(f"settings: got {value!r}, expected a Settings. Pass Settings(n_steps=..., ...).")
    return value or Settings()


def resolve(settings: Settings, pipeline: Any) -> Settings:
    """Return `settings` with every default filled in, checked against what `pipeline` can take."""
    adapter, name = adapter_of(pipeline), type(pipeline).__name__
    height, width = adapter.default_size(pipeline)
    defaults: dict[str, Any] = {
        "guidance": adapter.default_guidance(pipeline),
        "height": height,
        "width": width,
        "max_sequence_length": adapter.default_sequence_length(pipeline),
        **(getattr(pipeline, "ttsnap_defaults", None) or {}),
    }
    resolved = replace(settings, **{key: value for key, value in defaults.items() if getattr(settings, key) is None})
    multiple = adapter.size_multiple(pipeline)
    for side, value in zip(("height", "width"), resolved.size, strict=True):
        if value % multiple:
            raise ConfigError(
                f"{side} of {name}: got {value}, expected a multiple of {multiple}. The nearest is "
                f"{max(multiple, round(value / multiple) * multiple)}."
            )
    made = adapter.made_size(pipeline, *resolved.size)
    if made != resolved.size:
        raise ConfigError(
            f"height, width of {name}: got {resolved.size}, expected the area of {(height, width)}, which it always makes. "
            f"It would make {made}: give that."
        )
    if defaults["max_sequence_length"] is None and settings.max_sequence_length is not None:
        raise ConfigError(
            f"max_sequence_length: got {settings.max_sequence_length}, expected None: {name} has a fixed one. Leave it out."
        )
    embedded, guided = adapter.embedded_guidance(pipeline), adapter.uses_cfg(pipeline, resolved)
    true, negative = settings.true_guidance, settings.negative_prompt
    if adapter.guidable(pipeline):
        if true is not None and not embedded:
            raise ConfigError(f"true_guidance: got {true}, expected None. Set guidance: it is classifier-free here.")
        remedy = f"Set {'true_guidance' if embedded else 'guidance'} above {adapter.unguided:g}, or leave it out."
    else:
        remedy = f"This {name} was distilled to do without: leave it out."
        if true is not None or (not embedded and settings.guidance not in (None, adapter.unguided)):
            told = f"guidance: got {settings.guidance}" if true is None else f"true_guidance: got {true}"
            raise ConfigError(f"{told}, expected no classifier-free guidance. {remedy}")
    if negative is not None and not guided:
        raise ConfigError(
            f"negative_prompt: got {negative!r}, which has no effect without classifier-free guidance. {remedy}"
        )
    return resolved


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: the embeddings a pipeline call takes, by name, each with one row per image."""

    embeds: Mapping[str, torch.Tensor | list[torch.Tensor]]  # a list has a tensor per row, each of its own length
    axes: Mapping[str, int] = field(default_factory=dict)  # axis of the rows, where it is not the first

    def __len__(self) -> int:
        name, value = next(iter(self.embeds.items()))
        return len(value) if isinstance(value, list) else value.shape[self.axes.get(name, 0)]

    def take(self, indices: Sequence[int]) -> Conditioning:
        """Return the rows `indices`, in this order; a row may come several times."""
        found: dict[str, Any] = {}
        for name, value in self.embeds.items():
            if isinstance(value, list):
                found[name] = [value[index] for index in indices]
            else:
                rows = torch.as_tensor(indices, dtype=torch.long, device=value.device)
                found[name] = value.index_select(self.axes.get(name, 0), rows)
        return replace(self, embeds=found)

    def repeat(self, n: int) -> Conditioning:
        """Return each row `n` times in a row: all candidates of the first prompt, then those of the second."""
        return self.take([row for row in range(len(self)) for _ in range(n)])

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Return the rows of all `parts`, in order. Shorter texts are padded, where the pipeline takes a mask of them."""
        first = parts[0]
        if any(part.embeds.keys() != first.embeds.keys() for part in parts):
            raise ConfigError("conditioning: got parts of different embeddings. Encode all of them by one Denoiser.")
        found: dict[str, Any] = {}
        for name, value in first.embeds.items():
            rows: list[Any] = [part.embeds[name] for part in parts]
            if isinstance(value, list):
                found[name] = [row for listed in rows for row in listed]
                continue
            axis = first.axes.get(name, 0)
            longest = max(one.shape[axis + 1] for one in rows)
            if any(one.shape[axis + 1] < longest for one in rows) and not any("mask" in key for key in first.embeds):
                raise ConfigError(
                    f"conditioning: got {name} of several lengths, expected one, as this pipeline takes no mask of them. "
                    "Encode all prompts with the same max_sequence_length."
                )
            found[name] = torch.cat([_padded(one, axis + 1, longest) for one in rows], dim=axis)
        return replace(first, embeds=found)


@dataclass(frozen=True)
class Candidates:
    """Images on their way: their latents after `step`, and what a multistep solver remembers."""

    latents: torch.Tensor  # (n, ...), in the layout that the pipeline's loop works in
    step: int = -1  # the last one that has run; -1 is pure noise
    history: History | None = None  # earlier model outputs

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, indices: Sequence[int]) -> Candidates:
        """Return the candidates `indices`: the survivors of a pruning step."""
        return self._each(lambda rows: rows[torch.as_tensor(indices, dtype=torch.long, device=rows.device)])

    def to(self, device: torch.device | str) -> Candidates:
        """Return the candidates on `device`, such as in main memory while they wait."""
        return self._each(lambda rows: rows.to(device))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Candidates:
        history = None if self.history is None else {k: _changed(v, change) for k, v in self.history.items()}
        return replace(self, latents=change(self.latents), history=history)

    @classmethod
    def cat(cls, parts: Sequence[Candidates]) -> Candidates:
        """Return the candidates of all `parts`, in order; they must stand at one step."""
        steps = {part.step for part in parts}
        if len(steps) != 1:
            raise ConfigError(
                f"candidates: got steps {sorted(steps)}, expected one step. Run them to the same step first."
            )
        kept = [part.history or {} for part in parts]
        history = None if parts[0].history is None else {name: _joined([one[name] for one in kept]) for name in kept[0]}
        return cls(torch.cat([part.latents for part in parts]), steps.pop(), history)


def _padded(value: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    missing = length - value.shape[axis]
    if not missing:
        return value
    return torch.cat([value, value.new_zeros(*value.shape[:axis], missing, *value.shape[axis + 1 :])], dim=axis)


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_changed(one, change) for one in value]
    if not isinstance(value, torch.Tensor) or value.ndim == 0:  # a timestep, a count, an empty place
        return value
    return change(value)


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [_joined(list(parts)) for parts in zip(*values, strict=True)]
    return torch.cat(values) if isinstance(values[0], torch.Tensor) and values[0].ndim else values[0]


def image_seed(base_seed: int, prompt_index: int, image_index: int) -> int:
    """Return the seed of one image; it depends on these three numbers alone.

    The low 63 bits of ``numpy.random.SeedSequence([base, prompt, image]).generate_state(1, uint64)``.
    """
    given = {"base_seed": base_seed, "prompt_index": prompt_index, "image_index": image_index}
    numbers = [integer(name, value, 0) for name, value in given.items()]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) & (2**63 - 1)


def image_generator(base_seed: int, prompt_index: int, image_index: int) -> torch.Generator:
    """Return the CPU generator of one image, seeded with :func:`image_seed`."""
    return torch.Generator().manual_seed(image_seed(base_seed, prompt_index, image_index))


class Denoiser:
    """Drives one stock pipeline of :data:`ttsnap_lib.diffusion.families.ADAPTERS`, part by part.

    Nothing on the pipeline stays changed. What cannot work (PipelineError, ConfigError) is told here, before any model
    runs.

    Attributes
    ----------
    settings : Settings, with every default filled in
    timesteps : torch.Tensor (n_steps,) on the CPU, what the model is told at each step
    sigmas : tuple of float (n_steps + 1,), the noise level before each step, and after the last
    """

    def __init__(self, pipeline: Any, settings: Settings | Mapping[str, Any] | None = None) -> None:
        self.pipeline = pipeline = faced(pipeline)
        self._adapter = adapter_of(pipeline)
        self._scheduler = prepare(pipeline.scheduler)
        self.settings = resolve(as_settings(settings), pipeline)
        dry = self._dry_run(self._adapter.blank_embeds(pipeline, self.settings, self.device, self.dtype))
        self.timesteps: torch.Tensor = dry._whole.cpu()
        self.sigmas: tuple[float, ...] = noise_levels(dry)
        if len(self.timesteps) != self.settings.n_steps:
            raise PipelineError(
                f"scheduler {type(pipeline.scheduler).__name__}: got {len(self.timesteps)} timesteps, expected one for "
                f"each of {self.settings.n_steps} steps. Change n_steps or the scheduler's timestep_spacing."
            )

    # Facts

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes (with offload: the accelerator, not where the weights rest)."""
        return self.pipeline._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoising model; latents have it too, unless the pipeline's loop works in fp32."""
        return self._adapter.component(self.pipeline).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image's noise, as the stock pipeline draws it."""
        return self._adapter.latent_shape(self.pipeline, *self.settings.size)

    def wait(self) -> None:
        """Return when the device has done all that it was given: before reading a clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # Work

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode `prompts` once, one row each, together with the negative prompt where guidance needs it."""
        if isinstance(prompts, str) or not prompts:
            raise ConfigError(f"prompts: got {prompts!r}, expected a list of at least one text.")
        try:
            with memory_errors(len(prompts), remedy=_SMALLER):
                found = self._adapter.encode(self.pipeline, list(prompts), self.settings)
        except (AttributeError, NameError, TypeError, ValueError) as error:
            if not self._lacking():  # some pipelines can do without some of them
                raise
            raise PipelineError(
                f"{type(self.pipeline).__name__} has no {' and '.join(self._lacking())}, which prompts need. Load it whole, "
                "or give prompt_embeds."
            ) from error
        return Conditioning(MappingProxyType(found), self._adapter.rows)

    def require_text(self) -> None:
        """Raise the PipelineError of :meth:`encode` now, when the pipeline was loaded without what encodes prompts."""
        if self._lacking():  # Stable Diffusion 3 does without its T5
            self.encode(["-"])

    def given(self, prompt_embeds: Mapping[str, Any], n: int) -> Conditioning:
        """Return the embeddings of `n` prompts that were made elsewhere, checked, where they are; see :meth:`placed`.

        Their names are arguments of the pipeline's call, such as ``prompt_embeds`` and ``pooled_prompt_embeds``; each
        has one row per prompt. ConfigError when one is missing or has another shape.
        """
        names = list(self._adapter.blank_embeds(self.pipeline, self.settings))
        if not isinstance(prompt_embeds, Mapping):
            raise ConfigError(
                f"prompt_embeds: got {type(prompt_embeds).__name__}, expected a mapping of {names} to tensors with a row "
                "per prompt. Name them as the pipeline's call does."
            )
        if self.settings.negative_prompt is not None:
            raise ConfigError(
                f"negative_prompt: got {self.settings.negative_prompt!r} beside prompt_embeds. Leave it out; its "
                "embeddings are among prompt_embeds."
            )
        known_keys("prompt_embeds", prompt_embeds, names)
        missing = [name for name in names if name not in prompt_embeds and not name.endswith("_mask")]
        if missing:
            raise ConfigError(
                f"prompt_embeds: got {list(prompt_embeds)}, without {missing}. Add them, as the pipeline's encode_prompt "
                "gives them; those of the negative prompt are needed where guidance is on."
            )
        found = Conditioning(prompt_embeds, self._adapter.rows)
        config = self._adapter.component(self.pipeline).config
        width = next(
            (one for one in (getattr(config, name, None) for name in _TEXT_WIDTHS) if isinstance(one, int)), None
        )
        for name, value in prompt_embeds.items():
            parts = value if isinstance(value, list) else [value]
            if any(not isinstance(part, torch.Tensor) for part in parts):
                raise ConfigError(
                    f"prompt_embeds: got {name} of {type(parts[0]).__name__}, expected tensors. Convert it."
                )
            rows = len(Conditioning({name: value}, self._adapter.rows))
            if rows != n:
                raise ConfigError(f"prompt_embeds: got {rows} rows of {name}, expected {n}. Give one per prompt.")
            last = parts[0].shape[-1]
            if width is not None and name.removeprefix("negative_") == "prompt_embeds" and last != width:
                raise ConfigError(
                    f"prompt_embeds: got {name} of width {last}, expected {width}. Encode with the text encoders of this "
                    "model."
                )
        self._dry_run(self.placed(found.take([0])).embeds)
        return found

    def placed(self, conditioning: Conditioning) -> Conditioning:
        """Return `conditioning` on the pipeline's device, in its precision."""

        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(one) for one in value]
            return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

        return replace(conditioning, embeds={name: moved(value) for name, value in conditioning.embeds.items()})

    def noise(self, generators: Sequence[torch.Generator]) -> Candidates:
        """Draw pure noise, one image per generator, in fp32 on the CPU, and cast it to the precision of the loop."""
        shape = self.latent_shape
        drawn = torch.stack([torch.randn(shape, generator=one, dtype=torch.float32) for one in generators])
        return Candidates(self._packed(drawn))

    def run(
        self,
        candidates: Candidates,
        conditioning: Conditioning,
        last_step: int,
        record: Collection[int] = (),
        on_x0: Callable[[int, torch.Tensor], None] | None = None,
    ) -> Candidates:
        """Run the steps after ``candidates.step`` up to and with `last_step`, with the candidates' rows of conditioning.

        At the steps `record`, ``on_x0(step, x0)`` is called with the x0 estimates (n, ...) in the layout and precision of
        the latents, for :meth:`decode`; what it raises ends the run and leaves the pipeline usable.
        """
        first = candidates.step + 1
        last_step = integer("last_step", last_step, first, self.settings.n_steps - 1)
        if len(candidates) != len(conditioning):
            raise ConfigError(
                f"conditioning: got {len(conditioning)} rows for {len(candidates)} candidates, expected one each. Use "
                "Conditioning.repeat(n) for several seeds of a prompt, and take() the same survivors of both."
            )
        outside = [step for step in record if not first <= step <= last_step]
        if outside or (record and on_x0 is None):
            raise ConfigError(
                f"record: got {sorted(record)}, expected steps in [{first}, {last_step}], with an on_x0 to take them."
            )
        n = len(candidates)
        rows = [min(row, n - 1) for row in range(padded(self.pipeline, n))]  # the last one fills the batch up
        if len(rows) > n:
            candidates, conditioning = candidates.take(rows), conditioning.take(rows)
        told = None if on_x0 is None else lambda step, x0: on_x0(step, x0[:n])
        segment = make_segment(self._scheduler, first, last_step, record, told, candidates.history)
        with self._installed(segment), memory_errors(n, remedy=_SMALLER):
            self._call(conditioning.embeds, candidates.latents)
        # Not what the call returns: FLUX.2-klein returns latents in the scale and layout of its decoder.
        moved = Candidates(segment.sample, last_step, history_of(segment))
        return moved.take(range(n)) if len(rows) > n else moved

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, decoder: Any = None) -> torch.Tensor:
        """Return the pixels of `latents` or x0 estimates: (n, 3, height, width), float32 in [0, 1].

        A `decoder`, such as an AutoencoderTiny, stands in for the pipeline's VAE, for quick looks. What it cannot decode
        (fp16 overflows in some VAEs) is NaN.
        """
        return self.pipeline.image_processor.postprocess(self._pixels(latents, decoder), output_type="pt").float()

    @torch.no_grad()
    def final(self, candidates: Candidates) -> torch.Tensor:
        """Return the finished images as the stock pipeline puts them out: (n, 3, height, width), float32 in [0, 1].

        The safety checker and the watermark run where the pipeline has them, as in its own call.
        """
        if candidates.step != self.settings.n_steps - 1:
            raise ConfigError(
                f"candidates.step: got {candidates.step}, expected the last step, {self.settings.n_steps - 1}. Run them "
                "to the end first; decode() shows images on their way."
            )
        pixels = self._pixels(candidates.latents, None)
        options = {}
        if getattr(self.pipeline, "watermark", None) is not None:
            pixels = self.pipeline.watermark.apply_watermark(pixels)
        if getattr(self.pipeline, "safety_checker", None) is not None:
            pixels, flagged = self.pipeline.run_safety_checker(pixels, self.device, self.dtype)
            options["do_denormalize"] = [not bad for bad in flagged]
        images = self.pipeline.image_processor.postprocess(pixels, output_type="pt", **options).float()
        self.pipeline.maybe_free_model_hooks()
        return images

    # Inside

    def _lacking(self) -> list[str]:
        parts = self.pipeline.components
        return [name for name, part in parts.items() if part is None and name.startswith(("text_encoder", "tokenizer"))]

    def _dry_run(self, embeds: Mapping[str, Any]) -> Any:
        """Let the pipeline check its inputs and ask for its schedule, without a timestep to run; return the scheduler."""
        dry = make_segment(self._scheduler, 0, -1)
        try:
            with self._installed(dry):
                self._call(embeds, self._packed(torch.zeros(1, *self.latent_shape)))
        except ValueError as error:
            raise PipelineError(
                f"{type(self.pipeline).__name__} refuses these settings: {error}. Change or leave out what it names."
            ) from error
        return dry

    def _pixels(self, latents: torch.Tensor, decoder: Any) -> torch.Tensor:
        vae = decoder if decoder is not None else self.pipeline.vae
        latents = self._adapter.unpack(self.pipeline, latents, *self.settings.size)
        # fp16 overflows in the SDXL VAE; stock pipelines decode in fp32 then.
        upcast = decoder is None and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
        if upcast:
            torch.nn.Module.to(vae, dtype=torch.float32)  # diffusers' own `to` warns at each of these casts
        try:
            latents = self._adapter.decodable(self.pipeline, latents.to(self.device, vae.dtype), vae)
            with memory_errors(len(latents), remedy=_SMALLER):
                pixels = vae.decode(latents, return_dict=False)[0]
            pixels = pixels[:, :, 0] if pixels.ndim == 5 else pixels  # the one frame of a video autoencoder
            return pixels.masked_fill(~pixels.isfinite(), torch.nan)  # infinity would be clipped to white or black
        finally:
            if upcast:
                torch.nn.Module.to(vae, dtype=torch.float16)

    def _packed(self, noise: torch.Tensor) -> torch.Tensor:
        return self._adapter.pack(noise).to(self.device, torch.float32 if self._adapter.float32 else self.dtype)

    def _call(self, embeds: Mapping[str, Any], latents: torch.Tensor) -> None:
        given = self._adapter.given(self.pipeline, latents, *self.settings.size)
        options = self._adapter.call_options(self.pipeline, self.settings)
        self.pipeline(**embeds, latents=given, output_type="latent", return_dict=False, **options)

    @contextlib.contextmanager
    def _installed(self, scheduler: Any) -> Iterator[None]:
        """Put `scheduler` in the pipeline's place, and everything a call changes back afterwards."""
        # Past DiffusionPipeline.__setattr__, which would write the class into the pipeline's saved configuration.
        own = vars(self.pipeline)
        before = {name: value for name, value in own.items() if name == "scheduler" or name.startswith("_")}
        own["scheduler"] = scheduler
        own["_progress_bar_config"] = {"disable": True}
        try:
            yield
        finally:
            for name in [name for name in own if name.startswith("_") and name not in before]:
                del own[name]
            own.update(before)
            # What enable_cache() keeps of a step does not fit fewer candidates. A call that ends resets it itself.
            reset = getattr(self._adapter.component(self.pipeline), "_reset_stateful_cache", None)
            if reset is not None:
                reset()
