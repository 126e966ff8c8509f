"""The segment engine on tiny pipelines of the real classes: a run in parts is the stock pipeline's one call."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, StableDiffusionImg2ImgPipeline, UniPCMultistepScheduler
from diffusers.models.embeddings import MultiIPAdapterImageProjection

from tests import worlds
from tests.worlds import CAPTIONS, RELATIVE, STEPS, generators, in_parts, same_to, settings, stock
from ttsnap_lib.diffusion.denoise import Candidates, Conditioning, Denoiser, Settings, image_generator, image_seed
from ttsnap_lib.errors import ConfigError, DeviceError, PipelineError

CUTS = [(5,), (0, 5), (2, 5), (4, 5), (0, 1, 2, 3, 4, 5)]
NAMES = list(worlds.PIPELINES)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipelines() -> dict[str, DiffusionPipeline]:
    return {name: worlds.build(name) for name in NAMES}


# Equality with the stock call


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_bit_equal_to_one_stock_call(pipelines, name):
    pipeline = pipelines[name]
    latents, images = stock(pipeline), stock(pipeline, "pt").float()
    denoiser = Denoiser(pipeline, settings())
    for cuts in CUTS:
        candidates, estimates = in_parts(denoiser, cuts)
        assert torch.equal(candidates.latents, latents), cuts
        assert torch.equal(denoiser.final(candidates), images), cuts
        assert sorted(estimates) == list(range(STEPS)) and candidates.step == STEPS - 1
    assert torch.equal(stock(pipeline), latents)  # nothing stays changed on the pipeline
    assert denoiser.sigmas[-1] == 0  # and there the last estimate is the image, no earlier one
    same_to(estimates[STEPS - 1], latents, 1e-6)
    assert all((estimates[step] - latents).abs().max() > 1e-3 for step in range(STEPS - 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [[0, 2], [2], [1]])
def test_the_survivors_do_not_notice_the_dropped(pipelines, name, keep):
    pipeline = pipelines[name]
    latents = stock(pipeline)
    denoiser = Denoiser(pipeline, settings())
    conditioning = denoiser.encode(CAPTIONS)
    half = denoiser.run(denoiser.noise(generators()), conditioning, 2)
    rest = denoiser.run(half.take(keep), conditioning.take(keep), STEPS - 1)
    assert len(rest) == len(keep)
    same_to(rest.latents, latents[keep], RELATIVE)


def test_candidates_of_several_batches_go_on_together(pipelines):
    pipeline = pipelines["sdxl"]
    denoiser = Denoiser(pipeline, settings())
    conditioning = denoiser.encode(CAPTIONS)
    noise = denoiser.noise(generators())
    parts = [denoiser.run(noise.take(rows), conditioning.take(rows), 1) for rows in ([0, 1], [2])]
    joined = denoiser.run(Candidates.cat(parts), conditioning, 5)
    same_to(joined.latents, stock(pipeline), RELATIVE)


def test_candidates_may_wait_in_main_memory():
    pipeline = worlds.sd()
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    denoiser = Denoiser(pipeline, settings())
    moved = denoiser.run(denoiser.noise(generators()), denoiser.encode(CAPTIONS), 2)
    away = moved.to("meta")  # stands for another device
    remembered = [one for one in away.history["model_outputs"] if one is not None]
    assert away.step == 2 and {one.device.type for one in (away.latents, *remembered)} == {"meta"}
    assert moved.to("cpu").latents is moved.latents and away.history["this_order"] == moved.history["this_order"]


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_the_estimate_is_sample_minus_sigma_times_what_the_model_says(pipelines, name):
    """Against the model's output, read off the model itself, unguided; SDXL in the variance-exploding scale."""
    pipeline = pipelines[name]
    denoiser, seen, estimates = Denoiser(pipeline, settings(guidance=1.0)), [], {}
    model = pipeline.unet if name == "sdxl" else pipeline.transformer
    hook = model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    before = denoiser.run(denoiser.noise(generators()), denoiser.encode(CAPTIONS), 2)
    denoiser.run(before, denoiser.encode(CAPTIONS), 3, [3], estimates.__setitem__)
    hook.remove()
    assert torch.equal(estimates[3], before.latents - torch.tensor(denoiser.sigmas[3]) * seen[3])


# Guidance, text, precision


