"""FLUX.1-dev, SDXL, CLIP-H and ImageReward at real size with random weights, on an accelerator; 512 px, bf16.

``python -m tests.benchmarks device [--tiny]``: tiny models with ``--tiny``, and where there is no accelerator. Every row is also
written as a line of ``device.jsonl``, in the folder of the variable OUT or in ``test-artifacts``, as soon as it is measured.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import transformers
from PIL import Image

from tests import worlds
from tests.benchmarks.rows import Row, interleaved
from tests.parity.image_reward import SMALL_VISION, write_inputs
from ttsnap_lib import PUBLISHED_SCHEDULE, Schedule, measure_costs, search
from ttsnap_lib.checks import default_device
from ttsnap_lib.diffusion.compiling import compile_pipeline
from ttsnap_lib.diffusion.denoise import Denoiser, Settings, image_generator
from ttsnap_lib.pocket.training.tokens import clip_tokenizer
from ttsnap_lib.rewards import image_reward
from ttsnap_lib.rewards.pixels import from_clip_processor
from ttsnap_lib.rewards.towers import ClipReward

PROMPT = "a red fox"
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "4090": 165}  # dense bf16 TFLOPs a second, by the vendor
SCHEDULES = (Schedule(), PUBLISHED_SCHEDULE, Schedule((4, 8), (0.35, 0.5)))
DEVICE = default_device()
CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32
CARD = torch.cuda.get_device_name() if CUDA else "CPU"


@dataclass(frozen=True)
class Scale:
    """How large everything is. A family: guidance, images beside the stock pipeline, batch sizes, candidates of searches."""

    tiny: bool
    px: int
    families: dict[str, tuple[float, int, tuple[int, ...], tuple[int, ...]]]
    crowd: tuple[int, int]  # candidates and pixels that memory has no room for
    pictures: int


TINY = Scale(True, worlds.SIZE, {name: (3.0, 2, (1, 2), (3,)) for name in ("sdxl", "flux")}, (4, worlds.SIZE), 4)
REAL = Scale(
    False,
    512,
    {"sdxl": (5.0, 16, (1, 2, 4, 8, 16, 32), (32, 64)), "flux": (3.5, 4, (1, 2, 4, 8, 16), (8, 16))},
    (96, 1024),
    256,
)


def run(tiny: bool = not CUDA or "--tiny" in sys.argv) -> list[Row]:
    """Return everything that was measured; a part that fails is a row too, and the others go on."""
    scale = TINY if tiny else REAL
    folder = Path(os.environ.get("OUT", "test-artifacts"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with (folder / "device.jsonl").open("w") as file:
        about = {"card": CARD, "torch": torch.__version__, "tiny": tiny}
        for row in _rows(scale):
            rows.append(row)
            file.write(json.dumps({**about, **asdict(row)}) + "\n")
            file.flush()
    return rows


def _rows(scale: Scale) -> Iterator[Row]:
    clip = _clip(scale)
    for name in scale.families:
        yield from _guarded(name, lambda name=name: _family(scale, name, clip))
    yield from _guarded("scoring", lambda: _scoring(scale, clip))
    yield from _guarded("memory", lambda: _memory(scale, clip))
    yield from _guarded("offload", lambda: _offload(scale, clip))


def _guarded(name: str, part: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Yield the rows of a part; one that fails ends with a row that says so."""
    try:
        yield from part()
    except Exception as error:  # noqa: BLE001 - minutes of a card are not lost to one part
        yield Row(f"{name}: failed", 1, "", at_most=0, note=f"{type(error).__name__}: {error}"[:300])
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def _family(scale: Scale, name: str, clip: Any) -> Iterator[Row]:
    guidance, n, sizes, counts = scale.families[name]
    pipeline, settings = _pipeline(scale, name), Settings(height=scale.px, width=scale.px, guidance=guidance)
    yield from _guarded(f"{name}, stock pipeline", lambda: _against_stock(name, pipeline, settings, n))
    measured = measure_costs(pipeline, clip, settings, batch_sizes=sizes, repeats=2)
    yield from _curve(f"{name}, eager", measured, sizes)
    yield from _guarded(
        f"{name}, searches", lambda: _searches(name, pipeline, clip, settings, measured.seconds, counts)
    )
    yield from _guarded(f"{name}, compiled", lambda: _compiled(scale, name, pipeline, clip, settings, sizes))


