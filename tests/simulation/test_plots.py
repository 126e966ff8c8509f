"""Figures and tables that a reader takes from a simulation, and the commands that follow from it."""

import shlex

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel, Schedule, best_of_n, save_rewards
from ttsnap_lib.__main__ import main
from ttsnap_lib.errors import ConfigError
from ttsnap_lib.simulation import metrics, plots
from ttsnap_lib.simulation.plots import (
    by_budget,
    optimize_command,
    pruning_method,
    search_command,
)
from ttsnap_lib.simulation.simulate import curves
from ttsnap_lib.style import METHOD_LABELS, reward_label
from ttsnap_lib.tensors.tensor import make_rewards, synthetic_rewards

PRESET = "flux-512+image_reward"

COST = CostModel(step=3, verify=0.5, decode=1, n_steps=8)
SCHEDULE = Schedule((1, 4), (0.5, 0.4))


@pytest.fixture(scope="module")
def result():
    dataset = synthetic_rewards(12, 40, 8, rewards=("image_reward", "pickscore"))
    return curves(dataset, ["best_of_n", "ttsp", "ttsnap"], [80, 120, 200], COST, SCHEDULE)


@pytest.fixture(scope="module")
def two_methods():
    cost = CostModel.load(PRESET)
    rewards = synthetic_rewards(12, 120, 20, rewards=("image_reward", "pickscore"))
    budgets = [multiple * cost.total(1) for multiple in (2, 4, 8)]
    return curves(rewards, ["best_of_n", "ttsnap"], budgets, cost, PUBLISHED_SCHEDULE, iterations=40, rng=0)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_reward_against_budget(result, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *a: pytest.fail("a plot must not show itself"))
    frame = result.frame()
    ax = plots.reward_against_budget(frame, "pickscore")
    assert ax.get_xlabel() == "budget per prompt (TFLOPs)" and "PickScore" in ax.get_ylabel()
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == ["Best-of-N", "TTSp", "TTSnap"]
    rows = frame[(frame["method"] == "ttsnap") & (frame["reward"] == "pickscore")]
    assert np.array_equal(lines["TTSnap"].get_ydata(), rows["mean"])
    assert len({line.get_marker() for line in lines.values()}) == 3  # told apart without colour too
    _, given = plt.subplots()
    assert plots.reward_against_budget(frame, "pickscore", ax=given) is given
    with pytest.raises(ConfigError, match="Name the reward"):
        plots.reward_against_budget(frame)


def test_gains_stand_under_rewards_at_the_same_budgets(result):
    figure, frame = plots.reward_panels(result, COST), result.frame()
    top, _, below, _ = figure.axes[:4]
    assert below.get_ylabel() == "gain over Best-of-N\nin ImageReward, paired"
    for ax, column, at in ((top, "mean", 2), (below, "gain", 2)):
        rows = frame.query("method == 'ttsnap' and reward == 'image_reward'")
        line = ax.get_lines()[at]
        assert line.get_xdata() == pytest.approx(result.budgets / COST.total(1))
        assert np.array_equal(line.get_ydata(), rows[column])
    assert {text.get_text() for text in top.texts} == {"Best-of-N", "TTSp", "TTSnap", "perfect verifier"}


def test_a_perfect_verifier_has_the_best_of_all_seeds(two_methods):
    cost, dataset = CostModel.load(PRESET), synthetic_rewards(12, 120, 20)
    found = curves(dataset, ["ttsnap"], [4 * cost.total(1)], cost, PUBLISHED_SCHEDULE, iterations=400, rng=0)
    drawn = plots.reward_panels(found, cost).axes[0].get_lines()[-1].get_ydata()
    best = best_of_n(dataset["base"].values[0, :, :, -1], int(found.n[1, 0])).mean()
    assert drawn == pytest.approx([best], abs=0.02)  # subsets and interpolation


