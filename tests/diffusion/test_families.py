"""Every supported family, at tiny size with random weights: a run in parts is the stock pipeline's one call.

The table of ``docs/models.md``, as tests: latents and images to the last bit in one, two and four parts, the last estimate, survivors
taken and repeated, and guidance that really runs the model on two texts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from tests import worlds
from tests.families import FAMILIES, _vae
from tests.worlds import CAPTIONS, RELATIVE, STEPS, generators, in_parts, same_to, settings
from ttsnap_lib.diffusion.denoise import Conditioning, Denoiser
from ttsnap_lib.diffusion.families import ADAPTERS
from ttsnap_lib.errors import ConfigError, PipelineError

CUTS = [(5,), (2, 5), (0, 2, 3, 5)]
QUICK = "z-image"
TABLE = [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
MOST = [
    name if name != "flux3" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
]  # that one is slow
GUIDED = [name for name, family in FAMILIES.items() if family.guided]

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def pipeline_of(name: str) -> Any:
    pipeline = FAMILIES[name].build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(name: str, guided: bool = True) -> dict[str, Any]:
    """Return settings that say what the stock call of the table says."""
    family = FAMILIES[name]
    given = family.more | (family.guided if guided else family.plain)
    found = {"max_sequence_length": given.get("max_sequence_length"), "guidance": given.get("guidance_scale")}
    if "true_cfg_scale" in given:
        found["true_guidance" if name == "flux" else "guidance"] = given["true_cfg_scale"]
    if "negative_prompt" in given:
        found["negative_prompt"] = given["negative_prompt"][0]
    return {key: value for key, value in found.items() if value is not None}


def test_every_entry_has_a_line_in_the_table():
    offered = {name for name in ADAPTERS if hasattr(diffusers, name)}
    assert {type(pipeline_of(name)).__name__ for name in FAMILIES} == offered


@pytest.mark.parametrize("name", MOST)
def test_parts_are_bit_equal_to_one_stock_call(name):
    pipeline, family = pipeline_of(name), FAMILIES[name]
    for guided in (True, False) if family.guided else (True,):
        latents, images = (family.stock(pipeline, kind, guided) for kind in ("latent", "pt"))
        denoiser = Denoiser(pipeline, settings(**ours(name, guided)))
        for cuts in CUTS:
            candidates, estimates = in_parts(denoiser, cuts)
            assert torch.equal(candidates.latents, latents), (guided, cuts)
            assert torch.equal(denoiser.final(candidates), images.float()), (guided, cuts)
        assert denoiser.sigmas[-1] == 0
        same_to(estimates[STEPS - 1], latents, 1e-6)
        assert all((estimates[step] - latents).abs().max() > 1e-3 for step in range(STEPS - 1))
        decoded = denoiser.decode(estimates[2])
        assert decoded.shape == (3, 3, worlds.SIZE, worlds.SIZE) and decoded.std() > 0.01


@pytest.mark.parametrize("name", MOST)
def test_a_pipeline_without_text_encoders_takes_embeddings(name):
    """And says in a sentence that it cannot encode prompts."""
    pipeline, given = pipeline_of(name), settings(**ours(name))
    denoiser = Denoiser(pipeline, given)
    conditioning = denoiser.encode(CAPTIONS)
    latents = in_parts(denoiser, (2, 5), conditioning)[0].latents
    parts = {key: part for key, part in pipeline.components.items() if key.startswith("text_encoder")}
    whole = getattr(pipeline, "modular", None)  # has no register_modules
    change = pipeline.register_modules if whole is None else lambda **parts: vars(whole).update(parts)
    change(**dict.fromkeys(parts))
    try:
        bare = Denoiser(pipeline, dataclasses.replace(given, negative_prompt=None))
        with pytest.raises(PipelineError, match="has no text_encoder.*prompt_embeds"):
            bare.require_text()
        taken = bare.placed(bare.given(conditioning.embeds, len(CAPTIONS)))
        assert torch.equal(in_parts(bare, (2, 5), taken)[0].latents, latents)
        for bad in (dict(list(conditioning.embeds.items())[1:]), conditioning.take([0]).embeds):
            with pytest.raises((ConfigError, PipelineError), match="prompt_embeds"):
                bare.given(bad, len(CAPTIONS))
    finally:
        change(**parts)


@pytest.mark.parametrize("name", TABLE)
def test_half_precision(name):
    """bf16; some loops work in fp32 all the same."""
    pipeline, family = FAMILIES[name].build().to(torch.bfloat16), FAMILIES[name]
    pipeline.set_progress_bar_config(disable=True)
    denoiser = Denoiser(pipeline, settings(**ours(name)))
    noise = denoiser.noise(generators()).latents
    assert noise.dtype == (torch.float32 if ADAPTERS[type(pipeline).__name__].float32 else torch.bfloat16)
    given = ADAPTERS[type(pipeline).__name__].given(pipeline, noise, *denoiser.settings.size)
    latents, images = (family.stock(pipeline, kind, latents=given) for kind in ("latent", "pt"))
    for cuts in CUTS:
        candidates, estimates = in_parts(denoiser, cuts)
        assert candidates.latents.dtype == latents.dtype and torch.equal(candidates.latents, latents), cuts
        assert torch.equal(denoiser.final(candidates), images.float()), cuts
    same_to(estimates[STEPS - 1], latents, 1e-2)


@pytest.mark.parametrize("name", TABLE)
def test_survivors_are_taken_and_repeated(name):
    pipeline, family = pipeline_of(name), FAMILIES[name]
    latents = family.stock(pipeline)
    denoiser = Denoiser(pipeline, settings(**ours(name)))
    # Prompts that were encoded one by one are put together: a text may be padded, which a mask tells.
    apart = Conditioning.cat([denoiser.encode([text]) for text in CAPTIONS])
    for conditioning in (denoiser.encode(CAPTIONS), apart):
        assert len(conditioning) == len(CAPTIONS)
        half = denoiser.run(denoiser.noise(generators()), conditioning, 2)
        rows = [2, 0, 0]
        rest = denoiser.run(half.take(rows), conditioning.take(rows), STEPS - 1)
        same_to(rest.latents, latents[rows], RELATIVE)
        alone = denoiser.run(half.take([1]), conditioning.take([1]), STEPS - 1)
        same_to(alone.latents, latents[[1]], RELATIVE)
    several = denoiser.encode(CAPTIONS[:2]).repeat(2)
    assert len(several) == 4
    both = denoiser.run(denoiser.noise(generators(4)), several, STEPS - 1)
    # the second prompt with the third noise is another picture than with the fourth, or than the first prompt's
    assert (both.latents[2] - both.latents[3]).abs().max() > 1e-3
    swapped = denoiser.run(denoiser.noise(generators(4)), several.take([2, 3, 0, 1]), STEPS - 1)
    assert not torch.equal(swapped.latents[0], both.latents[0])


@pytest.mark.parametrize("name", TABLE)
def test_guidance_runs_the_model_on_two_texts(name):
    pipeline, rows = pipeline_of(name), []

    def count(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    model = ADAPTERS[type(pipeline).__name__].component(pipeline)
    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        for guided, texts in [(True, 2), (False, 1)] if FAMILIES[name].guided else [(True, 1)]:
            denoiser = Denoiser(pipeline, settings(**ours(name, guided)))
            assert not rows  # the dry run touches no model
            in_parts(denoiser, (2, 5))
            assert sum(rows) == texts * len(CAPTIONS) * STEPS
            rows.clear()
    finally:
        hook.remove()


@pytest.mark.parametrize("name", TABLE)
def test_what_a_pipeline_does_when_it_is_not_told(name):
    """Size, guidance and text length are the pipeline's own defaults."""
    pipeline = pipeline_of(name)
    found = Denoiser(pipeline, {"n_steps": 2}).settings
    stock = {"sdxl": 32, "sd": 32, "sd3": 32, "sana": 1024, "lumina2": 32, "pixart": 32, "hidream": 32}
    stock |= {"flux3": 1024, "flux3-distilled": 1024, "anima": 1024}
    assert found.size == (stock.get(name, 512),) * 2, found.size
    guidance = {"flux": 3.5, "sd": 7.5, "sdxl": 5.0, "sd3": 7.0, "z-image": 5.0, "sana": 4.5, "pixart": 4.5}
    guidance |= {
        "schnell": 1.0,
        "klein-distilled": 1.0,
        "chroma": 5.0,
        "hidream": 5.0,
        "flux3": 3.5,
        "flux3-distilled": 1.0,
    }
    assert found.guidance == guidance.get(name, 4.0)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("flux2", {"true_guidance": 2.0}, "true_guidance: got 2.0.*distilled to do without"),
        ("flux2", {"negative_prompt": "the cat"}, "negative_prompt.*distilled to do without"),
        ("klein-distilled", {"guidance": 4.0}, "guidance: got 4.0.*distilled to do without"),
        ("z-image", {"guidance": 0.0, "negative_prompt": "the cat"}, "Set guidance above 0"),
        ("qwen-image", {"true_guidance": 2.0}, "Set guidance: it is classifier-free here"),
        ("hidream", {"height": 64, "width": 64}, r"got \(64, 64\), expected the area of \(32, 32\).*make \(32, 32\)"),
        ("lumina2", {"height": 40}, "multiple of 16"),
    ],
)
def test_settings_that_a_family_cannot_take(name, changes, match):
    with pytest.raises(ConfigError, match=match):
        Denoiser(pipeline_of(name), settings(**changes))


