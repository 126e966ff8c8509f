"""The online run on the pocket models: what pruning wins at equal compute, and whether the simulation foretells it."""

from __future__ import annotations

import os
import statistics

import numpy as np
import torch

from tests.benchmarks.rows import Row
from ttsnap_lib import CostModel, Schedule, metrics, search, simulate
from ttsnap_lib.denoise import Denoiser, Settings, image_generator
from ttsnap_lib.measure import count_tflops, measure_costs
from ttsnap_lib.pipelines import load_pipeline
from ttsnap_lib.pocket import pocket_prompts
from ttsnap_lib.rewards import load_reward
from ttsnap_lib.search_models import find_adapters, load_decoder
from ttsnap_lib.tensors import make_rewards

SCHEDULE = Schedule((2, 6, 11), (0.4, 0.4, 0.5))
MULTIPLE = 6  # budget in finished images of Best-of-N
POOL = 48  # images of a prompt in the tensor that the simulation draws from
BATCH = 16


def run(model: str = "pocket-flux", n_prompts: int | None = None) -> list[Row]:
    """Measure everything that the project promises of the online run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _rows(model, int(os.environ.get("TTSNAP_BENCH_PROMPTS", "40")) if n_prompts is None else n_prompts)
    finally:
        torch.set_num_threads(before)


def _rows(model: str, n_prompts: int) -> list[Row]:
    pipeline = load_pipeline(model, device="cpu")
    reward = load_reward("pocket-clip", adapters=find_adapters("pocket", model), device="cpu")
    decoder, settings = load_decoder("pocket-tiny", pipeline), Settings()
    prompts = pocket_prompts("test", n_prompts)
    measured = measure_costs(pipeline, reward, settings, decoder=decoder, batch_sizes=(BATCH,), repeats=5)
    methods = ["best_of_n", "ttsp", *(["ttsnap"] if reward.adapter_steps else [])]
    common = {"settings": settings, "decoder": decoder, "batch_size": BATCH}
    rows = _overhead(pipeline, reward, measured.tflops, common)

    budget = MULTIPLE * measured.tflops.total(1)
    live = _live(pipeline, reward, prompts, methods, budget, measured.tflops, common)
    pool, tiny_tau, full_tau = _tensor(pipeline, reward, prompts, decoder, settings)
    for method in methods:
        n = measured.tflops.candidates(budget, None if method == "best_of_n" else SCHEDULE)
        drawn = simulate(pool, method, n=n, schedule=SCHEDULE, iterations=400)
        rewards = live[method][0]
        # Live is one draw per prompt, the simulation the mean of many: the difference has the spread of one draw.
        gap = rewards - drawn.per_prompt[0]
        estimate = _estimate(gap)
        rows += [
            Row(f"{method}: live reward over {n_prompts} held-out prompts, {n} candidates", rewards.mean(), "reward"),
            Row(f"  simulated on a pool of {POOL}", float(drawn.mean[0]), "reward",
                note=f"{drawn.low[0]:.3f} to {drawn.high[0]:.3f}"),
            Row("  live - simulated, paired", estimate.mean, "reward", note=f"95% interval {_span(estimate)}"),
            Row("  zero within the interval (1 yes)", float(estimate.low <= 0 <= estimate.high), "", at_least=1),
        ]  # fmt: skip
        if method != "best_of_n":
            won = _estimate(rewards - live["best_of_n"][0])
            promise = 0.0 if method == "ttsnap" else None
            rows.append(Row(f"{method} - best_of_n live at equal FLOPs, lower end of 95%", won.low, "reward", promise,
                            note=f"mean {won.mean:.3f}, {_span(won)}"))  # fmt: skip
    rows += _equal_seconds(pipeline, reward, prompts, methods, measured.seconds, common)
    for k, step in enumerate(SCHEDULE.steps):
        rows.append(Row(f"tau of the base reward at step {step}: tiny decoder", tiny_tau[k], "",
                        note=f"full VAE {full_tau[k]:.3f}"))  # fmt: skip
    return rows


def _overhead(pipeline, reward, costs: CostModel, common) -> list[Row]:
    """Hold a run to its cost model: counted FLOPs, seconds beside the model calls, wall-clock saved."""
    prompt, n = pocket_prompts("test", 1)[0], 32
    reward.clear_cache()
    counted = count_tflops(lambda: search(pipeline, prompt, reward, SCHEDULE, candidates=n, **common))
    rows = [Row("FLOPs of a run, counted / by the cost model", counted / costs.total(n, SCHEDULE), "x", 0.95, 1.05)]
    beside, seconds = [], []
    for _ in range(5):
        record = search(pipeline, prompt, reward, SCHEDULE, candidates=n, **common).record
        for stage in record.stages:
            calls = stage.denoise_s + stage.decode_s + stage.score_s
            beside.append((stage.elapsed_s - calls) / stage.candidates)
        seconds.append(record)
    worst = max(beside)
    # FLUX at 512 px by its own cost model, at the H100's nominal dense bf16 rate: 989 TFLOPs a second.
    flux = CostModel.preset("flux-512-tiny+hpsv2")
    shortest = min(stage.total / stage.candidates for stage in flux.stages(n, SCHEDULE)) / 989
    rows += [
        Row("seconds per candidate and stage beside model calls: worst", worst * 1e3, "ms",
            note=f"median {statistics.median(beside) * 1e3:.3f}"),
        Row("  of the model calls of the shortest FLUX-512 stage at 989 TFLOPs/s", 100 * worst / shortest, "%",
            at_most=5),
    ]  # fmt: skip
    # Seconds of the parts as they ran in Best-of-N foretell how long the pruned run takes.
    ratios = []
    for _ in range(5):
        whole = search(pipeline, prompt, reward, candidates=n, **common).record
        pruned = search(pipeline, prompt, reward, SCHEDULE, candidates=n, **common).record
        step = whole.stages[0].denoise_s / whole.stages[0].forwards
        parts = {
            "step": step,
            "decode": whole.stages[0].decode_s / n,
            "verify": whole.stages[0].score_s / n,
            "preview_decode": pruned.stages[0].decode_s / n,
        }
        model = CostModel(**parts, n_steps=costs.n_steps, unit="seconds")
        took = sum(stage.elapsed_s for stage in pruned.stages) / sum(stage.elapsed_s for stage in whole.stages)
        ratios.append((1 - took) / (1 - model.total(n, SCHEDULE) / model.total(n)))
    rows.append(Row("wall-clock saved by pruning / what the cost model says", statistics.median(ratios), "x", 0.9, 1.1,
                    note=f"runs {min(ratios):.2f} to {max(ratios):.2f}"))  # fmt: skip
    return rows


def _live(pipeline, reward, prompts, methods, budget: float, costs: CostModel, common, seed: int = 1):
    """Return rewards and seconds, each (prompt,), by method; the base seed is another than the tensor's."""
    found = {}
    for method in methods:
        results = [
            search(
                pipeline, text, reward, SCHEDULE, budget, cost=costs, seed=seed, method=method, prompt_index=p, **common
            )
            for p, text in enumerate(prompts)
        ]
        scores = np.array([result.scores[reward.name] for result in results])
        found[method] = scores, np.array([result.record.elapsed_s for result in results])
    return found