@pytest.mark.parametrize("name", ["sdxl", "sd", "sd3"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("negative", [None, "blurry"])
def test_classifier_free_guidance(pipelines, name, guidance, negative):
    pipeline = pipelines[name]
    if negative and guidance == 1.0:
        with pytest.raises(ConfigError, match="no effect"):
            Denoiser(pipeline, settings(guidance=guidance, negative_prompt=negative))
        return
    denoiser = Denoiser(pipeline, settings(guidance=guidance, negative_prompt=negative))
    texts = None if negative is None else [negative] * len(CAPTIONS)
    expected = stock(pipeline, guidance_scale=guidance, negative_prompt=texts)
    assert torch.equal(in_parts(denoiser, (1, 5))[0].latents, expected)
    plain = in_parts(Denoiser(pipeline, settings()), (5,))[0].latents
    assert not torch.equal(plain, expected)


def test_flux_guidance_embedded_and_classifier_free(pipelines):
    distilled, plain = pipelines["flux"], worlds.flux(guidance_embeds=False)
    assert Denoiser(distilled, settings()).settings.guidance == 3.5
    assert Denoiser(plain, settings()).settings.guidance == 1.0
    ours = {"true_guidance": 2.5, "negative_prompt": "bad"}
    cases = [
        (distilled, {"guidance": 2.0}, {"guidance_scale": 2.0}),
        (distilled, ours, {"true_cfg_scale": 2.5, "negative_prompt": ["bad"] * 3}),
        (plain, {"guidance": 2.5}, {"true_cfg_scale": 2.5, "negative_prompt": [""] * 3}),
        (plain, {}, {}),
    ]
    results = []
    for pipeline, ours, theirs in cases:
        results.append(in_parts(Denoiser(pipeline, settings(**ours)), (3, 5))[0].latents)
        assert torch.equal(results[-1], stock(pipeline, **theirs)), ours
    assert all(not torch.equal(a, b) for k, a in enumerate(results) for b in results[:k])


def test_text_is_encoded_once_and_repeated(pipelines):
    pipeline = pipelines["flux"]
    calls = []
    hook = pipeline.text_encoder_2.register_forward_hook(lambda *_: calls.append(1))
    denoiser = Denoiser(pipeline, settings())
    assert not calls  # the dry run touches no model
    conditioning = denoiser.encode(CAPTIONS[:1]).repeat(3)
    candidates, _ = in_parts(denoiser, (0, 3, 5), conditioning)
    hook.remove()
    assert len(calls) == 1 and len(conditioning) == 3
    repeated = denoiser.encode(CAPTIONS).repeat(2)  # the candidates of a prompt stay together
    for key, rows in denoiser.encode(CAPTIONS).embeds.items():
        assert torch.equal(repeated.embeds[key], rows[[0, 0, 1, 1, 2, 2]])
    expected = pipeline(
        CAPTIONS[0], num_images_per_prompt=3, generator=generators(), height=worlds.SIZE, width=worlds.SIZE,
        num_inference_steps=STEPS, max_sequence_length=worlds.TOKENS, output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(candidates.latents, expected)


GIVEN = {  # what is wrong with embeddings of "sdxl" with guidance
    "no mapping": (lambda embeds: embeds["prompt_embeds"], "got Tensor, expected a mapping"),
    "an unknown name": (lambda embeds: {**embeds, "prompt_embed": 1}, "Did you mean 'prompt_embeds'"),
    "without the negative ones": (
        lambda embeds: {key: value for key, value in embeds.items() if not key.startswith("neg")},
        r"without \['negative_prompt_embeds', 'negative_pooled_prompt_embeds'\]",
    ),
    "too few rows": (lambda embeds: {**embeds, "pooled_prompt_embeds": embeds["pooled_prompt_embeds"][:2]}, "2 rows of"),
    "of another model": (
        lambda embeds: {**embeds, "prompt_embeds": embeds["prompt_embeds"][..., :8]}, "width 8, expected"
    ),
    "no tensors": (lambda embeds: {**embeds, "prompt_embeds": "a.pt"}, "of str, expected tensors"),
}  # fmt: skip


@pytest.mark.parametrize("bad", GIVEN)
def test_embeddings_that_do_not_fit_are_told(pipelines, bad):
    denoiser = Denoiser(pipelines["sdxl"], settings())
    embeds = dict(denoiser.encode(CAPTIONS).embeds)
    denoiser.given(embeds, 3)
    change, says = GIVEN[bad]
    with pytest.raises(ConfigError, match=says):
        denoiser.given(change(embeds), 3)
    with pytest.raises(ConfigError, match="beside prompt_embeds"):
        Denoiser(pipelines["sdxl"], settings(negative_prompt="blurred")).given(embeds, 3)


def test_what_a_pipeline_can_do_without_is_not_missed():
    pipeline = worlds.build("sd3")
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    Denoiser(pipeline, settings()).require_text()


def test_rows_of_embeddings_of_every_kind():
    """Lists of texts of their own lengths (Z-Image), prompts on the second axis (HiDream), and padding by masks."""

    def texts(lengths):
        values = [torch.full((1, n, 2), float(n)) for n in lengths]
        longest = max(lengths)
        padded = torch.cat([torch.nn.functional.pad(value, (0, 0, 0, longest - value.shape[1])) for value in values])
        mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
        embeds = {"layers": torch.stack([padded, -padded]), "mask": mask, "pooled": padded.mean(1)}
        return Conditioning({"text": [value[0] for value in values], **embeds}, {"layers": 1})

    both = texts([3, 1])
    assert len(both) == 2 and len(Conditioning({"layers": both.embeds["layers"]}, {"layers": 1})) == 2
    picked = both.take([1, 0, 1])
    assert len(picked) == 3 and [len(text) for text in picked.embeds["text"]] == [1, 3, 1]
    assert picked.embeds["layers"].shape == (2, 3, 3, 2) and torch.equal(
        picked.embeds["mask"].sum(1), torch.tensor([1, 3, 1])
    )
    assert torch.equal(both.repeat(2).embeds["layers"], both.take([0, 0, 1, 1]).embeds["layers"])
    joined = Conditioning.cat([texts([1]), texts([3, 1])])
    for name, value in both.take([1, 0, 1]).embeds.items():
        same = joined.embeds[name]
        if name == "pooled":  # of texts that were not padded
            continue
        assert all(torch.equal(a, b) for a, b in zip(same, value, strict=True)), name
    with pytest.raises(ConfigError, match="several lengths"):
        Conditioning.cat([Conditioning({"text": torch.zeros(1, n, 2)}) for n in (2, 3)])
    with pytest.raises(ConfigError, match="different embeddings"):
        Conditioning.cat([both, Conditioning({"text": both.embeds["text"]})])


def test_a_model_cache_survives_a_shrinking_batch(pipelines):
    pipeline = worlds.build("flux")
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))  # reuses whatever it can
    denoiser, conditioning = Denoiser(pipeline, settings()), Denoiser(pipeline, settings()).encode(CAPTIONS)
    assert not torch.equal(stock(pipeline), stock(pipelines["flux"]))  # the cache is at work
    assert torch.equal(in_parts(denoiser, (STEPS - 1,))[0].latents, stock(pipeline))

    def stop(step, x0):
        raise KeyError

    half = denoiser.run(denoiser.noise(generators()), conditioning, 2)
    with pytest.raises(KeyError):
        denoiser.run(half, conditioning, STEPS - 1, [3], stop)
    rest = denoiser.run(half.take([1]), conditioning.take([1]), STEPS - 1)
    assert len(rest) == 1 and torch.isfinite(rest.latents).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(name, dtype):
    pipeline = worlds.build(name).to(dtype)
    denoiser = Denoiser(pipeline, settings())
    candidates, estimates = in_parts(denoiser, (2, 5))
    assert candidates.latents.dtype == estimates[5].dtype == dtype
    noise = denoiser.noise(generators()).latents
    assert torch.equal(noise, Denoiser(worlds.build(name), settings()).noise(generators()).latents.to(dtype))
    assert torch.equal(candidates.latents, stock(pipeline, latents=noise))
    assert torch.equal(estimates[5], candidates.latents) or dtype is torch.float16
    images = denoiser.final(candidates)
    assert images.dtype == torch.float32 and torch.isfinite(images).all()


def test_a_vae_that_overflows_in_fp16_is_decoded_in_fp32():
    pipeline = worlds.sdxl()
    latents = Denoiser(pipeline, settings()).noise(generators()).latents
    expected = Denoiser(pipeline, settings()).decode(latents.half().float())
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.to(torch.float16)
    got = Denoiser(pipeline, settings()).decode(latents.half())
    assert pipeline.vae.dtype == torch.float16
    assert (got - expected).abs().max() < 5e-3  # the weights were rounded to fp16 once


# Decoding


def test_decode_with_a_tiny_decoder_and_with_latent_statistics(pipelines):
    pipeline = pipelines["flux"]
    denoiser = Denoiser(pipeline, settings())
    candidates, _ = in_parts(denoiser, (5,))
    quick = denoiser.decode(candidates.latents, worlds.tiny_decoder())
    full = denoiser.decode(candidates.latents)
    for images in (quick, full):
        assert images.shape == (3, 3, worlds.SIZE, worlds.SIZE) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
    assert not torch.equal(quick, full)

    other = worlds.sdxl()
    other.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    denoiser = Denoiser(other, settings())
    candidates, _ = in_parts(denoiser, (5,))
    assert torch.equal(denoiser.final(candidates), stock(other, "pt").float())


def test_final_images_pass_the_safety_checker_and_the_watermark():
    class Marker:
        def apply_watermark(self, images):
            return images * 0.5

    pipeline = worlds.sdxl()
    pipeline.watermark = Marker()
    denoiser = Denoiser(pipeline, settings())
    assert torch.equal(denoiser.final(in_parts(denoiser, (5,))[0]), stock(pipeline, "pt").float())


def test_non_square_sizes(pipelines):
    for name in NAMES:
        pipeline = pipelines[name]
        denoiser = Denoiser(pipeline, settings(height=48, width=32))
        candidates, _ = in_parts(denoiser, (2, 5))
        assert torch.equal(candidates.latents, stock(pipeline, height=48, width=32)), name
        assert denoiser.final(candidates).shape == (3, 3, 48, 32)


# The pipeline is left as it was


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_changed_even_after_an_error(pipelines, name):
    pipeline = pipelines[name]
    own, config = dict(vars(pipeline)), dict(pipeline.config)
    denoiser = Denoiser(pipeline, settings())
    conditioning, noise = denoiser.encode(CAPTIONS), denoiser.noise(generators())

    class Stop(Exception):
        pass

    def stop(step, x0):
        raise Stop

    with pytest.raises(Stop):
        denoiser.run(noise, conditioning, 3, [2], stop)
    assert dict(vars(pipeline)) == own and dict(pipeline.config) == config
    assert torch.equal(in_parts(denoiser, (5,))[0].latents, stock(pipeline))


def test_a_run_inside_a_run(pipelines):
    pipeline = pipelines["sdxl"]
    outer, inner = Denoiser(pipeline, settings()), Denoiser(pipeline, settings(guidance=1.0, n_steps=4))
    inside = []

    def again(step, x0):
        conditioning = inner.encode(CAPTIONS)
        inside.append(inner.run(inner.noise(generators()), conditioning, 3).latents)

    candidates = outer.run(outer.noise(generators()), outer.encode(CAPTIONS), 5, [1, 3], again)
    assert torch.equal(candidates.latents, stock(pipeline))
    assert torch.equal(inside[0], stock(pipeline, guidance_scale=1.0, num_inference_steps=4))
    assert torch.equal(inside[0], inside[1])


# Seeds


def test_seed_rule():
    assert image_seed(3, 5, 7) == int(np.random.SeedSequence([3, 5, 7]).generate_state(1, np.uint64)[0]) & (2**63 - 1)
    seeds = {image_seed(base, prompt, image) for base in range(3) for prompt in range(20) for image in range(20)}
    assert len(seeds) == 3 * 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_noise_depends_on_the_image_alone_and_is_what_the_stock_pipeline_draws(pipelines):
    denoiser = Denoiser(pipelines["flux"], settings())
    together = denoiser.noise(generators(3)).latents
    alone = denoiser.noise([image_generator(0, 0, 2)]).latents
    assert torch.equal(together[2:], alone)
    state = torch.get_rng_state()
    denoiser.noise(generators())
    assert torch.equal(torch.get_rng_state(), state)


# Bad input


@pytest.mark.parametrize("changes", [{"n_steps": 2.5}, {"guidance": float("nan")}, {"negative_prompt": 3}], ids=str)
def test_settings_that_can_be_right_for_no_pipeline(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        Settings(**changes)


def test_settings_to_and_from_a_dictionary():
    given = settings(guidance=2, negative_prompt="x")
    assert Settings.from_dict(given.to_dict()) == given
    with pytest.raises(ConfigError, match="Did you mean 'guidance'"):
        Settings.from_dict({"guidence": 3.0})


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("flux", {"height": 36}, "multiple of 8.*nearest is 32"),
        ("sdxl", {"width": 33}, "multiple of 8"),
        ("sd3", {"height": 33}, "multiple of 8"),
        ("sd", {"max_sequence_length": 16}, "has a fixed one"),
        ("sdxl", {"true_guidance": 2.0}, "classifier-free here"),
        ("flux", {"negative_prompt": "bad"}, "true_guidance"),
    ],
)
def test_settings_that_this_pipeline_cannot_take(pipelines, name, changes, match):
    ran = []
    pipeline = pipelines[name]
    model = pipeline.unet if name.startswith("sd") and name != "sd3" else pipeline.transformer
    hook = model.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ConfigError, match=match):
        Denoiser(pipeline, settings(**changes))
    hook.remove()
    assert not ran


