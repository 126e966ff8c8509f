"""Every scheduler in parts: the schedule that a segment shows is the stock pipeline's."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from tests import worlds
from tests.worlds import CAPTIONS, RELATIVE, STEPS, generators, in_parts, same_to, settings, stock
from ttsnap_lib.diffusion.denoise import Denoiser
from ttsnap_lib.diffusion.schedulers import set_at_run_time
from ttsnap_lib.errors import PipelineError

pytestmark = pytest.mark.usefixtures("one_thread")


def with_scheduler(name: str, make) -> DiffusionPipeline:
    """Return a tiny pipeline whose scheduler is ``make(its own configuration)``."""
    pipeline = worlds.build(name)
    pipeline.scheduler = make(pipeline.scheduler.config)
    return pipeline


def ddim(**options):
    return lambda config: DDIMScheduler.from_config(config, clip_sample=False, **options)


SCHEDULERS = {
    "euler-linspace": lambda c: EulerDiscreteScheduler.from_config(c, timestep_spacing="linspace"),
    "euler-trailing": lambda c: EulerDiscreteScheduler.from_config(c, timestep_spacing="trailing"),
    "euler-karras": lambda c: EulerDiscreteScheduler.from_config(c, use_karras_sigmas=True),
    "euler-v": lambda c: EulerDiscreteScheduler.from_config(c, prediction_type="v_prediction"),
    "euler-sample": lambda c: EulerDiscreteScheduler.from_config(c, prediction_type="sample"),
    "euler-sigma-min": lambda c: EulerDiscreteScheduler.from_config(c, final_sigmas_type="sigma_min"),
    "ddim": ddim(set_alpha_to_one=False),
    "ddim-to-one": ddim(set_alpha_to_one=True),
    "ddim-v": ddim(prediction_type="v_prediction", set_alpha_to_one=False),
    "ddim-sample": ddim(prediction_type="sample", set_alpha_to_one=False),
    "ddim-trailing-zero-snr": ddim(
        timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    ),
    "dpm++": lambda c: DPMSolverMultistepScheduler.from_config(c),
    "dpm++-3-karras": lambda c: DPMSolverMultistepScheduler.from_config(c, solver_order=3, use_karras_sigmas=True),
    "unipc": lambda c: UniPCMultistepScheduler.from_config(c),
}
ENDS_NOISY = ("euler-sigma-min", "ddim", "ddim-v", "ddim-sample", "ddim-trailing-zero-snr")


@pytest.mark.parametrize(  # SDXL tells its scheduler where to begin, SD does not
    ("name", "kind"),
    [("sd", kind) for kind in SCHEDULERS] + [("sdxl", kind) for kind in ("euler-trailing", "ddim", "dpm++", "unipc")],
)
def test_every_scheduler_in_parts(name, kind):
    pipeline = with_scheduler(name, SCHEDULERS[kind])
    latents = stock(pipeline)
    denoiser = Denoiser(pipeline, settings())
    for cuts in ((0, 1, 2, 3, 4, 5), (2, 5)):
        candidates, estimates = in_parts(denoiser, cuts)
        assert torch.equal(candidates.latents, latents), cuts
        assert len(estimates) == STEPS
    assert len(denoiser.sigmas) == STEPS + 1 and list(denoiser.sigmas) == sorted(denoiser.sigmas, reverse=True)
    assert (denoiser.sigmas[-1] == 0) is (kind not in ENDS_NOISY)
    conditioning = denoiser.encode(CAPTIONS)
    half = denoiser.run(denoiser.noise(generators()), conditioning, 2)
    rest = denoiser.run(half.take([2, 0]), conditioning.take([2, 0]), STEPS - 1)
    same_to(rest.latents, latents[[2, 0]], RELATIVE)
    if denoiser.sigmas[-1] == 0:
        same_to(estimates[STEPS - 1], latents, 1e-5)
    else:  # the image is the pipeline's output, not the estimate
        assert (estimates[STEPS - 1] - latents).abs().max() > 1e-3
        assert torch.equal(denoiser.final(candidates), stock(pipeline, "pt").float())


@pytest.mark.parametrize(
    "options",
    [
        {"use_dynamic_shifting": False, "shift": 1.0},
        {"use_dynamic_shifting": False, "shift": 5.0},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"shift_terminal": 0.1},
        {"use_dynamic_shifting": False, "use_karras_sigmas": True},
    ],
    ids=str,
)
def test_flow_matching_options(options):
    pipeline = worlds.flux(**options)
    latents = stock(pipeline)
    candidates, _ = in_parts(Denoiser(pipeline, settings()), (1, 5))
    assert torch.equal(candidates.latents, latents)


def test_a_shift_set_at_run_time_counts():
    pipeline = worlds.sd3()
    plain = Denoiser(pipeline, settings()).sigmas
    pipeline.scheduler.set_shift(7.0)
    denoiser = Denoiser(pipeline, settings())
    assert denoiser.sigmas != plain
    assert torch.equal(in_parts(denoiser, (1, 5))[0].latents, stock(pipeline))


def without_corrector(scheduler):
    scheduler.disable_corrector = [0, 1]


def clean_end(scheduler):
    scheduler.final_alpha_cumprod = torch.tensor(1.0)


def other_levels(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.1


@pytest.mark.parametrize(
    ("kind", "change"),
    [("unipc", without_corrector), ("ddim", clean_end), ("ddim", other_levels), ("euler-linspace", other_levels)],
)
def test_an_attribute_set_at_run_time_counts(kind, change):
    pipeline = with_scheduler("sd", SCHEDULERS[kind])
    plain = stock(pipeline)
    assert set_at_run_time(pipeline.scheduler) == {}  # also after a run
    change(pipeline.scheduler)
    changed = stock(pipeline)
    assert not torch.equal(changed, plain)
    assert len(set_at_run_time(pipeline.scheduler)) == 1
    before = dict(vars(pipeline.scheduler))
    assert torch.equal(in_parts(Denoiser(pipeline, settings()), (1, 5))[0].latents, changed)
    assert all(vars(pipeline.scheduler)[name] is value for name, value in before.items())  # a copy did the work


def test_a_subclass_of_a_scheduler_runs_and_a_replaced_method_is_refused():
    class Halved(EulerDiscreteScheduler):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.sigmas = self.sigmas * 0.5

    pipeline = with_scheduler("sd", Halved.from_config)
    latents = stock(pipeline)
    assert torch.equal(in_parts(Denoiser(pipeline, settings()), (1, 5))[0].latents, latents)
    pipeline.scheduler.set_timesteps = functools.partial(pipeline.scheduler.set_timesteps)
    with pytest.raises(PipelineError, match="set_timesteps was replaced"):
        Denoiser(pipeline, settings())


@pytest.mark.parametrize("solver", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_multistep_solvers_on_flow_matching(solver):
    pipeline = worlds.sd3()
    pipeline.scheduler = solver.from_config(
        pipeline.scheduler.config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    latents = stock(pipeline)
    denoiser = Denoiser(pipeline, settings())
    candidates, estimates = in_parts(denoiser, (2, 5))
    assert torch.equal(candidates.latents, latents)
    same_to(estimates[STEPS - 1], latents, 1e-5)


def test_many_steps_do_not_change_what_a_multistep_solver_thinks_is_left():
    """Solvers treat the last steps of short schedules differently: a part must not look like a short schedule."""
    pipeline = with_scheduler("sd", lambda c: DPMSolverMultistepScheduler.from_config(c, final_sigmas_type="sigma_min"))
    latents = stock(pipeline, num_inference_steps=20)
    candidates, _ = in_parts(Denoiser(pipeline, settings(n_steps=20)), (3, 10, 19))
    assert torch.equal(candidates.latents, latents)


@pytest.mark.parametrize(
    ("scheduler", "missing"),
    [
        (EulerAncestralDiscreteScheduler, "a rule to read x0"),
        (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "fresh noise"),
        (lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "fresh noise"),
        (lambda: UniPCMultistepScheduler(predict_x0=False), "predict_x0"),
    ],
)
def test_unsupported_schedulers_say_what_is_missing(scheduler, missing):
    pipeline = worlds.sd()
    pipeline.scheduler = scheduler()
    with pytest.raises(PipelineError, match=missing):
        Denoiser(pipeline, settings())


def test_more_steps_than_the_scheduler_has():
    pipeline = with_scheduler("sd", ddim())
    with pytest.raises(PipelineError, match="refuses these settings.*1001"):
        Denoiser(pipeline, settings(n_steps=1001))


def test_clipping_of_latents_is_pointed_out():
    pipeline = with_scheduler("sd", lambda c: DDIMScheduler.from_config(c, clip_sample=True))
    with pytest.warns(UserWarning, match="clip_sample"):
        Denoiser(pipeline, settings())
