"""Finetuning runs on a tiny CLIP reward: checkpoints, resume, several processes, bad input."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tests.launch import environment, launcher
from tests.worlds import Looks, make_bank, save_clip, small_config
from ttsnap_lib.errors import CheckpointError, ConfigError, CurriculumError
from ttsnap_lib.finetuning import train as loop_module
from ttsnap_lib.finetuning.batches import batch_loss
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.finetuning.data import ImageBank, own_targets, score_step
from ttsnap_lib.finetuning.report import measures, metrics_table
from ttsnap_lib.finetuning.train import finetune
from ttsnap_lib.rewards.loading import load_reward

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("curriculum") / "tiny-clip")


@pytest.fixture(scope="module")
def bank():
    return make_bank()


@pytest.fixture(scope="module")
def held():
    return make_bank(5, seed=1)


def weights_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: load_file(path) for path in sorted(Path(folder).glob("step_*/*.safetensors"))}


def same(a: Path, b: Path) -> bool:
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.glob("step_*/*.safetensors")}
        for folder in (a, b)
    )
    return bool(first) and first == second


def close(a: Path, b: Path) -> None:
    expected = weights_of(b)
    for step, tensors in weights_of(a).items():
        for key, value in tensors.items():
            torch.testing.assert_close(value, expected[step][key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_learns_and_its_checkpoints_are_read(clip, bank, tmp_path, method):
    config = small_config(
        clip, method=method, epochs_per_step=8, keep="last", learning_rate=3e-3 if method == "lora" else 1e-3
    )
    events = []
    result = finetune(bank, tmp_path / "run", config, validation=bank, device="cpu", listener=events.append)
    table = result.table
    assert table["step"].tolist() == [2, 0] and (table["updates"] == 24).all()
    assert (table["after_mse"] < 0.7 * table["base_mse"]).all()
    assert table["after_tau"].mean() > table["base_tau"].mean() + 0.1
    assert table["before_mse"][0] == table["base_mse"][0] and table["before_mse"][1] != table["base_mse"][1]
    # What was measured while training is what the written checkpoints give.
    base = load_reward(clip, device="cpu")
    targets, plain = own_targets(base, bank), score_step(base, bank, 2)
    reward = load_reward(clip, device="cpu", adapters=tmp_path / "run")
    assert reward.adapter_steps == (0, 2) and reward.series_kind == method
    for row in table.itertuples():
        found = measures(score_step(reward.use_step(row.step), bank, row.step), targets)
        assert found.mse == pytest.approx(row.after_mse, rel=1e-4)
        assert found.tau == pytest.approx(row.after_tau, abs=0.06)
    np.testing.assert_allclose(score_step(reward.use_step(None), bank, 2), plain, rtol=1e-5)
    # Tables, events, facts.
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "run" / "metrics.parquet"), metrics_table(tmp_path / "run")
    )
    assert len(pd.read_csv(tmp_path / "run" / "losses.csv")) == 48
    assert [event["event"] for event in events].count("update") == 48
    assert result.disk_bytes > 0 and 0 <= result.wait_share <= 1 and result.pictures == 48 * 8
    assert result.trained_parameters < result.base_parameters or method == "full"
    about = json.loads((tmp_path / "run" / "step_02" / "adapter_config.json").read_text()) if method == "lora" else {}
    assert not about.get("base_model_name_or_path")


def test_each_step_starts_from_the_one_before(clip, bank, tmp_path):
    finetune(bank, tmp_path / "two", small_config(clip), device="cpu")
    finetune(bank, tmp_path / "one", small_config(clip, steps=(2,)), device="cpu")
    two, one = weights_of(tmp_path / "two"), weights_of(tmp_path / "one")
    assert all(torch.equal(two["step_02"][key], one["step_02"][key]) for key in one["step_02"])
    finetune(bank, tmp_path / "alone", small_config(clip, steps=(0,)), device="cpu")
    alone = weights_of(tmp_path / "alone")
    assert any(not torch.equal(two["step_00"][key], alone["step_00"][key]) for key in alone["step_00"])


def test_the_better_weights_are_kept(clip, bank, held, tmp_path):
    wrong = {"targets": -own_targets(load_reward(clip, device="cpu"), bank), "validation": held, "device": "cpu"}
    config = small_config(clip, steps=(0,), epochs_per_step=4, learning_rate=0.1)  # far enough to turn the order round
    (row,) = finetune(bank, tmp_path / "run", config, **wrong).table.itertuples()
    assert row.kept_update == 0 and row.after_tau == row.before_tau
    (last,) = finetune(bank, tmp_path / "last", config.replace(keep="last"), **wrong).table.itertuples()
    assert last.kept_update == last.updates == 12 and last.after_tau < row.after_tau


# -- every setting does something ---------------------------------------------------------------------------------

CHANGES = {
    "steps": (2, 1),
    "curriculum": False,
    "epochs_per_step": 2,
    "max_updates_per_step": 2,
    "method": "full",
    "lora_rank": 2,
    "lora_alpha": 2.0,
    "mse": 0.3,
    "centered_mse": 0.0,
    "preference": 1.0,
    "listwise": 1.0,
    "standardize": True,
    "batch_size": 4,
    "group_size": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.9,
    "beta1": 0.5,
    "beta2": 0.9,
    "warmup_updates": 2,
    "decay": "constant",
    "decay_floor": 0.1,
    "max_grad_norm": 1e-3,
    "mixed_precision": "bf16",
    "seed": 1,
    "save_dtype": "float16",
    "validation_prompts": 2,
    "preference_tau": 2.0,
    "keep": "last",
}
BESIDE = {  # what the fields need that do something beside another one
    "preference_tau": {"preference": 1.0},
    "keep": {"learning_rate": 0.1, "validation_prompts": 2, "epochs_per_step": 4},
}
TESTED_ALONE = {"reward", "trajectories", "validation", "accumulation", "save_every", "check_targets"}


def test_no_field_is_forgotten():
    names = {field.name for field in dataclasses.fields(CurriculumConfig)}
    assert names == CHANGES.keys() | TESTED_ALONE


def outcome(bank, folder, config):
    events = []
    finetune(bank, folder, config, device="cpu", listener=events.append)
    weights = {k: {n: (v.dtype, v.double().sum().item()) for n, v in w.items()} for k, w in weights_of(folder).items()}
    updates = [(event["update"], event["loss"]) for event in events if event["event"] == "update"]
    return weights, updates, [event["event"] for event in events]


@pytest.fixture(scope="module")
def plain(clip, bank, tmp_path_factory):
    return outcome(bank, tmp_path_factory.mktemp("plain") / "run", small_config(clip))


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_changes_the_run(clip, bank, plain, tmp_path, name):
    config = small_config(clip, **BESIDE.get(name, {}))
    before = outcome(bank, tmp_path / "before", config) if name in BESIDE else plain
    assert outcome(bank, tmp_path / "run", config.replace(**{name: CHANGES[name]})) != before


def test_the_same_settings_give_the_same_run(clip, bank, plain, tmp_path):
    assert outcome(bank, tmp_path / "run", small_config(clip)) == plain


def test_accumulation_changes_the_work_but_not_the_result(clip, bank, tmp_path, monkeypatch):
    finetune(bank, tmp_path / "plain", small_config(clip), device="cpu")
    calls, real = [], batch_loss
    monkeypatch.setattr(loop_module, "batch_loss", lambda scores, *a: calls.append(len(scores)) or real(scores, *a))
    finetune(bank, tmp_path / "parts", small_config(clip, accumulation=2), device="cpu")
    assert calls == [4] * 12  # 6 updates of 8 pictures, in halves
    close(tmp_path / "parts", tmp_path / "plain")


def test_validation_comes_from_the_configuration(clip, bank, held, tmp_path):
    bank.save(tmp_path / "bank")
    held.save(tmp_path / "held")
    config = small_config(clip, trajectories=str(tmp_path / "bank"), validation=str(tmp_path / "held"))
    table = finetune(None, tmp_path / "run", config, device="cpu").table
    given = finetune(bank, tmp_path / "given", small_config(clip), validation=held, device="cpu").table
    assert table["after_tau"].tolist() == given["after_tau"].tolist()
    with pytest.raises(CurriculumError, match="Say what to train on"):
        finetune(None, tmp_path / "none", small_config(clip), device="cpu")
    with pytest.raises(ConfigError, match="no or bf16 on a CPU"):
        finetune(None, tmp_path / "none", config.replace(mixed_precision="fp16"), device="cpu")


# -- killed and resumed -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a process that ends between two instructions."""


