"""Bad words on the command line: exit status 1 and one line on standard error, or 2 and the usage."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.bad_input.drill import time_limit
from tests.bad_input.samples import trajectories
from ttsnap_lib.__main__ import main
from ttsnap_lib.tensors.tensor import save_rewards, synthetic_rewards

REFUSED = [
    ("score none", "no trajectory folder"),
    ("score t --reward pikscore", "pickscore"),
    ("score t --reward-option scale", "KEY=VALUE"),
    ("score t --noise-aware none", "curriculum"),
    ("score t --reward math:cos --batch-size 0", "batch_size"),
    ("score t --reward math:cos --steps 9", "steps"),
    ("score t --reward math:cos --shard one", "shard"),
    ("score t --reward math:cos --out cost.json", "Zarr"),
    ("score t --reward math:cos --out r.zarr", "how it was scored"),
    ("score t --device cuda:99", "device"),
    ("score t --reward math:cos --out bad.zarr", "s00.png"),
    ("generate --prompts none.txt --out g", "cannot be read"),
    ("generate --images 0 --out g", "--images"),
    ("generate --steps 1000000000 --out g", "n_steps"),
    ("generate --size 0 --out g", "height"),
    ("generate --guidance nan --out g", "guidance"),
    ("generate --negtome -1 --out g", "group_size"),
    ("generate --model pocket-fluks --out g", "pocket-flux"),
    ("generate", "--out"),
    ("verify none", "no trajectory folder"),
    ("search --candidates 4 --out s", "prompt"),
    ("search cat --out s", "budget"),
    ("search cat --candidates 0 --out s", "candidates"),
    ("search cat --candidates 4 --keep 5 --out s", "keep: got 5"),
    ("search cat --candidates 4 --diversity 0.5 --out s", "keep=1"),
    ("search cat --budget 1e18 --cost cost.json --out s", "unit"),
    ("search cat --candidates 4 --schedule none.yaml --out s", "schedule"),
    ("search cat --candidates 4 --cost list.yaml --out s", "mapping"),
    ("run simulat", "simulate"),
    ("run simulate -p itertions 5", "iterations"),
    ("run simulate -p iterations many", "iterations"),
    ("run simulate -f list.yaml", "mapping"),
    ("run simulate --timeout -1 -o runs", "timeout_s"),
    ("sweep none.yaml", "sweep"),
    ("sweep list.yaml", "mapping"),
    ("report empty", "nothing to report"),
    ("optimize none --cost published", "Zarr"),
    ("optimize r.zarr --cost publisht", "cost"),
    ("optimize r.zarr --cost published --budgets many", "--budgets"),
    ("optimize r.zarr --cost published --budgets 5:2", "--budgets"),
    ("optimize r.zarr --cost published --budgets 2:99", "pool"),
    ("optimize r.zarr --cost published --reward c", "reward"),
    ("optimize r.zarr --cost published --budgets 2:3 --trials 0", "n_trials"),
    ("export none --out e", "Zarr"),
    ("export r.zarr --out e --model ../x", "model"),
    ("export r.zarr --out e --layout ground-truth", "reward"),
    ("import-published none --model flux --out i.zarr", "flux"),
    ("import-published empty --model flux --out r.zarr", "--overwrite"),
    ("finetune --config no-such", "configuration"),
    ("finetune --config pocket-flux -p learning_rat 1", "learning_rate"),
    ("import-checkpoints none --reward pikscore --out c", "pickscore"),
]
USAGE = [
    ("scor t", "scor"),
    ("score t --on-error maybe", "maybe"),
    ("score t --rewad pickscore", "--rewad"),
    ("generate --size 5by5", "5by5"),
    ("run", "notebook"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Make what the commands name, and stand beside it."""
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    trajectories(tmp_path / "t")
    save_rewards(synthetic_rewards(2, 4, 20, ("a", "b")), tmp_path / "r.zarr")
    (tmp_path / "list.yaml").write_text("[1, 2]\n")
    (tmp_path / "cost.json").write_text(json.dumps({"step": 1.0, "verify": 0.1}))
    (tmp_path / "empty").mkdir()


@pytest.mark.parametrize(("line", "names"), REFUSED, ids=[line for line, _ in REFUSED])
def test_refused_in_one_line(line, names, place, capsys):
    with time_limit():
        assert main(shlex.split(line)) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("ttsnap: ") and names in said[-1]
    assert not any(one.startswith("Traceback") for one in said)


@pytest.mark.parametrize(("line", "names"), USAGE, ids=[line for line, _ in USAGE])
def test_usage(line, names, place, capsys):
    with pytest.raises(SystemExit) as end:
        main(shlex.split(line))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("usage: ttsnap") and names in said
