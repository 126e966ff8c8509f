"""The command line: exit status 1 and one line on standard error, or 2 and the usage."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tests.bad_input.cases_files import ALIAS_BOMB
from tests.bad_input.cases_pictures import trajectories
from tests.bad_input.drill import Cases
from ttsnap_lib.__main__ import main
from ttsnap_lib.tensors.tensor import make_rewards, save_rewards, synthetic_rewards

CASES = Cases()
ERROR = "exit status 1 and one line on standard error, with value, bound and remedy"
USAGE = "exit status 2, the usage, and what was wrong"


def refused(folder: Path, line: str, names: str, status: int) -> bool:
    """Run a command; words may hold {folder}."""
    words = [word.replace("{folder}", str(folder)) for word in line.split()]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    said = err.getvalue().strip()
    shown = said.splitlines()
    assert code == status, f"status {code}: {out.getvalue()} {said}"
    assert names in said, f"{names!r} not in: {said}"
    if status == 1:
        assert shown[-1].startswith("ttsnap: ") and "expected " in shown[-1], said
        assert not any(one.startswith("Traceback") for one in shown)
    else:
        assert shown[0].startswith("usage: ttsnap"), said
    return True


def prepared(folder: Path) -> Path:
    """Fill a folder with what commands name."""
    trajectories(folder / "t")
    save_rewards(synthetic_rewards(2, 4, 20, ("a", "b")), folder / "r.zarr")
    odd = make_rewards(np.ones((1, 1, 2, 2)), rewards=["cos"], prompt_text=["a cat"], attributes={"scores": [1]})
    save_rewards(odd, folder / "odd.zarr")
    (folder / "bomb.yaml").write_text(ALIAS_BOMB)
    (folder / "list.yaml").write_text("[1, 2]\n")
    (folder / "cost.json").write_text(json.dumps({"step": 1.0, "verify": 0.1}))
    (folder / "empty").mkdir()
    return folder


def add(status: int, lines: Iterable[tuple[str, str]]) -> None:
    for line, names in lines:
        CASES.add(
            "command line",
            line.replace("{folder}/", ""),
            lambda folder, line=line, names=names: refused(prepared(folder), line, names, status),
            skip=ERROR if status == 1 else USAGE,
        )


add(
    1,
    [
        ("score {folder}/none", "no trajectory folder"),
        ("score {folder}/empty", "no trajectory folder"),
        ("score {folder}/t --reward pikscore", "pickscore"),
        ("score {folder}/t --reward-option scale", "KEY=VALUE"),
        ("score {folder}/t --reward-option x.scale=2", "pocket-clip"),
        ("score {folder}/t --noise-aware {folder}/none", "curriculum"),
        ("score {folder}/t --reward math:cos --batch-size 0", "batch_size"),
        ("score {folder}/t --reward math:cos --steps 9", "steps"),
        ("score {folder}/t --reward math:cos --shard 2/2", "shard"),
        ("score {folder}/t --reward math:cos --shard one", "shard"),
        ("score {folder}/t --reward math:cos --workers 0", "workers"),
        ("score {folder}/t --reward math:cos --reward cmath:cos", "each name once"),
        ("score {folder}/t --reward math:cos --out {folder}/cost.json", "Zarr"),
        ("score {folder}/t --reward math:cos --out {folder}/r.zarr", "prompts"),
        ("score {folder}/t --reward math:cos --out {folder}/odd.zarr", "scored"),
        ("score {folder}/t --device gpu", "device"),
        ("score {folder}/t --device cuda:99", "device"),
        ("score {folder}/t --reward math:cos --out {folder}/cost.json/r.zarr", "cannot write"),
        ("score {folder}/t --reward math:cos --out {folder}/bad.zarr", "s00.png"),
        ("generate --prompts {folder}/none.txt --out {folder}/g", "cannot be read"),
        ("generate --prompts {folder}/bomb.yaml --out {folder}/g", "ending of the prompt file"),
        ("generate --prompts pocket:trian --out {folder}/g", "train"),
        ("generate --images 0 --out {folder}/g", "--images"),
        ("generate --images 1000000000000 --out {folder}/g", "1000000"),
        ("generate --limit 0 --out {folder}/g", "limit"),
        ("generate --steps 0 --out {folder}/g", "n_steps"),
        ("generate --steps 1000000000 --out {folder}/g", "n_steps"),
        ("generate --size 0 --out {folder}/g", "height"),
        ("generate --size 1000000 --out {folder}/g", "height x width"),
        ("generate --guidance nan --out {folder}/g", "guidance"),
        ("generate --negtome -1 --out {folder}/g", "group_size"),
        ("generate --model pocket-fluks --out {folder}/g", "pocket-flux"),
        ("generate --device gpu --out {folder}/g", "device"),
        ("generate", "--out"),
        ("verify {folder}/none", "no trajectory folder"),
        ("verify {folder}/t --workers 0", "workers"),
        ("search --candidates 4 --out {folder}/s", "prompt"),
        ("search cat --prompts {folder}/x.txt --candidates 4 --out {folder}/s", "prompt"),
        ("search cat --out {folder}/s", "budget"),
        ("search cat --candidates 1000000000000 --out {folder}/s", "1000000"),
        ("search cat --budget 1e18 --cost {folder}/cost.json --out {folder}/s", "unit"),
        ("search cat --candidates 0 --out {folder}/s", "candidates"),
        ("search cat --budget nan --cost {folder}/cost.json --out {folder}/s", "budget"),
        ("search cat --candidates 4 --schedule {folder}/none.yaml --out {folder}/s", "schedule"),
        ("search cat --candidates 4 --schedule {folder}/bomb.yaml --out {folder}/s", "aliases"),
        ("search cat --candidates 4 --cost {folder}/bomb.yaml --out {folder}/s", "aliases"),
        ("run simulat", "simulate"),
        ("run simulate -p itertions 5", "iterations"),
        ("run simulate -p iterations many", "iterations"),
        ("run simulate -f {folder}/none.yaml", "parameters"),
        ("run simulate -f {folder}/bomb.yaml", "aliases"),
        ("run simulate -f {folder}/list.yaml", "mapping"),
        ("run simulate --timeout nan -o {folder}/runs", "timeout_s"),
        ("run simulate --timeout -1 -o {folder}/runs", "timeout_s"),
        ("run {folder}/cost.json", "simulate"),
        ("sweep {folder}/none.yaml", "sweep"),
        ("sweep {folder}/bomb.yaml", "aliases"),
        ("sweep {folder}/list.yaml", "mapping"),
        ("sweep {folder}/list.yaml --dry-run", "mapping"),
        ("report {folder}/empty", "nothing to report"),
        ("report {folder}/none", "nothing to report"),
        ("optimize {folder}/none --cost published", "Zarr"),
        ("optimize {folder}/t --cost published", "Zarr"),
        ("optimize {folder}/r.zarr --cost publisht", "cost"),
        ("optimize {folder}/r.zarr --cost {folder}/bomb.yaml", "aliases"),
        ("optimize {folder}/r.zarr --cost published --budgets many", "--budgets"),
        ("optimize {folder}/r.zarr --cost published --budgets 5:2", "--budgets"),
        ("optimize {folder}/r.zarr --cost published --budgets nan", "--budgets"),
        ("optimize {folder}/r.zarr --cost published --budgets 1:inf", "--budgets"),
        ("optimize {folder}/r.zarr --cost published --budgets 0:9:1e-9", "--budgets"),
        ("optimize {folder}/r.zarr --cost published --budgets 2:99", "pool"),
        ("optimize {folder}/r.zarr --cost published --reward c", "reward"),
        ("optimize {folder}/r.zarr --cost published --report a --report b --budgets 2:3", "report"),
        ("optimize {folder}/r.zarr --cost published --budgets 2:3 --trials 0", "n_trials"),
        ("optimize {folder}/r.zarr --cost published --budgets 2:3 --time-limit nan", "time_limit_s"),
        ("optimize {folder}/r.zarr --cost published --budgets 2:3 --tune 7", "tune"),
        ("export {folder}/none --out {folder}/e", "Zarr"),
        ("export {folder}/r.zarr --out {folder}/e --model ../x", "model"),
        ("export {folder}/r.zarr --out {folder}/e --model x --reward c", "reward"),
        ("export {folder}/r.zarr --out {folder}/e --layout ground-truth", "reward"),
        ("export {folder}/r.zarr --out {folder}/e --layout ground-truth --reward a --reward b", "one"),
        ("export {folder}/r.zarr --out {folder}/cost.json --model x", "cannot write"),
        ("import-published {folder}/none --model flux --out {folder}/i.zarr", "flux"),
        ("import-published {folder}/empty --model ../x --out {folder}/i.zarr", "model"),
        ("import-published {folder}/empty --model flux --out {folder}/r.zarr", "--overwrite"),
        ("finetune --config no-such", "configuration"),
        ("finetune --config {folder}/bomb.yaml", "aliases"),
        ("finetune --config pocket-flux -p learning_rat 1", "learning_rate"),
        ("finetune --config pocket-flux -p learning_rate [", "learning_rate"),
        ("finetune --config pocket-flux -p steps 5", "steps"),
        ("import-checkpoints {folder}/none --reward pikscore --out {folder}/c", "pickscore"),
    ],
)
add(
    2,
    [
        ("", "COMMAND"),
        ("scor {folder}/t", "scor"),
        ("score", "folder"),
        ("score {folder}/t --on-error maybe", "maybe"),
        ("score {folder}/t --steps first", "first"),
        ("score {folder}/t --rewad pickscore", "--rewad"),
        ("generate --images many", "many"),
        ("generate --size 5by5", "5by5"),
        ("generate --size -5", "--size"),
        ("optimize {folder}/r.zarr", "--cost"),
        ("optimize {folder}/r.zarr --cost published --objective best", "best"),
        ("export {folder}/r.zarr", "--out"),
        ("export {folder}/r.zarr --out x --layout csv", "csv"),
        ("run", "notebook"),
        ("sweep", "GRID"),
    ],
)
