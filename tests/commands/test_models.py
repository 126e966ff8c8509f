"""``ttsnap generate``, ``verify`` and ``score`` on a tiny saved pipeline."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests import worlds
from tests.conftest import ROOT
from tests.families import write_lora
from tests.worlds import fill, save_clip, write_adapters
from ttsnap_lib import open_rewards
from ttsnap_lib.__main__ import main
from ttsnap_lib.commands.options import picture_size
from ttsnap_lib.trajectories.layout import Manifest
from ttsnap_lib.trajectories.read import verify


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(worlds.save("flux", tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def call(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")

    def run(*more, out="set"):
        fixed = ["--model", model, "--prompts", str(tmp_path / "prompts.txt"), "--images", "2", "--steps", "2"]
        fixed += ["--size", "32", "--max-sequence-length", "16", "--batch-size", "4", "--threads", "1", "--quiet"]
        return main(["generate", *fixed, "--out", str(tmp_path / out), *map(str, more)])

    return run


def test_generate_verify_repair(call, tmp_path, capsys):
    assert call() == 0
    assert "4 images made, 0 found" in capsys.readouterr().out
    assert call() == 0
    assert "0 images made, 4 found" in capsys.readouterr().out
    folder = tmp_path / "set"
    assert main(["verify", str(folder), "--quiet"]) == 0
    kept = (folder / "p0001" / "id000" / "s01.png").read_bytes()
    shutil.rmtree(folder / "p0001")
    assert main(["verify", str(folder), "--quiet"]) == 1
    assert "missing" in capsys.readouterr().out
    assert main(["verify", str(folder), "--quiet", "--repair"]) == 0
    assert (folder / "p0001" / "id000" / "s01.png").read_bytes() == kept


def test_a_lora_reaches_the_pictures_and_their_repair(call, tmp_path, capsys):
    file = write_lora("flux", tmp_path / "lora")
    assert call("--lora", f"{file}:0.5") == 0
    folder = tmp_path / "set"
    assert Manifest.read(folder).identity["lora_from"] == [f"{file}:0.5"]
    kept = (folder / "p0001" / "id000" / "s01.png").read_bytes()
    shutil.rmtree(folder / "p0001")
    assert main(["verify", str(folder), "--quiet", "--repair"]) == 0
    assert (folder / "p0001" / "id000" / "s01.png").read_bytes() == kept
    capsys.readouterr()
    assert call() == 1 and "made with other settings" in capsys.readouterr().err
    assert call(out="plain") == 0
    assert (tmp_path / "plain" / "p0001" / "id000" / "s01.png").read_bytes() != kept


@pytest.mark.parametrize("scheduler", ["dpm++", "unipc"])
def test_the_scheduler_of_a_folder_is_built_again_for_its_repair(call, tmp_path, scheduler):
    """DPM-Solver's configuration has an infinite bound, which a manifest must be able to tell."""
    assert call("--scheduler", scheduler) == 0
    folder = tmp_path / "set"
    kept = (folder / "p0001" / "id000" / "s01.png").read_bytes()
    shutil.rmtree(folder / "p0001")
    assert main(["verify", str(folder), "--quiet", "--repair"]) == 0
    assert (folder / "p0001" / "id000" / "s01.png").read_bytes() == kept


def test_settings_reach_the_manifest(call, tmp_path):
    assert call("--negtome", 2, "--guidance", 2.5, "--seed", 3, "--format", "webp", "--scheduler", "flow-euler") == 0
    identity = Manifest.read(tmp_path / "set").identity
    assert identity["negtome"]["group_size"] == 2
    assert (identity["guidance"], identity["seed"], identity["image_format"]) == (2.5, 3, "webp")
    (tmp_path / "set" / "p0000" / "id001" / "s00.webp").write_bytes(b"")
    assert main(["verify", str(tmp_path / "set"), "--quiet", "--repair"]) == 0


