"""The runs of a sweep side by side."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.runs.compare import compare_runs, comparison_text, write_comparison
from ttsnap_lib.runs.report import render
from ttsnap_lib.runs.run import write_table
from ttsnap_lib.simulation.metrics import jackknife_interval, leave_one_out, relative_gain_of
from ttsnap_lib.simulation.simulate import curves
from ttsnap_lib.tensors.tensor import synthetic_rewards

COST = CostModel.preset("flux-512+image_reward")
BUDGETS = np.arange(2, 7) * COST.total(1)
SCHEDULES = {"late": Schedule((12,), (0.9,)), "early": Schedule((2, 6), (0.4, 0.5)), "between": Schedule((6,), (0.5,))}


@pytest.fixture(scope="module")
def found():
    dataset = synthetic_rewards(16, 40, 20)
    methods = ["best_of_n", "ttsp", "ttsnap"]
    return {
        name: curves(dataset, methods, BUDGETS, COST, plan, iterations=20, rng=0) for name, plan in SCHEDULES.items()
    }


@pytest.fixture
def runs(found, tmp_path):
    """Run folders as simulate.ipynb leaves them."""
    for name, result in found.items():
        (tmp_path / name).mkdir()
        write_table(result.relative_gains(), tmp_path / name / "relative_gains.csv")
        write_table(result.gains_without(), tmp_path / name / "gains_without.csv")
    same = {"tensor": "synthetic", "iterations": 20}
    return [
        {"folder": str(tmp_path / name), "run_hash": name, "status": "complete",
         "parameters": {**same, "steps": list(plan.steps)}} for name, plan in SCHEDULES.items()
    ]  # fmt: skip


def test_runs_are_paired_prompt_by_prompt_with_the_best_first(found, runs):
    table = compare_runs(runs, list(found))
    gains = {name: result.relative_gains().query("method == 'ttsnap'").iloc[0] for name, result in found.items()}
    assert table["label"].tolist() == sorted(found, key=lambda name: -gains[name]["relative_gain"])
    assert (table["method"] == "ttsnap").all() and table["run"].tolist() == table["label"].tolist()
    for row in table.itertuples():
        assert [row.gain, row.low, row.high] == pytest.approx(
            gains[row.label][["relative_gain", "low", "high"]].tolist()
        )
    # the difference from the rewards themselves, and its interval narrower than that of two unpaired gains
    best, last = (found[table["label"].iloc[k]].per_prompt[:, :, 0] for k in (0, -1))

    def gain(values, mean):
        return relative_gain_of(BUDGETS, mean(values[2]), mean(values[0]), strict=False)

    whole = gain(best, lambda rows: rows.mean(-1)) - gain(last, lambda rows: rows.mean(-1))
    without = gain(best, lambda rows: leave_one_out(rows.T)) - gain(last, lambda rows: leave_one_out(rows.T))
    row = table.iloc[-1]
    assert row["behind"] == pytest.approx(whole)
    assert [row["behind_low"], row["behind_high"]] == pytest.approx(jackknife_interval(whole, without).tolist())
    unpaired = np.hypot(*(table.iloc[k]["high"] - table.iloc[k]["low"] for k in (0, -1)))
    assert row["behind_high"] - row["behind_low"] < unpaired
    assert table["behind"].iloc[0] == 0 and table["as_good"].iloc[0] == "yes"


def test_what_cannot_be_paired_is_not(runs):
    labels = [run["run_hash"] for run in runs]
    assert compare_runs(runs[:1], labels[:1]) is None
    other = [*runs[:2], {**runs[2], "parameters": {"tensor": "another"}}]
    assert compare_runs(other, labels) is None
    assert compare_runs([*runs[:2], {**runs[2], "folder": "/nowhere"}], labels) is None


def test_the_report_of_a_sweep_compares_its_runs_and_tells_what_they_share_once(runs, tmp_path):
    table = compare_runs(runs, [f"steps={run['parameters']['steps']}" for run in runs])
    write_comparison(table, tmp_path)
    results = table.assign(tensor="synthetic", iterations=20, steps=table["label"])
    write_table(results, tmp_path / "results.csv")
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "schedules", "notebook": "simulate", "runs": runs}))
    told = render(tmp_path).read_text()
    assert told.count("<th>iterations</th>") == 1 and told.count(">tensor<") == 1  # above, and in no table below
    assert told.index("The same in all runs") < told.index("Runs compared, the best first") < told.index("Results (3")
    for cell in comparison_text(table).to_numpy().ravel():
        assert str(cell) in told
    assert 'alt="compared"' in told and (tmp_path / "compared.png").stat().st_size > 5000
