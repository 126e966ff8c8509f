"""The tiny worlds of the tests: pipelines and rewards of the real classes with random weights, and small folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
import xarray as xr
from PIL import Image

from ttsnap_lib import CostModel, Schedule, prune, search
from ttsnap_lib.diffusion.denoise import Candidates, Denoiser, Settings, image_generator
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.finetuning.data import ImageBank
from ttsnap_lib.live.record import SearchRecord, SearchResult
from ttsnap_lib.pocket.training.clip import clip_processor
from ttsnap_lib.pocket.training.models import (
    TEXT_WIDTH,
    make_clip,
    make_clip_text,
    make_t5,
    make_transformer,
    make_unet,
    make_vae,
)
from ttsnap_lib.pocket.training.tokens import T5_TOKENS, clip_tokenizer, t5_tokenizer
from ttsnap_lib.rewards.base import Reward
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.rewards.pixels import Preprocessing
from ttsnap_lib.trajectories.layout import extend
from ttsnap_lib.trajectories.prompts import PromptList
from ttsnap_lib.trajectories.write import ImageWriter

SIZE = 32  # pixels; the VAE is 4x down
TOKENS = T5_TOKENS
LATENTS = 4
N_STEPS = 5  # of a live search
STEPS = 6  # of a run in parts
RELATIVE = 1e-5  # of the largest latent, in fp32, where the batch shape differs
WORDS = ["a", "red", "blue", "green", "circle", "square", "above", "below", "left", "of", "and", "the", "cat", "with"]
PROMPTS = [
    "a red circle",
    "a blue square above a green circle",
    "the cat",
    "a red circle",
    "a green square and a blue circle left of the red square",
    "circle",
    "the cat with the blue circle",
]
CAPTIONS = ["a red ring", "blue square left", "green dot"]
PROMPT = "a red circle above the cat"

# a trajectory folder
FOLDER_STEPS, PICTURE = 4, (24, 32)
IDENTITY = {
    "n_steps": FOLDER_STEPS,
    "height": PICTURE[0],
    "width": PICTURE[1],
    "image_format": "png",
    "seed": 0,
    "model": "tiny",
}

# a finetuning run of a second
SMALL_CURRICULUM = {
    "steps": (2, 0),
    "batch_size": 8,
    "group_size": 4,
    "learning_rate": 3e-3,
    "centered_mse": 1.0,
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "validation_prompts": 0,
}

# a live search
COST = CostModel(step=1.0, verify=0.25, decode=0.5, preview_decode=0.125, per_prompt=0.0625, n_steps=N_STEPS)
FULL = dataclasses.replace(COST, preview_decode=None)  # without a tiny decoder
SCHEDULE = Schedule((1, 3), (0.5, 0.5))


def make_images(n: int, width: int = 40, height: int = 30, seed: int = 0) -> list[Image.Image]:
    """Return smooth colored pictures with sharp edges and some noise: resizing errors show on each."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(n):
        y, x = np.mgrid[0:height, 0:width]
        phase = rng.uniform(0, 6, 3)
        base = 127 + 90 * np.sin(x[..., None] / rng.uniform(2, 9) + y[..., None] / rng.uniform(2, 9) + phase)
        base[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
        images.append(Image.fromarray(np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8)))
    return images


def embedding(found):
    """Return the embedding of ``CLIPModel.get_image_features``: an object holds it since transformers 5."""
    return getattr(found, "pooler_output", found)


def pillow_processor():
    """Return the CLIPImageProcessor that resizes with Pillow: transformers 5 gives that name to torchvision's."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ModuleNotFoundError:
        from transformers import CLIPImageProcessor as CLIPImageProcessorPil
    return CLIPImageProcessorPil


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Return images as floats (n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def _like(model: Any, seed: int, **changes: Any) -> Any:
    """Return a model of the pocket world's class and sizes with some settings changed and random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(model, transformers.PreTrainedModel):
            return type(model)(type(model.config).from_dict({**model.config.to_dict(), **changes})).eval()
        return type(model).from_config({**model.config, **changes}).eval()