def run_until(bank, folder, config, stop, **options):
    count = 0

    def listener(event):
        nonlocal count
        count += event["event"] == "update"
        if event["event"] == "update" and count == stop:
            raise Killed

    with pytest.raises(Killed):
        finetune(bank, folder, config, device="cpu", listener=listener, **options)


@pytest.mark.parametrize("changes", [{}, {"method": "full", "learning_rate": 1e-3}, {"curriculum": False}])
def test_a_killed_run_ends_with_the_same_weights(clip, bank, held, tmp_path, changes):
    config = small_config(clip, epochs_per_step=2, save_every=2, **changes)
    whole = finetune(bank, tmp_path / "whole", config, validation=held, device="cpu")
    for stop in (1, 3, 4):  # before the first saved state, between two, at one; then again later
        run_until(bank, tmp_path / "cut", config, stop, validation=held)
    result = finetune(bank, tmp_path / "cut", config, validation=held, device="cpu")
    assert same(tmp_path / "whole", tmp_path / "cut")
    drop = ["elapsed_s"]
    pd.testing.assert_frame_equal(whole.table.drop(columns=drop), result.table.drop(columns=drop))
    losses = [pd.read_csv(tmp_path / name / "losses.csv") for name in ("whole", "cut")]
    pd.testing.assert_frame_equal(*losses)
    again = finetune(bank, tmp_path / "cut", config, validation=held, device="cpu")
    assert again.pictures == 0 and same(tmp_path / "whole", tmp_path / "cut")