def test_gains_are_dots_with_intervals(result):
    gains = result.relative_gains()
    ax = plots.gain_dots(gains)
    shown = {
        (label.get_text(), round(line.get_xdata()[0], 6))
        for label, line in zip(ax.get_yticklabels(), ax.get_lines(), strict=False)
    }
    assert shown == {
        (f"{METHOD_LABELS[row.method]}, {reward_label(row.reward)}", round(row.relative_gain, 6))
        for row in gains.itertuples()
    }
    assert not plots.gain_dots(gains[:0]).collections  # Best-of-N alone


def test_tau_per_step():
    dataset = synthetic_rewards(5, 20, 8).isel(step=[0, 3, 7])
    ax = plots.tau_per_step(dataset)
    assert [line.get_label() for line in ax.get_lines()] == ["base reward", "noise-aware reward"]
    aware = metrics.kendall_tau(dataset["noise_aware"].values[0], dataset["base"].values[0, :, :, -1])
    assert np.array_equal(ax.get_lines()[1].get_ydata(), aware.mean)
    assert ax.get_lines()[1].get_xdata().tolist() == [0, 3, 7]


def test_a_paper_gets_narrow_figures_and_a_latex_table(two_methods):
    gains = two_methods.relative_gains()
    lines = plots.gains_latex(gains).splitlines()
    row = gains.query("reward == 'pickscore'").iloc[0]
    assert lines[0] == r"\begin{tabular}{lr}" and lines[2] == r"reward & TTSnap \\"
    assert lines[5] == rf"PickScore & {row['relative_gain']:.1f} [{row['low']:.1f}, {row['high']:.1f}] \\"
    with plots.paper_style("column"):
        figure, ax = plt.subplots(layout="constrained")
        plots.speed_up(two_methods, CostModel.load(PRESET), "image_reward", ax=ax)
        own = [plots.reward_panels(two_methods, CostModel.load(PRESET)), plots.gain_dots(gains).figure]
    assert [one.get_figwidth() for one in own] == [3.3, 3.3] and plots.gain_dots(gains).figure.get_figwidth() == 5.2
    assert figure.get_figwidth() == 3.3 and ax.texts[0].get_fontsize() < 7 < plt.rcParams["font.size"]


def test_steps_without_noise_aware_scores_are_grey():
    dataset = synthetic_rewards(5, 20, 8)
    source = np.array([["finetuned"] * 3 + ["copied_from_base"] * 5])
    ax = plots.tau_per_step(dataset.assign(noise_aware_source=(("reward", "step"), source)))
    assert [patch.get_x() + 0.5 for patch in ax.patches] == [3, 4, 5, 6, 7]
    assert np.isfinite(ax.get_lines()[1].get_ydata()).tolist() == [True] * 3 + [False] * 5


def test_survivor_funnel():
    ax = plots.survivor_funnel(COST, SCHEDULE, 20)
    assert [bar.get_width() for bar in ax.patches] == [20, 10, 4]
    texts = " ".join(text.get_text() for text in ax.texts)
    assert "keep ratio (alpha) 0.5" in texts and "choose one" in texts
    assert f"20 seeds → 10 → 4 → best  ({COST.total(20, SCHEDULE):.4g}" in ax.get_title(loc="left")


def test_the_table_sets_the_methods_side_by_side(two_methods):
    result = two_methods
    table, frame = by_budget(result, "TFLOPs"), result.frame()
    page = plots.unbroken(table).to_html()
    assert "text-align: center" in page and page.count("cannot run") == 0 and page.count("<tr>") == 2 * 3 + 3
    assert "\n[" in page and " [" not in page  # an interval below its value, or the table is wider than a window
    assert table.index.names == ["reward", "budget (TFLOPs)"] and len(table) == 2 * 3
    assert list(dict.fromkeys(table.columns.get_level_values(0))) == ["Best-of-N", "TTSnap"]
    assert ("Best-of-N", "over Best-of-N") not in table.columns
    ours = frame[frame["method"] == "ttsnap"]
    assert table["TTSnap", "N"].tolist() == ours["n"].tolist()
    assert table["TTSnap", "mean reward"].tolist() == [f"{mean:.3f}" for mean in ours["mean"]]
    assert table["TTSnap", "over Best-of-N"].iloc[0].startswith(f"{ours['gain'].iloc[0]:+.3f} [")