def _vae(seed: int, **changes: Any) -> diffusers.AutoencoderKL:
    return _like(make_vae(), seed, block_out_channels=(8, 8, 8), latent_channels=LATENTS, scaling_factor=0.5, **changes)


def tiny_decoder(seed: int = 5) -> diffusers.AutoencoderTiny:
    """Return an AutoencoderTiny over the latents of all pipelines here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            latent_channels=LATENTS,
        ).eval()


def _euler() -> diffusers.EulerDiscreteScheduler:
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )


def flux(seed: int = 0, *, guidance_embeds: bool = True, **scheduler: Any) -> diffusers.FluxPipeline:
    """Return a FluxPipeline; keywords go to its flow-matching scheduler (dynamic shifting as in FLUX.1-dev)."""
    options = {"shift": 3.0, "use_dynamic_shifting": True} | scheduler
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**options),
        vae=_vae(seed, shift_factor=0.1),
        text_encoder=make_clip_text(seed).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=make_t5(seed).eval(),
        tokenizer_2=t5_tokenizer(),
        transformer=_like(
            make_transformer(), seed, in_channels=4 * LATENTS, num_layers=1, num_single_layers=1,
            num_attention_heads=2, guidance_embeds=guidance_embeds
        ),
    )  # fmt: skip


def sdxl(seed: int = 0) -> diffusers.StableDiffusionXLPipeline:
    """Return a StableDiffusionXLPipeline with an Euler scheduler."""
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(seed, shift_factor=None),
        text_encoder=make_clip_text(seed).eval(),
        text_encoder_2=make_clip_text(seed + 1, projection=True).eval(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=_like(make_unet(), seed, block_out_channels=(16, 32), in_channels=LATENTS, out_channels=LATENTS),
        scheduler=_euler(),
    )


def sd(seed: int = 0) -> diffusers.StableDiffusionPipeline:
    """Return a StableDiffusionPipeline (1.x and 2.x) with an Euler scheduler."""
    return diffusers.StableDiffusionPipeline(
        vae=_vae(seed, shift_factor=None),
        text_encoder=make_clip_text(seed).eval(),
        tokenizer=clip_tokenizer(),
        unet=_like(
            make_unet(), seed, block_out_channels=(16, 32), in_channels=LATENTS, out_channels=LATENTS,
            cross_attention_dim=TEXT_WIDTH, addition_embed_type=None, projection_class_embeddings_input_dim=None
        ),
        scheduler=_euler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sd3(seed: int = 0) -> diffusers.StableDiffusion3Pipeline:
    """Return a StableDiffusion3Pipeline with a flow-matching scheduler of fixed shift."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=SIZE // 4,
            patch_size=2,
            in_channels=LATENTS,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * TEXT_WIDTH,
            out_channels=LATENTS,
            pos_embed_max_size=16,
        ).eval()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(seed, shift_factor=0.1),
        text_encoder=make_clip_text(seed, projection=True).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=make_clip_text(seed + 1, projection=True).eval(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_like(make_t5(), seed, d_model=2 * TEXT_WIDTH),
        tokenizer_3=t5_tokenizer(),
    )


PIPELINES: dict[str, Callable[..., diffusers.DiffusionPipeline]] = {"flux": flux, "sdxl": sdxl, "sd": sd, "sd3": sd3}


def build(name: str, **options: object) -> diffusers.DiffusionPipeline:
    """Return the tiny pipeline `name` of :data:`PIPELINES`."""
    pipeline = PIPELINES[name](**options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(name: str, folder: Path, **options: object) -> Path:
    """Write the tiny pipeline `name` as an ordinary pipeline folder and return it."""
    build(name, **options).save_pretrained(folder)
    return folder


def settings(**changes) -> Settings:
    return Settings(**{"n_steps": STEPS, "height": SIZE, "width": SIZE} | changes)


def generators(n: int = len(CAPTIONS)) -> list[torch.Generator]:
    return [image_generator(0, 0, image) for image in range(n)]


def stock(pipeline, output_type: str = "latent", **changes):
    """Call the pipeline as its users do."""
    options = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS} | changes
    if hasattr(pipeline, "transformer"):
        options.setdefault("max_sequence_length", TOKENS)
    return pipeline(CAPTIONS, generator=generators(), output_type=output_type, **options).images


