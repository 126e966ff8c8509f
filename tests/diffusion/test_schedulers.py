"""Every scheduler in parts: the schedule that a segment shows is the stock pipeline's."""

from __future__ import annotations

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
