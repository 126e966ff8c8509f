"""Loading: one path for folders, pocket models and hub ids, and errors that say what to do."""

from __future__ import annotations

import shutil

import httpx
import pytest
import requests
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerAncestralDiscreteScheduler, StableDiffusionImg2ImgPipeline
from huggingface_hub import errors as hub
from huggingface_hub.utils import OfflineModeIsEnabled

from tests import tiny
from ttsnap_lib.diffusion.denoise import Denoiser, Settings, image_generator
from ttsnap_lib.diffusion.pipelines import POCKET_MODELS, SCHEDULERS, load_pipeline, pipeline_source
from ttsnap_lib.errors import ConfigError, DeviceError, PipelineError

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: tiny.save(name, root / name) for name in tiny.PIPELINES}


def images(pipeline, **changes) -> torch.Tensor:
    denoiser = Denoiser(pipeline, Settings(**{"n_steps": 3, "height": tiny.SIZE, "width": tiny.SIZE} | changes))
    candidates = denoiser.noise([image_generator(0, 0, 0)])
    return denoiser.final(denoiser.run(candidates, denoiser.encode(["a red ring"]), 2))


@pytest.mark.parametrize("name", list(tiny.PIPELINES))
def test_a_saved_pipeline_is_the_same_pipeline(folders, name):
    loaded = load_pipeline(folders[name], **CPU)
    built = tiny.build(name)
    assert type(loaded) is type(built)
    for part, module in built.components.items():
        if isinstance(module, torch.nn.Module):
            own = getattr(loaded, part).state_dict()
            assert all(torch.equal(own[key], value) for key, value in module.state_dict().items())
    # Loaded weights lie in a mapped file where they may be aligned otherwise, which some processors' kernels show.
    torch.testing.assert_close(images(loaded), images(built), rtol=0, atol=1e-5)
    assert pipeline_source(loaded) == {"model": str(folders[name]), "revision": None}
    assert loaded.vae.dtype == torch.float32


def test_dtypes(folders):
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), (torch.bfloat16, torch.bfloat16)):
        pipeline = load_pipeline(str(folders["sd"]), dtype=name, **CPU)
        assert pipeline.unet.dtype == pipeline.text_encoder.dtype == dtype


def test_weights_kept_in_eight_bits(folders):
    pipeline = load_pipeline(folders["flux"], dtype="bf16", fp8=True, **CPU)
    kept = {parameter.dtype for parameter in pipeline.transformer.transformer_blocks.parameters()}
    assert torch.float8_e4m3fn in kept
    got, exact = images(pipeline), images(tiny.flux())
    assert torch.isfinite(got).all() and not torch.equal(got, exact)
    # e4m3 keeps 4 significant bits; the pictures of a random model still agree to a few grey levels on average
    assert (got - exact).abs().mean() < 0.03


def test_a_pipeline_may_bring_defaults(folders):
    pipeline = load_pipeline(folders["flux"], **CPU)
    assert pipeline.ttsnap_defaults == {}
    pipeline.ttsnap_defaults = {"height": 32, "width": 48, "guidance": 2.0}
    settings = Denoiser(pipeline, Settings(n_steps=3, width=32)).settings
    assert (settings.height, settings.width, settings.guidance) == (32, 32, 2.0)


@pytest.mark.parametrize("name", ["euler", "ddim", "dpm++", "unipc"])
def test_schedulers_by_name_for_diffusion(folders, name):
    pipeline = load_pipeline(folders["sdxl"], scheduler=name, **CPU)
    assert type(pipeline.scheduler) is SCHEDULERS[name][0]
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"  # the model's own configuration goes along
    assert not pipeline.scheduler.config.get("clip_sample", False)
    assert torch.isfinite(images(pipeline)).all()
    with pytest.raises(ConfigError, match="does not fit.*flow-euler"):
        load_pipeline(folders["sd3"], scheduler="ddim", **CPU)