def test_a_state_that_was_being_written_does_not_harm_the_one_before(clip, bank, tmp_path, monkeypatch):
    config = small_config(clip, save_every=1)
    finetune(bank, tmp_path / "whole", config, device="cpu")
    real, count = torch.save, 0

    def torn(content, file):
        nonlocal count
        count += 1
        if count == 3:
            file.write(b"half a state")
            raise Killed
        real(content, file)

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(Killed):
        finetune(bank, tmp_path / "cut", config, device="cpu")
    monkeypatch.setattr(torch, "save", real)
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["update"] == 2
    finetune(bank, tmp_path / "cut", config, device="cpu")
    assert same(tmp_path / "whole", tmp_path / "cut")


SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from tests.worlds import make_bank, small_config
from ttsnap_lib import finetune
from pathlib import Path
clip, folder = Path(sys.argv[1]), sys.argv[2]
finetune(make_bank(), folder, small_config(clip, accumulation=1, validation_prompts=1), device="cpu")
"""


def test_two_processes_train_as_one(clip, bank, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [*launcher(2), str(script), str(clip), str(tmp_path / "two")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    finetune(bank, tmp_path / "one", small_config(clip, validation_prompts=1), device="cpu")
    losses = [pd.read_csv(tmp_path / name / "losses.csv")["loss"].to_numpy() for name in ("one", "two")]
    assert len(losses[0]) == 6  # 5 groups: the last batch has one group, so one process stands by
    np.testing.assert_allclose(*losses, rtol=1e-4)
    close(tmp_path / "two", tmp_path / "one")


# -- bad input ----------------------------------------------------------------------------------------------------


def test_a_folder_of_another_run_is_refused(clip, bank, tmp_path):
    finetune(bank, tmp_path / "run", small_config(clip), device="cpu")
    before = (tmp_path / "run" / "step_02" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(CurriculumError, match="learning_rate: 0.003 there, 0.001 now"):
        finetune(bank, tmp_path / "run", small_config(clip, learning_rate=1e-3), device="cpu")
    with pytest.raises(CurriculumError, match="pictures"):
        finetune(make_bank(seed=5), tmp_path / "run", small_config(clip), device="cpu")
    assert (tmp_path / "run" / "step_02" / "adapter_model.safetensors").read_bytes() == before
    finetune(bank, tmp_path / "run", small_config(clip, learning_rate=1e-3), device="cpu", overwrite=True)
    (tmp_path / "other" / "step_03").mkdir(parents=True)
    with pytest.raises(CurriculumError, match="without curriculum.json"):
        finetune(bank, tmp_path / "other", small_config(clip), device="cpu")


def test_steps_without_images(clip, bank, tmp_path):
    with pytest.raises(CurriculumError, match="step 7 has no images"):
        finetune(bank, tmp_path / "run", small_config(clip, steps=(7, 2)), device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_names_step_and_batch(clip, bank, tmp_path, monkeypatch):
    config = small_config(clip, save_every=1)
    real, count = batch_loss, 0

    def sometimes(*arguments):
        nonlocal count
        count += 1
        loss, told = real(*arguments)
        return (loss * float("nan") if count == 5 else loss), told

    monkeypatch.setattr(loop_module, "batch_loss", sometimes)
    with pytest.raises(CurriculumError, match=r"not finite at step 0, update 1 \(prompts"):
        finetune(bank, tmp_path / "run", config, device="cpu")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert (state["position"], state["update"]) == (1, 1)
    assert all(torch.isfinite(value).all() for value in state["weights"].values())
    monkeypatch.setattr(loop_module, "batch_loss", real)
    finetune(bank, tmp_path / "run", config, device="cpu")
    finetune(bank, tmp_path / "whole", config, device="cpu")
    assert same(tmp_path / "run", tmp_path / "whole")


def test_a_reward_that_reads_no_prompt_is_trained(clip, bank, tmp_path):
    class Mean(Looks):
        outputs = ()

        def forward(self, pixels, text):
            return super().forward(pixels, text)[:, 0]

    config = small_config(clip, method="full", learning_rate=1e-3)
    table = finetune(bank, tmp_path / "run", config, validation=bank, device="cpu", reward=Mean()).table
    assert (table["after_mse"] < table["base_mse"]).all()
    with pytest.raises(
        CurriculumError, match=r"several numbers, or reads metadata: got \('looks.mean', 'looks.sigma'\)"
    ):
        finetune(bank, tmp_path / "other", config, reward=Looks())


def test_rewards_that_cannot_be_trained(clip, bank, tmp_path):
    with pytest.raises(CurriculumError, match="no weights to train"):
        finetune(
            bank, tmp_path / "run", small_config(clip), reward=load_reward(lambda prompts, images: [0.0] * len(prompts))
        )
    finetune(bank, tmp_path / "run", small_config(clip), device="cpu")
    adapted = load_reward(clip, device="cpu", adapters=tmp_path / "run")
    with pytest.raises(CurriculumError, match="noise-aware weights or adapters already"):
        finetune(bank, tmp_path / "again", small_config(clip), reward=adapted)
    unnamed = load_reward(clip, device="cpu")
    unnamed.default_lora_targets = None
    with pytest.raises(CurriculumError, match="names no layers for LoRA"):
        finetune(bank, tmp_path / "again", small_config(clip), reward=unnamed)


@pytest.mark.parametrize("changes", [{}, {"method": "full", "learning_rate": 1e-3}])
def test_a_reward_handed_in_comes_back_as_it_was(clip, bank, tmp_path, changes):
    config, reward = small_config(clip, **changes), load_reward(clip, device="cpu")
    before, about = score_step(reward, bank, 1), reward.fingerprint()
    required = {name: p.requires_grad for name, p in reward.module.named_parameters()}

    def interrupt(event):
        raise KeyboardInterrupt

    for folder in ("one", "two"):
        with pytest.raises(KeyboardInterrupt):
            finetune(bank, tmp_path / folder, config, reward=reward, listener=interrupt)
        finetune(bank, tmp_path / folder, config, reward=reward)
        assert reward.fingerprint() == about
        np.testing.assert_array_equal(score_step(reward, bank, 1), before)
        assert {name: p.requires_grad for name, p in reward.module.named_parameters()} == required
    assert same(tmp_path / "one", tmp_path / "two")
    reward.attach_steps(tmp_path / "one").use_step(2)
    np.testing.assert_array_equal(score_step(reward.use_step(None), bank, 1), before)


def test_what_is_not_finite_after_a_finite_loss_leaves_no_checkpoint(clip, bank, held, tmp_path, monkeypatch):
    # The loss of the only update is finite; what it does to the weights is not.
    config = small_config(clip, steps=(0,), max_updates_per_step=1, keep="last", learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(CurriculumError, match="validation at step 0 is not finite at step 0, update 1"):
        finetune(bank, tmp_path / "run", config, validation=held, device="cpu")
    assert not list((tmp_path / "run").glob("step_*"))
    real = batch_loss

    def steep(scores, *arguments):
        loss, told = real(scores, *arguments)
        return loss + (scores.sum() * 0).sqrt(), told  # adds 0, and the derivative of a root there

    monkeypatch.setattr(loop_module, "batch_loss", steep)
    with pytest.raises(CurriculumError, match=r"gradient is not finite at step 0, update 0 \(prompts"):
        finetune(bank, tmp_path / "two", config.replace(max_grad_norm=1.0), device="cpu")
    with pytest.raises(CurriculumError, match="weight .* is not finite at step 0, update 1"):
        finetune(bank, tmp_path / "three", config, device="cpu")
    assert not list(tmp_path.glob("*/step_*"))


ONE = {"group_size": 1, "centered_mse": 0.0}


@pytest.mark.parametrize(
    ("shape", "changes", "options", "words"),
    [
        ((0, 4), {}, {}, "0 prompts x 4 images"),
        ((6, 1), {**ONE, "validation_prompts": 2}, {}, "validation targets are the same"),
        ((6, 4), {}, {"validation": (5, 4), "validation_targets": np.ones((5, 4))}, "validation targets are the same"),
        ((6, 4), {}, {"validation_targets": np.ones((6, 4))}, "Name the validation pictures too"),
        ((6, 4), {}, {"targets": [[1.0, 2.0], [3.0]]}, "finite numbers"),
        ((6, 4), {}, {"targets": np.full((6, 4), "high")}, "finite numbers"),
    ],
)
def test_pictures_and_targets_that_cannot_be(clip, tmp_path, shape, changes, options, words):
    pictures = make_bank(*shape) if shape[0] else ImageBank(np.zeros((0, 4, 4, 32, 32, 3), np.uint8), [])
    if "validation" in options:
        options = options | {"validation": make_bank(*options["validation"], seed=2)}
    with pytest.raises(CurriculumError, match=words):
        finetune(pictures, tmp_path / "run", small_config(clip, **changes), device="cpu", **options)
    assert not (tmp_path / "run").exists()


def test_prompts_on_both_sides_are_told(clip, bank, tmp_path):
    with pytest.warns(UserWarning, match="6 validation prompts are trained on too"):
        finetune(bank, tmp_path / "run", small_config(clip, max_updates_per_step=1), validation=bank, device="cpu")
    mirrored = make_bank()
    mirrored.mirrored = True
    with pytest.raises(CurriculumError, match="mirror images of pictures trained on"):
        finetune(mirrored, tmp_path / "other", small_config(clip, validation_prompts=2), device="cpu")


def test_a_tau_that_is_undefined_is_missing_in_the_table(clip, bank, held, tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "score_step", lambda reward, images, *a, **k: np.ones((5, 4), np.float32))
    table = finetune(bank, tmp_path / "run", small_config(clip), validation=held, device="cpu").table
    assert table["after_tau"].isna().all() and table["after_mse"].notna().all()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "run" / "metrics.parquet"), table)


def test_a_damaged_state_is_named(clip, bank, tmp_path):
    finetune(bank, tmp_path / "run", small_config(clip), device="cpu")
    (tmp_path / "run" / "state.pt").write_bytes(b"PK\x03\x04 not a state")
    with pytest.raises(CheckpointError, match="state.pt"):
        finetune(bank, tmp_path / "run", small_config(clip), device="cpu")
