"""Live Best-of-N, TTSp and TTSnap on the pocket models at one budget, and whether the simulation foretold them.

Each method's schedule is tuned on the shipped tensor (captions of the test split); the live runs are on captions of the
evaluation split, several draws of candidates for each. Checks are decoded by the full decoder, as in the shipped
tensor; what the tiny one would do to tau is told. The intervals are over prompts.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from tests.benchmarks.rows import Row
from ttsnap_lib import CostModel, Schedule, open_rewards, optimize_schedule, search, simulate
from ttsnap_lib.diffusion.denoise import Denoiser, Settings, image_generator
from ttsnap_lib.diffusion.pipelines import load_decoder, load_pipeline
from ttsnap_lib.files import data_cache
from ttsnap_lib.live.measure import measure_costs
from ttsnap_lib.live.record import SearchRecord
from ttsnap_lib.pocket.world import pocket_prompts
from ttsnap_lib.rewards.loading import find_adapters, load_reward
from ttsnap_lib.simulation import metrics
from ttsnap_lib.tensors.tensor import make_rewards

METHODS = ("best_of_n", "ttsp", "ttsnap")
MULTIPLE = 3  # budget in finished images of Best-of-N
POOL = 32  # images of a prompt in the tensor that the simulation draws from
DRAWS = 3  # live runs of a prompt
BATCH = 16


def run(models: tuple[str, ...] = ("pocket-flux", "pocket-sdxl"), n_prompts: int | None = None) -> list[Row]:
    """Return live and simulated rewards, and what pruning wins at equal FLOPs and at equal seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        n_prompts = int(os.environ.get("TTSNAP_BENCH_PROMPTS", "128")) if n_prompts is None else n_prompts
        return [row for model in models for row in _rows(model, pocket_prompts("evaluation", n_prompts))]
    finally:
        torch.set_num_threads(before)


def _rows(model: str, prompts: list[str]) -> list[Row]:
    pipeline = load_pipeline(model, device="cpu")
    reward = load_reward("pocket-clip", adapters=find_adapters("pocket", model), device="cpu")
    settings = Settings()
    measured = measure_costs(pipeline, reward, settings, batch_sizes=(BATCH,), repeats=5)
    common = {"settings": settings, "batch_size": BATCH}
    costs, budget = measured.tflops, MULTIPLE * measured.tflops.total(1)
    schedules = _tuned(model, costs, budget)

    live = _live(pipeline, reward, prompts, schedules, costs, common, first_seed=1)
    checks = sorted({step for schedule in schedules.values() for step in schedule.steps})
    pool, full_tau, tiny_tau = _tensor(pipeline, reward, prompts, settings, checks)
    rows = []
    for method, (rewards, spent, _) in live.items():
        n = costs.candidates(budget, schedules[method])
        drawn = simulate(pool, method, n=n, schedule=schedules[method], iterations=400)
        # Live is a few draws per prompt, the simulation the mean of many. Six such intervals: 99% each.
        gap = _estimate(rewards - drawn.per_prompt[0], level=0.99)
        rows += [
            Row(f"{model}, {method}: live reward, {len(prompts)} prompts, {n} candidates", rewards.mean(), "reward",
                note=str(schedules[method])),
            Row("  simulated on a pool of the same models", float(drawn.mean[0]), "reward",
                note=f"{drawn.low[0]:.3f} to {drawn.high[0]:.3f}"),
            Row("  live - simulated, paired", gap.mean, "reward", note=f"99% {_span(gap)}"),
            Row("  zero within the interval (1 yes)", float(gap.low <= 0 <= gap.high), "", at_least=1),
            Row("  compute of the runs / the budget", float(spent.mean() / budget), "x", at_most=1),
        ]  # fmt: skip
    rows += _won(f"{model}, equal FLOPs", live, promised="ttsnap")
    equal = _live(pipeline, reward, prompts, schedules, measured.seconds, common, first_seed=101)
    rows += _won(f"{model}, equal seconds by the measured costs", equal)
    for method in METHODS[1:]:
        took = float(equal[method][2].mean() / equal["best_of_n"][2].mean())
        rows.append(Row(f"  seconds that {method} took / Best-of-N's", took, "x"))
    for k, step in enumerate(checks):
        rows.append(Row(f"{model}: tau of the base reward at step {step}", full_tau[k], "",
                        note=f"tiny decoder {tiny_tau[k]:.3f}"))  # fmt: skip
    return rows


