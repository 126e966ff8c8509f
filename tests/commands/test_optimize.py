"""``ttsnap optimize``: what it prints and writes."""

import pandas as pd
import pytest
import yaml
from PIL import Image

from tests.tuning.world import COST, world
from ttsnap_lib import Schedule, save_rewards
from ttsnap_lib.__main__ import main
from ttsnap_lib.commands.optimize import parse_range
from ttsnap_lib.errors import ConfigError


@pytest.fixture
def arguments(tmp_path):
    tensor = save_rewards(world(prompts=20, rewards=2), tmp_path / "t.zarr")
    COST.save(tmp_path / "cost.json")
    shared = ["--cost", str(tmp_path / "cost.json"), "--budgets", "2:5", "--trials", "64", "-q", "--reward", "r0"]
    return ["optimize", str(tensor), *shared]


def test_schedule_trials_and_the_next_commands(arguments, tmp_path, capsys):
    out = tmp_path / "schedule.yaml"
    assert main([*arguments, "--out", str(out), "--trials-out", str(tmp_path / "trials.csv")]) == 0
    printed = capsys.readouterr().out
    schedule = Schedule.from_yaml(out)
    assert str(list(schedule.steps)) in printed and "next: ttsnap run simulate" in printed
    search = f"ttsnap search 'your prompt' --model MODEL --reward r0 --steps {COST.n_steps} --schedule '{{steps: {list(schedule.steps)}"
    assert search in printed
    assert (tmp_path / "trials.csv").read_text().count("\n") == 65
    assert main([*arguments, "--objective", "frontier", "--out", str(out)]) == 0
    content = yaml.safe_load(out.read_text())
    assert len(content["frontier"]) == 4 and Schedule.from_dict(content["schedule"]) is not None
    assert main([*arguments, "--tune", "5:1"]) == 1


def test_a_tensor_has_the_cost_of_its_model(capsys):
    assert main(["optimize", "pocket-sdxl", "--budgets", "2:4", "--trials", "8", "-q"]) == 0
    printed = capsys.readouterr().out
    for command in ("ttsnap run simulate -p tensor pocket-sdxl -p cost", "--model pocket-sdxl --reward pocket-clip"):
        assert command in printed
    assert printed.count(" pocket-sdxl+pocket-clip ") == 2


def test_flatness(arguments, capsys):
    assert main([*arguments, "--report", "r1", "--flatness", "5"]) == 0
    printed = capsys.readouterr().out
    assert "as good as the chosen one" in printed and printed.count("step ") >= 6  # the chosen one and at least four


def test_ranges():
    assert parse_range("x", "2:5", float) == [2, 3, 4, 5]
    assert parse_range("x", "0:10:5,12", int) == [0, 5, 10, 12]
    for text in ("", "a", "5:2", "1:2:0"):
        with pytest.raises(ConfigError):
            parse_range("x", text, int)


def test_compare_sets_the_best_first(arguments, tmp_path, capsys):
    (tmp_path / "late.yaml").write_text(Schedule((6,), (0.9,)).to_yaml())
    early, nowhere = "{steps: [2], keep_ratios: [0.3]}", "{steps: [9], keep_ratios: [0.5]}"
    tensor, cost = arguments[1], arguments[3]
    words = ["compare", str(tmp_path / "late.yaml"), early, early, nowhere, "--tensor", tensor, "--cost", cost]
    assert main([*words, "--budgets", "2:5", "--reward", "r0", "-o", str(tmp_path / "out")]) == 0
    rows = pd.read_csv(tmp_path / "out" / "compared.csv")
    assert rows["schedule"].tolist() == ["step 2 keep 0.3", "step 6 keep 0.9", "step 9 keep 0.5"]
    assert rows["behind"][0] == 0 and 0 < rows["behind"][1] == pytest.approx(rows["gain"][0] - rows["gain"][1])
    assert rows["as_good"].fillna("").tolist() == ["yes", "no", ""] and "cannot run" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "compared.png") as picture:
        picture.verify()
