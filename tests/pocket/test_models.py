"""The shipped models: stock classes load them, pictures show their captions, pocket-clip agrees with the oracle."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from ttsnap_lib.pocket import POCKET_DEFAULTS, POCKET_MODELS, pocket_folder
from ttsnap_lib.pocket.oracle import oracle_score
from ttsnap_lib.pocket.world import caption, hard_negative, held_out, parse_caption, pocket_prompts, render

torch = pytest.importorskip("torch")
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from transformers import CLIPModel

from ttsnap_lib.pocket.training.clip import clip_scores
from ttsnap_lib.pocket.training.pictures import call_settings, initial_noise, sample_steps
from ttsnap_lib.pocket.training.report import measure
from ttsnap_lib.pocket.training.vae import encode, to_pixels


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip():
    return CLIPModel.from_pretrained(pocket_folder("pocket-clip"))


@pytest.fixture(scope="module", params=["pocket-flux", "pocket-sdxl"])
def drawn(request):
    pipeline = DiffusionPipeline.from_pretrained(pocket_folder(request.param))
    prompts = pocket_prompts("evaluation", 8)
    return request.param, pipeline, prompts, sample_steps(pipeline, prompts, 6, base_seed=5, batch=48)


def test_shipped_folders_are_small_and_ordinary():
    files = [file for name in POCKET_MODELS for file in pocket_folder(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt"}
    assert not [file for file in files if file.suffix == ".json" and '_name_or_path": "/' in file.read_text("utf-8")]


@pytest.mark.parametrize("name", ["pocket-flux", "pocket-sdxl"])
def test_stock_call_makes_a_picture(name):
    import diffusers

    stock = {"pocket-flux": diffusers.FluxPipeline, "pocket-sdxl": diffusers.StableDiffusionXLPipeline}[name]
    pipeline = stock.from_pretrained(pocket_folder(name))
    pipeline.set_progress_bar_config(disable=True)
    assert next((pipeline.transformer if name == "pocket-flux" else pipeline.unet).parameters()).dtype == torch.float32
    settings = call_settings(pipeline)
    assert settings["num_inference_steps"] == POCKET_DEFAULTS[name]["n_steps"] == 20
    generator = torch.Generator().manual_seed(0)
    image = pipeline(prompt=pocket_prompts()[0], generator=generator, **settings).images[0]
    assert image.size == (32, 32)
    assert np.asarray(image).std() > 5
    unknown = set(POCKET_DEFAULTS[name]) - {"n_steps", "guidance"} - set(inspect.signature(stock.__call__).parameters)
    assert not unknown


def test_pictures_show_their_captions(drawn):
    name, _, prompts, pictures = drawn
    texts = np.repeat(prompts, pictures.shape[1]).tolist()
    scores = oracle_score(texts, pictures[:, :, -1].reshape(-1, 32, 32, 3))
    others = oracle_score(texts[6:] + texts[:6], pictures[:, :, -1].reshape(-1, 32, 32, 3))
    assert scores.mean() > {"pocket-flux": 0.4, "pocket-sdxl": 0.5}[name]
    assert scores.mean() > others.mean() + 0.2
    within = scores.reshape(len(prompts), -1).std(axis=1).mean()
    assert within > 0.03  # seeds differ in how well they do: what a reward has to find


def test_estimates_approach_the_picture(drawn):
    _, _, _, pictures = drawn
    distance = np.abs(pictures.astype(float) - pictures[:, :, -1:].astype(float)).mean(axis=(0, 1, 3, 4, 5))
    assert distance[-1] == 0
    assert distance[2] > 1.3 * distance[8] > 1.7 * distance[14] > 0


def test_recorded_steps_are_the_stock_pipelines_own(drawn):
    name, pipeline, prompts, pictures = drawn
    noise = torch.stack([initial_noise(5, p, 0) for p in range(2)])
    if name == "pocket-flux":
        noise = pipeline._pack_latents(noise, *noise.shape)
    stock = pipeline(prompt=prompts[:2], latents=noise, output_type="np", **call_settings(pipeline)).images
    # another batch size: float rounding only, so at most one step of 255
    assert np.abs(np.round(stock * 255) - pictures[:2, 0, -1]).max() <= 1
    again = sample_steps(pipeline, prompts[:2], 6, base_seed=5, batch=12, every_step=False)
    assert np.abs(again[:, 0, -1].astype(int) - pictures[:2, 0, -1]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pocket-flux", "pocket-sdxl"])
def test_figures_on_held_out_prompts(name, clip):
    figures, _ = measure(
        DiffusionPipeline.from_pretrained(pocket_folder(name)), clip, pocket_prompts("evaluation", 48), 8
    )
    assert figures["spearman_clip_oracle"] >= 0.4  # a reward that is mostly noise teaches nothing
    assert 0.4 < figures["oracle_mean"] < 0.95
    tau = figures["kendall_tau_by_step"]
    assert tau[2] < tau[6] < tau[11] < tau[15] < tau[19] == 1.0


def test_clip_processor_feeds_the_model_what_training_fed(clip):
    from PIL import Image
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(pocket_folder("pocket-clip"))
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    texts = pocket_prompts("test", 3)
    given = processor(text=texts, images=[Image.fromarray(p) for p in pictures], return_tensors="pt", padding=True)
    with torch.no_grad():
        stock = clip(**given).logits_per_image.diagonal().numpy()
    np.testing.assert_allclose(stock, clip_scores(clip, texts, pictures.astype(np.float32) / 255), rtol=1e-4, atol=1e-4)


def test_clip_prefers_the_right_caption(clip):
    rng = np.random.default_rng(2)
    scenes = sorted(held_out(), key=caption)[:200]
    pictures = render(scenes, rng).astype(np.float32) / 255
    right = clip_scores(clip, [caption(s) for s in scenes], pictures)
    wrong = clip_scores(clip, [caption(hard_negative(s, rng)) for s in scenes], pictures)
    assert (right > wrong).mean() > 0.85


def test_tiny_decoder_reads_the_pipelines_latents(clip):
    vae = AutoencoderKL.from_pretrained(pocket_folder("pocket-flux"), subfolder="vae")
    tiny = AutoencoderTiny.from_pretrained(pocket_folder("pocket-tiny"))
    pictures = render([parse_caption(text) for text in pocket_prompts("test", 32)], np.random.default_rng(0))
    x = to_pixels(pictures)
    with torch.no_grad():
        latents = encode(vae, pictures)
        full, small = vae.decode(latents).sample, tiny.decode(latents).sample
        own = tiny.encode(x).latents
    error = lambda made: float((made - x).square().mean())
    assert abs(float(latents.mean())) < 0.1
    assert float(latents.std()) == pytest.approx(1.0, abs=0.15)
    assert error(full) < 0.01
    assert error(small) < 0.03
    assert float((own - latents).square().mean()) < 0.5  # of a variance of one