def test_shards_of_the_command_line(call, tmp_path):
    assert call("--shard", "1/2", "--batch-size", 2) == 0
    assert not verify(tmp_path / "set").ok
    assert call("--shard", "0/2", "--batch-size", 2) == 0
    assert verify(tmp_path / "set").ok


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--images", 0), "--images"),
        (("--size", 30), "multiple of"),
        (("--prompts", "none.txt"), "cannot be read"),
        (("--model", "pocket-fluxx"), "pocket-flux"),
        (("--shard", "2/2"), "shard"),
        (("--seed", 9), "seed: 0 there, 9 now"),
        (("--scheduler", "ddim"), "scheduler"),
        (("--dtype", "fp8"), "dtype"),
    ],
)
def test_bad_input_is_one_line(call, capsys, more, says):
    call()
    capsys.readouterr()
    assert call(*more) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.splitlines()[-1].startswith("ttsnap: ")  # before it, the bar of loading the model
    assert "Traceback" not in error


def test_sizes():
    assert picture_size("512") == (512, 512)
    assert picture_size("512x768") == (512, 768)


def test_verify_names_a_folder_that_is_none(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert "no trajectory folder" in capsys.readouterr().err


def test_a_reward_without_a_tensor_is_refused_before_anything_is_made(tmp_path, capsys):
    out = tmp_path / "pool"
    assert main(["generate", "--prompts", "pocket:evaluation:1", "--out", str(out), "--reward", "image_reward"]) == 1
    assert "Add --score TENSOR.zarr" in capsys.readouterr().err and not out.exists()


def test_every_module_of_commands_is_in_the_help_and_defaults_are_told_once():
    import pkgutil

    from ttsnap_lib import commands
    from ttsnap_lib.__main__ import parser

    assert {info.name for info in pkgutil.iter_modules(commands.__path__)} == {*commands.COMMANDS, "options"}
    choices = parser()._subparsers._group_actions[0].choices
    for name, one in choices.items():
        text = " ".join(one.format_help().split())
        assert "(default: None)" not in text and "(default: [])" not in text, name
    assert "base seed (default: 0)" in choices["generate"].format_help()


def test_rewards_are_named_one_by_one_everywhere():
    from ttsnap_lib.__main__ import parser

    given = ["--reward", "a", "--reward", "b"]
    heads = (
        "search ring --out best",
        "cost",
        "optimize t",
        "compare s --tensor t",
        "generate",
        "score f",
        "export t -o v",
    )
    for words in heads:
        assert parser().parse_args([*words.split(), *given]).reward == ["a", "b"]
    assert parser().parse_args(["search", *given, "a ring", "--out", "best"]).prompt == "a ring"  # is no third reward


# -- score ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Trajectories of 3 prompts x 3 images x 4 steps."""
    return fill(tmp_path_factory.mktemp("trajectories") / "set")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a tiny CLIP reward."""
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


def test_score(folder, clip, tmp_path, capsys):
    series = write_adapters(clip, tmp_path / "run", steps=(1,))
    out = tmp_path / "r.zarr"
    command = [
        "score", str(folder), "--out", str(out), "--reward", f"mine={clip}", "--reward-option", "mine.scale=1.0",
        "--reward", "tests.worlds:brightness", "--noise-aware", f"mine={series}", "--device", "cpu", "-q",
    ]  # fmt: skip
    assert main(command) == 0
    tensor = open_rewards(out)
    assert list(tensor["reward"].values) == ["mine", "brightness"]
    assert np.abs(tensor["base"].values[0]).max() <= 1  # a cosine, as asked
    assert tensor["noise_aware_source"].values[0].tolist().count("finetuned") == 1
    assert "36 pictures" in capsys.readouterr().out
    assert main(command) == 0 and "nothing left to score" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["my_reward:brightness", "./my_reward.py:brightness"])
def test_the_script_finds_a_reward_function_in_the_working_folder(folder, tmp_path, source):
    shutil.copy(ROOT / "tests/cases/reward/my_reward.py", tmp_path)
    # As an installed script is: the working folder is not on the path.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ttsnap_lib.__main__ import run; sys.exit(run())"
    command = [sys.executable, "-P", "-c", code, "score", str(folder), "--reward", source, "-q", "--out", "r.zarr"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    opened = open_rewards(tmp_path / "r.zarr")
    assert opened["reward"].values.tolist() == ["brightness"] and opened["base"].values.max() > 1


def test_skipped_pictures_are_listed(tmp_path, capsys):
    broken = fill(tmp_path / "set")
    (broken / "p0001" / "id001" / "s02.png").write_bytes(b"x")
    command = ["score", str(broken), "--reward", "tests.worlds:brightness", "-q"]
    assert main(command) == 1
    assert "p0001/id001/s02.png" in capsys.readouterr().err
    assert main([*command, "--on-error", "skip"]) == 0
    assert "prompt 1, image 1, step 2" in capsys.readouterr().err
    assert open_rewards(tmp_path / "set.zarr").sizes["prompt"] == 3  # beside the folder


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--reward", "pickscor"], "Did you mean"),
        (["--reward", "a=math:sqrt", "--reward", "b=math:sqrt", "--reward-option", "scale=1"], "for which reward"),
        (["--reward", "math:sqrt", "--reward-option", "scale"], "KEY=VALUE"),
        (["--reward", "math:sqrt", "--noise-aware", "x=nowhere"], "--noise-aware"),
    ],
)
def test_bad_options(folder, tmp_path, capsys, options, says):
    assert main(["score", str(folder), "--out", str(tmp_path / "r.zarr"), *options]) == 1
    assert says in capsys.readouterr().err and not (tmp_path / "r.zarr").exists()


def test_generate_and_score(tmp_path, capsys):
    model = worlds.save("sdxl", tmp_path / "model")
    (tmp_path / "prompts.json").write_text('["a red circle", "the cat"]')
    common = [
        "generate", "--model", str(model), "--prompts", str(tmp_path / "prompts.json"), "--images", "2", "--steps", "3",
        "--size", "32", "--threads", "1", "--device", "cpu", "-q", "--reward", "tests.worlds:brightness",
    ]  # fmt: skip
    seeing = [*common, "--reward", "pocket-clip", "--embeddings"]
    assert main([*seeing, "--score", str(tmp_path / "inline.zarr")]) == 0
    assert not list(tmp_path.rglob("s00.png"))
    assert main([*seeing, "--out", str(tmp_path / "set"), "--score", str(tmp_path / "after.zarr")]) == 0
    assert "embeddings of" in capsys.readouterr().out
    inline, after = open_rewards(tmp_path / "inline.zarr"), open_rewards(tmp_path / "after.zarr")
    assert inline["base"].shape == (2, 2, 2, 3)
    assert np.array_equal(inline["base"].values[0], after["base"].values[0])
    np.testing.assert_allclose(inline["embedding"].values, after["embedding"].values, atol=2e-3)  # float16
    assert inline.attrs["made_with"] == after.attrs["made_with"] and inline.attrs["made_with"]["seed"] == 0
    assert main([*common, "--draft", "2", "--score", str(tmp_path / "drafts.zarr")]) == 0
    drafts = open_rewards(tmp_path / "drafts.zarr")
    assert drafts["step"].values.tolist() == [1] and drafts.attrs["made_with"] == inline.attrs["made_with"]
    assert main([*common, "--draft", "2", "--out", str(tmp_path / "set")]) == 1
    assert "--draft keeps no pictures" in capsys.readouterr().err
    assert main([*common[:-2], "--embeddings", "--out", str(tmp_path / "set")]) == 1
    assert "without --score" in capsys.readouterr().err
    assert main(common) == 1 and "neither --out nor --score" in capsys.readouterr().err
    assert main([*common, "--score", str(tmp_path / "third.zarr"), "--format", "webp"]) == 1
    assert "no picture is kept" in capsys.readouterr().err and not (tmp_path / "third.zarr").exists()
