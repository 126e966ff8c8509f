"""Bad values handed to Python functions: schedules, costs, simulations, tensors, settings, pipelines, searches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.bad_input.drill import Cases, held
from tests.bad_input.samples import reward
from ttsnap_lib import (
    CostModel,
    Schedule,
    best_of_n,
    generate,
    load_pipeline,
    load_reward,
    measure_costs,
    optimize_schedule,
    prune,
    relative_gain,
    save_rewards,
    search,
    simulate,
    sweep,
)
from ttsnap_lib.diffusion.denoise import Settings
from ttsnap_lib.diffusion.negtome import NegToMe
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.tensors.tensor import check_rewards, drop_missing, make_rewards, synthetic_rewards

CASES = Cases()
NAN, INF, HUGE = float("nan"), float("inf"), 10**5000


class Unshowable:
    """An object whose own repr fails."""

    def __repr__(self):
        raise RuntimeError("no")


# -- schedules and costs -----------------------------------------------------------------------------------------------

CASES.each(
    "schedule",
    lambda given: Schedule(*given),
    [
        ("steps unsorted", ((6, 2), (0.5, 0.5)), "strictly increasing"),
        ("a negative step", ((-1,), (0.5,)), "-1"),
        ("a fraction as step", ((2.5,), (0.5,)), r"2\.5"),
        ("a boolean as step", ((True,), (0.5,)), "True"),
        ("one number for steps", (3, (0.5,)), "list"),
        ("more ratios than steps", ((3,), (0.5, 0.5)), "keep_ratios"),
        ("ratio above one", ((3,), (1.01,)), r"1\.01"),
        ("ratio NaN", ((3,), (NAN,)), "nan"),
        ("ratio of too many digits", ((3,), (HUGE,)), "cannot be shown"),
        ("ratio as text", ((3,), ("0.5",)), "'0.5'"),
        ("an object that cannot be shown", ((3,), (Unshowable(),)), "Unshowable"),
    ],
)
CASES.each("schedule", Schedule.from_dict, [("unknown key", {"steps": [1], "keep": [0.5]}, "keep_ratios")])
CASES.each("schedule", Schedule((2, 18), (0.5, 0.5)).check, [("a step at the end", 19, "at most 17")])
CASES.each(
    "cost model",
    CostModel.from_dict,
    [
        ("step zero", {"step": 0, "verify": 1}, "above 0"),
        ("step as text", {"step": "1", "verify": 1}, "'1'"),
        ("step beyond floats", {"step": 10**400, "verify": 1}, "finite"),
        ("verify negative", {"step": 1, "verify": -0.1}, r"verify.*-0\.1"),
        ("half a step", {"step": 1, "verify": 1, "n_steps": 2.5}, "n_steps"),
        ("unknown accounting", {"step": 1, "verify": 1, "accounting": "exactly"}, "Did you mean 'exact'"),
        ("without verify", {"step": 1}, "verify"),
        ("unknown key", {"step": 1, "verify": 1, "decoding": 2}, "Did you mean 'decode'"),
        ("None for a mapping", None, "mapping"),
    ],
)
CASES.each("cost model", CostModel.preset, [("misspelt preset", "flux-512+pikscore", "flux-512")])
COST = CostModel.preset("flux-512+hpsv2")
CASES.each("cost model", COST.candidates, [("negative budget", -1, "budget"), ("budget as text", "ten", "budget")])
CASES.each("cost model", COST.total, [("half a candidate", 1.5, "n")])

# -- simulations -------------------------------------------------------------------------------------------------------

POOL = synthetic_rewards(4, 12, 20)
SCHEDULE = Schedule((2, 6), (0.5, 0.5))


def holed(value: float, step: int = -1) -> Any:
    """Return the pool with one bad value."""
    pool = POOL.copy(deep=True)
    for name in ("base", "noise_aware"):
        pool[name].values[0, 1, 2, step] = value
    return pool


def ask(changes: dict[str, Any]) -> Any:
    """Simulate with some arguments changed."""
    given = {"dataset": POOL, "method": "ttsp", "budget": 4 * COST.total(1), "cost": COST, "schedule": SCHEDULE}
    return simulate(**given | changes)


CASES.each(
    "simulation",
    ask,
    [
        ("an array for a dataset", {"dataset": np.ones((1, 2, 3, 4))}, "Dataset"),
        ("unknown method", {"method": "tsnap"}, "Did you mean 'ttsnap'"),
        ("budget too small", {"budget": 1e-9}, "at least"),
        ("budget beyond the pool", {"budget": 1e9}, "at most 12"),
        ("budget NaN", {"budget": NAN}, "budget"),
        ("neither budget nor n", {"budget": None}, "either budget or n"),
        ("n beyond the pool", {"budget": None, "n": 13}, "at most 12"),
        ("no cost", {"cost": None}, "cost"),
        ("cost of other steps", {"cost": dataclasses.replace(COST, n_steps=30)}, "20"),
        ("no schedule", {"schedule": None}, "schedule"),
        ("schedule past the end", {"schedule": Schedule((19,), (0.5,))}, "at most 18"),
        ("10^12 iterations", {"iterations": 10**12}, "10000000"),
        ("rng a text", {"rng": "seed"}, "rng"),
        ("unknown combination", {"combine": "sum"}, "rank_sum"),
        ("weights of another length", {"combine": "weighted_sum", "weights": [1.0, 2.0]}, "1 numbers"),
        ("every reward reported, none selects", {"report": ["image_reward"]}, "fewer than all"),
        ("NaN at a check", {"dataset": holed(NAN, 2)}, "drop_missing"),
        ("infinity at the end", {"dataset": holed(INF)}, "drop_missing"),
    ],
)
CASES.each(
    "simulation",
    lambda changes: sweep(**{"dataset": POOL, "cost": COST, "schedule": SCHEDULE, "methods": ["ttsp"], **changes}),
    [("no budgets", {"budgets": []}, "at least one"), ("no methods", {"methods": [], "budgets": [100]}, "method")],
)
REWARDS = POOL["base"]
CASES.each(
    "simulation",
    lambda changes: prune(**{"rewards": REWARDS, "subsets": [[0, 1, 2]], "schedule": SCHEDULE, **changes}),
    [
        ("subset names an image twice", {"subsets": [[0, 1, 1]]}, "distinct"),
        ("subset beyond the pool", {"subsets": [[0, 12]]}, "12"),
        ("subset of fractions", {"subsets": [[0.5, 1.0]]}, "integers"),
        ("rewards of two dimensions", {"rewards": np.ones((3, 4))}, "shape"),
        ("rewards of other dims", {"rewards": REWARDS.rename(image="seed")}, "dims"),
        ("final of another shape", {"final": np.ones((4, 11))}, "final"),
        ("schedule of a step not scored", {"rewards": REWARDS.isel(step=[0, 1, 3, 19])}, "scored steps"),
    ],
)
CASES.each(
    "simulation",
    lambda given: best_of_n(*given),
    [
        ("best of more than there are", (np.ones((2, 3)), 4), r"\[1, 3\]"),
        ("best of NaN", (np.array([[1.0, NAN]]), 1), "prompt 0, image 1"),
    ],
)
CASES.each(
    "simulation",
    lambda given: relative_gain(*given),
    [
        ("gain over a negative area", ([1, 2, 3], [1, 2, 3], [3, 2, 1]), "area"),
        ("gain of unsorted budgets", ([2, 1, 3], [1, 2, 3], [1, 2, 4]), "budgets"),
    ],
)
CASES.each(
    "optimiser",
    lambda changes: optimize_schedule(
        **{"dataset": POOL, "cost": COST, "budgets": np.array([3, 4]) * COST.total(1), "n_trials": 5, **changes}
    ),
    [
        ("tune and test share a prompt", {"tune": [0, 1], "test": [1, 2]}, "tune|test"),
        ("tune names a prompt that is not there", {"tune": [9], "test": [1]}, "9"),
        ("no trials", {"n_trials": 0}, "n_trials"),
        ("unknown objective", {"objective": "areal"}, "Did you mean 'area'"),
        ("best_of_n has nothing to tune", {"method": "best_of_n"}, "method"),
    ],
)

# -- tensors -----------------------------------------------------------------------------------------------------------

GOOD = np.ones((1, 2, 3, 4))
TENSOR = make_rewards(GOOD, rewards=["a"])
CASES.each(
    "reward tensor",
    lambda changes: make_rewards(**{"base": GOOD, "rewards": ["a"], **changes}),
    [
        ("three dimensions", {"base": np.ones((2, 3, 4))}, "shape"),
        ("noise-aware of another shape", {"noise_aware": np.ones((1, 2, 3, 5))}, "equal shapes"),
        ("a name twice", {"base": np.ones((2, 2, 3, 4)), "rewards": ["a", "a"]}, "each once"),
        ("steps that fall", {"steps": [3, 2, 1, 0]}, "increasing"),
        ("texts of another number", {"prompt_text": ["x"]}, "prompt_text"),
        ("values that are text", {"base": np.full((1, 2, 3, 4), "high")}, "numbers"),
        ("values beyond float32", {"base": GOOD * 1e300}, "float32"),
        ("source of an unknown word", {"noise_aware_source": np.full((1, 4), "tuned")}, "finetuned"),
    ],
)
CASES.each(
    "reward tensor",
    check_rewards,
    [
        ("a list", [1, 2], "Dataset"),
        ("without base", TENSOR.drop_vars("base"), "base"),
        ("dims renamed", TENSOR.rename(image="seed"), "dims"),
        ("of a later schema", TENSOR.assign_attrs(schema_version=99), "at most 1"),
        ("an image twice", TENSOR.assign_coords(image=[0, 0, 1]), "distinct"),
        ("empty selection", TENSOR.isel(image=[]), "empty"),
    ],
)
CASES.each("reward tensor", drop_missing, [("nothing but NaN", make_rewards(GOOD * NAN, rewards=["a"]), "again")])
CASES.add("reward tensor: a path that is taken", lambda folder: save_rewards(TENSOR, folder), "new path")

# -- finetuning settings -----------------------------------------------------------------------------------------------

CASES.each(
    "finetuning settings",
    CurriculumConfig.from_dict,
    [
        ("unknown key", {"learning_rat": 1}, "Did you mean 'learning_rate'"),
        ("rate zero", {"learning_rate": 0}, "learning_rate"),
        ("rate as text", {"learning_rate": "fast"}, "learning_rate"),
        ("steps ascending", {"steps": [1, 2, 3]}, "descending"),
        ("group that does not divide", {"batch_size": 10, "group_size": 3}, "multiple"),
        ("no loss", {"mse": 0}, "mse"),
        ("unknown method", {"method": "lorra"}, "Did you mean 'lora'"),
        ("reward blank", {"reward": " "}, "reward"),
    ],
)

# -- pictures, prompts and rewards -------------------------------------------------------------------------------------

RGB = torch.zeros(2, 3, 8, 8)
CASES.each(
    "pictures in memory",
    lambda images: reward().score("a cat", images),
    [
        ("integers", RGB.byte(), "float tensor"),
        ("channels last", RGB.permute(0, 2, 3, 1), r"\(2, 8, 8, 3\)"),
        ("levels up to 255", RGB + 255.0, r"\[0, 1\]"),
        ("NaN", RGB * NAN, r"\[0, 1\]"),
        ("a number", 5, "int"),
        ("a picture of no pixels", Image.new("RGB", (0, 8)), "pixel"),
        ("a path of nothing", "none.png", "image"),
    ],
)
CASES.each(
    "prompts in memory",
    lambda prompts: reward().score(prompts, RGB),
    [("of another number", ["a", "b", "c"], "3 prompts, 2 images"), ("one that is a number", ["a", 5], "text")],
)


def answer(value: Any) -> Any:
    """Return a reward whose function answers `value`."""
    return load_reward(lambda prompts, images: value, name="odd")


CASES.each(
    "reward function",
    lambda value: answer(value).score("a", RGB),
    [
        ("answers one number for two pictures", [1.0], "shape"),
        ("answers text", ["high", "low"], "numbers"),
        ("answers NaN", [1.0, NAN], "not finite"),
    ],
)
CASES.each(
    "reward",
    load_reward,
    [
        ("of a module that is not", "no_such_module:f", "imported"),
        ("that cannot be called", "math:pi", "callable"),
        ("misspelt", "image_rewrd", "image_reward"),
        ("None", None, "callable"),
    ],
)
CASES.each(
    "reward",
    lambda options: load_reward("pocket-clip", **options),
    [
        ("an option that it does not take", {"scal": 2.0}, "Did you mean 'scale'"),
        ("a type that is none", {"dtype": "float33"}, "dtype"),
        ("a device that is not there", {"device": "cuda:99"}, "cuda:99"),
        ("adapters that are not there", {"adapters": "none"}, "curriculum"),
    ],
)

# -- pipelines, generation, search -------------------------------------------------------------------------------------

CASES.each(
    "pipeline settings",
    Settings.from_dict,
    [
        ("unknown key", {"n_step": 4}, "Did you mean 'n_steps'"),
        ("10^9 steps", {"n_steps": 10**9}, "10000"),
        ("10^12 pixels", {"height": 10**6, "width": 10**6}, "height x width"),
        ("guidance NaN", {"guidance": NAN}, "guidance"),
        ("negative prompt a list", {"negative_prompt": ["x"]}, "negative_prompt"),
    ],
)
CASES.each(
    "NegToMe",
    lambda options: NegToMe(**options),
    [("a cosine of two", {"threshold": 2}, "threshold"), ("a window turned round", {"start": 1, "end": 9}, "start")],
)
CASES.each(
    "pipeline",
    load_pipeline,
    [("misspelt", "pocket-fluks", "Did you mean 'pocket-flux'"), ("a path that is not there", "./none", "none")],
)
CASES.each(
    "pipeline",
    lambda options: load_pipeline("pocket-flux", **options),
    [
        ("a device that is none", {"device": "gpu"}, "device"),
        ("a scheduler that is none", {"scheduler": "eular"}, "Did you mean 'euler'"),
        ("offload on the CPU", {"device": "cpu", "offload": "model"}, "offload"),
    ],
)


@functools.cache
def flux() -> Any:
    """Return the pocket pipeline, loaded once."""
    return load_pipeline("pocket-flux", device="cpu")


def bright(prompts: Any, images: Any) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


SHORT = Settings(n_steps=3)
CASES.each(
    "search",
    lambda changes: search(**{"pipeline": flux(), "prompt": "a cat", "reward": bright, "candidates": 2, **changes}),
    [
        ("a blank prompt", {"prompt": " "}, "prompt"),
        ("a pipeline that is none", {"pipeline": 5}, "model|pipeline"),
        ("the same reward twice", {"reward": [bright, bright]}, "reward|distinct"),
        ("a schedule past the end", {"schedule": Schedule((5,), (0.5,)), "settings": SHORT}, "at most 1"),
        ("ttsnap with a base reward", {"method": "ttsnap", "schedule": Schedule((2,), (0.5,))}, "noise-aware"),
        ("budget and candidates", {"budget": 10.0}, "either budget or candidates"),
        ("a budget without a cost", {"candidates": None, "budget": 10.0}, "cost"),
        ("10^12 candidates", {"candidates": 10**12}, "1000000"),
        ("more images than candidates", {"keep": 3}, "keep: got 3"),
        ("difference without an image tower", {"keep": 2, "diversity": 1.0}, "image tower"),
        ("a negative diversity", {"keep": 2, "diversity": -1.0}, "diversity"),
        ("deadline NaN", {"deadline_s": NAN}, "deadline_s"),
        ("a decoder that is not there", {"decoder": "./none"}, "decoder"),
        ("a size that the model cannot take", {"settings": Settings(n_steps=3, height=33)}, "multiple"),
        ("a negative prompt without guidance", {"settings": Settings(negative_prompt="x")}, "negative_prompt"),
    ],
)
CASES.each(
    "generation",
    lambda changes: generate(
        **{"pipeline": flux(), "prompts": ["a cat"], "on_batch": lambda *given: None, "settings": SHORT, **changes}
    ),
    [
        ("nowhere to put it", {"on_batch": None}, "folder"),
        ("10^12 images", {"images_per_prompt": 10**12}, "1000000"),
        ("a step out of range", {"steps": [3]}, "steps"),
        ("a shard beyond its count", {"shard": (2, 2)}, "shard"),
        ("a format with loss", {"image_format": "jpeg"}, "image_format"),
        ("a NegToMe group that does not divide", {"negtome": NegToMe(group_size=4), "batch_size": 6}, "multiple"),
    ],
)
CASES.add("generation: into a file", lambda folder: generate(flux(), ["a cat"], _below_a_file(folder)), "cannot write")
CASES.each(
    "cost measurement",
    lambda changes: measure_costs(**{"pipeline": flux(), "reward": reward(), "settings": SHORT, **changes}),
    [("a batch of none", {"batch_sizes": [0]}, "batch_sizes"), ("no repeats", {"repeats": 0}, "repeats")],
)


def _below_a_file(folder: Any) -> Any:
    (folder / "f").write_text("x")
    return folder / "f" / "g"


test_bad_value = held(CASES)
