"""The table that a reader takes from a simulation, and the commands that follow from it."""

from __future__ import annotations

import shlex

import numpy as np
import pandas as pd
import pytest

from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel, Schedule
from ttsnap_lib.__main__ import main
from ttsnap_lib.errors import ConfigError
from ttsnap_lib.simulation.plots import (
    by_budget,
    flatness_table,
    optimize_command,
    pruning_method,
    search_command,
    transfer_table,
    unbroken,
)
from ttsnap_lib.simulation.simulate import curves
from ttsnap_lib.tensors.tensor import make_rewards, save_rewards, select_rewards, stack_rewards, synthetic_rewards
from ttsnap_lib.tuning.optimize import cases_by_reward, compare_schedules, transfer

COST = "flux-512+image_reward"


@pytest.fixture(scope="module")
def result():
    cost = CostModel.load(COST)
    rewards = synthetic_rewards(12, 120, 20, rewards=("image_reward", "pickscore"))
    budgets = [multiple * cost.total(1) for multiple in (2, 4, 8)]
    return curves(rewards, ["best_of_n", "ttsnap"], budgets, cost, PUBLISHED_SCHEDULE, iterations=40, rng=0)


def test_the_table_sets_the_methods_side_by_side(result):
    table, frame = by_budget(result, "TFLOPs"), result.frame()
    assert table.index.names == ["reward", "budget (TFLOPs)"] and len(table) == 2 * 3
    assert list(dict.fromkeys(table.columns.get_level_values(0))) == ["Best-of-N", "TTSnap"]
    assert ("Best-of-N", "over Best-of-N") not in table.columns
    ours = frame[frame["method"] == "ttsnap"]
    assert table["TTSnap", "N"].tolist() == ours["n"].tolist()
    assert table["TTSnap", "mean reward"].tolist() == [f"{mean:.3f}" for mean in ours["mean"]]
    assert table["TTSnap", "over Best-of-N"].iloc[0].startswith(f"{ours['gain'].iloc[0]:+.3f} [")


def test_what_best_of_n_needs_lies_on_its_own_curve(result):
    table, frame = by_budget(result, "TFLOPs"), result.frame()
    base, ours = (frame[frame["method"] == name].reset_index(drop=True) for name in ("best_of_n", "ttsnap"))
    told = 0
    for k, text in enumerate(table["TTSnap", "Best-of-N needs (TFLOPs)"]):
        curve, mean = base[base["reward"] == ours["reward"][k]], ours["mean"][k]
        if text:
            told += 1
            assert np.interp(float(text), curve["budget"], curve["mean"]) == pytest.approx(mean, abs=2e-3)
        else:
            assert not curve["mean"].min() <= mean <= curve["mean"].max()
    assert told  # at the smaller budgets Best-of-N comes that far


def test_tables_of_schedules_tell_what_was_measured():
    cost = CostModel.load(COST)
    rewards = synthetic_rewards(12, 120, 20, rewards=("image_reward", "pickscore"))
    budgets = [multiple * cost.total(1) for multiple in (2, 4, 8)]
    one = rewards.sel(reward=["image_reward"])
    table = compare_schedules(one, cost, budgets, [PUBLISHED_SCHEDULE, Schedule((25,), (0.5,))])
    table["within"] = [True, False]
    text = flatness_table(table)
    assert text["schedule"][0] == str(PUBLISHED_SCHEDULE) and text["as good"].tolist() == ["yes", ""]
    assert text.iloc[0, 1] == f"{table['gain'][0]:.1f} [{table['low'][0]:.1f}, {table['high'][0]:.1f}]"
    assert text.iloc[1, 1] == text.iloc[1, 2] == "cannot run"  # there is no step 25

    cases = cases_by_reward({"one": one, "both": rewards}, cost, budgets)
    assert list(cases) == ["one", "both/image_reward", "both/pickscore"]
    found = transfer({name: cases[name] for name in ("one", "both/pickscore")}, n_trials=20, iterations=8)
    text = transfer_table(found)
    assert list(text.index) == ["one", "both/pickscore", "published"]
    assert text["one", "behind"]["one"] == "0.0 [0.0, 0.0]"
    assert unbroken(text)["one", "behind"]["one"].split(" ") == ["0.0\N{NO-BREAK SPACE}[0.0,\N{NO-BREAK SPACE}0.0]"]
    assert text["one", "gain"]["published"].startswith(f"{found.gain.loc['published', 'one']:.1f} [")