@pytest.mark.parametrize("name", ["flow-euler", "dpm++", "unipc"])
def test_schedulers_by_name_for_flow_matching(folders, name):
    pipeline = load_pipeline(folders["sd3"], scheduler=name, **CPU)
    assert type(pipeline.scheduler) is SCHEDULERS[name][0]
    assert torch.isfinite(images(pipeline)).all()
    with pytest.raises(ConfigError, match="does not fit.*euler, ddim"):
        load_pipeline(folders["sdxl"], scheduler="flow-euler", **CPU)


def test_a_scheduler_object(folders):
    pipeline = load_pipeline(folders["sd"], scheduler=DDIMScheduler(clip_sample=False), **CPU)
    assert type(pipeline.scheduler) is DDIMScheduler
    with pytest.raises(PipelineError, match="fresh noise"):
        load_pipeline(folders["sd"], scheduler=EulerAncestralDiscreteScheduler(), **CPU)
    with pytest.raises(ConfigError, match="scheduler"):
        load_pipeline(folders["sd"], scheduler=3, **CPU)


# -- bad names and folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("pocket-flax", "unknown model.*Did you mean 'pocket-flux'"),
        ("pocketsdxl", "unknown model.*Did you mean 'pocket-sdxl'"),
        ("./no/such/folder", "unknown model.*Check the spelling"),
        ("/no/such/folder", "unknown model"),
        ("a/b/c", "unknown model"),
    ],
)
def test_unknown_names(model, match):
    with pytest.raises(PipelineError, match=match):
        load_pipeline(model, **CPU)


@pytest.mark.parametrize("model", [None, "", 3, "  "])
def test_no_name(model):
    with pytest.raises(ConfigError, match="model"):
        load_pipeline(model, **CPU)


def test_broken_folders(folders, tmp_path):
    with pytest.raises(PipelineError, match="no model_index.json"):
        load_pipeline(tmp_path, **CPU)
    (tmp_path / "file.safetensors").write_text("x")
    with pytest.raises(PipelineError, match="a file, not a folder"):
        load_pipeline(tmp_path / "file.safetensors", **CPU)
    broken = shutil.copytree(folders["sd"], tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(PipelineError, match="missing or broken"):
        load_pipeline(broken, **CPU)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(PipelineError, match="missing or broken"):
        load_pipeline(broken, **CPU)
    (broken / "model_index.json").write_text("{")
    with pytest.raises(PipelineError, match="missing or broken"):
        load_pipeline(broken, **CPU)


def test_not_a_text_to_image_pipeline(tmp_path):
    other = StableDiffusionImg2ImgPipeline(**tiny.sd().components, requires_safety_checker=False)
    other.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "unet")  # told from the index, before any weights are read
    with pytest.raises(PipelineError, match="is a StableDiffusionImg2ImgPipeline, which is not supported"):
        load_pipeline(tmp_path, **CPU)


# -- the hub, up to the network call --------------------------------------------------------------------------------


def response(status: int):
    """Return an answer of the hub, of the library that it is asked with: httpx, requests before huggingface-hub 1.0."""
    url = "https://huggingface.co/owner/name"
    if issubclass(hub.HfHubHTTPError, requests.HTTPError):
        made = requests.Response()
        made.status_code, made.request = status, requests.Request("GET", url).prepare()
        return made
    return httpx.Response(status, request=httpx.Request("GET", url))