def test_what_best_of_n_needs_lies_on_its_own_curve(two_methods):
    result = two_methods
    table, frame = by_budget(result, "TFLOPs"), result.frame()
    ours = frame[frame["method"] == "ttsnap"].reset_index(drop=True)
    told = 0
    for k, text in enumerate(table["TTSnap", "Best-of-N needs (TFLOPs)"]):
        curve = result.ladder[:, result.rewards.index(ours["reward"][k])].mean(-1)
        if text.startswith(">"):  # beyond the pool, which is told in its place
            assert ours["mean"][k] > curve.max() and text.split()[1] == f"{result.ladder_spent[-1]:.3g}"
        else:
            told += 1
            needs = float(text.split()[0])
            assert np.interp(needs, result.ladder_spent, curve) == pytest.approx(ours["mean"][k], abs=4e-3)
    assert told


def test_the_headline_tells_the_budget_next_to_ten_images(two_methods):
    cost, pool = CostModel.load(PRESET), synthetic_rewards(24, 120, 20)
    found = curves(pool, ["ttsnap"], [m * cost.total(1) for m in (4, 9, 14)], cost, PUBLISHED_SCHEDULE, rng=0)
    row, needs = (frame.query("method == 'ttsnap'").iloc[1] for frame in (found.frame(), found.needs()))
    told = plots.headline(found, cost)
    assert told.startswith(f"At the price of 9 images, TTSnap tries {row['n']} seeds and gains {row['gain']:+.3f} [+")
    assert told.endswith(f"{needs['needs'] / row['budget']:.2f} x the compute.") and "ImageReward" in told
    assert "may be chance: the interval includes 0" in plots.headline(two_methods, cost, reward="pickscore")
    worse = CostModel(step=1, verify=30)  # each check costs more than an image
    assert "loses -" in plots.headline(curves(pool, ["ttsnap"], [500], worse, PUBLISHED_SCHEDULE, rng=0), worse)
    single = curves(pool.isel(prompt=[0]), ["ttsnap"], [8 * cost.total(1)], cost, PUBLISHED_SCHEDULE, rng=0)
    assert plots.headline(single, cost).endswith("One prompt tells no interval.")


def test_speed_up_is_what_best_of_n_needs_over_the_budget(two_methods):
    cost = CostModel.load(PRESET)
    ax = plots.speed_up(two_methods, cost, "image_reward")
    needs = two_methods.needs().query("reward == 'image_reward'")
    drawn = ax.get_lines()[0]
    assert drawn.get_xdata() == pytest.approx([2, 4, 8])
    known = needs["needs"].to_numpy() <= two_methods.ladder_spent[-1]
    assert drawn.get_ydata()[known] == pytest.approx((needs["needs"] / needs["budget"]).to_numpy()[known])
    assert np.isnan(drawn.get_ydata()[~known]).all()
    assert {text.get_text() for text in ax.texts} == {"TTSnap", "Best-of-N"}


def test_what_the_noise_aware_reward_adds_is_paired(result):
    gains = result.relative_gains().query("reward == 'pickscore'").set_index("method")["relative_gain"]
    assert f": {gains['ttsnap'] - gains['ttsp']:+.1f} [" in plots.over_ttsp(result, "pickscore")
    dataset = synthetic_rewards(12, 40, 8)
    single = curves(dataset, ["ttsp", "ttsnap"], [120], COST, SCHEDULE, rng=0)
    value = (single.per_prompt[2] - single.per_prompt[1]).mean()
    assert f": {value:+.3f} [" in plots.over_ttsp(single)


