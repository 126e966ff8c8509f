"""Prompts that share batches against one prompt at a time, on the pocket models: work a prompt, and whose winners differ."""

from __future__ import annotations

import time
from typing import Any

import torch

from tests.benchmarks.rows import Row, ratio
from ttsnap_lib import Schedule
from ttsnap_lib.diffusion.pipelines import load_decoder, load_pipeline
from ttsnap_lib.live.run import Searcher
from ttsnap_lib.pocket.world import pocket_prompts
from ttsnap_lib.rewards.loading import find_adapters, load_reward

SCHEDULE = Schedule((2, 6, 11), (0.4, 0.4, 0.5))
CANDIDATES = 16  # survivors 16, 6, 2, 1: alone three of four stages leave most of a batch empty
TOGETHER = 16
BATCH = 16


def run(models: tuple[str, ...] = ("pocket-flux", "pocket-sdxl"), n_prompts: int = 64) -> list[Row]:
    """Search prompts in groups, one at a time and together in turns; the clock is the processor's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for model in models for row in _rows(model, pocket_prompts("evaluation", n_prompts))]
    finally:
        torch.set_num_threads(before)


def _rows(model: str, prompts: list[str]) -> list[Row]:
    pipeline = load_pipeline(model, device="cpu")
    reward = load_reward("pocket-clip", adapters=find_adapters("pocket", model), device="cpu")
    searcher = Searcher(
        pipeline,
        reward,
        SCHEDULE,
        candidates=CANDIDATES,
        batch_size=BATCH,
        decoder=load_decoder("pocket-tiny", pipeline),
    )
    alone: dict[int, Any] = {}
    shared: dict[int, Any] = {}
    slow, fast = [], []
    searcher.run({0: prompts[0]}, alone.__setitem__)  # warm
    for start in range(0, len(prompts), TOGETHER):
        group = {index: prompts[index] for index in range(start, min(start + TOGETHER, len(prompts)))}
        begin = time.process_time()
        for index, prompt in group.items():
            searcher.run({index: prompt}, alone.__setitem__)
        middle = time.process_time()
        searcher.run(group, shared.__setitem__)
        slow.append(middle - begin)
        fast.append(time.process_time() - middle)
    value, spread = ratio(slow, fast)
    gaps = [abs(alone[k].scores[reward.name] - shared[k].scores[reward.name]) for k in range(len(prompts))]
    differ = [k for k in range(len(prompts)) if alone[k].winner != shared[k].winner]
    return [
        Row(f"{model}: work of one prompt at a time / of {TOGETHER} together, {CANDIDATES} candidates", value, "x", 1.0,
            note=f"{spread}; {1e3 * sum(fast) / len(prompts):.0f} ms a prompt together"),
        Row(f"  winners that differ, of {len(prompts)}", len(differ), "", at_most=len(prompts) // 16, note=str(differ)),
        Row("  largest difference between the chosen images' rewards", max(gaps), "reward"),
    ]  # fmt: skip
