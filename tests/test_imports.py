"""What an import loads, and that the public names are there."""

import json
import subprocess
import sys

import pytest

LIGHT = ["errors", "checks", "paths", "schedule", "costs", "tensors", "published", "synthetic", "metrics", "results",
         "simulate", "optimize", "plots"]  # fmt: skip


def loaded_after(code: str) -> dict[str, bool]:
    names = ["torch", "diffusers", "transformers", "numba", "scipy", "xarray", "pandas", "matplotlib"]
    script = f"import sys, json\n{code}\nprint(json.dumps({{n: n in sys.modules for n in {names}}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("statement", ["import ttsnap_lib", *(f"import ttsnap_lib.{name}" for name in LIGHT)])
def test_light_modules_load_no_heavy_library(statement):
    loaded = loaded_after(statement)
    assert not any(loaded.values()), loaded


def test_simulating_loads_neither_torch_nor_diffusers():
    loaded = loaded_after(
        "from ttsnap_lib import open_rewards, simulate, Schedule\n"
        "simulate(open_rewards('synthetic'), 'ttsnap', n=5, schedule=Schedule((2,), (0.5,)), iterations=2)"
    )
    assert loaded["numba"] and not loaded["torch"] and not loaded["diffusers"]


@pytest.mark.parametrize("first", ["import ttsnap_lib.simulation.simulate", "from ttsnap_lib import simulate", "pass"])
def test_simulate_is_module_and_function_whatever_comes_first(first):
    loaded_after(
        f"{first}\nfrom ttsnap_lib import simulate, open_rewards, Schedule\nimport ttsnap_lib.simulation.simulate as module\n"
        "assert simulate is module and callable(simulate) and callable(module.prune) and callable(module.simulate)"
    )


def test_public_names_exist():
    import ttsnap_lib

    for name in ttsnap_lib.__all__:
        assert getattr(ttsnap_lib, name) is not None
    with pytest.raises(AttributeError):
        _ = ttsnap_lib.nothing