@pytest.mark.parametrize(
    ("cause", "match"),
    [
        (lambda: hub.GatedRepoError("403 gated", response=response(403)), "is gated.*accept the licence.*HF_TOKEN"),
        (lambda: hub.RepositoryNotFoundError("404", response=response(404)), "the hub has no .*Did you mean"),
        (lambda: hub.RevisionNotFoundError("404", response=response(404)), "not that revision"),
        (lambda: hub.LocalEntryNotFoundError("no cache"), "cannot be downloaded.*hf download"),
        (lambda: requests.ConnectionError("no route"), "cannot be downloaded.*hf download"),
        (lambda: httpx.ConnectError("no route"), "cannot be downloaded.*hf download"),
        (lambda: OfflineModeIsEnabled("HF_HUB_OFFLINE"), "cannot be downloaded.*pocket models need no download"),
        (lambda: RuntimeError("surprise"), "cannot be loaded.*RuntimeError: surprise"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(monkeypatch, cause, match):
    """Where diffusers meets the network, an error of the hub's own classes comes back, wrapped as diffusers wraps it."""
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename))
        raise cause()

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", download)
    with pytest.raises(PipelineError, match=match):
        load_pipeline("black-forest-labs/FLUX.1-dav", **CPU)
    assert asked == [("black-forest-labs/FLUX.1-dav", "model_index.json")]  # the first call, before any weights


def test_really_offline(monkeypatch, tmp_path):
    """Nothing in the cache and the hub switched off, as HF_HUB_OFFLINE=1 does: no call leaves the machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("diffusers.configuration_utils.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PipelineError, match="FLUX.1-schnell.*hf download black-forest-labs/FLUX.1-schnell"):
        load_pipeline("black-forest-labs/FLUX.1-schnell", **CPU)


def test_a_hub_id_takes_the_same_path(monkeypatch, folders):
    """With the download replaced by a folder that holds it, everything after the network call runs for real."""
    seen = []
    from_pretrained, load_config = DiffusionPipeline.from_pretrained, DiffusionPipeline.load_config

    def local(original):
        def call(name, *args, **options):
            seen.append((name, options.pop("revision", None)))
            return original(str(folders["sdxl"]), *args, **options)

        return call

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", staticmethod(local(from_pretrained)))
    monkeypatch.setattr(DiffusionPipeline, "load_config", staticmethod(local(load_config)))
    pipeline = load_pipeline("SG161222/RealVisXL_V4.0", revision="abc", scheduler="ddim", **CPU)
    asked = [call for call in seen if call[0] != str(folders["sdxl"])]  # from_pretrained reads the index once more
    assert asked == [("SG161222/RealVisXL_V4.0", "abc")] * 2
    assert pipeline_source(pipeline) == {"model": "SG161222/RealVisXL_V4.0", "revision": "abc"}
    assert torch.isfinite(images(pipeline)).all()


# -- devices and options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"device": "gpu"}, DeviceError, "device"),
        ({"device": 3.5}, DeviceError, "device"),
        ({"device": "meta"}, DeviceError, "not there"),
        ({"device": "cuda:99"}, DeviceError, "not there"),
        ({"device": "cpu", "offload": "model"}, DeviceError, "offload without an accelerator"),
        ({"device": "cpu", "offload": "all"}, ConfigError, "offload"),
        ({"device": "cpu", "dtype": "fp64"}, ConfigError, "dtype"),
        ({"device": "cpu", "dtype": torch.float64}, ConfigError, "dtype"),
        ({"device": "cpu", "scheduler": "eulr"}, ConfigError, "Did you mean 'euler'"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_anything_is_read(options, error, match):
    with pytest.raises(error, match=match):
        load_pipeline("/no/such/folder", **options)


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_offload(folders, offload):
    pipeline = load_pipeline(folders["flux"], device="cuda", dtype="fp32", offload=offload)
    assert (images(pipeline).cpu() - images(tiny.flux())).abs().max() < 1e-2


# -- the shipped models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POCKET_MODELS)
def test_pocket_models(name):
    pipeline = load_pipeline(name, **CPU)
    denoiser = Denoiser(pipeline, Settings(n_steps=6))
    assert (denoiser.settings.height, denoiser.settings.width) == (32, 32)
    text = denoiser.encode(["a small red ring left of a large blue square on a green background"]).repeat(2)
    candidates = denoiser.noise([image_generator(0, 0, image) for image in range(2)])
    whole = denoiser.run(candidates, text, 5)
    half = denoiser.run(candidates, text, 2)
    assert torch.equal(denoiser.run(half, text, 5).latents, whole.latents)
    pictures = denoiser.final(whole)
    assert pictures.shape == (2, 3, 32, 32) and pictures.std() > 0.05
