"""How simulation, scoring, generation and sweeps grow at 1, 4 and 16 times the work; docs/scale.md shows the table.

Generation and scoring run the pocket models at 20 steps; the tensors and the plan have the images and steps of the large run
that the page asks about (1,000 images, 50 steps), so that only the number of prompts is extrapolated.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.benchmarks.bench_simulate import _fresh
from tests.benchmarks.rows import Row

TIMES = (1, 4, 16)
IMAGES, STEPS = 1000, 50
PROMPTS = 25
"""Prompts of the tensor at 1x: one chunk of the store."""
POCKET_IMAGES = 8
RUNS = 3


def timed(work: Callable[[], object]) -> float:
    """Return the CPU seconds of one call, all threads: the growth then does not depend on what else the machine does."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def grown(name: str, values: dict[int, float], unit: str = "CPU s", at_most: float | None = 20.0) -> list[Row]:
    """Return a row for each size, and what 16 times the work takes over 1 time (linear is 16)."""
    rows = [Row(f"{name}: {k}x", value, unit) for k, value in values.items()]
    each = (values[TIMES[-1]] - values[TIMES[0]]) / (TIMES[-1] - TIMES[0])
    ratio = values[TIMES[-1]] / values[TIMES[0]]
    return [*rows, Row(f"{name}: 16x over 1x", ratio, "x", at_most=at_most, note=f"{each:.3g} {unit} each further 1x")]


def simulation_rows() -> list[Row]:
    """Sweep, save and open tensors of 1,000 images x 50 steps; peak memory in a fresh process."""
    from ttsnap_lib import CostModel, Schedule, open_rewards, save_rewards, sweep
    from ttsnap_lib.tensors.tensor import synthetic_rewards

    cost, schedule = CostModel(step=21.5, verify=0.138, decode=2.51, n_steps=STEPS), Schedule((5, 15), (0.3, 0.4))
    budgets = np.linspace(5, 100, 10) * cost.total(1)
    given = (["best_of_n", "ttsp", "ttsnap"], budgets, cost, schedule)
    whole = synthetic_rewards(PROMPTS * TIMES[-1], IMAGES, STEPS)
    sweeps, saves, opens = {}, {}, {}
    sweep(whole.isel(prompt=[0]), ["ttsnap"], budgets[:1], cost, schedule, iterations=2)  # compile
    with tempfile.TemporaryDirectory() as folder:
        for k in TIMES:
            part, path = whole.isel(prompt=slice(0, PROMPTS * k)), Path(folder) / f"{k}.zarr"
            sweeps[k] = min(timed(lambda part=part: sweep(part, *given, iterations=50)) for _ in range(3))
            saves[k] = timed(lambda part=part, path=path: save_rewards(part, path))
            opens[k] = timed(lambda path=path: open_rewards(path).load())
        files = sum(file.is_file() for file in path.rglob("*"))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    unit = f"tensor of {PROMPTS} prompts x {IMAGES} images x {STEPS} steps"
    rows = grown(f"sweep, 3 methods x 10 budgets x 50 iterations, {unit}", sweeps)
    rows += grown(f"save, {unit}", saves) + grown(f"open and load, {unit}", opens)
    rows += [
        Row(f"files of the store, {PROMPTS * TIMES[-1]} prompts", files, "files"),
        Row("stored bytes over float32 bytes of base and noise-aware", size / (2 * whole["base"].nbytes), "x"),
    ]
    memory = {k: fresh(_SWEEP, PROMPTS * k)[1] for k in TIMES}
    return rows + grown(f"peak memory of that sweep above the interpreter's, {unit}", memory, "MB")


_PEAK = """
import pathlib, re, time
import numpy as np
status = pathlib.Path("/proc/self/status")  # ru_maxrss would carry over from the parent process
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text()).group(1)) * 1024 / 1e6
"""
_SWEEP = """
from ttsnap_lib import CostModel, Schedule, sweep
from ttsnap_lib.tensors.tensor import make_rewards
cost, schedule, rng = CostModel(step=21.5, verify=0.138, n_steps=STEPS), Schedule((5, 15), (0.3, 0.4)), np.random.default_rng(0)
def work(prompts, iterations):
    a, b = (rng.standard_normal((1, prompts, IMAGES, STEPS), np.float32) for _ in range(2))
    sweep(make_rewards(a, b, rewards=["a"]), ["ttsnap"], np.linspace(5, 100, 10) * cost.total(1), cost, schedule, iterations=iterations)
work(1, 1)
before, begin = peak(), time.process_time()
work(PROMPTS, 5)
print(time.process_time() - begin, peak() - before)
"""
_PLAN = """
import tempfile
from ttsnap_lib.trajectories.generate import blocks_for, wanted_rows
from ttsnap_lib.scoring.score import InlineScorer, open_scorer
from ttsnap_lib.rewards.loading import load_reward
reward = load_reward(lambda prompt, images: [0.0] * len(images), name="r")
def work(prompts):
    texts = [f"prompt {k}" for k in range(prompts)]
    options = {"source": "", "shard": (0, 1), "where": "{} {} {}".format}
    with tempfile.TemporaryDirectory() as folder, open_scorer(f"{folder}/r.zarr", [reward], texts, IMAGES, list(range(STEPS)), {}, **options) as scorer:
        blocks = blocks_for(8, {"size": 8}, prompts, IMAGES)
        batches = list(blocks.starts(prompts, IMAGES))
        assert len(wanted_rows(blocks, batches, prompts, IMAGES, STEPS, InlineScorer(scorer).only)) == prompts * IMAGES
work(1)
before, begin = peak(), time.process_time()
work(PROMPTS)
print(time.process_time() - begin, peak() - before)
"""


