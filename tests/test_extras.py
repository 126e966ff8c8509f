"""Without torch or Jupyter: the core works, and what needs an extra says in one sentence what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from ttsnap_lib.errors import MissingExtraError, missing_extra

MODELS = ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "safetensors")
NOTEBOOKS = ("nbformat", "papermill", "ipywidgets", "jupyter_client", "ipykernel", "IPython")
SWEEPS = ("dask", "distributed")
# An entry of None makes an import fail as that of a package which is not there.
BARE = f"import sys\nsys.modules.update(dict.fromkeys({(*MODELS, *NOTEBOOKS, *SWEEPS)!r}))\n"
POCKET = str(ROOT / "data_cache" / "pocket" / "flux.zarr")


def bare(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has the core alone."""
    command = [sys.executable, "-c", BARE + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


COMMAND = "from ttsnap_lib.__main__ import main\nsys.exit(main(sys.argv[1:]))"


def test_the_core_simulates_tunes_and_explores():
    code = f"""
import ttsnap_lib as t
data = t.open_rewards({POCKET!r})
cost, schedule = t.CostModel.preset("pocket-flux+pocket-clip"), t.Schedule(steps=(1,), keep_ratios=(0.5,))
table = t.sweep(data, ["best_of_n", "ttsp"], [cost.total(4), cost.total(8)], cost, schedule, iterations=8)
assert len(table) == 4 and table["mean"].notna().all()
import ttsnap_lib.explorer.pool, ttsnap_lib.explorer.result
print(t.optimize_schedule(data, cost, [cost.total(8)], n_trials=4, seed=0, objective="single").trials.shape)
"""
    done = bare(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(")


def test_the_core_s_commands(tmp_path):
    tune = ("optimize", POCKET, "--cost", "pocket-flux+pocket-clip", "--trials", "4", "-q")
    out = ("export", POCKET, "--model", "flux", "--out", str(tmp_path / "values"))
    for arguments in (("--help",), tune, out):
        done = bare(COMMAND, *arguments)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("models", ("search", "a red ring", "--model", "pocket-flux", "--candidates", "2", "-o", "{}/out")),
        ("models", ("generate", "--model", "pocket-flux", "--prompts", "pocket", "--out", "{}/out")),
        ("models", ("score", "{}", "--reward", "pocket-clip")),
        ("models", ("finetune", "--out", "{}/out")),
        ("notebooks", ("run", "simulate", "-o", "{}/out")),
        ("notebooks", ("demo",)),
        ("notebooks", ("sweep", "{}/grid.yaml", "-o", "{}/out")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_a_command_says_what_to_install(extra, arguments, tmp_path):
    (tmp_path / "grid.yaml").write_text("notebook: simulate\ngrid: {seed: [1, 2]}\n")
    done = bare(COMMAND, *(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 1
    *said, last = done.stderr.splitlines()
    assert last.startswith("ttsnap: this needs ") and all(line.startswith("loading ") for line in said), done.stderr
    assert f"Run `pip install 'ttsnap[{extra}]'`." in done.stderr


@pytest.mark.parametrize(
    ("name", "extra"), [("load_pipeline", "models"), ("search", "models"), ("explore", "notebooks")]
)
def test_a_name_says_what_to_install(name, extra):
    done = bare(f"import ttsnap_lib\nttsnap_lib.{name}")
    assert done.stderr.splitlines()[-1].startswith("ttsnap_lib.errors.MissingExtraError: this needs ")
    assert f"ttsnap[{extra}]" in done.stderr


def test_other_failed_imports_stay_what_they_are():
    assert missing_extra(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    assert missing_extra(ImportError("cannot import name 'x' from 'torch'", name="torch")) is None  # it is there
    assert missing_extra(ValueError("torch")) is None
    found = missing_extra(ModuleNotFoundError("no", name="open_clip.model"))
    assert isinstance(found, MissingExtraError) and isinstance(found, ImportError)