def test_a_negative_text_is_taken_where_the_call_has_no_argument_for_it():
    """FLUX.2-klein takes negative embeddings, though no negative prompt."""
    pipeline = pipeline_of("klein")
    plain, other = (
        in_parts(Denoiser(pipeline, settings(guidance=3.0, negative_prompt=text)), (5,))[0].latents
        for text in (None, "the blue square")
    )
    assert not torch.equal(plain, other)


# Pipelines as their users change them


def tiles(pipeline: Any) -> None:
    pipeline.vae.enable_tiling()
    pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 16, 4


USERS = {
    "tiles": ("sdxl", tiles, {}),
    "slices": ("flux", lambda pipeline: pipeline.vae.enable_slicing(), {}),
    "attention processors": ("sdxl", lambda pipeline: pipeline.unet.set_attn_processor(AttnProcessor()), {}),
    "another VAE": ("flux", lambda pipeline: setattr(pipeline, "vae", _vae(scaling_factor=0.9, norm_num_groups=4)), {}),
    "four steps of schnell": ("schnell", lambda pipeline: None, {"num_inference_steps": 4, "guidance_scale": 0.0}),
    "four steps of SDXL Lightning": (
        "sdxl",
        lambda pipeline: pipeline.scheduler.register_to_config(timestep_spacing="trailing"),
        {"num_inference_steps": 4, "guidance_scale": 0.0},
    ),
}


@pytest.mark.parametrize("name", USERS)
def test_pipelines_as_their_users_change_them(name):
    kind, change, call = USERS[name]
    pipeline, family = FAMILIES[kind].build(), FAMILIES[kind]
    pipeline.set_progress_bar_config(disable=True)
    before = family.stock(pipeline, "pt", guided=False, **call)
    change(pipeline)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    expected = family.stock(pipeline, "pt", guided=False, **call)
    if name not in ("slices", "attention processors", "four steps of schnell"):  # these change no more than rounding
        assert not torch.equal(before, expected)
    steps, given = call.get("num_inference_steps", STEPS), ours(kind, guided=False)
    given |= {"n_steps": steps} | ({"guidance": 0.0} if call else {})
    denoiser = Denoiser(pipeline, settings(**given))
    candidates, _ = in_parts(denoiser, (1, steps - 1))
    assert torch.equal(denoiser.final(candidates), expected.float())
