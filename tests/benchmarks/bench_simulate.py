"""Speed, growth and memory of the simulation, against a plain NumPy implementation in the same run."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks.rows import Row, interleaved, ratio
from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel, Schedule, open_rewards, save_rewards, sweep
from ttsnap_lib.tensors.tensor import synthetic_rewards

BUDGETS = np.arange(400, 4001, 200)
METHODS = ["best_of_n", "ttsp", "ttsnap"]
COST = CostModel.preset("published")


def numpy_sweep(base: np.ndarray, aware: np.ndarray, schedule: Schedule, iterations: int, rng) -> np.ndarray:
    """Sweep the plain way: a fresh subset per iteration, boolean masks, argpartition per stage.

    Parameters
    ----------
    base, aware : (prompt, image, step)

    Returns
    -------
    (method, budget)
    """
    n_prompts, pool, _ = base.shape
    final = base[:, :, -1]
    means = np.empty((len(METHODS), len(BUDGETS)))
    for m, method in enumerate(METHODS):
        plan = None if method == "best_of_n" else schedule
        scores = aware if method == "ttsnap" else base
        for b, budget in enumerate(BUDGETS):
            n = COST.candidates(budget, plan)
            total = 0.0
            for _ in range(iterations):
                alive = np.zeros((n_prompts, pool), bool)
                alive[:, rng.choice(pool, n, replace=False)] = True
                left = n
                for step, keep in zip(*((plan.steps, plan.keep_ratios) if plan else ((), ())), strict=True):
                    left = max(1, round(left * keep))
                    masked = np.where(alive, scores[:, :, step], -np.inf)
                    best = np.argpartition(-masked, left - 1, axis=1)[:, :left]
                    alive = np.zeros_like(alive)
                    np.put_along_axis(alive, best, True, axis=1)
                total += np.where(alive, final, -np.inf).max(1).mean()
            means[m, b] = total / iterations
    return means


def run() -> list[Row]:
    """Measure everything that the project promises of the simulation."""
    dataset = synthetic_rewards(200, 200, 20)
    base, aware = dataset["base"].values[0], dataset["noise_aware"].values[0]
    rows = [Row("compile and first sweep in a fresh process, empty compile cache", _first_call(), "s")]

    def ours(iterations: int = 50, data=dataset):
        return sweep(data, METHODS, BUDGETS, COST, PUBLISHED_SCHEDULE, iterations=iterations)

    def plain():
        return numpy_sweep(base, aware, PUBLISHED_SCHEDULE, 50, np.random.default_rng(0))

    ours()
    slow, fast = interleaved(plain, ours, repeats=5)
    value, spread = ratio(slow, fast)
    rows.append(
        Row("sweep 19 budgets x 50 iterations x 200 prompts x 3 methods: NumPy / ours", value, "x", 20, note=spread)
    )
    rows.append(Row("  the same, ours", float(np.median(fast)), "s", note=f"{min(fast):.3f} to {max(fast):.3f}"))
    agree = np.abs(ours(400).pivot(index="method", columns="budget", values="mean").loc[METHODS].to_numpy() - plain())
    rows.append(Row("  largest difference of the two means (Monte Carlo)", float(agree.max()), "reward", at_most=0.05))

    times = {k: min(interleaved(lambda k=k: ours(50 * k), repeats=3)[0]) for k in (4, 16, 64)}
    rows += [Row(f"iterations x {k}: seconds per x", times[k] / k, "s") for k in times]
    rows.append(Row("16 times the iterations cost (linear is 16)", times[64] / times[4], "x", at_most=20))
    big = synthetic_rewards(3200, 200, 20)
    times = {
        k: min(interleaved(lambda k=k: ours(50, big.isel(prompt=slice(0, 200 * k))), repeats=3)[0]) for k in (1, 4, 16)
    }
    rows += [Row(f"prompts x {k}: seconds per x", times[k] / k, "s") for k in times]
    rows.append(Row("16 times the prompts cost (linear is 16)", times[16] / times[1], "x", at_most=20))

    rows.append(Row("peak memory of a sweep on 5000 x 200 x 20, over the tensor's size", _memory(), "x", at_most=1.5))

    with tempfile.TemporaryDirectory() as folder:
        three = synthetic_rewards(200, 200, 20, rewards=("a", "b", "c"))
        path = save_rewards(three, Path(folder) / "three.zarr")
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            sweep(open_rewards(path), METHODS, BUDGETS, COST, PUBLISHED_SCHEDULE, report=["b", "c"])
            seconds.append(time.perf_counter() - start)
        rows.append(Row("open three rewards and sweep, select by one", float(np.median(seconds)), "s", at_most=1.0))
        seconds = interleaved(lambda: sweep(open_rewards(path), METHODS, BUDGETS, COST, PUBLISHED_SCHEDULE), repeats=3)[
            0
        ]
        rows.append(Row("open three rewards and sweep, select by their rank sum", float(np.median(seconds)), "s"))
    rows.append(Row("import ttsnap_lib.simulation.simulate", _import_time(), "s", at_most=0.5))
    return rows


def _fresh(code: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return done.stdout.strip()


def _first_call() -> float:
    with tempfile.TemporaryDirectory() as cache:
        return float(
            _fresh(
                "import time, numpy as np\nfrom tests.benchmarks.bench_simulate import *\n"
                "d = synthetic_rewards(20, 200, 20); t = time.perf_counter()\n"
                "sweep(d, METHODS, BUDGETS, COST, PUBLISHED_SCHEDULE, iterations=2)\nprint(time.perf_counter() - t)",
                NUMBA_CACHE_DIR=cache,
            )
        )


def _memory() -> float:
    """Return peak resident memory over the tensor's bytes (base and noise-aware), the interpreter's own taken off."""
    return float(
        _fresh(
            "import re, pathlib\nfrom tests.benchmarks.bench_simulate import *\n"
            "status = pathlib.Path('/proc/self/status')  # ru_maxrss would carry over from the parent process\n"
            "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text()).group(1))\n"
            "small = synthetic_rewards(100, 200, 20)\n"
            "sweep(small, METHODS, BUDGETS, COST, PUBLISHED_SCHEDULE)\nbefore = peak()\n"
            "import numpy as np\nfrom ttsnap_lib.tensors.tensor import make_rewards\n"
            "rng = np.random.default_rng(0)\n"
            "a = rng.standard_normal((1, 5000, 200, 20), np.float32); b = rng.standard_normal(a.shape, np.float32)\n"
            "d = make_rewards(a, b, rewards=['a'])\n"
            "sweep(d, METHODS, BUDGETS, COST, PUBLISHED_SCHEDULE, iterations=10)\n"
            "print((peak() - before) / (a.nbytes + b.nbytes))"
        )
    )


def _import_time() -> float:
    code = "import time; t = time.perf_counter(); import ttsnap_lib.simulation.simulate; print(time.perf_counter() - t)"
    return float(np.median([float(_fresh(code)) for _ in range(5)]))