def in_parts(denoiser: Denoiser, cuts, conditioning=None) -> tuple[Candidates, dict[int, torch.Tensor]]:
    """Run to each of `cuts` in turn, recording every estimate."""
    conditioning = denoiser.encode(CAPTIONS) if conditioning is None else conditioning
    candidates, estimates = denoiser.noise(generators()), {}
    for end in cuts:
        candidates = denoiser.run(
            candidates, conditioning, end, range(candidates.step + 1, end + 1), estimates.__setitem__
        )
    return candidates, estimates


def same_to(got: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert (got - expected).abs().max() <= relative * expected.abs().max()


def save_clip(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, width: int = 64, **changes: Any) -> Path:
    """Save a CLIP reward with random weights as an ordinary folder and return it; `changes` are of the vision tower."""
    vision = {**make_clip().config.vision_config.to_dict(), "hidden_size": 64, "num_hidden_layers": 2, **changes}
    model = _like(make_clip(), seed, vision_config={**vision, "projection_dim": width}, projection_dim=width)
    for parameter in model.parameters():  # the small default start gives nearly constant scores
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    model.to(dtype).save_pretrained(folder)
    for half in clip_processor():
        half.save_pretrained(folder)
    return folder


def load_clip(folder: Path, name: str = "clip", **options: Any) -> Any:
    """Return a tiny CLIP reward from a folder of :func:`save_clip`."""
    return load_reward(folder, name=name, device="cpu", **options)


def write_adapters(base, folder, steps=(14, 8, 2), reward: str | None = None, padded: bool = False):
    """Write one random LoRA adapter per step as peft saves them, with a curriculum.json."""
    from peft import LoraConfig, get_peft_model

    for step in steps:
        source = load_reward(base, device="cpu")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=source.default_lora_targets)
        model = get_peft_model(source.module, config)
        generator = torch.Generator().manual_seed(step)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        model.save_pretrained(folder / (f"step_{step:02d}" if padded else f"step_{step}"))
    content = {"steps": list(steps), **({"reward": reward} if reward else {})}
    (folder / "curriculum.json").write_text(json.dumps(content))
    return folder


def randomize_image_reward(module: torch.nn.Module) -> None:
    """Make the head react: the package starts it so small that all scores are nearly equal."""
    generator = torch.Generator().manual_seed(3)
    for layer in module.mlp.layers:
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5
    for parameter in module.blip.text_encoder.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5


