"""What an import loads, and that the public names are there."""

import json
import subprocess
import sys

import pytest

import ttsnap_lib

# What simulates, tunes, plots and explores: it starts at once, and runs where torch is not installed.
LIGHT = ["errors", "checks", "files", "schedule", "costs", "style", "tensors.tensor", "tensors.published",
         "simulation.metrics", "simulation.simulate", "simulation.plots", "tuning.optimize", "explorer.explorer"]  # fmt: skip
HEAVY = ["torch", "diffusers", "transformers", "numba", "scipy", "xarray", "pandas", "matplotlib"]


def loaded_after(code: str) -> dict[str, bool]:
    script = f"import sys, json\n{code}\nprint(json.dumps({{n: n in sys.modules for n in {HEAVY}}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_light_modules_load_no_heavy_library():
    loaded = loaded_after("import ttsnap_lib\n" + "\n".join(f"import ttsnap_lib.{name}" for name in LIGHT))
    assert not any(loaded.values()), loaded


def test_simulating_loads_neither_torch_nor_diffusers():
    loaded = loaded_after(
        "from ttsnap_lib import open_rewards, simulate, Schedule\n"
        "simulate(open_rewards('synthetic'), 'ttsnap', n=5, schedule=Schedule((2,), (0.5,)), iterations=2)"
    )
    assert loaded["numba"] and not loaded["torch"] and not loaded["diffusers"]


def test_public_names_exist():
    for name in ttsnap_lib.__all__:
        assert getattr(ttsnap_lib, name) is not None and name in dir(ttsnap_lib)
    with pytest.raises(AttributeError):
        _ = ttsnap_lib.nothing


def test_a_public_function_stays_one_whatever_was_imported_before():
    loaded_after("""
from importlib import import_module
import ttsnap_lib
import sys
names = ("finetune", "score", "simulate", "explore", "generate", "search")
homes = [import_module("ttsnap_lib." + ttsnap_lib._HOME[name]) for name in names[:4]]
assert "torch" in sys.modules and "diffusers" not in sys.modules  # rewards need no pipelines
homes += [import_module("ttsnap_lib." + ttsnap_lib._HOME[name]) for name in names[4:]]
for name, home in zip(names, homes, strict=True):
    assert getattr(ttsnap_lib, name) is getattr(home, name) and callable(getattr(ttsnap_lib, name)), name
""")