def test_the_notebook_answers_for_one_budget_and_tries_the_schedule_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    given = {"multiples": "[4]", "iterations": "20", "trials": "20", "transfer_to": "['pocket-sdxl']"}
    assert main(["run", "simulate", *(word for key, value in given.items() for word in ("-p", key, value))]) == 0
    folder = next((tmp_path / "runs" / "simulate").glob("*/transfer.csv")).parent
    carried = pd.read_csv(folder / "transfer.csv", index_col=0)
    assert list(carried.index) == ["pocket-flux", "pocket-sdxl", "published"] and carried.notna().all(None)
    schedules = pd.read_csv(folder / "schedules.csv")
    assert str(PUBLISHED_SCHEDULE) in set(schedules["schedule"]) and schedules["behind"][0] == 0
    tuned = [int(part.split()[1]) for part in schedules["schedule"][0].split(", ")]
    assert f"steps: {tuned}" in capsys.readouterr().out  # the last line runs what was tuned


def test_the_notebook_answers_for_a_tensor_without_noise_aware_rewards(tmp_path, monkeypatch, capsys):
    """Such as `ttsnap score` writes before anything was finetuned."""
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    values = synthetic_rewards(4, 24, 20, rewards=("image_reward",))["base"].values
    save_rewards(make_rewards(values, rewards=["image_reward"]), tmp_path / "base.zarr")
    given = {
        "tensor": str(tmp_path / "base.zarr"),
        "cost": COST,
        "multiples": "[2, 3]",
        "iterations": "20",
        "trials": "20",
    }
    assert main(["run", "simulate", *(word for key, value in given.items() for word in ("-p", key, value))]) == 0
    optimize, search = capsys.readouterr().out.strip().splitlines()[-4:-1:2]
    assert "--method ttsp" in optimize and "--adapters" not in search
    assert next((tmp_path / "runs" / "simulate").glob("*/schedules.csv"))


@pytest.mark.parametrize(("methods", "report", "wanted"), [
    (["best_of_n", "ttsp", "ttsnap"], [], "ttsp"),  # the second reward is not noise-aware
    (["best_of_n", "ttsp", "ttsnap"], ["second"], "ttsnap"),
    (["ttsp", "best_of_n"], ["second"], "ttsp"),
    (["best_of_n"], [], "best_of_n"),
])  # fmt: skip
def test_what_a_schedule_is_tuned_for(methods, report, wanted):
    values = np.zeros((1, 2, 3, 4))
    dataset = stack_rewards([make_rewards(values, values, rewards=["first"]), make_rewards(values, rewards=["second"])])
    assert pruning_method(dataset, methods, report) == wanted


def test_a_reward_that_the_tensor_lacks_is_named():
    with pytest.raises(ConfigError, match="got 'imagereward', expected one of .*Did you mean 'image_reward'"):
        select_rewards(synthetic_rewards(2, 3, 4, rewards=("image_reward",)), ["imagereward"])


def test_a_long_error_of_a_cell_keeps_its_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    assert main(["run", "simulate", "-p", "cost", "flux-512+imagereward"]) == 1
    assert "Did you mean 'flux-512+image_reward'?" in capsys.readouterr().err


def test_the_optimize_line_is_taken_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = optimize_command("synthetic", COST, [2.0000000001, 4, 6.5], ["image_reward"])
    assert "--budgets 2,4,6.5" in line
    assert main([*shlex.split(line)[1:], "--trials", "20", "-q"]) == 0
    assert Schedule.from_yaml(tmp_path / "schedule.yaml").steps


def test_the_search_line_runs_the_schedule_that_was_simulated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    schedule = Schedule((2, 5), (0.5, 0.5))
    line = search_command("pocket-flux", ["pocket-clip"], "pocket-flux-tiny+pocket-clip", 4, schedule)
    assert "--adapters pocket" in line and "--tiny pocket-tiny" in line
    assert main([*shlex.split(line)[1:], "--threads", "1", "-q"]) == 0
    assert (tmp_path / "best" / "image.png").exists()
    assert "ttsnap" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "cost", "method", "wanted", "missing"), [
    ("flux", COST, "ttsnap", ["black-forest-labs/FLUX.1-dev", "--size 512", "--adapters NOISE_AWARE"], "--tiny"),
    ("sdxl", "sdxl-1024-tiny+image_reward", "ttsp", ["--size 1024", "--tiny madebyollin/taesdxl"], "--adapters"),
    ("pocket-sdxl", "pocket-sdxl+pocket-clip", "best_of_n", ["--model pocket-sdxl"], "--schedule"),
    ("synthetic stand-in", COST, "ttsnap", ["--model MODEL"], "synthetic"),
])  # fmt: skip
def test_the_search_line_names_what_the_tensor_was_made_with(model, cost, method, wanted, missing):
    line = search_command(model, ["image_reward"], cost, 9, PUBLISHED_SCHEDULE, method)
    assert all(words in line for words in wanted) and missing not in line
