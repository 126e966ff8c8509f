"""Every shipped notebook by papermill's own command line and a parameters file, as its users run it."""

from __future__ import annotations

import os
import subprocess
import sys

import nbformat
import pytest
import yaml

from tests.conftest import ROOT

# Small parameters, and a file of the results that they lead to.
GIVEN = {
    "simulate": (
        {"multiples": [2, 4], "iterations": 20, "trials": 50, "transfer_to": ["pocket-sdxl"]}, "relative_gains.csv"
    ),
    "explore": ({"steps": [3, 8], "keep_ratios": [0.3, 0.5], "iterations": 20}, "results.csv"),
    "generate": ({"prompts": "pocket:evaluation:1", "images": 4, "compare_diversity": False}, "contact_sheet.png"),
    "score": ({"rewards": ["pocket-clip"], "prompt": 1}, "rank_correlation.csv"),
    "finetune": (
        {
            "trajectories": "pocket-flux:train:8x8", "validation": "pocket-flux:selection:4x8", "steps": [5],
            "settings": {"epochs_per_step": 1, "warmup_updates": 1},
        },
        "comparison.csv",
    ),
    "search": ({"prompts": "pocket:evaluation:1", "multiple": 2, "batch_size": 4}, "compared.csv"),
}  # fmt: skip


def test_no_notebook_is_left_out():
    assert sorted(GIVEN) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", GIVEN)
def test_papermill_command_with_a_parameters_file(name, tmp_path):
    parameters, wanted = GIVEN[name]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(parameters))
    environment = {key: value for key, value in os.environ.items() if key not in ("MPLBACKEND", "TTSNAP_RUN_FOLDER")}
    environment |= {"TTSNAP_DATA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "papermill", ROOT / "notebooks" / f"{name}.ipynb", "out.ipynb", "-f", "params.yaml"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert executed.metadata["papermill"]["parameters"] == parameters
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code" and cell.source)
    assert (tmp_path / "cache" / "runs" / name / "interactive" / wanted).stat().st_size