def test_pipelines_that_are_not_supported():
    other = StableDiffusionImg2ImgPipeline(**worlds.sd().components, requires_safety_checker=False)
    with pytest.raises(
        PipelineError, match="StableDiffusionImg2ImgPipeline is not supported: it works on a picture.*ADAPTERS"
    ):
        Denoiser(other)
    inpainting = worlds.sdxl()
    inpainting.vae.register_to_config(latent_channels=8)
    with pytest.raises(PipelineError, match="4 latent channels"):
        Denoiser(inpainting)
    headless = worlds.flux()
    headless.transformer = None
    with pytest.raises(PipelineError, match="has no transformer"):
        Denoiser(headless)
    for name, why in {
        "WanPipeline": "makes videos", "LTXPipeline": "makes videos", "HunyuanVideoPipeline": "makes videos",
        "QwenImageEditPipeline": "works on a picture that is given", "FluxKontextPipeline": "works on a picture",
        "Cosmos2TextToImagePipeline": "reads its scheduler by the index", "SanaSprintPipeline": "adds fresh noise",
        "AuraFlowPipeline": "has no entry",
    }.items():  # fmt: skip
        kind = getattr(diffusers, name)
        with pytest.raises(PipelineError, match=f"{name} is not supported: it {why}"):
            Denoiser(kind.__new__(kind))