def _against_stock(name: str, pipeline: Any, settings: Settings, n: int) -> Iterator[Row]:
    denoiser = Denoiser(pipeline, settings)
    text = denoiser.encode([PROMPT]).repeat(n)
    options = denoiser._adapter.call_options(pipeline, denoiser.settings)
    kept: dict[str, torch.Tensor] = {}

    def noise() -> Any:
        return denoiser.noise([image_generator(0, 0, image) for image in range(n)])

    def engine(label: str, *cuts: int) -> None:
        candidates = noise()
        for cut in cuts:
            candidates = denoiser.run(candidates, text, cut)
        kept[label] = denoiser.final(candidates).cpu()

    def stock() -> None:
        found = pipeline(**text.embeds, latents=noise().latents, output_type="pt", return_dict=False, **options)
        kept["stock"] = found[0].float().cpu()

    calls = (stock, lambda: engine("engine", 19), lambda: engine("engine in four parts", 2, 6, 11, 19))
    calls[0]()  # to warm up
    plain, *ours = interleaved(*calls, repeats=2)
    for label, seconds in zip(("engine", "engine in four parts"), ours, strict=True):
        gap = float((kept[label] - kept["stock"]).abs().max())
        yield Row(f"{name}: {label} / stock pipeline, seconds of {n} images", min(seconds) / min(plain), "x")
        yield Row(f"{name}: {label}, largest difference of a pixel from the stock pipeline's", gap, "", at_most=0)


def _curve(name: str, measured: Any, sizes: tuple[int, ...]) -> Iterator[Row]:
    peak = next((value for part, value in PEAKS.items() if part in CARD), None)
    found = {size: measured.seconds.each("step", size) for size in sizes}
    shares = {size: "" if peak is None else f"{measured.tflops.step / each / peak:.0%} of the card's peak"
              for size, each in found.items()}  # fmt: skip
    for size, each in found.items():
        yield Row(f"{name}: a step of a batch of {size}", 1e3 * size * each, "ms", note=shares[size])
    for part in ("decode", "verify"):
        yield Row(
            f"{name}: {part} in batches of {sizes[-1]}, a candidate", 1e3 * measured.seconds.each(part, sizes[-1]), "ms"
        )
    yield Row(f"{name}: TFLOPs of a step", measured.tflops.step, "TFLOPs")


def _searches(
    name: str, pipeline: Any, clip: Any, settings: Settings, cost: Any, counts: tuple[int, ...]
) -> Iterator[Row]:
    searched = functools.partial(
        search, pipeline, reward=clip, cost=cost, settings=settings, batch_size=cost.batch_size
    )
    searched(PROMPT, schedule=PUBLISHED_SCHEDULE, candidates=counts[0])  # sizes of batches that were not measured
    errors = []
    for k, schedule in enumerate(SCHEDULES):
        for n in counts:
            took = searched(f"{PROMPT}{' a' * (k + 1)}", schedule=schedule, candidates=n).record.elapsed_s
            told = cost.total(n, schedule)
            errors.append(100 * abs(told / took - 1))
            note = f"{took:.2f} s, {told:.2f} predicted; {schedule}"
            yield Row(f"{name}, search of {n}: predicted / measured seconds", told / took, "x", note=note)
    yield Row(f"{name}: prediction off by, median of {len(errors)}", statistics.median(errors), "%",
              at_most=10 if CUDA and len(counts) > 1 else None, note=f"largest {max(errors):.1f}")  # fmt: skip


def _compiled(
    scale: Scale, name: str, pipeline: Any, clip: Any, settings: Settings, sizes: tuple[int, ...]
) -> Iterator[Row]:
    # The C++ compiler of a CPU takes minutes, and tests/diffusion covers it: tiny models only take this way.
    plain = patch.object(torch, "compile", lambda function, **_: function)
    with plain if scale.tiny else contextlib.nullcontext():
        compile_pipeline(pipeline, "blocks")
    begin = time.perf_counter()
    search(pipeline, PROMPT, clip, candidates=2, settings=settings)
    yield Row(f"{name}: compiling and a search of 2", time.perf_counter() - begin, "s", note=pipeline.ttsnap_compile)
    yield from _curve(
        f"{name}, {pipeline.ttsnap_compile} compiled",
        measure_costs(pipeline, clip, settings, batch_sizes=sizes, repeats=2),
        sizes,
    )


def _memory(scale: Scale, clip: Any) -> Iterator[Row]:
    """Memory that runs out, then weights in 8 bits."""
    pipeline, (many, px) = _pipeline(scale, "flux"), scale.crowd
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        given = {"settings": Settings(n_steps=2, height=px, width=px), "batch_size": many, "candidates": many}
        done = search(pipeline, PROMPT, clip, Schedule((0,), (0.05,)), **given).complete
    note = "; ".join(str(one.message) for one in told if "out of memory" in str(one.message)) or "memory was enough"
    yield Row(f"flux: {many} candidates of {px} px at once, finished", float(done), "", at_least=1, note=note)
    before = _allocated()
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=DTYPE)
    gc.collect()
    found = search(pipeline, PROMPT, clip, candidates=2, settings=Settings(n_steps=4, height=scale.px, width=scale.px))
    yield Row("flux: fp8 weights, finished with finite scores", float(found.complete), "", at_least=1,
              note=f"{before:.1f} GB become {_allocated():.1f}")  # fmt: skip