def _equal_seconds(pipeline, reward, prompts, methods, costs: CostModel, common) -> list[Row]:
    live = _live(pipeline, reward, prompts, methods, MULTIPLE * costs.total(1), costs, common, seed=2)
    rows = []
    for method in methods[1:]:
        won = _estimate(live[method][0] - live["best_of_n"][0])
        rows += [
            Row(f"{method} - best_of_n live at equal budgeted seconds", won.mean, "reward", note=_span(won)),
            Row("  seconds that it took / Best-of-N's", live[method][1].mean() / live["best_of_n"][1].mean(), "x"),
        ]
    return rows


def _tensor(pipeline, reward, prompts, decoder, settings):
    """Score a pool of images at the checks, with the tiny decoder where a search uses it; also tau with either."""
    denoiser = Denoiser(pipeline, settings)
    n_steps = denoiser.settings.n_steps
    base = np.zeros((1, len(prompts), POOL, n_steps), np.float32)
    aware, full = base.copy(), base.copy()
    for p, text in enumerate(prompts):
        encoded = denoiser.encode([text])
        for start in range(0, POOL, BATCH):
            images = range(start, start + BATCH)
            estimates: dict[int, torch.Tensor] = {}
            noise = denoiser.noise([image_generator(0, p, image) for image in images])
            moved = denoiser.run(noise, encoded.take([0] * BATCH), n_steps - 1, SCHEDULE.steps, estimates.__setitem__)
            for step, x0 in estimates.items():
                place = (0, p, slice(start, start + BATCH), step)
                pixels = denoiser.decode(x0, decoder)
                base[place] = reward.use_step(None).score(text, pixels)
                full[place] = reward.score(text, denoiser.decode(x0))
                known = step in reward.adapter_steps
                aware[place] = reward.use_step(step).score(text, pixels) if known else base[place]
            place = (0, p, slice(start, start + BATCH), n_steps - 1)
            base[place] = aware[place] = full[place] = reward.use_step(None).score(text, denoiser.final(moved))
    steps = list(SCHEDULE.steps)
    tau = [metrics.kendall_tau(scores[0][..., steps], scores[0][..., -1]).mean for scores in (base, full)]
    return make_rewards(base, aware, rewards=[reward.name]), *tau


def _estimate(values: np.ndarray) -> metrics.Estimate:
    return metrics.Estimate.over_prompts(values, 0, resamples=4000)


def _span(estimate: metrics.Estimate) -> str:
    return f"{estimate.low:.3f} to {estimate.high:.3f}"
