"""Run a stock diffusers pipeline from one step to another, with the x0 estimate at each step.

The pipeline's own ``__call__`` does the work: it is handed a scheduler that shows it a part of the schedule
(:mod:`ttsnap_lib._segments`), the prompts as embeddings that were computed once, and the latents of the candidates
that are still in the running. Between two parts candidates may be dropped.

>>> denoiser = Denoiser(load_pipeline("pocket-flux"), Settings(n_steps=20))
>>> text = denoiser.encode(["a small red ring on a green background"]).repeat(8)
>>> candidates = denoiser.noise([image_generator(0, 0, image) for image in range(8)])
>>> candidates = denoiser.run(candidates, text, last_step=6)
>>> best = [2, 5]
>>> candidates = denoiser.run(candidates.take(best), text.take(best), last_step=19)
>>> images = denoiser.final(candidates)

Nothing here depends on the device, the precision or offload. Tested is the CPU in fp32, bf16 and fp16; ``cuda``,
``mps`` and offload are untested so far, and have tests marked ``device``. One denoiser at a time drives a pipeline;
decoding may overlap with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from ._adapters import adapter_of
from ._candidates import Candidates, Conditioning, image_generator, image_seed
from ._devices import memory_errors
from ._segments import history_of, make_segment, noise_levels, prepare
from ._settings import Settings, as_settings, resolve
from .checks import integer
from .errors import ConfigError, PipelineError

__all__ = ["Candidates", "Conditioning", "Denoiser", "Settings", "image_generator", "image_seed"]

_SMALLER = "Use a smaller batch, a smaller size, or load_pipeline(..., offload='model')."


class Denoiser:
    """Drives one stock pipeline, part by part.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        A text-to-image pipeline of :data:`ttsnap_lib._adapters.ADAPTERS`. Nothing on it stays changed.
    settings : Settings, optional
        Kept, with every default filled in, in ``.settings``.

    Attributes
    ----------
    settings : Settings
        What is run, without a None except where there is nothing to set.
    timesteps : torch.Tensor
        (n_steps,) on the CPU: what the model is told at each step.
    sigmas : tuple of float
        (n_steps + 1,): the noise level before each step, and after the last.

    Raises
    ------
    PipelineError, ConfigError
        A pipeline, a scheduler or a setting that cannot work; raised here, before any model runs.
    """

    def __init__(self, pipeline: Any, settings: Settings | None = None) -> None:
        self.pipeline = pipeline
        self._adapter = adapter_of(pipeline)
        self._scheduler = prepare(pipeline.scheduler)
        self.settings = resolve(as_settings(settings), pipeline)
        # A dry run: the pipeline checks its inputs and asks for its schedule, and is given no timestep to run.
        dry = make_segment(self._scheduler, 0, -1)
        blank = self._adapter.blank_embeds(pipeline, self.settings)
        blank = {name: value.to(self.device, self.dtype) for name, value in blank.items()}
        try:
            with self._installed(dry):
                self._call(blank, self._pack(torch.zeros(1, *self.latent_shape)))
        except ValueError as error:
            raise PipelineError(
                f"{type(pipeline).__name__} refuses these settings: {error}",
                value=self.settings.to_dict(),
                bound="settings that this pipeline takes",
                remedy="Change the setting it names, or leave it to the pipeline's default.",
            ) from error
        self.timesteps: torch.Tensor = dry._whole.cpu()
        self.sigmas: tuple[float, ...] = noise_levels(dry)
        if len(self.timesteps) != self.settings.n_steps:
            raise PipelineError(
                f"the scheduler makes {len(self.timesteps)} timesteps of {self.settings.n_steps} steps",
                value=type(pipeline.scheduler).__name__,
                bound="one timestep per step",
                remedy="Change n_steps or the scheduler's timestep_spacing.",
            )

    # -- facts --------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes (with offload: the accelerator, not where the weights rest)."""
        return self.pipeline._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoising model and of the latents."""
        return self._adapter.component(self.pipeline).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image's latents as the decoder takes them."""
        return self._adapter.latent_shape(self.pipeline, *self.settings.size)

    @property
    def ends_clean(self) -> bool:
        """Whether the x0 estimate of the last step is the image: the schedule ends at sigma 0."""
        return self.sigmas[-1] == 0

    # -- work ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode `prompts` once, one row each, together with the negative prompt where guidance needs it."""
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError(
                "prompts", value=prompts, bound="a list of at least one text", remedy="Give the prompts as a list."
            )
        with memory_errors(len(prompts), remedy=_SMALLER):
            return Conditioning(MappingProxyType(self._adapter.encode(self.pipeline, list(prompts), self.settings)))

    def noise(self, generators: Sequence[torch.Generator]) -> Candidates:
        """Draw pure noise, one image per generator, in fp32 on the CPU, and cast it to the pipeline's precision."""
        generators = list(generators)
        if not generators or any(
            not isinstance(one, torch.Generator) or one.device.type != "cpu" for one in generators
        ):
            raise ConfigError(
                "generators",
                value=generators,
                bound="a list of torch.Generator on the CPU, one per image",
                remedy="Make them with image_generator(base_seed, prompt_index, image_index).",
            )
        shape = self.latent_shape
        drawn = torch.stack([torch.randn(shape, generator=one, dtype=torch.float32) for one in generators])
        return Candidates(self._pack(drawn))

    def run(
        self,
        candidates: Candidates,
        conditioning: Conditioning,
        last_step: int,
        record: Collection[int] = (),
        on_x0: Callable[[int, torch.Tensor], None] | None = None,
    ) -> Candidates:
        """Run the steps after ``candidates.step`` up to and with `last_step`.

        Parameters
        ----------
        candidates : Candidates
            n images, at any step before `last_step`.
        conditioning : Conditioning
            n rows, those of the candidates.
        last_step : int
            0-based index of the last step to run.
        record : collection of int
            Steps at which `on_x0` is called.
        on_x0 : callable, optional
            ``on_x0(step, x0)`` with the x0 estimates (n, ...) in the layout and precision of the latents, for
            :meth:`decode`. Called between two steps; what it raises ends the run and leaves the pipeline usable.

        Returns
        -------
        Candidates
            The same images at `last_step`.

        Raises
        ------
        ConfigError
            Steps out of order, or numbers of rows that differ.
        DeviceError
            Out of memory.
        """
        first = candidates.step + 1
        last_step = integer("last_step", last_step, first, self.settings.n_steps - 1)
        if len(candidates) != len(conditioning):
            raise ConfigError(
                f"conditioning of {len(conditioning)} rows for {len(candidates)} candidates",
                bound="one row per candidate",
                value=len(conditioning),
                remedy="Use Conditioning.repeat(n) for several seeds of a prompt, and take() the same survivors of both.",
            )
        outside = [step for step in record if not first <= step <= last_step]
        if outside or (record and on_x0 is None):
            raise ConfigError(
                "record",
                value=sorted(record),
                bound=f"steps in [{first}, {last_step}], with an on_x0 to take them",
                remedy="Record steps that this part runs, and pass on_x0.",
            )
        segment = make_segment(self._scheduler, first, last_step, record, on_x0, candidates.history)
        with self._installed(segment), memory_errors(len(candidates), remedy=_SMALLER):
            latents = self._call(conditioning.embeds, candidates.latents)
        return Candidates(latents, last_step, history_of(segment))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, decoder: Any = None) -> torch.Tensor:
        """Return the pixels of `latents` or x0 estimates: (n, 3, height, width), float32 in [0, 1].

        Parameters
        ----------
        latents : torch.Tensor
            (n, ...) in the layout of :class:`Candidates`.
        decoder : AutoencoderTiny or AutoencoderKL, optional
            Decodes instead of the pipeline's VAE, for quick looks.
        """
        return self.pipeline.image_processor.postprocess(self._pixels(latents, decoder), output_type="pt").float()

    @torch.no_grad()
    def final(self, candidates: Candidates) -> torch.Tensor:
        """Return the finished images as the stock pipeline puts them out: (n, 3, height, width), float32 in [0, 1].

        The safety checker and the watermark run where the pipeline has them, as in its own call.
        """
        if candidates.step != self.settings.n_steps - 1:
            raise ConfigError(
                "candidates.step",
                value=candidates.step,
                bound=f"the last step, {self.settings.n_steps - 1}",
                remedy="Run them to the end first; decode() shows images on their way.",
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

    # -- inside -------------------------------------------------------------------------------------------------

    def _pixels(self, latents: torch.Tensor, decoder: Any) -> torch.Tensor:
        vae = decoder if decoder is not None else self.pipeline.vae
        if not hasattr(vae, "decode") or not hasattr(vae, "config"):
            raise ConfigError(
                "decoder", value=type(vae).__name__, bound="a diffusers autoencoder", remedy="Pass an AutoencoderTiny."
            )
        latents = self._adapter.unpack(self.pipeline, latents, *self.settings.size)
        # fp16 overflows in the SDXL VAE; stock pipelines decode in fp32 then.
        upcast = decoder is None and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
        if upcast:
            vae.to(dtype=torch.float32)
        try:
            latents = self._adapter.descale(latents.to(self.device, vae.dtype), vae.config)
            with memory_errors(len(latents), remedy=_SMALLER):
                return vae.decode(latents, return_dict=False)[0]
        finally:
            if upcast:
                vae.to(dtype=torch.float16)

    def _pack(self, latents: torch.Tensor) -> torch.Tensor:
        return self._adapter.pack(self.pipeline, latents).to(self.device, self.dtype)

    def _call(self, embeds: Mapping[str, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
        options = self._adapter.call_options(self.pipeline, self.settings)
        return self.pipeline(**embeds, latents=latents, output_type="latent", return_dict=False, **options)[0]

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
