"""Schedulers that run a part of their schedule: how a stock pipeline stops at a step and goes on later.

A pipeline's ``__call__`` asks its scheduler for the timesteps, walks over them and calls ``step`` at each. The
subclass made here, for any supported scheduler class, computes the whole schedule, shows the pipeline only the part
that is to be run, and reads the x0 (Tweedie) estimate as the steps go by. The numbers of a step do not change.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ttsnap_lib.errors import PipelineError

History = dict[str, Any]

_LEFT_BY_A_RUN = {
    "_internal_dict", "timesteps", "sigmas", "num_inference_steps", "_step_index", "_begin_index", "is_scale_input_called",
    "model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order",
    "_shift",  # the sigmas tell it
}  # fmt: skip
_FRESH_NOISE = "noise drawn per image: it adds fresh noise at every step"


@dataclass(frozen=True)
class Schedulable:
    """What the engine has to know about a scheduler class."""

    # (scheduler, schedule index, model_output, sample, output) -> x0, right after ``step``
    read_x0: Callable[[Any, int, torch.Tensor, torch.Tensor, Any], torch.Tensor]
    history: tuple[str, ...] = ()  # attributes in which a multistep solver keeps earlier model outputs
    refuse: Callable[[Any], str] = lambda config: ""  # what an option lacks for the engine; empty when it is fine


def _flow_x0(scheduler: Any, index: int, velocity: torch.Tensor, sample: torch.Tensor, output: Any) -> torch.Tensor:
    # The arithmetic of the scheduler's own step, so that the last estimate has the bits of the image.
    return sample.to(torch.float32) - scheduler.sigmas[index] * velocity


def _reported_x0(scheduler: Any, index: int, model: torch.Tensor, sample: torch.Tensor, output: Any) -> torch.Tensor:
    return output[1] if isinstance(output, tuple) else output.pred_original_sample


def _converted_x0(scheduler: Any, index: int, model: torch.Tensor, sample: torch.Tensor, output: Any) -> torch.Tensor:
    return scheduler.model_outputs[-1]


SCHEDULABLE: dict[type, Schedulable] = {
    FlowMatchEulerDiscreteScheduler: Schedulable(
        _flow_x0, refuse=lambda config: _FRESH_NOISE if config.get("stochastic_sampling") else ""
    ),
    EulerDiscreteScheduler: Schedulable(_reported_x0),
    DDIMScheduler: Schedulable(_reported_x0),
    DPMSolverMultistepScheduler: Schedulable(
        _converted_x0,
        history=("model_outputs", "lower_order_nums"),
        refuse=lambda config: (
            ""
            if config.algorithm_type == "dpmsolver++"
            else "an x0 estimate without fresh noise: only algorithm_type='dpmsolver++' has both"
        ),
    ),
    UniPCMultistepScheduler: Schedulable(
        _converted_x0,
        history=("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "this_order"),
        refuse=lambda config: "" if config.predict_x0 else "an x0 estimate: set predict_x0=True",
    ),
}
"""Scheduler classes that can be stopped and continued; a class of the same kind is one more line."""


def schedulable(scheduler: Any) -> Schedulable:
    """Return what is known of `scheduler`'s class; a PipelineError says what it, or one of its options, lacks."""
    name = type(scheduler).__name__
    known = next((entry for cls, entry in SCHEDULABLE.items() if isinstance(scheduler, cls)), None)
    lacks = "a rule to read x0 from a step" if known is None else known.refuse(scheduler.config)
    if known is None or lacks:
        raise PipelineError(
            f"scheduler: got {name}, expected one that can be stopped and continued; this one lacks {lacks}. Load with "
            "load_pipeline(..., scheduler='euler'), 'ddim', 'dpm++' or 'unipc'."
        )
    replaced = [method for method in ("set_timesteps", "step") if method in vars(scheduler)]
    if replaced:
        raise PipelineError(
            f"scheduler: got a {name} on which {' and '.join(replaced)} was replaced, expected the methods of its class. "
            f"Make a subclass of {name} with yours."
        )
    if getattr(scheduler.config, "clip_sample", False):
        warnings.warn(
            f"{name} has clip_sample=True: it cuts latents to [-1, 1], which suits pixels only; set it to False.",
            stacklevel=3,
        )
    return known


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


