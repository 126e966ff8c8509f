"""NegToMe against a plain loop over the formula, and on tiny pipelines of the real classes."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests import worlds
from ttsnap_lib.diffusion.denoise import Denoiser, Settings, image_generator
from ttsnap_lib.diffusion.negtome import NegToMe, merge
from ttsnap_lib.errors import ConfigError, PipelineError

STEPS = 6
ALWAYS = {"start": 1000, "end": 0}

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_loop(tokens, group_size, alpha, threshold, matching):
    """Write the formula out, token by token."""
    result = tokens.clone()
    count = tokens.shape[1]
    for image in range(len(tokens)):
        reference = tokens[image - image % group_size]
        if image % group_size == 0:
            continue
        similarity = torch.zeros(count, count)
        for a in range(count):
            for b in range(count):
                similarity[a, b] = torch.cosine_similarity(tokens[image, a], reference[b], dim=0)
        for position in range(count):
            line = similarity[position] if matching == "paper" else similarity[:, position]
            if line.max() > threshold:
                result[image, position] = (1 + alpha) * tokens[image, position] - alpha * reference[line.argmax()]
    return result


def denoised(pipeline, negtome=None, n=4, cuts=(STEPS - 1,), **changes):
    options = {"n_steps": STEPS, "height": worlds.SIZE, "width": worlds.SIZE} | changes
    denoiser = Denoiser(pipeline, Settings(**options))
    text = denoiser.encode(["a red ring"]).repeat(n)
    candidates = denoiser.noise([image_generator(0, 0, image) for image in range(n)])
    handle = None if negtome is None else negtome.install(pipeline)
    try:
        for cut in cuts:
            candidates = denoiser.run(candidates, text, cut)
    finally:
        if handle is not None:
            handle.remove()
    return candidates.latents, handle


# The formula


@pytest.mark.parametrize("matching", ["paper", "released"])
@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.65])
@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_merge_is_the_formula(matching, threshold, group_size):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(6, 7, 5, generator=generator)
    expected = plain_loop(tokens, group_size, 1.2, threshold, matching)
    got = merge(tokens, group_size, 1.2, threshold, matching)
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(got[::group_size], tokens[::group_size])  # references keep their bits
    assert not torch.equal(got, tokens)


@pytest.mark.parametrize(
    "options", [{"group_size": 1}, {"group_size": 2, "alpha": 0.0}, {"group_size": 2, "threshold": 1.0}]
)
def test_settings_without_effect(options):
    tokens = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(4))
    assert torch.equal(merge(tokens, **{"alpha": 1.0, "threshold": 0.2, **options}), tokens)


# On pipelines


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_off_is_the_stock_pipeline(name):
    pipeline = worlds.build(name)
    before, _ = denoised(pipeline)
    changed, handle = denoised(pipeline, NegToMe(min_features=1, threshold=-1, **ALWAYS))
    assert handle.merges > 0 and not torch.equal(changed, before)
    assert torch.equal(changed[0], before[0]) or (changed[0] - before[0]).abs().max() < 1e-5  # the reference
    after, _ = denoised(pipeline)
    assert torch.equal(after, before)  # removed: same bits
    outside, handle = denoised(pipeline, NegToMe(min_features=1, start=0, end=0))
    assert handle.merges == 0 and torch.equal(outside, before)  # on, but never in its window
    alone, _ = denoised(pipeline, NegToMe(min_features=1, group_size=1, **ALWAYS))
    assert torch.equal(alone, before)
    modules = list(pipeline.components["transformer" if name == "flux" else "unet"].modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_an_image_does_not_depend_on_the_other_groups(name):
    pipeline = worlds.build(name)
    negtome = NegToMe(group_size=2, min_features=1, threshold=-1, **ALWAYS)
    small, _ = denoised(pipeline, negtome, n=2)
    large, _ = denoised(pipeline, negtome, n=6)
    assert (large[:2] - small).abs().max() <= 1e-5 * small.abs().max()
    one_group, _ = denoised(pipeline, NegToMe(group_size=6, min_features=1, threshold=-1, **ALWAYS), n=6)
    assert (one_group[2:] - large[2:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_parts_with_negtome_are_one_run_with_it(name):
    pipeline = worlds.build(name)
    negtome = NegToMe(min_features=1, threshold=0.0)
    whole, _ = denoised(pipeline, negtome)
    parts, _ = denoised(pipeline, negtome, cuts=(0, 2, 5))
    plain, _ = denoised(pipeline)
    assert torch.equal(whole, parts) and not torch.equal(whole, plain)


def spied(modules, before=False):
    """Return what goes into (or comes out of) each of the modules by name, as it passes, and the hooks."""
    seen = {}
    if before:
        hooks = [
            module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]))
            for name, module in modules.items()
        ]
    else:
        hooks = [
            module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
            for name, module in modules.items()
        ]
    return seen, hooks


def test_flux_hooks_stand_between_attention_and_projection():
    pipeline = worlds.flux()
    projection = {"dual": pipeline.transformer.transformer_blocks[0].attn.to_out[0]}
    attention = {"single": pipeline.transformer.single_transformer_blocks[0].attn}
    spies = [spied(projection, before=True), spied(attention)]
    negtome = NegToMe(group_size=2, threshold=-1.0, **ALWAYS).install(pipeline)
    spies += [spied(projection, before=True), spied(attention)]
    denoised(pipeline, n=4, cuts=(0,))
    negtome.remove()
    for _, hooks in spies:
        hooks[0].remove()
    dual, single, merged_dual, merged_single = (next(iter(seen.values())) for seen, _ in spies)
    text = single.shape[1] - dual.shape[1]
    assert text == worlds.TOKENS
    assert torch.allclose(merged_dual, plain_loop(dual, 2, 1.2, -1.0, "paper"), rtol=1e-5, atol=1e-6)
    assert torch.equal(merged_single[:, :text], single[:, :text])
    expected = plain_loop(single[:, text:], 2, 1.2, -1.0, "paper")
    assert torch.allclose(merged_single[:, text:], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sdxl_merges_after_projection_each_guidance_half_by_itself(guidance):
    pipeline = worlds.sdxl()
    block = pipeline.unet.up_blocks[0].attentions[0].transformer_blocks[0]
    attentions = {"attn1": block.attn1, "attn2": block.attn2}
    raw, hooks = spied(attentions)
    negtome = NegToMe(group_size=3, min_features=1, threshold=-1.0, **ALWAYS).install(pipeline)
    merged, more = spied(attentions)
    denoised(pipeline, n=3, cuts=(0,), guidance=guidance)
    negtome.remove()
    for hook in hooks + more:
        hook.remove()
    for name in attentions:
        halves = raw[name].chunk(2 if guidance > 1 else 1)
        expected = torch.cat([plain_loop(half, 3, 2.5, -1.0, "paper") for half in halves])
        assert len(raw[name]) == 3 * len(halves)
        # Under random weights two tokens may be the nearest to within rounding: one in a hundred may have the other.
        equal = torch.isclose(merged[name], expected, rtol=1e-5, atol=1e-5).all(-1)
        assert equal.float().mean() > 0.98


def test_published_windows():
    flux, sdxl = worlds.flux(), worlds.sdxl()
    settings = NegToMe().resolved(flux)
    assert (settings.alpha, settings.threshold, settings.start, settings.end) == (1.2, 0.65, 1000, 900)
    settings = NegToMe(alpha=1.0).resolved(sdxl)
    assert (settings.alpha, settings.threshold, settings.start, settings.end) == (1.0, 0.7, 950, 800)
    assert settings.min_features == 32
    denoiser = Denoiser(sdxl, Settings(n_steps=20, height=32, width=32))
    assert denoiser.timesteps[0] == 951  # leading spacing with offset 1, as SDXL ships
    assert NegToMe().active_steps(sdxl, denoiser.timesteps) == (1, 2, 3)
    denoiser = Denoiser(flux, Settings(n_steps=20, height=32, width=32))
    active = NegToMe().active_steps(flux, denoiser.timesteps)
    assert active == tuple(k for k, t in enumerate(denoiser.timesteps) if t >= 900) and active[0] == 0


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_the_window_is_read_from_the_timestep(name):
    """Every step of the window merges as often, in bf16 too, where the model is told a rounded timestep."""
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = worlds.build(name).to(dtype)
        negtome = NegToMe(min_features=1, start=990 if name == "flux" else 800, end=640)
        denoiser = Denoiser(pipeline, Settings(n_steps=20, height=worlds.SIZE, width=worlds.SIZE))
        active = negtome.active_steps(pipeline, denoiser.timesteps)
        assert 0 < len(active) < 20 and 0 not in active
        text = denoiser.encode(["x"]).repeat(4)
        candidates = denoiser.noise([image_generator(0, 0, image) for image in range(4)])
        counts = []
        with negtome.install(pipeline) as handle:
            for step in range(20):
                before = handle.merges
                candidates = denoiser.run(candidates, text, step)
                counts.append(handle.merges - before)
        assert tuple(k for k, count in enumerate(counts) if count) == active
        assert len({counts[k] for k in active}) == 1


def test_features_that_are_too_small_are_left_alone_and_told():
    pipeline = worlds.sdxl()
    plain, _ = denoised(pipeline)
    with pytest.warns(UserWarning, match="min_features=32"):
        got, handle = denoised(pipeline, NegToMe(**ALWAYS))
    assert torch.equal(got, plain) and handle.merges == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, handle = denoised(pipeline, NegToMe(min_features=4, **ALWAYS))
    assert handle.merges > 0


# Bad input


@pytest.mark.parametrize(("changes", "match"), [({"alpha": -1}, "alpha"), ({"start": 100, "end": 900}, "the larger")])
def test_bad_settings(changes, match):
    with pytest.raises(ConfigError, match=match):
        NegToMe(**changes)


def test_to_and_from_a_dictionary():
    given = NegToMe(group_size=8, alpha=1, matching="released")
    assert NegToMe.from_dict(given.to_dict()) == given
    with pytest.raises(ConfigError, match="Did you mean 'alpha'"):
        NegToMe.from_dict({"alfa": 1.0})


def test_a_batch_of_broken_groups_is_refused_in_the_window_only():
    pipeline = worlds.flux()
    with pytest.raises(PipelineError, match="batch of 3.*group_size=4"):
        denoised(pipeline, NegToMe(), n=3)
    denoised(pipeline, NegToMe(start=0, end=0), n=3)
    assert getattr(pipeline.transformer, "_negtome", None) is None


def test_once_at_a_time_and_for_two_families():
    pipeline = worlds.flux()
    with NegToMe().install(pipeline), pytest.raises(PipelineError, match="already"):
        NegToMe().install(pipeline)
    NegToMe().install(pipeline).remove()
    with pytest.raises(PipelineError, match="StableDiffusion3Pipeline"):
        NegToMe().install(worlds.sd3())
