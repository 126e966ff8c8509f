"""Every Python block and every command of the README is run."""

from __future__ import annotations

import re
import shlex

import numpy as np
import pytest
import yaml

from tests.conftest import ROOT
from ttsnap_lib import save_rewards
from ttsnap_lib.__main__ import main, parser
from ttsnap_lib.synthetic import synthetic_rewards

TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
LINES = [
    line.split("  #")[0].strip() for language, code in BLOCKS if language != "python" for line in code.splitlines()
]
COMMANDS = [line for line in LINES if line.startswith(("ttsnap ", "accelerate launch "))]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - our own page
    assert capsys.readouterr().out


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"\bmake ([a-z-]+)", TEXT)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_linked_files_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / path).exists(), path


def write_published(folder):
    """Write a small pool in the published layout."""
    dataset = synthetic_rewards(4, 120, 20)
    for name, variant in (("base", "base"), ("noise_aware", "naft")):
        target = folder / f"flux_imr_val_{variant}"
        target.mkdir(parents=True)
        for step in range(20):
            rows = dataset[name].values[0, :, :, step]
            content = {p: [float(x) for x in row] for p, row in enumerate(rows)}
            (target / f"p4_i120_s{step:02d}.yaml").write_text(yaml.dump(content, Dumper=yaml.CSafeDumper))
    (folder / "validation.json").write_text(str([f"prompt {k}" for k in range(4)]).replace("'", '"'))
    return np.asarray(dataset["base"].values)


# Models of many gigabytes: the command line is parsed, nothing is loaded.
FAR = ("black-forest-labs", "SG161222", "--reward pickscore", "finetune")


def test_commands_run_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path / "data_cache"))
    write_published(tmp_path)
    save_rewards(synthetic_rewards(8, 120, 20), tmp_path / "tensor.zarr")
    (tmp_path / "grid.yaml").write_text(
        next(code for language, code in BLOCKS if language == "yaml").replace("TENSOR", "tensor.zarr")
    )
    monkeypatch.chdir(tmp_path)
    places = {"VALUES": str(tmp_path), "TENSOR": str(tmp_path / "tensor.zarr")}
    assert len(COMMANDS) > 8
    for command in COMMANDS:
        words = [places.get(word, word) for word in shlex.split(command)]
        if words[0] == "accelerate":
            words = words[words.index("ttsnap_lib") :]
        if any(part in command for part in FAR):
            assert parser().parse_args(words[1:]).func
        else:
            assert main(words[1:]) == 0, command