def _tuned(model: str, costs: CostModel, budget: float) -> dict[str, Schedule]:
    """Return each method's best schedule at the budget on the shipped tensor, at most three checks."""
    dataset = open_rewards(data_cache() / "pocket" / f"{model.removeprefix('pocket-')}.zarr")
    found = {"best_of_n": Schedule()}
    for method in METHODS[1:]:
        found[method] = optimize_schedule(
            dataset, costs, budget, method, objective="single", max_stages=3, copied_steps=True
        ).schedule
    return found


def _live(pipeline, reward, prompts, schedules, costs: CostModel, common, first_seed: int):
    """Return rewards, compute and seconds, each (prompt,) as means over draws, by method.

    The seeds are others than the pool's, and the same for every method.
    """
    found = {}
    for method, schedule in schedules.items():
        results = [
            [
                search(
                    pipeline, text, reward, schedule, MULTIPLE * costs.total(1), cost=costs, seed=first_seed + draw,
                    method=method, prompt_index=p, **common,
                )
                for draw in range(DRAWS)
            ]
            for p, text in enumerate(prompts)
        ]  # fmt: skip
        numbers = [[(r.scores[reward.name], _spent(r.record, costs), r.record.elapsed_s) for r in of] for of in results]
        found[method] = np.array(numbers).mean(1).T
    return found


def _spent(record: SearchRecord, costs: CostModel) -> float:
    return costs.per_prompt + sum(stage.price(costs) for stage in record.stages)


def _won(title: str, live, promised: str | None = None) -> list[Row]:
    rows = []
    for method, other in (("ttsp", "best_of_n"), ("ttsnap", "best_of_n"), ("ttsnap", "ttsp")):
        won = _estimate(live[method][0] - live[other][0])
        rows.append(Row(f"{title}: {method} - {other}", won.mean, "reward", note=f"95% {_span(won)}"))
        if method == promised and other == "best_of_n":
            rows.append(Row("  lower end of the interval", won.low, "reward", at_least=0))
    return rows


def _tensor(pipeline, reward, prompts, settings, checks):
    """Score a pool of images at the checks; also tau of the base reward with the full and with the tiny decoder."""
    denoiser, decoder = Denoiser(pipeline, settings), load_decoder("pocket-tiny", pipeline)
    n_steps = denoiser.settings.n_steps
    base = np.zeros((1, len(prompts), POOL, n_steps), np.float32)
    aware, tiny = base.copy(), base.copy()
    for p, text in enumerate(prompts):
        encoded = denoiser.encode([text])
        for start in range(0, POOL, BATCH):
            images = range(start, start + BATCH)
            estimates: dict[int, torch.Tensor] = {}
            noise = denoiser.noise([image_generator(0, p, image) for image in images])
            moved = denoiser.run(noise, encoded.take([0] * BATCH), n_steps - 1, checks, estimates.__setitem__)
            for step, x0 in estimates.items():
                place = (0, p, slice(start, start + BATCH), step)
                pixels = denoiser.decode(x0)
                base[place] = reward.use_step(None).score(text, pixels)
                tiny[place] = reward.score(text, denoiser.decode(x0, decoder))
                known = step in reward.adapter_steps
                aware[place] = reward.use_step(step).score(text, pixels) if known else base[place]
            place = (0, p, slice(start, start + BATCH), n_steps - 1)
            base[place] = aware[place] = tiny[place] = reward.use_step(None).score(text, denoiser.final(moved))
    tau = [metrics.kendall_tau(scores[0][..., checks], scores[0][..., -1]).mean for scores in (base, tiny)]
    return make_rewards(base, aware, rewards=[reward.name]), *tau


def _estimate(values: np.ndarray, level: float = 0.95) -> metrics.Estimate:
    return metrics.Estimate.over_prompts(values, 0, level=level, resamples=4000)


def _span(estimate: metrics.Estimate) -> str:
    return f"{estimate.low:.3f} to {estimate.high:.3f}"
