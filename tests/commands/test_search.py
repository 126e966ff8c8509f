"""``ttsnap search`` and ``ttsnap cost`` on the pocket models."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from PIL import Image

from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.__main__ import main, parser
from ttsnap_lib.commands import COMMANDS
from ttsnap_lib.live.record import SearchRecord
from ttsnap_lib.schedule import Draft

pytestmark = pytest.mark.usefixtures("one_thread")

POCKET = ["--steps", "4", "--quiet", "--threads", "1"]


@pytest.fixture(scope="module")
def cost_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cost") / "cost.json"
    options = ["--tiny", "pocket-tiny", "--batch-sizes", "2", "1", "--repeats", "1", "-o", str(path)]
    assert main(["cost", *POCKET, *options]) == 0
    with Image.open(path.with_suffix(".png")) as curve:
        curve.verify()
    return path


@pytest.fixture
def schedule_file(tmp_path):
    path = tmp_path / "schedule.yaml"
    path.write_text(Schedule((1,), (0.5,)).to_yaml())
    return path


def test_cost_then_search(cost_file, schedule_file, tmp_path, capsys):
    costs = CostModel.load(cost_file)
    budget = costs.total(4, Schedule((1,), (0.5,)))
    out = tmp_path / "out"
    arguments = ["--budget", str(budget), "--cost", str(cost_file), "--schedule", str(schedule_file), "-o", str(out)]
    arguments += ["--keep", "2", "--diversity", "0.5"]
    assert main(["search", "a small red ring", *POCKET, *arguments, "--tiny", "pocket-tiny"]) == 0
    said = capsys.readouterr().out
    record = SearchRecord.load(out)
    assert len(record.chosen) == 2 and record.diversity == 0.5 and "set_distance" in said
    assert len(record.seeds) == 4 and record.method == "ttsp" and record.checks == [1, 3]
    assert json.loads((out / "record.json").read_text())["cost"] == pytest.approx(budget)
    assert str(record.seeds[record.winner]) in said and "gallery.png" in said and " cost: " in said
    assert "stopped:" not in said  # it was not
    for name in ("image.png", "image_1.png", "gallery.png"):
        with Image.open(out / name) as picture:
            picture.verify()


def test_a_budget_is_priced_by_the_models_own_preset(tmp_path, capsys):
    own = CostModel.preset("pocket-flux-tiny+pocket-clip", n_steps=4)
    arguments = ["--budget", str(own.total(3)), "--tiny", "pocket-tiny", "-o", str(tmp_path / "out")]
    assert main(["search", "a small red ring", *POCKET, *arguments]) == 0
    record = SearchRecord.load(tmp_path / "out")
    assert len(record.seeds) == 3 and CostModel.from_dict(record.cost_model) == own
    unknown = ["--reward", "math:cos", "--budget", "4", "-o", str(tmp_path / "other")]
    assert main(["search", "a small red ring", *POCKET, *unknown]) == 1
    assert "Name one (" in capsys.readouterr().err


def test_drafts_are_priced_and_told(tmp_path, capsys):
    cost = CostModel.preset("pocket-flux+pocket-clip", n_steps=4)
    arguments = [
        "--budget",
        str(cost.total(3, Draft(2, 1))),
        "--draft",
        "2",
        "--finish",
        "1",
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(["search", "a small red ring", *POCKET, *arguments]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "candidates: 3 draft_steps: 2 finished: 1" in said
    record = SearchRecord.load(tmp_path / "out")
    assert len(record.seeds) == 3 and record.price(cost) == pytest.approx(cost.total(3, Draft(2, 1)))


def test_search_a_file_twice(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring\na blue disk\na green star\n")
    arguments = ["search", "--prompts", str(prompts), "--limit", "2", *POCKET, "--candidates", "2", "-o",
                 str(tmp_path / "out"), "--together", "2"]  # fmt: skip
    assert main(arguments) == 0
    assert main(arguments) == 0
    frame = pd.read_csv(tmp_path / "out" / "results.csv")
    assert SearchRecord.load(tmp_path / "out" / "p0001").together == [0, 1]
    assert frame["prompt"].tolist() == ["a red ring", "a blue disk"] and "results.csv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a ring", "--prompts", "x.txt", "--candidates", "2"], "exactly one"),
        (["a ring", "--together", "4", "--candidates", "2"], "for several prompts"),
        (["--prompts", "x.txt", "--together", "4", "--candidates", "4", "--negtome", "2"], "together with NegToMe"),
        (["a ring", "--candidates", "4", "--draft", "6"], "expected both or none"),
        (["a ring", "--candidates", "4", "--draft", "6", "--finish", "5"], "expected at least 5"),
        (["a ring", "--budget", "1", "--cost", "flux-512+hpsv2"], "the cost of one candidate"),
        (["a ring", "--candidates", "2", "--schedule", "nowhere.yaml"], "schedule file nowhere.yaml"),
        (["--prompts", "nowhere.txt", "--candidates", "2"], "nowhere.txt"),
        (["caf\udce9", "--candidates", "2"], "Unicode"),  # bytes that are no UTF-8, as Python gives them
        (["a ring", "--candidates", "2", "--model", "nowhere"], "nowhere"),
        (["a ring", "--candidates", "2", "--tiny", "/nowhere"], "tiny decoder"),
    ],
)
def test_mistakes_on_the_command_line(arguments, says, tmp_path, capsys):
    assert main(["search", *arguments, "--quiet", "-o", str(tmp_path / "out")]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [name for names in COMMANDS.values() for name in names])
def test_a_command_is_in_the_module_that_the_table_names(command, capsys):
    with pytest.raises(SystemExit) as ended:
        parser(command).parse_args([command, "--help"])
    assert ended.value.code == 0 and f"usage: ttsnap {command}" in capsys.readouterr().out