@pytest.mark.parametrize("name", ["flux", "sd"])
def test_a_text_encoder_that_is_missing(name):
    pipeline = worlds.build(name)
    pipeline.text_encoder = None
    denoiser = Denoiser(pipeline, settings())
    with pytest.raises(PipelineError, match="has no text_encoder, which prompts need"):
        denoiser.encode(CAPTIONS)


def test_an_ip_adapter_wants_a_picture():
    pipeline = worlds.build("sd")
    pipeline.unet.encoder_hid_proj = MultiIPAdapterImageProjection([torch.nn.Identity()])
    with pytest.raises(PipelineError, match="IP-Adapter.*unload_ip_adapter"):
        Denoiser(pipeline, settings())


def test_bad_calls(pipelines):
    denoiser = Denoiser(pipelines["sd"], settings())
    conditioning, noise = denoiser.encode(CAPTIONS), denoiser.noise(generators())
    half = denoiser.run(noise, conditioning, 2)
    for bad in ([], "a prompt"):
        with pytest.raises(ConfigError, match="prompts"):
            denoiser.encode(bad)
    for step in (2, 6):
        with pytest.raises(ConfigError, match="last_step"):
            denoiser.run(half, conditioning, step)
    with pytest.raises(ConfigError, match="2 rows for 3 candidates"):
        denoiser.run(half, conditioning.take([0, 1]), 4)
    for record, on_x0 in (([2], print), ([5], print), ([3], None)):
        with pytest.raises(ConfigError, match="record"):
            denoiser.run(half, conditioning, 4, record, on_x0)
    with pytest.raises(ConfigError, match="last step, 5"):
        denoiser.final(half)
    with pytest.raises(ConfigError, match="same step"):
        Candidates.cat([noise, half])


def test_out_of_memory_is_told_with_a_remedy(pipelines):
    pipeline = pipelines["sd"]
    denoiser = Denoiser(pipeline, settings())

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = pipeline.unet.register_forward_hook(full)
    with pytest.raises(DeviceError, match="3 images at once.*smaller batch"):
        denoiser.run(denoiser.noise(generators()), denoiser.encode(CAPTIONS), 2)
    hook.remove()


# Accelerators


@pytest.mark.device
@pytest.mark.parametrize("name", NAMES)
def test_on_an_accelerator(name):
    place = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if place is None:
        pytest.skip("no accelerator")
    expected, _ = in_parts(Denoiser(worlds.build(name), settings()), (5,))
    pipeline = worlds.build(name).to(place)
    candidates, _ = in_parts(Denoiser(pipeline, settings()), (2, 5))
    assert torch.equal(candidates.latents, stock(pipeline))
    same_to(candidates.latents.cpu(), expected.latents, 1e-3)
    if place == "cuda":
        for offload in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
            pipeline = worlds.build(name)
            getattr(pipeline, offload)()
            offloaded, _ = in_parts(Denoiser(pipeline, settings()), (2, 5))
            same_to(offloaded.latents.cpu(), expected.latents, 1e-3)
