"""``ttsnap score`` and ``ttsnap generate --score``."""

from __future__ import annotations

import numpy as np
import pytest

from tests import worlds
from tests.worlds import fill, save_clip, write_adapters
from ttsnap_lib import open_rewards
from ttsnap_lib.__main__ import main


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
    assert main([*common, "--score", str(tmp_path / "inline.zarr")]) == 0
    assert not list(tmp_path.rglob("s00.png"))
    assert main([*common, "--out", str(tmp_path / "set"), "--score", str(tmp_path / "after.zarr")]) == 0
    inline, after = open_rewards(tmp_path / "inline.zarr"), open_rewards(tmp_path / "after.zarr")
    assert inline["base"].shape == (1, 2, 2, 3)
    assert np.array_equal(inline["base"].values, after["base"].values)
    assert main(common) == 1 and "neither --out nor --score" in capsys.readouterr().err