def test_the_notebook_answers_for_one_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    given = {"multiples": "[4]", "iterations": "20", "trials": "20"}
    assert main(["run", "simulate", *(word for key, value in given.items() for word in ("-p", key, value))]) == 0
    folder = next((tmp_path / "runs" / "simulate").glob("*/schedules.csv")).parent
    schedules = pd.read_csv(folder / "schedules.csv")
    assert "step 0 keep 0.5, step 5 keep 0.4" in set(schedules["schedule"]) and schedules["behind"][0] == 0
    tuned = [int(part.split()[1]) for part in schedules["schedule"][0].split(", ")]
    assert f"steps: {tuned}" in capsys.readouterr().out  # the last line runs what was tuned


def test_the_notebook_answers_for_a_tensor_without_noise_aware_rewards(tmp_path, monkeypatch, capsys):
    """Such as `ttsnap score` writes before anything was finetuned."""
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    values = synthetic_rewards(4, 24, 20, rewards=("image_reward",))["base"].values
    save_rewards(make_rewards(values, rewards=["image_reward"]), tmp_path / "base.zarr")
    drafts = make_rewards(values[..., 7:8], rewards=["image_reward"], steps=[7])
    save_rewards(drafts, tmp_path / "drafts.zarr")
    methods = ["best_of_n", "ttsp", "ttsnap", {"drafts": str(tmp_path / "drafts.zarr"), "finish": 1}]
    given = {
        "tensor": str(tmp_path / "base.zarr"),
        "methods": repr(methods),
        "cost": PRESET,
        "multiples": "[2, 3]",
        "iterations": "20",
        "trials": "20",
    }
    assert main(["run", "simulate", *(word for key, value in given.items() for word in ("-p", key, value))]) == 0
    lines = capsys.readouterr().out.splitlines()
    optimize, search = (next(line for line in lines if f"ttsnap {word} " in line) for word in ("optimize", "search"))
    assert "--method ttsp" in optimize and "--adapters" not in search
    folder = next((tmp_path / "runs" / "simulate").glob("*/schedules.csv")).parent
    assert set(pd.read_csv(folder / "relative_gains.csv")["method"]) == {"ttsp", "ttsnap", "draft 8, finish 1"}


@pytest.mark.parametrize(("methods", "report", "wanted"), [
    (["best_of_n", "ttsp", "ttsnap"], [], "ttsp"),  # the second reward is not noise-aware
    (["best_of_n", "ttsp", "ttsnap"], ["second"], "ttsnap"),
    (["ttsp", "best_of_n"], ["second"], "ttsp"),
    (["best_of_n"], [], "best_of_n"),
])  # fmt: skip
def test_what_a_schedule_is_tuned_for(methods, report, wanted):
    values, source = np.zeros((2, 2, 3, 4)), np.repeat([["finetuned"], ["copied_from_base"]], 4, axis=1)
    dataset = make_rewards(values, values, rewards=["first", "second"], noise_aware_source=source)
    assert pruning_method(dataset, methods, report) == wanted


def test_a_long_error_of_a_cell_keeps_its_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    assert main(["run", "simulate", "-p", "cost", "flux-512+imagereward"]) == 1
    assert "Did you mean 'flux-512+image_reward'?" in capsys.readouterr().err


def test_the_optimize_line_is_taken_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = optimize_command("synthetic", PRESET, [2.0000000001, 4, 6.5], ["image_reward"])
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
    ("flux", PRESET, "ttsnap", ["black-forest-labs/FLUX.1-dev", "--size 512", "--adapters NOISE_AWARE"], "--tiny"),
    ("sdxl", "sdxl-1024-tiny+image_reward", "ttsp", ["--size 1024", "--tiny madebyollin/taesdxl"], "--adapters"),
    ("pocket-sdxl", "pocket-sdxl+pocket-clip", "best_of_n", ["--model pocket-sdxl"], "--schedule"),
    ("synthetic stand-in", PRESET, "ttsnap", ["--model MODEL"], "synthetic"),
])  # fmt: skip
def test_the_search_line_names_what_the_tensor_was_made_with(model, cost, method, wanted, missing):
    line = search_command(model, ["image_reward"], cost, 9, PUBLISHED_SCHEDULE, method)
    assert all(words in line for words in wanted) and missing not in line