def _offload(scale: Scale, clip: Any) -> Iterator[Row]:
    if not CUDA:
        yield Row("flux: searches with weights in main memory", 0, "", note="skipped: there is no accelerator")
        return
    pipeline = _pipeline(scale, "flux").to("cpu")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pipeline.enable_model_cpu_offload(device=DEVICE)
    search(pipeline, PROMPT, clip, candidates=2, settings=Settings(n_steps=4, height=scale.px, width=scale.px))
    peak = torch.cuda.max_memory_allocated() / 2**30
    yield Row("flux: searches with weights in main memory", 1, "", note=f"{peak:.1f} GB on the card at the peak")


def _scoring(scale: Scale, clip: Any) -> Iterator[Row]:
    n = scale.pictures
    pixels = torch.rand(n, 3, scale.px, scale.px, device=DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k}.png" for k in range(n)]
        for path, picture in zip(paths, pixels, strict=True):
            Image.fromarray((picture * 255).byte().movedim(0, -1).cpu().numpy()).save(path, compress_level=1)
        for reward in (clip, _image_reward(scale)):
            for where, images in (("memory", pixels), ("PNG files", paths)):
                score = functools.partial(reward.score, PROMPT, images, batch_size=64)
                score()  # to warm up
                rate = n / min(interleaved(score, repeats=2)[0])  # scores are on the CPU: nothing is left to wait for
                yield Row(f"{reward.name}: pictures of {scale.px} px scored from {where}", rate, "1/s")


def _allocated() -> float:
    return torch.cuda.memory_allocated() / 2**30 if CUDA else 0.0


# Models


def built(make: Callable[[], Any], device: torch.device = DEVICE) -> Any:
    """Return a model made on the device in its precision: random weights of that size take minutes on a CPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with device:
            model = make()
    finally:
        torch.set_default_dtype(before)
    return model.to(device, DTYPE).eval().requires_grad_(False)


def _pipeline(scale: Scale, name: str) -> Any:
    tiny = worlds.build(name)
    if scale.tiny:
        return tiny.to(DEVICE, DTYPE) if CUDA else tiny
    pipeline = type(tiny)(**{**tiny.components, **{part: built(make) for part, make in PARTS[name].items()}})
    pipeline.set_progress_bar_config(disable=True)
    pipeline.tokenizer.model_max_length = 77  # the words are those of the pocket world, the rows as long as published
    pipeline.tokenizer_2.model_max_length = 512 if name == "flux" else 77
    return pipeline


def _text_config(width: int, layers: int, heads: int) -> Any:
    ends = {key: getattr(clip_tokenizer(), key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return transformers.CLIPTextConfig(**sizes, num_attention_heads=heads, projection_dim=width, **ends)


def _vae(channels: int, **options: Any) -> Any:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": channels}
    return diffusers.AutoencoderKL(**kinds, **widths, sample_size=1024, **options)


_T5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True,
    "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
}  # fmt: skip
PARTS: dict[str, dict[str, Callable[[], Any]]] = {
    "flux": {
        "transformer": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
        "text_encoder": lambda: transformers.CLIPTextModel(_text_config(768, 12, 12)),
        "text_encoder_2": lambda: transformers.T5EncoderModel(
            transformers.T5Config(**_T5, feed_forward_proj="gated-gelu")
        ),
        "vae": lambda: _vae(
            16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
        ),
    },
    "sdxl": {
        "unet": lambda: diffusers.UNet2DConditionModel(**_UNET),
        "text_encoder": lambda: transformers.CLIPTextModel(_text_config(768, 12, 12)),
        "text_encoder_2": lambda: transformers.CLIPTextModelWithProjection(_text_config(1280, 32, 20)),
        "vae": lambda: _vae(4, scaling_factor=0.13025, force_upcast=False),
    },
}


def clip_model(tiny: bool) -> Any:
    """Return a CLIP-H, or a tiny one."""
    text = _text_config(32, 2, 2) if tiny else _text_config(1024, 24, 16)
    width, layers, heads, patch = (32, 2, 2, 56) if tiny else (1280, 32, 16, 14)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision = {**sizes, "num_attention_heads": heads, "image_size": 224, "patch_size": patch}
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision, projection_dim=text.projection_dim
    )
    return transformers.CLIPModel(config)


def _clip(scale: Scale) -> Any:
    pixels = from_clip_processor(transformers.CLIPImageProcessor(), "CLIPImageProcessor")  # 224 px, as published
    return ClipReward(
        "clip", built(lambda: clip_model(scale.tiny)), clip_tokenizer(), pixels, device=DEVICE, dtype=DTYPE
    )


def image_reward_model(tiny: bool) -> Any:
    """Return ImageReward's network, or one of a layer or two."""
    vision = patch.object(image_reward, "_VISION", SMALL_VISION)
    with tempfile.TemporaryDirectory() as folder, vision if tiny else contextlib.nullcontext():
        write_inputs(Path(folder), 0, tiny)
        return image_reward.build_module(Path(folder) / "med_config.json", Path(folder) / "bert-base-uncased")


def _image_reward(scale: Scale) -> Any:
    module = built(lambda: image_reward_model(scale.tiny))
    return image_reward.ImageRewardModel("image_reward", module, device=DEVICE, dtype=DTYPE)
