"""What runs on real models need, computed from the cost presets and file sizes; nothing here was measured on a GPU."""

from __future__ import annotations

from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel
from ttsnap_lib.costs import PRESETS
from ttsnap_lib.trajectories.estimate import CARDS, UTILISATION, Recording, hours

__all__ = ["CARDS", "UTILISATION", "WEIGHTS", "Recording", "hours", "table"]

WEIGHTS = {"FLUX.1-dev": {"transformer": 11.90, "T5-XXL encoder": 4.76, "CLIP-L encoder": 0.12, "VAE": 0.08},
           "SDXL": {"UNet": 2.57, "OpenCLIP bigG encoder": 0.69, "CLIP-L encoder": 0.12, "VAE": 0.08}}  # fmt: skip
"""Billions of weights; a test counts them on the real architectures."""
_MODELS = {"FLUX.1-dev, 512 px": ("flux-512", 512), "FLUX.1-dev, 1024 px": ("flux-1024", 1024),
           "SDXL, 512 px": ("sdxl-512", 512), "SDXL, 1024 px": ("sdxl-1024", 1024)}  # fmt: skip


def table(name: str) -> str:
    """Return one table as Markdown: ``recording``, ``search``, ``finetune``, ``large``, ``families``, ``weights`` or ``accounting``."""
    return _TABLES[name]()


def _recording() -> str:
    rows = []
    for label, (preset, pixels) in _MODELS.items():
        run = Recording(preset, pixels, 200, 200)
        rows.append([label, f"{run.image_tflops:,.0f}", *(_time(hours(run.tflops(), card)) for card in CARDS),
                     _bytes(run.picture_bytes("png")), _bytes(run.picture_bytes("webp")), _bytes(run.tensor_bytes())])  # fmt: skip
    return _markdown(["200 prompts x 200 images x 20 steps", "TFLOPs per image", *CARDS, "PNG", "WebP", "tensor"], rows)


def _search() -> str:
    rows = []
    for label, (preset, _) in _MODELS.items():
        for name in (preset, f"{preset}-tiny"):
            cost = CostModel.preset(f"{name}+image_reward")
            budget = 10 * cost.total(1)
            tiny = ", tiny decoder" if name.endswith("tiny") else ""
            rows.append([f"{label}{tiny}", f"{budget:,.0f}", "10", str(cost.candidates(budget, PUBLISHED_SCHEDULE)),
                         *(_time(hours(budget, card)) for card in CARDS)])  # fmt: skip
    return _markdown(["one prompt, ten images' budget", "TFLOPs", "Best-of-N", "published schedule", *CARDS], rows)


def _finetune() -> str:
    rows = []
    for reward in ("image_reward", "pickscore"):
        verify = CostModel.preset(f"flux-512+{reward}").verify
        tflops = 10_000 * 15 * 3 * verify
        rows.append([reward, f"{tflops:,.0f}", *(_time(hours(tflops, card)) for card in CARDS)])
    return _markdown(["10,000 pictures x 15 steps, one epoch", "TFLOPs", *CARDS], rows)


def _large() -> str:
    rows = []
    for label, (preset, pixels) in _MODELS.items():
        run = Recording(preset, pixels, 10_000, 1_000, 50)
        rows.append([label, f"{run.tflops() / 1e9:,.2f}", *(f"{hours(run.tflops(), card) / 24 / 365:.2g}" for card in CARDS),
                     _bytes(run.picture_bytes("png")), _bytes(run.picture_bytes("webp")), f"{run.pictures / 1e6:,.0f} million",
                     _bytes(run.tensor_bytes())])  # fmt: skip
    head = ["10,000 prompts x 1,000 images x 50 steps", "10^21 FLOPs", *(f"{card} years" for card in CARDS), "PNG", "WebP", "files",
            "tensor"]  # fmt: skip
    return _markdown(head, rows)


def _families() -> str:
    rows = []
    for name, cost in PRESETS.items():
        model, _, reward = name.partition("+")
        if reward != "image_reward" or "-tiny" in model:
            continue
        family, _, size = model.rpartition("-")
        tiny = PRESETS.get(f"{model}-tiny+image_reward")
        tiny_decode = "" if tiny is None or tiny.preview_decode is None else f"{tiny.preview_decode:g}"
        rows.append([family, size, f"{cost.step:g}", f"{cost.decode:g}", tiny_decode, f"{cost.per_prompt:g}" if cost.per_prompt else "",
                     f"{cost.total(1) - cost.per_prompt:,.0f}"])  # fmt: skip
    return _markdown(["TFLOPs", "px", "step", "decode", "tiny decode", "text of a prompt", "image of 20 steps"], rows)


def _weights() -> str:
    rows = []
    for model, parts in WEIGHTS.items():
        total = sum(parts.values())
        rows.append([model, ", ".join(f"{part} {size:.2f}" for part, size in parts.items()), f"{2 * total:.0f} GB",
                     f"{next(iter(parts.values())):.0f} GB"])  # fmt: skip
    return _markdown(
        ["model", "billions of weights", "download and memory in bf16", "denoiser in 8 bits (`--fp8`)"], rows
    )


def _accounting() -> str:
    rows = []
    presets = {"published": "published", "FLUX.1-dev, 512 px": "flux-512+image_reward", "SDXL, 512 px": "sdxl-512+image_reward",
               "SDXL, 512 px, tiny decoder at checks": "sdxl-512-tiny+image_reward"}  # fmt: skip
    for label, name in presets.items():
        cost = CostModel.preset(name)
        check = cost.verify + (cost.decode if cost.preview_decode is None else cost.preview_decode)
        one, hundred = cost.total(1), cost.total(100, PUBLISHED_SCHEDULE)
        rows.append([label, cost.accounting, f"{cost.step:g}", f"{check:.3g}", f"{check / cost.step:.0%}", f"{one:,.1f}",
                     f"{hundred / 100:,.1f}", f"{100 * one / hundred:.2f}"])  # fmt: skip
    head = [
        "cost model",
        "accounting",
        "step",
        "check",
        "check / step",
        "Best-of-N image",
        "pruned candidate",
        "candidates per image",
    ]
    return _markdown(head, rows)


_TABLES = {"recording": _recording, "search": _search, "finetune": _finetune, "large": _large, "families": _families, "weights": _weights,
           "accounting": _accounting}  # fmt: skip


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _time(count: float) -> str:
    """Return hours as text with two digits, in a unit that suits."""
    for unit, length in (("s", 1 / 3600), ("min", 1 / 60), ("h", 1)):
        if count / length < 100:
            return f"{float(f'{count / length:.2g}'):g} {unit}"
    return f"{float(f'{count / 24:.2g}'):,.0f} days"


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{float(f'{count / size:.2g}'):,.4g} {unit}"
    return f"{count / 1e3:.0f} kB"
