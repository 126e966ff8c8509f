"""``ttsnap generate`` and ``ttsnap verify`` on a tiny saved pipeline."""

from __future__ import annotations

import shutil

import pytest

from tests import worlds
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

    assert {info.name for info in pkgutil.iter_modules(commands.__path__)} == {*commands.MODULES, "options"}
    choices = parser()._subparsers._group_actions[0].choices
    for name, one in choices.items():
        text = " ".join(one.format_help().split())
        assert "(default: None)" not in text and "(default: [])" not in text, name
    assert "base seed (default: 0)" in choices["generate"].format_help()


def test_rewards_of_a_search_may_be_given_one_by_one_or_together():
    from ttsnap_lib.__main__ import parser

    head = ["search", "a ring", "--candidates", "2", "--out", "best"]
    for given in (["--reward", "a", "--reward", "b"], ["--reward", "a", "b"]):
        assert parser().parse_args([*head, *given]).reward == ["a", "b"]
