"""What a finetuned run is told and shown by: the command, the comparison on fresh prompts, figures, mirrored pictures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.finetuning.test_weights import write_checkpoints
from tests.worlds import SMALL_CURRICULUM, make_bank, save_clip
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.__main__ import main
from ttsnap_lib.errors import CheckpointError, CurriculumError
from ttsnap_lib.finetuning.config import load_config
from ttsnap_lib.finetuning.data import ImageBank, open_images, score_step, with_mirror_images
from ttsnap_lib.finetuning.report import (
    LiveCurves,
    compare_at_steps,
    gain_by_budget,
    gain_by_step,
    loss_curves,
    losses_table,
    metrics_table,
    recorded,
    tau_by_step,
    verdict,
)
from ttsnap_lib.finetuning.train import finetune
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.simulation.simulate import curves

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("report") / "tiny-clip")


@pytest.fixture(scope="module")
def run(clip, tmp_path_factory):
    """Folder of a run that the command made; its configuration and pictures stand beside it."""
    place = tmp_path_factory.mktemp("command")
    settings = {**SMALL_CURRICULUM, "steps": list(SMALL_CURRICULUM["steps"]), "reward": str(clip), "epochs_per_step": 4}
    (place / "small.yaml").write_text(yaml.safe_dump(settings))
    make_bank().save(place / "train")
    make_bank(seed=1).save(place / "held")
    command = ["finetune", "--config", str(place / "small.yaml"), "--trajectories", str(place / "train")]
    options = ["--validation", str(place / "held"), "--out", str(place / "run"), "--device", "cpu", "-q"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTSNAP_DATA_CACHE", str(place / "cache"))
        assert main([*command, *options, "-p", "seed", "3"]) == 0
    return place / "run"


def test_the_command_tells_its_run_and_takes_changes(run, capsys):
    config = run.parent / "small.yaml"
    assert load_config(run / "config.json").seed == 3
    again = ["finetune", "--config", str(config), "--trajectories", str(run.parent / "train"), "--out", str(run)]
    assert main([*again, "--validation", str(run.parent / "held"), "--device", "cpu", "-q", "-p", "seed", "3"]) == 0
    told = capsys.readouterr().out
    assert "base_tau" in told and "2 steps in" in told and f"--noise-aware {run}" in told
    assert main(["finetune", "--config", str(config), "--show", "-p", "learning_rate", "1e-3"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["learning_rate"] == 1e-3 and shown["steps"] == [2, 0]
    assert main(["finetune", "--config", str(config), "-p", "steps", "[2, 0"]) == 1
    told = capsys.readouterr().err
    assert "steps" in told and "Quote it for the shell." in told


def test_the_command_adopts_full_checkpoints(clip, tmp_path, capsys):
    write_checkpoints(clip, tmp_path / "authors")
    command = ["import-checkpoints", str(tmp_path / "authors"), "--reward", str(clip), "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run")
    assert load_reward(clip, device="cpu", adapters=tmp_path / "run").adapter_steps == (3, 14)


@pytest.fixture(scope="module")
def compared(run, clip):
    """Table and gains on prompts that the run has not seen."""
    fresh = make_bank(seed=2)
    reward = load_reward(clip, device="cpu", adapters=run)
    targets = score_step(load_reward(clip, device="cpu"), fresh, -1)
    table, gains = compare_at_steps(reward, fresh, targets)
    assert reward.step is None
    return table, gains


def test_comparison_is_paired(compared):
    table, gains = compared
    assert table["step"].tolist() == [0, 2] and gains.shape == (6, 2)
    np.testing.assert_allclose(table["gain"], table["noise_aware_tau"] - table["base_tau"], atol=1e-12)
    np.testing.assert_allclose(table["gain"], gains.mean(0), atol=1e-12)
    for name in ("base_tau", "noise_aware_tau", "gain"):
        assert ((table[f"{name}_low"] <= table[name]) & (table[name] <= table[f"{name}_high"])).all()


def test_what_is_not_there_is_said(clip, tmp_path):
    reward = load_reward(clip, device="cpu")
    with pytest.raises(CurriculumError, match="no noise-aware weights to compare"):
        compare_at_steps(reward, make_bank(), np.ones((6, 4)))
    with pytest.raises(CheckpointError, match="Finish at least one step"):
        losses_table(tmp_path)


def test_figures_show_the_tables(run, compared):
    losses = losses_table(run)
    ax = loss_curves(losses)
    assert len(ax.lines) == 4 and sum(len(line.get_xdata()) for line in ax.lines[::2]) == len(losses)
    assert [text.get_text() for text in ax.texts] == ["2", "0"] and ax.get_yscale() == "log"
    assert loss_curves(losses.assign(loss=-losses["loss"])).get_yscale() == "linear"
    table = metrics_table(run)
    lines = {line.get_label(): line for line in tau_by_step(table).lines}
    assert set(lines) == {"base reward", "before this step", "noise-aware"}
    np.testing.assert_array_equal(lines["noise-aware"].get_xdata(), [0, 2])
    np.testing.assert_allclose(lines["noise-aware"].get_ydata(), table.sort_values("step")["after_tau"])
    ax = gain_by_step({"this run": compared[0], "another": compared[0]})
    np.testing.assert_allclose(ax.lines[1].get_ydata(), compared[0].sort_values("step")["gain"])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["this run", "another"]


def test_the_verdict_counts_steps_whose_interval_leaves_out_zero():
    table = pd.DataFrame({
        "step": [2, 0, 4], "gain": [0.05, -0.02, 0.01], "gain_low": [0.02, -0.03, -0.01], "gain_high": [0.08, -0.01, 0.03]
    })  # fmt: skip
    told = verdict(table)
    assert "better than the base reward at 1 of 3 steps, worse at 1" in told
    assert told.index("step 0: -0.020 [-0.030, -0.010]") < told.index("step 2: +0.050 [+0.020, +0.080]")


def test_recorded_rewards_are_what_the_reward_says_and_can_be_simulated(run, clip):
    held = make_bank(seed=1)
    reward = load_reward(clip, adapters=run, device="cpu")
    targets = score_step(reward, held, held.n_steps - 1)
    tensor = recorded(reward, held, targets, [1, 0])
    assert list(tensor["step"]) == [0, 1, held.n_steps - 1] and tensor.sizes["image"] == held.n_images
    assert tensor["noise_aware_source"].values[0].tolist() == ["finetuned", "copied_from_base", "copied_from_base"]
    np.testing.assert_array_equal(tensor["base"].values[0, :, :, -1], targets)
    with reward.at(0):
        np.testing.assert_array_equal(tensor["noise_aware"].values[0, :, :, 0], score_step(reward, held, 0))
    np.testing.assert_array_equal(tensor["noise_aware"].values[..., 1], tensor["base"].values[..., 1])
    cost = CostModel(step=1, verify=0.1, n_steps=held.n_steps)
    budgets = [1.2 * cost.total(1), 1.6 * cost.total(1), 2 * cost.total(1)]
    found = curves(tensor, ["ttsp", "ttsnap"], budgets, cost, Schedule((0,), (0.5,)), iterations=20, rng=0)
    ax = gain_by_budget({"this run": found, "shipped": found}, cost)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["this run", "shipped", "base reward (TTSp)"]  # in the order and colours of gain_by_step
    frame = found.frame()
    np.testing.assert_allclose(ax.lines[2].get_ydata(), frame.loc[frame["method"] == "ttsnap", "gain"])


def test_curves_are_drawn_while_it_trains(clip, run, tmp_path, capsys):
    live = LiveCurves(every_s=0.0)
    config = load_config(run.parent / "small.yaml", epochs_per_step=1)
    finetune(make_bank(), tmp_path / "run", config, validation=make_bank(seed=1), device="cpu", listener=live)
    left, right = live.figure().axes
    assert len(left.lines) == 4 and len(right.lines) == 3 and len(live.rows) == 2
    assert "Figure" in capsys.readouterr().out  # outside a notebook `display` prints


def test_the_end_of_a_step_is_drawn_however_seldom_curves_are(monkeypatch):
    live, drawn = LiveCurves(every_s=1e9), []
    monkeypatch.setattr(live, "_show", lambda: drawn.append(len(live.rows)))
    for step in (5, 3):
        live({"event": "update", "step": step, "update": 1, "loss": 1.0})
        live({"event": "step", "step": step, "base_tau": 0.4, "before_tau": 0.4, "after_tau": 0.5})
    assert drawn == [1, 2]


def test_mirrored_pictures_swap_left_and_right():
    captions = ["a small red ring left of a large blue square on a pink background",
                "a small red ring on a pink background"]  # fmt: skip
    bank = ImageBank(np.random.default_rng(0).integers(0, 256, (2, 1, 1, 8, 8, 3), np.uint8), captions)
    both = with_mirror_images(bank)
    assert both.mirrored and not bank.mirrored
    assert both.prompts[:2] == captions and "right of" in both.prompts[2] and both.prompts[3] == captions[1]
    np.testing.assert_array_equal(both.pixels[2:], bank.pixels[:, :, :, :, ::-1])


def test_pictures_of_the_pocket_world_are_made_once(tmp_path):
    made = []
    bank = open_images("pocket-flux:train:2x1+mirror", steps=[0, 3], progress=lambda done, total: made.append(done))
    assert len(bank.prompts) == 4 and bank.n_images == 1 and made
    made.clear()
    again = open_images("pocket-flux:train:2x1", steps=[0, 3], progress=lambda done, total: made.append(done))
    np.testing.assert_array_equal(again.pixels, bank.pixels[:2])
    assert not made and list(tmp_path.rglob("pocket-flux-train-2x1-*"))


def test_the_notebook_holds_prompts_out_when_no_others_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    settings = "{validation: null, validation_prompts: 2, epochs_per_step: 1, warmup_updates: 1, group_size: 4}"
    pictures = {"trajectories": "pocket-sdxl:train:6x4", "validation": "", "test": "pocket-sdxl:evaluation:3x6"}
    given = {**pictures, "steps": "[2]", "settings": settings}
    assert main(["run", "finetune", *(word for key, value in given.items() for word in ("-p", key, value))]) == 0
    table = pd.read_csv(next((tmp_path / "runs" / "finetune").glob("*/comparison.csv")))
    assert table["step"].tolist() == [2] and table["base_tau"].notna().all()
