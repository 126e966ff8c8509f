"""How much more the images of a prompt differ with NegToMe on the pocket models: ``python -m tests.benchmarks negtome``.

The same seeds with and without it, groups of four, the published settings but for the bound on the size of features
(the pocket SDXL has none of 32 x 32). Distances are means over the pairs of a group; the intervals are over prompts.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from tests.benchmarks.rows import Row
from ttsnap_lib.diffusion.negtome import NegToMe
from ttsnap_lib.diffusion.pipelines import load_pipeline
from ttsnap_lib.finetuning.data import ImageBank
from ttsnap_lib.pocket.oracle import oracle_score
from ttsnap_lib.pocket.world import pocket_prompts
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.simulation.metrics import Estimate
from ttsnap_lib.trajectories.read import pairwise_distances

GROUP, GROUPS = 4, 4


def run(models: tuple[str, ...] = ("pocket-flux", "pocket-sdxl"), n_prompts: int | None = None) -> list[Row]:
    """Return diversity, reward and oracle with and without, for both ways of matching."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        n_prompts = int(os.environ.get("TTSNAP_BENCH_PROMPTS", "64")) if n_prompts is None else n_prompts
        prompts = pocket_prompts("evaluation", n_prompts)
        return [row for model in models for row in _rows(model, prompts)]
    finally:
        torch.set_num_threads(before)


def _rows(model: str, prompts: list[str]) -> list[Row]:
    pipeline, reward = load_pipeline(model, device="cpu"), load_reward("pocket-clip", device="cpu")

    def measured(negtome: NegToMe | None) -> dict[str, np.ndarray]:
        bank = ImageBank.generated(
            pipeline, prompts, GROUP * GROUPS, steps=[], batch_size=GROUP * GROUPS, negtome=negtome
        )
        pictures = bank.pixels[:, :, -1]
        groups = pictures.reshape(len(prompts), GROUPS, GROUP, *pictures.shape[2:])
        floats = [torch.from_numpy(of).permute(0, 3, 1, 2).float() / 255 for of in pictures]
        return {
            "distance of pixels": np.array([[pairwise_distances(g).mean() for g in of] for of in groups]).mean(1),
            "reward, mean": np.array([reward.score(text, of).mean() for text, of in zip(prompts, floats, strict=True)]),
            "reward, best of a prompt": np.array(
                [reward.score(text, of).max() for text, of in zip(prompts, floats, strict=True)]
            ),
            "oracle, mean": np.array(
                [oracle_score([text] * len(of), of).mean() for text, of in zip(prompts, pictures, strict=True)]
            ),
        }

    plain = measured(None)
    rows = []
    for matching in ("paper", "released"):
        merged = measured(NegToMe(group_size=GROUP, min_features=1, matching=matching))
        for name, values in merged.items():
            gain = Estimate.over_prompts(values - plain[name], 0, resamples=2000)
            rows.append(
                Row(
                    f"{model}, NegToMe ({matching}): {name}, with - without",
                    float(gain.mean),
                    "",
                    note=f"{plain[name].mean():.4f} -> {values.mean():.4f}, 95% {gain.low:+.4f} to {gain.high:+.4f}",
                )
            )
            if name == "distance of pixels" and matching == "paper":
                rows.append(Row("  lower end of its interval", float(gain.low), "", at_least=0))
    return rows