def prompts_of(n: int) -> list[str]:
    """Return n distinct prompts of words that the tiny tokenizer knows."""
    return [f"{PROMPTS[k % len(PROMPTS)]} and the cat" + " red" * (k // len(PROMPTS)) for k in range(n)]


def picture(prompt: int, image: int, step: int) -> np.ndarray:
    """Return the picture that :func:`fill` writes."""
    return np.array(make_images(FOLDER_STEPS, PICTURE[1], PICTURE[0], seed=prompt * 100 + image)[step])


def fill(
    folder: Path, n_prompts: int = 3, n_images: int = 3, identity: dict = IDENTITY, done=(), metadata=None
) -> Path:
    """Write a trajectory folder of random smooth pictures."""
    extend(folder, identity, PromptList(prompts_of(n_prompts), metadata), n_images)
    with ImageWriter(folder, identity["image_format"], "test", workers=2) as writer:
        for prompt in range(n_prompts):
            for image in range(n_images):
                if (prompt, image) in done:
                    continue
                writer.start(prompt, image, range(FOLDER_STEPS))
                for step in range(FOLDER_STEPS):
                    writer.put(prompt, image, step, lambda key=(prompt, image, step): picture(*key))
    return folder


def brightness(prompts: list[str], images: list) -> list[float]:
    """Return the mean of each picture."""
    return [np.asarray(image).mean() for image in images]


class Looks(Reward):
    """A small model that reads no prompt and gives a mean and a sigma of each picture."""

    outputs = ("mean", "sigma")
    reads_prompt = False

    def __init__(self, name: str = "looks") -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            module = torch.nn.Linear(3 * 8 * 8, 2)
        super().__init__(name, module, preprocessing=Preprocessing(8, "stretch"), device="cpu")

    def forward(self, pixels: torch.Tensor, text: None) -> torch.Tensor:
        """Return (n, 2)."""
        assert text is None
        return self.module(pixels.flatten(1))


def make_bank(n_prompts: int = 6, n_images: int = 4, n_steps: int = 4, seed: int = 0) -> ImageBank:
    """Return pictures of random blocks whose early steps are mostly noise."""
    rng = np.random.default_rng(seed)
    prompts = [" ".join(rng.choice(WORDS, 4)) for _ in range(n_prompts)]
    clean = rng.integers(0, 256, (n_prompts, n_images, 8, 8, 3)).repeat(4, 2).repeat(4, 3).astype(float)
    noise = rng.integers(0, 256, clean.shape)
    shares = np.linspace(0.8, 0, n_steps)
    pixels = np.stack([clean * (1 - share) + noise * share for share in shares], axis=2)
    return ImageBank(pixels.round().astype(np.uint8), prompts)


def small_config(clip: Path, **changes: object) -> CurriculumConfig:
    """Return settings for a run of a second."""
    return CurriculumConfig(reward=str(clip), **{**SMALL_CURRICULUM, **changes})


def tiny_search(pipeline: Any, reward: Any, **options: Any) -> SearchResult:
    """Search with eight candidates in batches of three unless told otherwise."""
    given = {"settings": settings(n_steps=N_STEPS), "batch_size": 3} | options
    if "candidates" not in given and "budget" not in given:
        given["candidates"] = 8
    return search(pipeline, given.pop("prompt", PROMPT), reward, **given)


def pruned_winner(record: SearchRecord) -> int:
    """Return the winner that `prune` finds in the recorded scores."""
    selecting = [r for r, name in enumerate(record.rewards) if name not in record.report]
    scores = xr.DataArray(
        record.scores[None][..., selecting], dims=("prompt", "image", "step", "reward"), coords={"step": record.checks}
    )
    subset = np.arange(len(record.seeds))[None]
    winners = prune(scores, subset, Schedule.from_dict(record.schedule), combine=record.combine, weights=record.weights)
    return int(winners[0, 0])


# Vision-language models

_CHAT = (  # Qwen's own, of one picture and one text in a message
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def vlm_tokenizer(folder: Path) -> Any:
    """Return a small tokenizer of Qwen's class, in which Yes and No are one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=letters, special_tokens=[_SPECIAL[0]], show_progress=False
    )
    words.train_from_iterator(["Yes No Yes No"] * 9 + PROMPTS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    words.model.save(str(folder))
    tokenizer = transformers.Qwen2TokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL[1:])})
    return tokenizer


def save_vlm(folder: Path, kind: str = "Qwen2VL", seed: int = 0, area: int = 8 * 28 * 28) -> Path:
    """Save a tiny Qwen2VL, Qwen2_5_VL or Qwen3VL with random weights, and its processor; pictures have at most `area` pixels."""
    tokenizer = vlm_tokenizer(folder)
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    vision = {
        "Qwen2VL": {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2},
        "Qwen2_5_VL": {"depth": 2, "hidden_size": 32, "out_hidden_size": 48, "num_heads": 2, "intermediate_size": 64,
                       "fullatt_block_indexes": [1], "window_size": 56},
        "Qwen3VL": {"depth": 2, "hidden_size": 32, "out_hidden_size": 48, "num_heads": 2, "intermediate_size": 64,
                    "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
    }[kind]  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24, "max_position_embeddings": 4096,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 4, 4]},
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, tie_word_embeddings=False, image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():  # the small default start gives nearly constant scores
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    model.save_pretrained(folder)
    patch = {"patch_size": 16} if kind == "Qwen3VL" else {}
    images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=area, **patch)
    videos = getattr(transformers, f"{'Qwen3VL' if kind == 'Qwen3VL' else 'Qwen2VL'}VideoProcessor")()
    getattr(transformers, f"{kind}Processor")(images, tokenizer, videos, chat_template=_CHAT).save_pretrained(folder)
    return folder