def fresh(code: str, prompts: int) -> tuple[float, float]:
    """Return the seconds and the peak memory in MB, above what its imports take, of `code` in a process of its own."""
    sizes = f"PROMPTS, IMAGES, STEPS = {prompts}, {IMAGES}, {STEPS}\n"
    seconds, megabytes = _fresh(_PEAK + sizes + code).split()[-2:]
    return float(seconds), float(megabytes)


def plan_rows() -> list[Row]:
    """Start one process of `generate --score`: the empty store and the list of work, before any image."""
    found = {k: fresh(_PLAN, PROMPTS * k) for k in TIMES}
    unit = f"{PROMPTS} prompts x {IMAGES} images x {STEPS} steps"
    rows = grown(f"inline scoring, start of one unsharded process, {unit}", {k: s for k, (s, _) in found.items()})
    return rows + grown(f"inline scoring, memory at that start, {unit}", {k: m for k, (_, m) in found.items()}, "MB")


def pictures_rows() -> list[Row]:
    """Generate and score pocket trajectories, through files and inline; go on with what is whole; its disk."""
    import torch

    from ttsnap_lib.diffusion.pipelines import load_pipeline
    from ttsnap_lib.rewards.loading import load_reward
    from ttsnap_lib.scoring.score import generate_scores, score
    from ttsnap_lib.trajectories.generate import generate
    from ttsnap_lib.trajectories.prompts import read_prompts

    pipeline, reward = load_pipeline("pocket-flux", device="cpu"), load_reward("pocket-clip", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    prompts = read_prompts(f"pocket:test:{2 * TIMES[-1]}")
    options = {"images_per_prompt": POCKET_IMAGES, "batch_size": POCKET_IMAGES, "cpu_threads": 1}
    made, again, scored, inline = {}, {}, {}, {}
    torch.set_num_threads(1)  # on a busy machine several threads of torch spin while they wait, and that counts as work
    with tempfile.TemporaryDirectory() as root:
        warm = Path(root) / "warm"
        generate(pipeline, prompts[:2], warm, **options)
        score(warm, reward, Path(root) / "warm.zarr")
        for k in TIMES:
            folder, chosen = Path(root) / str(k), prompts[: 2 * k]
            made[k] = timed(lambda c=chosen, f=folder: generate(pipeline, c, f, **options))
            again[k] = timed(lambda c=chosen, f=folder: generate(pipeline, c, f, **options))
            scored[k] = statistics.median(
                timed(lambda f=folder, to=to: score(f, reward, f.with_name(f"{f.name}-{to}.zarr"), batch_size=64))
                for to in range(3)
            )
            inline[k] = timed(
                lambda c=chosen, f=folder: generate_scores(
                    pipeline, c, f.with_name(f"{f.name}-i.zarr"), reward, **options
                )
            )
        found = [path for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in found)
    unit = f"2 pocket prompts x {POCKET_IMAGES} images x 20 steps"
    images = 2 * TIMES[-1] * POCKET_IMAGES
    rows = grown(f"generate into a folder, {unit}", made)
    rows += grown(f"generate again, all there, {unit}", again)
    rows += grown(f"score the folder, {unit}", scored) + grown(f"generate --score without a folder, {unit}", inline)
    return [
        *rows,
        Row("files over pictures", len(found) / (images * 20), "x"),
        Row("bytes of one 32 px estimate as PNG, all files counted", size / (images * 20), "bytes"),
    ]


def sweep_rows() -> list[Row]:
    """Run a sweep of small notebooks, one worker a core; wall-clock seconds."""
    from tests.benchmarks.bench_sweep import seconds
    from ttsnap_lib.runs.sweep import cores

    taken = {k: seconds(RUNS * k, cores()) for k in TIMES}
    return grown(f"ttsnap sweep, {RUNS} small notebook runs, {cores()} workers", taken, "s")


def run() -> list[Row]:
    """Measure all of it."""
    return simulation_rows() + plan_rows() + pictures_rows() + sweep_rows()
