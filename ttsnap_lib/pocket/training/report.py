"""The training report: losses, sample sheets, and what the shipped folders do, measured by the oracle."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from scipy import stats
from transformers import CLIPModel

from ttsnap_lib.files import atomic_write, write_json
from ttsnap_lib.pocket.oracle import oracle_score
from ttsnap_lib.pocket.training.clip import clip_scores
from ttsnap_lib.pocket.training.pictures import sample_steps
from ttsnap_lib.pocket.world import pocket_prompts

_SHOWN_STEPS = (0, 2, 4, 6, 8, 11, 14, 17)


def sheet(pictures: np.ndarray, zoom: int = 2, gap: int = 2) -> Image.Image:
    """Return uint8 (rows, columns, h, w, 3) as one picture."""
    rows, columns, height, width, _ = pictures.shape
    page = np.full((rows, height * zoom + gap, columns, width * zoom + gap, 3), 255, dtype=np.uint8)
    page[:, :-gap, :, :-gap] = pictures.repeat(zoom, axis=2).repeat(zoom, axis=3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(page.reshape(rows * (height * zoom + gap), -1, 3))


def rank_agreement(first: np.ndarray, second: np.ndarray, how: str = "spearman") -> float:
    """Return the mean over rows of the rank correlation of (prompt, image) arrays; constant rows are left out."""
    measure = stats.spearmanr if how == "spearman" else stats.kendalltau
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant rows give NaN
        values = [measure(a, b)[0] for a, b in zip(first, second, strict=True)]
    return float(np.nanmean(values))


def measure(pipeline: Any, clip: Any, prompts: Sequence[str], images: int) -> tuple[dict[str, Any], np.ndarray]:
    """Measure one pipeline on held-out captions; return the figures and the pictures (prompt, image, step, 32, 32, 3)."""
    started = time.perf_counter()
    pictures = sample_steps(pipeline, prompts, images, base_seed=7)
    elapsed = time.perf_counter() - started
    n_steps = pictures.shape[2]
    texts = np.repeat(prompts, images).tolist()
    last = pictures[:, :, -1].reshape(-1, *pictures.shape[3:])
    oracle = oracle_score(texts, last).reshape(len(prompts), images)
    floats = pictures.astype(np.float32) / 255.0
    scores = [
        clip_scores(clip, texts, floats[:, :, step].reshape(-1, *floats.shape[3:])).reshape(oracle.shape)
        for step in range(n_steps)
    ]
    figures = {
        "images": int(oracle.size),
        "oracle_mean": float(oracle.mean()),
        "oracle_within_prompt_sd": float(oracle.std(axis=1, ddof=1).mean()),
        "oracle_best_of_images_mean": float(oracle.max(axis=1).mean()),
        "spearman_clip_oracle": rank_agreement(scores[-1], oracle),
        "clip_within_prompt_sd": float(scores[-1].std(axis=1, ddof=1).mean()),
        "clip_between_prompts_sd": float(scores[-1].mean(axis=1).std(ddof=1)),
        "kendall_tau_by_step": [round(rank_agreement(value, scores[-1], "kendall"), 4) for value in scores],
        "seconds_per_image": elapsed / oracle.size,
        "threads": torch.get_num_threads(),
    }
    return figures, pictures


def write_report(
    logs: dict[str, list], n_prompts: int, images: int, models: Path, docs: Path, log: Callable[[str], None] = print
) -> None:
    """Write losses (of each stage), sheets and figures below `docs`."""
    prompts = pocket_prompts("evaluation", n_prompts)
    clip = CLIPModel.from_pretrained(models / "pocket-clip")
    figures: dict[str, Any] = {"prompts": n_prompts, "images_per_prompt": images}
    for name in ("pocket-flux", "pocket-sdxl"):
        figures[name], pictures = measure(DiffusionPipeline.from_pretrained(models / name), clip, prompts, images)
        log(f"{name}: {json.dumps(figures[name])}")
        for file, shown in ((f"{name}.png", pictures[:12, :12, -1]), (f"{name}-steps.png", pictures[:12, 0])):
            with atomic_write(docs / file) as handle:
                sheet(shown).save(handle, format="PNG", optimize=True)
    figures["bytes"] = {folder.name: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                        for folder in sorted(models.iterdir()) if folder.is_dir()}  # fmt: skip
    figures["training"] = {stage: {"seconds": rows[-1]["elapsed_s"], **rows[-1]} for stage, rows in logs.items()}
    write_json(docs / "losses.json", logs)
    write_json(docs / "figures.json", figures)
    with atomic_write(docs / "index.md", "w") as file:
        file.write(_page(figures, prompts[:12]))


def _page(figures: dict[str, Any], prompts: Sequence[str]) -> str:
    """Return the report as Markdown."""
    names = ("pocket-flux", "pocket-sdxl")
    measured = [
        ("oracle, mean", "oracle_mean", ".3f"),
        ("oracle, deviation within a prompt", "oracle_within_prompt_sd", ".3f"),
        ("oracle, best of the images of a prompt", "oracle_best_of_images_mean", ".3f"),
        ("Spearman of pocket-clip and oracle within a prompt", "spearman_clip_oracle", ".3f"),
        ("pocket-clip, deviation within a prompt", "clip_within_prompt_sd", ".2f"),
        ("pocket-clip, deviation between prompts", "clip_between_prompts_sd", ".2f"),
        ("seconds per image, 20 steps, every estimate decoded", "seconds_per_image", ".3f"),
    ]
    taus = [[n, *(f"{figures[n]['kendall_tau_by_step'][step]:.2f}" for step in _SHOWN_STEPS)] for n in names]
    stages = [
        [stage, str(row["step"]), f"{row['seconds']:.0f}", f"{row['loss']:.4g}"]
        for stage, row in figures["training"].items()
    ]
    sheets = "\n".join(f"![{n}]({n}.png)\n\n![{n}, estimates by step]({n}-steps.png)\n" for n in names)
    captions = "\n".join(f"{k}. {text}" for k, text in enumerate(prompts, 1))
    return f"""# The pocket models

Written by `python -m ttsnap_lib.pocket.training.train --stage report`. Held-out captions of the evaluation split: \
{figures["prompts"]} captions, {figures["images_per_prompt"]} images each, {figures[names[0]]["threads"]} thread(s). \
[How the shipped weights came about](training.md); [what noise-aware finetuning wins](finetuning.md).

{_table(["", *names], *([title, *(format(figures[n][key], form) for n in names)] for title, key, form in measured))}

Kendall tau between pocket-clip's score of the estimate at a step and of the picture, mean over prompts:

{_table(["step", *map(str, _SHOWN_STEPS)], *taus)}

{_table(["stage", "steps", "seconds", "last loss"], *stages)}

{_table(["folder", "MB"], *([name, f"{size / 1e6:.2f}"] for name, size in figures["bytes"].items()))}

Each row of the sheets is a caption, each column a seed; in the sheets of steps, each column a step of one seed.

{sheets}
Captions of the rows:

{captions}
"""


def _table(head: Sequence[str], *rows: Sequence[str]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
