"""Values handed to Python functions: schedules, costs, simulations, tensors, settings."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.bad_input.drill import Cases
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.costs import PRESETS
from ttsnap_lib.simulation.metrics import relative_gain
from ttsnap_lib.simulation.pruning import best_of_n, prune
from ttsnap_lib.simulation.simulate import simulate, sweep
from ttsnap_lib.tensors.tensor import (
    check_rewards,
    drop_missing,
    make_rewards,
    save_rewards,
    synthetic_rewards,
)
from ttsnap_lib.tuning.optimize import optimize_schedule

CASES = Cases()
HUGE, NAN, INF = 10**5000, float("nan"), float("inf")


class Unshowable:
    """An object whose own repr fails."""

    def __repr__(self):
        raise RuntimeError("no")


# -- schedules ---------------------------------------------------------------------------------------------------------

CASES.each(
    "schedule",
    lambda given: Schedule(*given),
    [
        ("steps unsorted", ((6, 2), (0.5, 0.5)), "strictly increasing"),
        ("a step twice", ((2, 2), (0.5, 0.5)), "strictly increasing"),
        ("a negative step", ((-1,), (0.5,)), "-1"),
        ("a fraction as step", ((2.5,), (0.5,)), r"2\.5"),
        ("a text as step", (("2",), (0.5,)), "'2'"),
        ("a boolean as step", ((True,), (0.5,)), "True"),
        ("None as step", ((None,), (0.5,)), "None"),
        ("NaN as step", ((NAN,), (0.5,)), "nan"),
        ("a column of steps", (np.array([[1], [2]]), (0.5, 0.5)), "steps"),
        ("one number for steps", (3, (0.5,)), "list"),
        ("text for steps", ("3", (0.5,)), "list"),
        ("a mapping for steps", ({3: 1}, (0.5,)), "list"),
        ("more ratios than steps", ((3,), (0.5, 0.5)), "one ratio per step"),
        ("no ratio", ((3,), ()), "one ratio per step"),
        ("ratio zero", ((3,), (0,)), r"\(0, 1\]"),
        ("ratio above one", ((3,), (1.01,)), r"1\.01"),
        ("ratio NaN", ((3,), (NAN,)), "nan"),
        ("ratio of too many digits", ((3,), (HUGE,)), "cannot be shown"),
        ("ratio of 400 digits", ((3,), (10**400,)), "finite"),
        ("ratio as text", ((3,), ("0.5",)), "'0.5'"),
        ("an object that cannot be shown", ((3,), (Unshowable(),)), "Unshowable"),
    ],
)
CASES.each(
    "schedule",
    Schedule.from_dict,
    [
        ("unknown key", {"steps": [1], "keep": [0.5]}, "keep_ratios"),
        ("a list for a mapping", [1, 2], "mapping"),
        ("a number for a mapping", 5, "mapping"),
        ("keys that are no text", {1: 2}, "unknown key"),
    ],
)
CASES.each(
    "schedule",
    Schedule((2, 18), (0.5, 0.5)).check,
    [("a step at the end", 19, "at most 17"), ("a loop of one step", 1, "at most -1")],
)

# -- costs -------------------------------------------------------------------------------------------------------------

CASES.each(
    "cost model",
    lambda fields: CostModel(**{"step": 1.0, "verify": 1.0, **fields}),
    [
        ("step zero", {"step": 0}, "above 0"),
        ("step negative", {"step": -1}, "-1"),
        ("step NaN", {"step": NAN}, "nan"),
        ("step infinite", {"step": INF}, "inf"),
        ("step as text", {"step": "1"}, "'1'"),
        ("step beyond floats", {"step": 10**400}, "finite"),
        ("step boolean", {"step": True}, "True"),
        ("step an array", {"step": np.ones(2)}, "step"),
        ("verify negative", {"verify": -0.1}, r"verify.*-0\.1"),
        ("decode None", {"decode": None}, "decode"),
        ("per_prompt infinite", {"per_prompt": INF}, "per_prompt"),
        ("preview_decode as text", {"preview_decode": "tiny"}, "tiny"),
        ("no steps", {"n_steps": 0}, "n_steps"),
        ("half a step", {"n_steps": 2.5}, "n_steps"),
        ("steps NaN", {"n_steps": NAN}, "n_steps"),
        ("empty unit", {"unit": " "}, "unit"),
        ("unit a number", {"unit": 3}, "unit"),
        ("unknown accounting", {"accounting": "exactly"}, "Did you mean 'exact'"),
        ("accounting an array", {"accounting": np.ones(3)}, "accounting"),
    ],
)
CASES.each(
    "cost model",
    CostModel.from_dict,
    [
        ("without verify", {"step": 1}, "verify"),
        ("unknown key", {"step": 1, "verify": 1, "decoding": 2}, "Did you mean 'decode'"),
        ("a list for a mapping", [1], "mapping"),
        ("None for a mapping", None, "mapping"),
    ],
)
CASES.each(
    "cost model",
    CostModel.preset,
    [("misspelt preset", "flux-512+pikscore", "flux-512"), ("preset a list", ["published"], "preset")],
)
COST = PRESETS["flux-512+hpsv2"]
CASES.each(
    "cost model",
    COST.candidates,
    [("negative budget", -1, "budget"), ("budget NaN", NAN, "budget"), ("budget as text", "ten", "budget")],
)
CASES.each("cost model", COST.total, [("negative candidates", -1, "n"), ("half a candidate", 1.5, "n")])
CASES.each(
    "cost model",
    CostModel.load,
    [("a number as file", 5, "path"), ("None as file", None, "path"), ("bytes as file", b"x", "path")],
)

# -- simulations -------------------------------------------------------------------------------------------------------

POOL = synthetic_rewards(4, 12, 20)
SCHEDULE = Schedule((2, 6), (0.5, 0.5))


def holed(value: float, step: int = -1):
    """Return the pool with one bad value."""
    pool = POOL.copy(deep=True)
    pool["base"].values[0, 1, 2, step] = value
    pool["noise_aware"].values[0, 1, 2, step] = value
    return pool


def ask(**changes):
    """Simulate with some arguments changed."""
    given = {"dataset": POOL, "method": "ttsp", "budget": 4 * COST.total(1), "cost": COST, "schedule": SCHEDULE}
    given |= changes
    return simulate(given.pop("dataset"), given.pop("method"), **given)


CASES.each(
    "simulation",
    lambda changes: ask(**changes),
    [
        ("no dataset", {"dataset": None}, "Dataset"),
        ("an array for a dataset", {"dataset": np.ones((1, 2, 3, 4))}, "Dataset"),
        ("unknown method", {"method": "tsnap"}, "Did you mean 'ttsnap'"),
        ("budget too small", {"budget": 1e-9}, "at least"),
        ("budget beyond the pool", {"budget": 1e9}, "at most 12"),
        ("budget NaN", {"budget": NAN}, "budget"),
        ("budget negative", {"budget": -3}, "budget"),
        ("budget and n", {"n": 3}, "either budget or n"),
        ("neither budget nor n", {"budget": None}, "either budget or n"),
        ("n beyond the pool", {"budget": None, "n": 13}, "at most 12"),
        ("n zero", {"budget": None, "n": 0}, "n"),
        ("no cost", {"cost": None}, "cost"),
        ("cost a preset's name", {"cost": "published"}, "cost"),
        ("cost of other steps", {"cost": dataclasses.replace(COST, n_steps=30)}, "20"),
        ("no schedule", {"schedule": None}, "schedule"),
        ("schedule a tuple", {"schedule": (2, 6)}, "schedule"),
        ("schedule past the end", {"schedule": Schedule((19,), (0.5,))}, "at most 18"),
        ("no iterations", {"iterations": 0}, "iterations"),
        ("10^12 iterations", {"iterations": 10**12}, "10000000"),
        ("10^12 resamples", {"resamples": 10**12}, "10000000"),
        ("iterations a fraction", {"iterations": 2.5}, "iterations"),
        ("rng a text", {"rng": "seed"}, "rng"),
        ("rng negative", {"rng": -1}, "rng"),
        ("unknown combination", {"combine": "sum"}, "rank_sum"),
        ("weights without weighted_sum", {"weights": [1.0]}, "weighted_sum"),
        ("weights of another length", {"combine": "weighted_sum", "weights": [1.0, 2.0]}, "1 numbers"),
        ("weights NaN", {"combine": "weighted_sum", "weights": [NAN]}, "weights"),
        ("reward reported that is not there", {"report": ["hps"]}, "report"),
        ("every reward reported, none selects", {"report": ["image_reward"]}, "fewer than all"),
        ("level above one", {"level": 1.5}, "level"),
        ("resamples zero", {"resamples": 0}, "resamples"),
        ("NaN at the end", {"dataset": holed(NAN), "method": "best_of_n"}, "drop_missing"),
        ("NaN at a check", {"dataset": holed(NAN, 2)}, "drop_missing"),
        ("infinity at the end", {"dataset": holed(INF)}, "drop_missing"),
        ("infinity at a check", {"dataset": holed(-INF, 2)}, "drop_missing"),
    ],
)
CASES.each(
    "simulation",
    lambda changes: sweep(**{"dataset": POOL, "cost": COST, "schedule": SCHEDULE, **changes}),
    [
        ("no budgets", {"methods": ["ttsp"], "budgets": []}, "at least one"),
        ("no methods", {"methods": [], "budgets": [100]}, "method"),
        ("budgets one number", {"methods": ["ttsp"], "budgets": 100.0}, "budget"),
        ("methods one text", {"methods": "ttsp", "budgets": [1500.0, NAN]}, "budget"),
    ],
)
REWARDS, SUBSETS = POOL["base"], np.array([[0, 1, 2, 3]])
CASES.each(
    "simulation",
    lambda changes: prune(**{"rewards": REWARDS, "subsets": SUBSETS, "schedule": SCHEDULE, **changes}),
    [
        ("subset names an image twice", {"subsets": [[0, 1, 1]]}, "repeated image"),
        ("subset beyond the pool", {"subsets": [[0, 12]]}, "12"),
        ("subset negative", {"subsets": [[-1, 2]]}, "-1"),
        ("subset of fractions", {"subsets": [[0.5, 1.0]]}, "integers"),
        ("subset empty", {"subsets": np.empty((0, 3), int)}, "integers"),
        ("subset of one dimension", {"subsets": [0, 1]}, "integers"),
        ("rewards of two dimensions", {"rewards": np.ones((3, 4))}, "shape"),
        ("rewards of text", {"rewards": np.full((2, 5, 20), "x")}, "numbers"),
        ("rewards of other dims", {"rewards": REWARDS.rename(image="seed")}, "dims"),
        ("final of another shape", {"final": np.ones((4, 11))}, "final"),
        ("schedule of a step not scored", {"rewards": REWARDS.isel(step=[0, 1, 3, 19])}, "scored steps"),
        ("subsets of uneven rows", {"subsets": [[0, 1], [2]]}, "equal length"),
    ],
)
CASES.each(
    "simulation",
    lambda given: best_of_n(*given),
    [
        ("best of none", (np.ones((2, 3)), 0), "n"),
        ("best of more than there are", (np.ones((2, 3)), 4), r"\[1, 3\]"),
        ("best of one dimension", (np.ones(3), 1), "shape"),
        ("best of NaN", (np.array([[1.0, NAN]]), 1), "prompt 0, image 1"),
        ("best of infinity", (np.array([[1.0, INF]]), 1), "prompt 0, image 1"),
        ("best of text", ([["a", "b"]], 1), "numbers"),
    ],
)
CASES.each(
    "simulation",
    lambda given: relative_gain(*given),
    [
        ("gain over a negative area", ([1, 2, 3], [1, 2, 3], [3, 2, 1]), "area"),
        ("gain of unsorted budgets", ([2, 1, 3], [1, 2, 3], [1, 2, 4]), "budgets"),
        ("gain of other lengths", ([1, 2, 3], [1, 2], [1, 2, 3]), "shape|length|budgets"),
        ("gain of NaN", ([1, 2, 3], [1, NAN, 3], [1, 2, 3]), "NaN"),
    ],
)
CASES.each(
    "simulation",
    lambda changes: optimize_schedule(
        **{"dataset": POOL, "cost": COST, "budgets": np.array([3, 4]) * COST.total(1), "n_trials": 5, **changes}
    ),
    [
        ("tune and test share a prompt", {"tune": [0, 1], "test": [1, 2]}, "tune|test"),
        ("tune names a prompt that is not there", {"tune": [9], "test": [1]}, "9"),
        ("tune empty", {"tune": [], "test": [1]}, "tune"),
        ("no trials", {"n_trials": 0}, "n_trials"),
        ("time limit NaN", {"time_limit_s": NAN}, "time_limit_s"),
        ("unknown objective", {"objective": "areal"}, "Did you mean 'area'"),
        ("best_of_n has nothing to tune", {"method": "best_of_n"}, "method"),
        ("no budgets to tune for", {"budgets": []}, "budgets"),
        ("stages negative", {"max_stages": -1}, "max_stages"),
        ("seed negative", {"seed": -1}, "seed"),
    ],
)

# -- tensors -----------------------------------------------------------------------------------------------------------

GOOD = np.ones((1, 2, 3, 4))
CASES.each(
    "reward tensor",
    lambda changes: make_rewards(**{"base": GOOD, "rewards": ["a"], **changes}),
    [
        ("three dimensions", {"base": np.ones((2, 3, 4))}, "shape"),
        ("nothing in it", {"base": np.ones((1, 2, 0, 4))}, "nothing empty"),
        ("noise-aware of another shape", {"noise_aware": np.ones((1, 2, 3, 5))}, "equal shapes"),
        ("too many names", {"rewards": ["a", "b"]}, "rewards"),
        ("a name twice", {"base": np.ones((2, 2, 3, 4)), "rewards": ["a", "a"]}, "each once"),
        ("steps that fall", {"steps": [3, 2, 1, 0]}, "increasing"),
        ("steps negative", {"steps": [-1, 0, 1, 2]}, "at least 0"),
        ("texts of another number", {"prompt_text": ["x"]}, "prompt_text"),
        ("values that are text", {"base": np.full((1, 2, 3, 4), "high")}, "numbers"),
        ("values of uneven rows", {"base": [[[[1, 2], [3]]]]}, "numbers"),
        ("values that are complex", {"base": GOOD * 1j}, "numbers"),
        ("values beyond float32", {"base": GOOD * 1e300}, "float32"),
        ("source of another shape", {"noise_aware_source": np.full((1, 9), "finetuned")}, "noise_aware_source"),
        ("source of an unknown word", {"noise_aware_source": np.full((1, 4), "tuned")}, "finetuned"),
    ],
)
TENSOR = make_rewards(GOOD, rewards=["a"])
CASES.each(
    "reward tensor",
    check_rewards,
    [
        ("a list for a tensor", [1, 2], "Dataset"),
        ("without base", TENSOR.drop_vars("base"), "base"),
        ("without steps", TENSOR.drop_vars("step"), "step"),
        ("dims renamed", TENSOR.rename(image="seed"), "dims"),
        ("integers for rewards", TENSOR.assign(base=TENSOR["base"].astype(int)), "float32"),
        ("of a later schema", TENSOR.assign_attrs(schema_version=99), "at most 1"),
        ("schema a text", TENSOR.assign_attrs(schema_version="one"), "one"),
        ("an image twice", TENSOR.assign_coords(image=[0, 0, 1]), "distinct"),
        ("images named by text", TENSOR.assign_coords(image=["a", "b", "c"]), "distinct integers"),
        ("prompts negative", TENSOR.assign_coords(prompt=[-1, 0]), "at least 0"),
        ("empty selection", TENSOR.isel(image=[]), "empty"),
        ("source without its dims", TENSOR.assign(noise_aware_source=("step", ["finetuned"] * 4)), "dims"),
    ],
)
CASES.each("reward tensor", drop_missing, [("nothing but NaN", make_rewards(GOOD * NAN, rewards=["a"]), "again")])
CASES.add("reward tensor", "a path that is taken", lambda folder: save_rewards(TENSOR, folder), "new path")
CASES.each(
    "reward tensor",
    lambda path: save_rewards(TENSOR, path),
    [("saved to a number", 5, "path"), ("saved to a NUL", "a\0b", "NUL"), ("saved to a long name", "x" * 300, "255")],
)
