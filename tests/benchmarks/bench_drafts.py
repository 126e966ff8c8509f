"""Drafts against TTSnap and Best-of-N on the pocket models: ``python -m tests.benchmarks drafts``.

Drafts of the shipped tensors' captions and seeds are recorded first, into ``data_cache/drafts`` (minutes each on a core).
Exact costs, 3 to 10 finished images. Cross-fitted: TTSnap's schedule, and the steps of the drafts and how many run in full,
are chosen on the even prompts and told on the odd ones, and the other way round. The intervals are over prompts, paired.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from tests.benchmarks.rows import Row
from ttsnap_lib import CostModel, load_pipeline, open_rewards, optimize_schedule
from ttsnap_lib.files import data_cache
from ttsnap_lib.scoring.score import draft_scores
from ttsnap_lib.simulation.draft import Drafts
from ttsnap_lib.simulation.metrics import jackknife_interval, kendall_tau, leave_one_out, relative_gain_of
from ttsnap_lib.simulation.simulate import curves

STEPS = {"flux": (4, 6, 8), "sdxl": (4, 6)}
FINISH = (1, 2)
POOL = 50  # images of a prompt
IMAGES = np.arange(3, 11)  # budgets, in finished images


def run(n_trials: int = 500, iterations: int = 100) -> list[Row]:
    """Return tau of the drafts, and relative gains of drafts, of TTSnap, and of Best-of-N with as few steps."""
    warnings.filterwarnings("ignore", "a tensor does not tell its seeds")  # the shipped ones: 0
    warnings.filterwarnings("ignore", "checks are charged by a tiny decoder")
    return [row for model in STEPS for row in _rows(model, n_trials, iterations)]


def _rows(model: str, n_trials: int, iterations: int) -> list[Row]:
    full = open_rewards(data_cache() / "pocket" / f"{model}.zarr").isel(image=slice(0, POOL)).load()
    drafts = {n: _recorded(model, n) for n in STEPS[model]}
    methods = [Drafts(one, k) for one in drafts.values() for k in FINISH]
    cost = CostModel.preset(f"pocket-{model}+pocket-clip")
    tiny = CostModel.preset(f"pocket-{model}-tiny+pocket-clip")
    budgets = IMAGES * cost.total(1)
    common = {"iterations": iterations, "rng": 1, "reach": False}
    prompts, told = np.arange(full.sizes["prompt"]), {}  # (budget, prompt)
    halves = prompts[::2], prompts[1::2]
    for tune, test in (halves, halves[::-1]):
        tuned = [
            optimize_schedule(
                full, charged, budgets, "ttsnap", tune=tune, test=test, n_trials=n_trials, copied_steps=True
            ).schedule
            for charged in (cost, tiny)
        ]
        seen = curves(full.isel(prompt=tune), methods, budgets, cost, **common).relative_gains()
        chosen = seen["method"][seen["relative_gain"].idxmax()]
        found = curves(full.isel(prompt=test), ["ttsnap", *methods], budgets, cost, tuned[0], **common)
        values = dict(zip(found.methods, found.per_prompt[:, :, 0], strict=True))
        cheaper = curves(full.isel(prompt=test), ["ttsnap"], budgets, tiny, tuned[1], **common)
        values["ttsnap, tiny decoder"] = cheaper.per_prompt[cheaper.methods.index("ttsnap"), :, 0]
        for name, curve in {**values, "drafts as chosen": values[chosen]}.items():
            told.setdefault(name, np.empty((len(budgets), len(prompts))))[:, test] = curve
    for n, one in drafts.items():
        few = curves(one, ["best_of_n"], budgets, replace(cost, n_steps=n), **common)
        told[f"Best-of-N of {n} steps, the drafts themselves"] = few.per_prompt[0, :, 0]
    final, rows = full["base"].values[0, :, :, -1], []
    for n, one in drafts.items():
        tau, share = (
            kendall_tau(one["base"].values[0][..., -1:], final),
            replace(cost, n_steps=n).total(1) / cost.total(1),
        )
        rows.append(Row(f"pocket-{model}: tau of drafts of {n} steps", tau.mean[0], "",
                        note=f"95% {tau.low[0]:.3f} to {tau.high[0]:.3f}; price {share:.3f}"))  # fmt: skip
    base = told.pop("best_of_n")
    for name, curve in told.items():
        rows.append(_gain(f"pocket-{model}: {name} over Best-of-N", budgets, base, curve))
    for name in ("ttsnap", "ttsnap, tiny decoder"):
        rows.append(_gain(f"  drafts as chosen - {name}", budgets, base, told["drafts as chosen"], told[name]))
    return rows


def _recorded(model: str, n_steps: int):
    out = data_cache() / "drafts" / f"{model}-{n_steps}.zarr"
    draft_scores(
        load_pipeline(f"pocket-{model}", device="cpu"), "pocket:test:64", out, "pocket-clip", n_steps,
        images_per_prompt=POOL, batch_size=POOL, cpu_threads=1,
    )  # fmt: skip
    return open_rewards(out).sel(reward=["pocket-clip"]).isel(image=slice(0, POOL)).load()


def _gain(name: str, budgets: np.ndarray, base: np.ndarray, curve: np.ndarray, other: np.ndarray | None = None) -> Row:
    """Return the relative gain of a curve (budget, prompt), or by how much it is above another's."""
    values = [
        relative_gain_of(budgets, pick(curve), pick(base), strict=False)
        - (0 if other is None else relative_gain_of(budgets, pick(other), pick(base), strict=False))
        for pick in (lambda part: part.mean(1), lambda part: leave_one_out(part.T))
    ]
    low, high = jackknife_interval(*values)
    return Row(name, float(values[0]), "%" if other is None else "points", note=f"95% {low:+.1f} to {high:+.1f}")
