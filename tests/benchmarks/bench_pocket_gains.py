"""What noise-aware finetuning wins on the pocket models, on fresh prompts: ``python -m tests.benchmarks pocket_gains``.

Settings were chosen on the selection captions; here the evaluation captions speak. Three seeds of the shipped settings;
then, on fewer pictures, LoRA against full finetuning and against one model for all steps without a curriculum (the
ablation of the paper). The runs are kept in ``$TTSNAP_BENCH_RUNS`` (a temporary folder when not set): finished ones
are not trained again.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tests.benchmarks.rows import Row
from ttsnap_lib.finetuning.config import load_config
from ttsnap_lib.finetuning.data import open_images, own_targets
from ttsnap_lib.finetuning.report import compare_at_steps
from ttsnap_lib.finetuning.train import finetune
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.simulation.metrics import Estimate

MODELS = ("pocket-flux", "pocket-sdxl")
FRESH = "evaluation:128x24@1"
SEEDS = (0, 1, 2)
SMALL = {"trajectories": "train:1000x8@0+mirror", "epochs_per_step": 1}
ABLATIONS: dict[str, dict[str, Any]] = {
    "LoRA": SMALL,
    "full finetuning": {**SMALL, "method": "full", "learning_rate": 5e-5},
    "one model for all steps": {**SMALL, "curriculum": False},
}
TARGET = 0.05  # of the gain in tau


def run(models: tuple[str, ...] = MODELS) -> list[Row]:
    """Train what is not there, and return the rows; ``TTSNAP_BENCH_MODELS`` may name some of the models."""
    models = tuple(os.environ.get("TTSNAP_BENCH_MODELS", " ".join(models)).split())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if kept := os.environ.get("TTSNAP_BENCH_RUNS"):
            return [row for model in models for row in _rows(model, Path(kept))]
        with tempfile.TemporaryDirectory() as folder:
            return [row for model in models for row in _rows(model, Path(folder))]
    finally:
        torch.set_num_threads(before)


def _rows(model: str, folder: Path) -> list[Row]:
    rows, shipped = [], []
    for seed in SEEDS:
        table, gains = _compare(model, folder / f"{model}-lora-{seed}", {"seed": seed})
        shipped.append((table, gains))
        found = _gain_where_useful(table, gains)
        rows.append(_gain_row(f"{model}, LoRA, seed {seed}: gain in tau", found))
    useful = shipped[0][0]["base_tau"].between(0.1, 0.5).to_numpy()
    mean = np.mean([gains for _, gains in shipped], axis=0)
    over_seeds = _gain_where_useful(shipped[0][0], mean)
    rows += [
        _gain_row(f"{model}, LoRA, mean of {len(SEEDS)} seeds", over_seeds, TARGET),
        Row("  lower end of its 95% interval over prompts", over_seeds["low"], "tau", at_least=0),
        Row("  the step that gains least", over_seeds["worst_step_gain"], "tau", at_least=0),
    ]
    for k, step in enumerate(shipped[0][0]["step"]):
        base = shipped[0][0]["base_tau"][k]
        told = Estimate.over_prompts(mean[:, k], 0, resamples=2000)
        used = "" if useful[k] else " (base outside .1 to .5)"
        note = f"{base:.3f} -> {base + told.mean:.3f}, gain {told.low:+.3f} to {told.high:+.3f}{used}"
        rows.append(Row(f"  step {step}: gain of the mean of seeds", told.mean, "tau", note=note))
    for name, changes in ABLATIONS.items():
        found = _gain_where_useful(*_compare(model, folder / f"{model}-small-{name.replace(' ', '-')}", changes))
        rows.append(_gain_row(f"{model}, 1000 x 8 pictures, {name}: gain in tau", found))
    return rows


def _gain_where_useful(table: pd.DataFrame, gains: np.ndarray) -> dict[str, Any]:
    """Return the mean gain, with its interval over prompts, over the steps where the base tau is in [0.1, 0.5].

    These are the steps at which pruning pays: the base reward knows something, and not yet enough.
    """
    chosen = table["base_tau"].between(0.1, 0.5).to_numpy()
    per_prompt = np.nan_to_num(gains[:, chosen], nan=0.0).mean(1)
    told = Estimate.over_prompts(per_prompt, 0)
    return {
        "steps": table["step"][chosen].tolist(),
        "gain": float(told.mean),
        "low": float(told.low),
        "high": float(told.high),
        "worst_step_gain": float(table["gain"][chosen].min()) if chosen.any() else float("nan"),
    }


def _gain_row(name: str, found: dict[str, Any], at_least: float | None = None) -> Row:
    note = f"95% {found['low']:+.3f} to {found['high']:+.3f}, steps {found['steps']}"
    return Row(name, found["gain"], "tau", at_least, note=note)


def _compare(model: str, folder: Path, changes: dict[str, Any]):
    """Train (or find) a run; return its table and gains per prompt and step on fresh prompts, last step first."""
    changes = dict(changes)
    if "trajectories" in changes:
        changes["trajectories"] = f"{model}:{changes['trajectories']}"
    config = load_config(model, **changes)
    finetune(None, folder, config)
    reward = load_reward(config.reward, adapters=folder, device="cpu")
    fresh = open_images(f"{model}:{FRESH}", steps=sorted(config.steps))
    table, gains = compare_at_steps(reward, fresh, own_targets(reward, fresh), steps=sorted(config.steps))
    return table, np.nan_to_num(gains)  # a caption whose images all score alike gains nothing
