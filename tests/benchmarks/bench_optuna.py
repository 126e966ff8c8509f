"""The race of the optimiser against Optuna's samplers: the same space, scorer, rounds, time and final choice."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
from numba import config

from tests.benchmarks.rows import Row
from tests.benchmarks.tuning_cases import CASES, POCKET, TuningCase
from tests.reference_data import MISSING
from ttsnap_lib import Schedule
from ttsnap_lib.tuning.optimize import Setup, choose_best, make_setup
from ttsnap_lib.tuning.race import Race, Trial
from ttsnap_lib.tuning.space import SearchSpace

SECONDS = 15.0  # CPU time of each search: what else the machine does favours neither
SEEDS = (0, 1, 2)
ITERATIONS = 48  # of the last round of the race
FINAL = 192  # iterations of the final choice and of the report


@dataclass(frozen=True)
class Found:
    """What one search found: gains in percent on the tune and the test prompts, and how many schedules it tried."""

    tuned: float
    held_out: float
    trials: int


def run() -> list[Row]:
    """Compare them on a FLUX, an SDXL and a pocket tensor."""
    rows = []
    for case in (CASES[0], CASES[2], POCKET[0]):
        dataset = case.dataset()
        if dataset is None:
            rows.append(Row(f"{case.name}: skipped", float("nan"), "", note=MISSING))
            continue
        setup = _setup(case, dataset)
        # In turns, the same seeds: the subsets of a seed are the same for both.
        found = [(search(setup, _race, seed), search(setup, _optuna, seed)) for seed in SEEDS]
        ours, theirs = zip(*found, strict=True)
        for what in ("tuned", "held_out"):
            one, other = ([getattr(result, what) for result in side] for side in (ours, theirs))
            gap = [a - b for a, b in zip(one, other, strict=True)]
            rows.append(
                Row(f"{case.name}, {what.replace('_', '-')} gain: race, median of {len(SEEDS)} seeds",
                    statistics.median(one), "%",
                    note=f"Optuna {statistics.median(other):.2f}; race minus Optuna {min(gap):+.2f} to {max(gap):+.2f}")
            )  # fmt: skip
        tried = [statistics.median(result.trials for result in side) for side in (ours, theirs)]
        rows.append(Row(f"  schedules tried in {SECONDS:g} CPU s", tried[0], "", note=f"Optuna {tried[1]:.0f}"))
    return rows


def _setup(case: TuningCase, dataset) -> Setup:
    return make_setup(dataset, case.cost, case.budgets, "ttsnap", "area")


def search(setup: Setup, run_search, seed: int, seconds: float = SECONDS) -> Found:
    """Search for `seconds` of CPU time, then choose among the best as the optimiser does, and report."""
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(4)]
    tuning = setup.scorer(streams[0].permutation(setup.tune), ITERATIONS, streams[0])
    race = Race(setup.space, tuning, setup.goals, streams[1], config.NUMBA_NUM_THREADS)
    run_search(race, seconds, seed)
    final = tuning.redrawn(FINAL, streams[2])
    single, _, tuned = choose_best(race, final, setup.goals, lambda: np.inf)
    test = setup.scorer(setup.test, FINAL, streams[3])
    curve = test.per_prompt(single.schedule.steps, single.counts)[:, :, 0].mean(1)
    baseline = test.best_of_n(setup.goals.n)[:, :, 0].mean(1)
    return Found(float(tuned[-1]), float(setup.goals.overall(curve, baseline)), len(race.trials))


def _race(race: Race, seconds: float, seed: int) -> None:
    end = time.process_time() + seconds
    race.run(10**9, lambda: np.inf if time.process_time() < end else -np.inf, None)


def _optuna(race: Race, seconds: float, seed: int) -> None:
    """Let TPE propose; successive halving stops a schedule after the same rounds as the race does, on its scores."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(multivariate=True, group=True, n_startup_trials=96, seed=seed)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    for schedule in race.space.first():
        study.enqueue_trial(_parameters(schedule, race.space))
    end = time.process_time() + seconds

    def objective(proposal: optuna.Trial) -> float:
        schedule = _suggest(proposal, race.space)
        trial = Trial(schedule, race.space.counts(schedule))
        if not race.goals.admits(trial.counts[:, 0] > 0):
            raise optuna.TrialPruned
        for r, blocks in enumerate(race.rounds):
            trial.sums = trial.sums + race.sums(trial, blocks)
            trial.draws += sum((part.stop - part.start) * (last - first) for part, first, last in blocks)
            trial.scores.append(race.goals.score(trial.sums / trial.draws, race.baselines[r]))
            if r == 0:
                race.trials.append(trial)
            proposal.report(float(trial.scores[-1][-1]), r + 1)
            if r + 1 < len(race.rounds) and proposal.should_prune():
                raise optuna.TrialPruned
        return float(trial.scores[-1][-1])

    study.optimize(
        objective,
        n_trials=10**9,
        n_jobs=race.threads,
        callbacks=[lambda study, _: study.stop() if time.process_time() > end else None],
    )


def _suggest(proposal, space: SearchSpace) -> Schedule:
    """Let Optuna draw the number of stages, then for each its place among the steps and its ratio."""
    stages = proposal.suggest_int("stages", 0, min(space.max_stages, len(space.steps)))
    places = [proposal.suggest_int(f"place {stages}.{k}", 0, len(space.steps) - 1) for k in range(stages)]
    ratios = [proposal.suggest_float(f"ratio {stages}.{k}", 0.05, 0.95, log=True) for k in range(stages)]
    # Steps ascend and differ: sorted, and of two at one place only the last prunes.
    kept = {space.steps[place]: round(ratio, 3) for place, ratio in zip(sorted(places), ratios, strict=True)}
    return Schedule(tuple(kept), tuple(kept.values()))


def _parameters(schedule: Schedule, space: SearchSpace) -> dict:
    stages = len(schedule)
    found: dict = {"stages": stages}
    for k, (step, ratio) in enumerate(zip(schedule.steps, schedule.keep_ratios, strict=True)):
        found |= {f"place {stages}.{k}": space.steps.index(step), f"ratio {stages}.{k}": ratio}
    return found
