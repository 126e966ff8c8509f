"""Loading: one path for folders, pocket models and hub ids, and errors that say what to do."""

from __future__ import annotations

import json
import logging
import shutil
from types import SimpleNamespace

import httpx
import pytest
import requests
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
)
from huggingface_hub import errors as hub
from huggingface_hub.utils import OfflineModeIsEnabled

from tests import worlds
from ttsnap_lib.diffusion.denoise import Denoiser, Settings, image_generator
from ttsnap_lib.diffusion.pipelines import (
    POCKET_PIPELINES,
    SCHEDULERS,
    load_decoder,
    load_pipeline,
    pipeline_source,
)
from ttsnap_lib.errors import ConfigError, DeviceError, PipelineError
from ttsnap_lib.pocket import pocket_folder

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: worlds.save(name, root / name) for name in worlds.PIPELINES}


def images(pipeline, **changes) -> torch.Tensor:
    denoiser = Denoiser(pipeline, Settings(**{"n_steps": 3, "height": worlds.SIZE, "width": worlds.SIZE} | changes))
    candidates = denoiser.noise([image_generator(0, 0, 0)])
    return denoiser.final(denoiser.run(candidates, denoiser.encode(["a red ring"]), 2))


@pytest.mark.parametrize("name", list(worlds.PIPELINES))
def test_a_saved_pipeline_is_the_same_pipeline(folders, name):
    loaded = load_pipeline(folders[name], **CPU)
    built = worlds.build(name)
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
    got, exact = images(pipeline), images(worlds.flux())
    assert torch.isfinite(got).all() and not torch.equal(got, exact)
    # e4m3 keeps 4 significant bits; the pictures of a random model still agree to a few grey levels on average
    assert (got - exact).abs().mean() < 0.03


def test_a_pipeline_may_bring_defaults(folders):
    pipeline = load_pipeline(folders["flux"], **CPU)
    assert pipeline.ttsnap_defaults == {}
    pipeline.ttsnap_defaults = {"height": 32, "width": 48, "guidance": 2.0}
    settings = Denoiser(pipeline, Settings(n_steps=3, width=32)).settings
    assert (settings.height, settings.width, settings.guidance) == (32, 32, 2.0)


@pytest.mark.parametrize(
    ("model", "name"),
    [("sdxl", name) for name in ("euler", "ddim", "dpm++", "unipc")]
    + [("sd3", name) for name in ("flow-euler", "dpm++", "unipc")],
)
def test_schedulers_by_name(folders, model, name):
    pipeline = load_pipeline(folders[model], scheduler=name, **CPU)
    assert type(pipeline.scheduler) is SCHEDULERS[name][0]
    if model == "sdxl":
        assert pipeline.scheduler.config.beta_schedule == "scaled_linear"  # the model's own configuration goes along
    assert not pipeline.scheduler.config.get("clip_sample", False)
    assert torch.isfinite(images(pipeline)).all()


@pytest.mark.parametrize(
    ("model", "name", "fit"), [("sd3", "ddim", "flow-euler"), ("sdxl", "flow-euler", "euler, ddim")]
)
def test_a_scheduler_of_the_other_kind(folders, model, name, fit):
    with pytest.raises(ConfigError, match=f"scheduler.*{fit}"):
        load_pipeline(folders[model], scheduler=name, **CPU)


def test_a_scheduler_object(folders):
    pipeline = load_pipeline(folders["sd"], scheduler=DDIMScheduler(clip_sample=False), **CPU)
    assert type(pipeline.scheduler) is DDIMScheduler
    with pytest.raises(PipelineError, match="a rule to read x0"):
        load_pipeline(folders["sd"], scheduler=EulerAncestralDiscreteScheduler(), **CPU)
    with pytest.raises(ConfigError, match="scheduler"):
        load_pipeline(folders["sd"], scheduler=3, **CPU)


# Bad names and folders


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        ("pocket-flax", PipelineError, "unknown model.*Did you mean 'pocket-flux'"),
        ("./no/such/folder", PipelineError, "unknown model.*Check the spelling"),
        ("a/b/c", PipelineError, "unknown model"),
        (None, ConfigError, "model"),
    ],
)
def test_unknown_names(model, error, match):
    with pytest.raises(error, match=match):
        load_pipeline(model, **CPU)


def test_broken_folders(folders, tmp_path):
    with pytest.raises(PipelineError, match="no model_index.json"):
        load_pipeline(tmp_path, **CPU)
    (tmp_path / "file.bin").write_text("x")
    with pytest.raises(PipelineError, match=r"a file of another kind.*or a \.safetensors file"):
        load_pipeline(tmp_path / "file.bin", **CPU)
    broken = shutil.copytree(folders["sd"], tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(PipelineError, match="missing or broken"):
        load_pipeline(broken, **CPU)
    # Another class is told from the index, before any weights are read.
    (broken / "model_index.json").write_text('{"_class_name": "StableDiffusionImg2ImgPipeline"}')
    with pytest.raises(PipelineError, match="a StableDiffusionImg2ImgPipeline is not supported: it works on"):
        load_pipeline(broken, **CPU)


# The hub, up to the network call


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


# Devices and options


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"device": "cuda:99"}, DeviceError, "not there"),
        ({"device": "cpu", "offload": "model"}, DeviceError, "offload without an accelerator"),
        ({"device": "cpu", "dtype": "fp64"}, ConfigError, "dtype"),
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
    assert (images(pipeline).cpu() - images(worlds.flux())).abs().max() < 1e-2


# The shipped models


@pytest.mark.parametrize("name", POCKET_PIPELINES)
def test_pocket_models(name):
    denoiser = Denoiser(load_pipeline(name, **CPU), Settings(n_steps=6))
    assert denoiser.settings.size == (32, 32)
    text = denoiser.encode(["a small red ring left of a large blue square on a green background"]).repeat(2)
    pictures = denoiser.final(denoiser.run(denoiser.noise([image_generator(0, 0, k) for k in range(2)]), text, 5))
    assert pictures.shape == (2, 3, 32, 32) and pictures.std() > 0.05


# Decoders


@pytest.fixture
def warnings_of_diffusers():
    """Collect what diffusers logs while a model is loaded; its loggers do not reach the root logger."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    log = logging.getLogger("diffusers")
    log.addHandler(handler)
    yield texts
    log.removeHandler(handler)


def test_a_decoder_that_diffusers_saved_loads_without_a_warning(warnings_of_diffusers, tmp_path):
    folder = pocket_folder("pocket-tiny")
    config = json.loads((folder / "config.json").read_text())
    vae = SimpleNamespace(dtype=torch.float32, config=SimpleNamespace(latent_channels=config["latent_channels"]))
    pipeline = SimpleNamespace(vae=vae, _execution_device=torch.device("cpu"))
    AutoencoderTiny.from_pretrained(folder)
    assert len(warnings_of_diffusers) == 1  # once diffusers stops this, the filter can go
    load_decoder("pocket-tiny", pipeline)
    assert len(warnings_of_diffusers) == 1
    other = shutil.copytree(folder, tmp_path / "tiny")
    (other / "config.json").write_text(json.dumps({**config, "sharpness": 2}))
    load_decoder(other, pipeline)  # other unknown entries are still told
    assert ["sharpness" in text for text in warnings_of_diffusers] == [False, True]
