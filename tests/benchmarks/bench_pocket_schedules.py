"""TTSnap against TTSp and Best-of-N on the shipped pocket tensors: ``python -m tests.benchmarks pocket_schedules``.

Each method has its own tuned schedule, exact costs. Cross-fitted: tuned on the even prompts and told on the odd ones,
and the other way round, so that every prompt speaks as one that was not tuned on. The intervals are over prompts.
The adapters saw none of these prompts either (they are of the test split). TTSnap may also check at steps without
adapters, by the base reward, as a live run does.
"""

from __future__ import annotations

import numpy as np

from tests.benchmarks.rows import Row
from ttsnap_lib import CostModel, Schedule, open_rewards, optimize_schedule
from ttsnap_lib.files import data_cache
from ttsnap_lib.simulation.metrics import jackknife_interval, leave_one_out, relative_gain_of
from ttsnap_lib.simulation.simulate import curves

METHODS = ("ttsp", "ttsnap")
EARLY = Schedule((2,), (0.3,))


def run(models: tuple[str, ...] = ("flux", "sdxl"), n_trials: int | None = None, iterations: int = 200) -> list[Row]:
    """Return the relative gains and their difference, for checks by the full decoder and by the tiny one.

    Besides the tuned schedules, one that prunes once and early, where the two rewards differ most.
    """
    return [
        row for model in models for preset in ("", "-tiny") for row in _rows(model, preset, n_trials, iterations)
    ]  # fmt: skip


def _rows(model: str, preset: str, n_trials: int | None, iterations: int) -> list[Row]:
    dataset = open_rewards(data_cache() / "pocket" / f"{model}.zarr")
    cost = CostModel.preset(f"pocket-{model}{preset}+pocket-clip")
    budgets = np.arange(2, 21) * cost.total(1)
    prompts = np.arange(dataset.sizes["prompt"])
    halves = prompts[::2], prompts[1::2]
    curve: dict[str, np.ndarray] = {}  # (prompt, budget)
    schedules: dict[str, list[str]] = {}
    for method in METHODS:
        for tune, test in (halves, halves[::-1]):
            tuned = optimize_schedule(
                dataset, cost, budgets, method, tune=tune, test=test, n_trials=n_trials, copied_steps=True
            )
            found = curves(
                dataset.isel(prompt=test), [method], budgets, cost, tuned.schedule, iterations=iterations, rng=1
            )
            for k, name in enumerate(found.methods):
                curve.setdefault(name, np.zeros((len(prompts), len(budgets))))[test] = found.per_prompt[k, :, 0].T
            schedules.setdefault(method, []).append(str(tuned.schedule))
    what = f"pocket-{model}, checks by the {'tiny' if preset else 'full'} decoder"
    rows = _told(what, curve, budgets, {method: " and ".join(of) for method, of in schedules.items()})
    found = curves(dataset, METHODS, budgets, cost, EARLY, iterations=iterations, rng=1)
    curve = {name: found.per_prompt[k, :, 0].T for k, name in enumerate(found.methods)}
    return rows + _told(what, curve, budgets, dict.fromkeys(METHODS, str(EARLY)))


def _told(what: str, curve: dict[str, np.ndarray], budgets: np.ndarray, schedules: dict[str, str]) -> list[Row]:
    without = {name: leave_one_out(values) for name, values in curve.items()}
    gains, others = {}, {}
    for method in METHODS:
        gains[method] = float(relative_gain_of(budgets, curve[method].mean(0), curve["best_of_n"].mean(0)))
        others[method] = relative_gain_of(budgets, without[method], without["best_of_n"], strict=False)
    rows = [
        Row(f"{what}: {method} over Best-of-N", gains[method], "%",
            note=f"{_interval(gains[method], others[method])}; {schedules[method]}")
        for method in METHODS
    ]  # fmt: skip
    ahead, others_ahead = (found["ttsnap"] - found["ttsp"] for found in (gains, others))
    rows.append(Row("  ttsnap - ttsp", ahead, "points", at_least=0, note=_interval(ahead, others_ahead)))
    return rows


def _interval(gain: float, without: np.ndarray) -> str:
    low, high = jackknife_interval(gain, without)
    return f"95% {low:+.1f} to {high:+.1f}"