@functools.cache
def _segment_class(base: Any) -> Any:
    """Return the subclass of the scheduler class `base` that runs a part of its schedule."""

    class Segment(base):
        # Set on each copy by make_segment().
        _first = 0
        _last = -1
        _done = 0
        _record: Collection[int] = ()
        _on_x0: Callable[[int, torch.Tensor], None] | None = None
        _resume: History | None = None
        _known: Schedulable
        timesteps: Any
        sample: torch.Tensor  # after the last step that has run

        @functools.wraps(base.set_timesteps)  # pipelines inspect the signature
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            if hasattr(self, "set_begin_index"):
                self.set_begin_index(self._first)
            for name, value in (self._resume or {}).items():
                setattr(self, name, _copied(value))
            self._whole = self.timesteps
            self.timesteps = self._whole[self._first : self._last + 1]
            self._done = self._first

        def set_begin_index(self, begin_index: int = 0) -> None:
            # Pipelines ask for 0; the index in the whole schedule is meant.
            super().set_begin_index(self._first)

        @functools.wraps(base.step)
        def step(
            self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            self.timesteps = self._whole  # multistep solvers look at how many steps are left
            output = super().step(model_output, timestep, sample, *args, **kwargs)
            self.sample = output[0] if isinstance(output, tuple) else output.prev_sample
            index, self._done = self._done, self._done + 1
            if index in self._record and self._on_x0 is not None:
                x0 = self._known.read_x0(self, index, model_output, sample, output)
                self._on_x0(index, x0.to(sample.dtype))
            return output

        @property
        def init_noise_sigma(self) -> Any:
            # Some pipelines scale the latents they are given by it; only pure noise wants that.
            if self._first > 0:
                return 1.0
            if "init_noise_sigma" in self.__dict__:
                return self.__dict__["init_noise_sigma"]
            return super().init_noise_sigma

        @init_noise_sigma.setter
        def init_noise_sigma(self, value: Any) -> None:
            self.__dict__["init_noise_sigma"] = value

    if not hasattr(base, "set_begin_index"):
        del Segment.set_begin_index
    Segment.__name__ = Segment.__qualname__ = f"Segment{base.__name__}"
    return Segment


def prepare(scheduler: Any) -> Any:
    """Return a segment scheduler that is `scheduler` as it stands, with all that was set on it at run time."""
    known = schedulable(scheduler)
    base: Any = type(scheduler)
    segment = copy.deepcopy(scheduler)
    segment.__class__ = _segment_class(base)
    segment._known = known
    return segment


@contextlib.contextmanager
def spaced_for_drafts(pipeline: Any) -> Iterator[None]:
    """Give `pipeline` the spacing of timesteps that a run of few steps needs, for as long as this lasts.

    With "leading" spacing, SDXL's own, fewer steps begin at less noise, so that pure noise is no start for them; with
    "trailing" they begin where noise is all there is (Lin et al., arXiv 2305.08891, section 3.3).
    """
    own = pipeline.scheduler
    try:
        if own.config.get("timestep_spacing") == "leading":
            scheduler = copy.deepcopy(own)
            scheduler.register_to_config(timestep_spacing="trailing")
            vars(pipeline)["scheduler"] = scheduler
        yield
    finally:
        vars(pipeline)["scheduler"] = own


def set_at_run_time(scheduler: Any) -> dict[str, Any]:
    """Return the attributes of `scheduler` that its configuration alone does not give, without what a run leaves."""
    plain = vars(type(scheduler).from_config(scheduler.config))
    return {
        name: value
        for name, value in vars(scheduler).items()
        if name not in _LEFT_BY_A_RUN and not (name in plain and _equal(value, plain[name]))
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one.cpu(), other.cpu())
    return np.array_equal(one, other)


def make_segment(
    prepared: Any,
    first: int,
    last: int,
    record: Collection[int] = (),
    on_x0: Callable[[int, torch.Tensor], None] | None = None,
    history: History | None = None,
) -> Any:
    """Return a copy of the `prepared` scheduler that runs schedule indices `first` to `last` (none when last < first)."""
    segment = copy.copy(prepared)
    segment._first, segment._last, segment._record, segment._on_x0 = first, last, frozenset(record), on_x0
    segment._resume = history
    return segment


def history_of(segment: Any) -> History | None:
    """Return what a multistep solver has to remember to go on, None for the others."""
    return {name: _copied(getattr(segment, name)) for name in segment._known.history if hasattr(segment, name)} or None


def noise_levels(segment: Any) -> tuple[float, ...]:
    """Return sigma before each step and, last, after all of them, from a segment whose timesteps were set."""
    if hasattr(segment, "sigmas"):
        return tuple(float(sigma) for sigma in segment.sigmas)
    # DDIM keeps alphas only; its last step goes to an alpha that need not be 1.
    whole = segment._whole
    after = int(whole[-1]) - segment.config.num_train_timesteps // segment.num_inference_steps
    alphas = [float(segment.alphas_cumprod[int(t)]) for t in whole]
    alphas.append(float(segment.alphas_cumprod[after] if after >= 0 else segment.final_alpha_cumprod))
    alphas = [max(alpha, 2.0**-24) for alpha in alphas]  # zero terminal SNR, as the Euler scheduler keeps it finite
    return tuple(((1 - alpha) / alpha) ** 0.5 for alpha in alphas)
