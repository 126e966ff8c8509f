"""Folders of the released code: a manifest beside their pictures, and what reads them then."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.worlds import save_clip, small_config
from ttsnap_lib import open_rewards
from ttsnap_lib.__main__ import main
from ttsnap_lib.errors import TrajectoryError
from ttsnap_lib.finetuning.data import open_images
from ttsnap_lib.finetuning.train import finetune
from ttsnap_lib.trajectories.layout import MANIFEST
from ttsnap_lib.trajectories.read import Trajectories, verify
from ttsnap_lib.trajectories.released import import_trajectories

MODEL = "black-forest-labs/FLUX.1-dev"
WHOLE = [f"a red circle and {k} cats" for k in range(3603)]


def released(folder, first=3600, n_prompts=2, seed=0):
    """Write pictures as the released code does: 3 images of 4 steps for each prompt from `first` on."""
    rng = np.random.default_rng(seed)
    for prompt in range(first, first + n_prompts):
        for image in range(3):
            place = folder / f"p{prompt:04d}" / f"id{image:03d}"
            place.mkdir(parents=True)
            for step in range(4):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place / f"s{step:02d}.png")
    return folder


@pytest.mark.parametrize("first", [0, 3600])
@pytest.mark.parametrize("texts", ["of the folders", "the whole set"])
def test_scored_finetuned_and_verified_from_any_first_prompt(first, texts, tmp_path, capsys):
    folder = released(tmp_path / "released", first)
    expected = WHOLE[first : first + 2]
    (tmp_path / "prompts.json").write_text(json.dumps(WHOLE if texts == "the whole set" else expected))
    clip = save_clip(tmp_path / "clip")
    assert main(["score", str(folder), "--reward", str(clip)]) == 1
    assert "import-trajectories" in capsys.readouterr().err
    given = ["import-trajectories", str(folder), "--model", MODEL, "--prompts", str(tmp_path / "prompts.json"), "-q"]
    assert main(given) == 0
    assert f"2 prompts x 3 images x 4 steps\nthe first, p{first:04d}, is {expected[0]!r}" in capsys.readouterr().out
    assert main(given) == 1 and "Remove it to import again" in capsys.readouterr().err

    assert main(["verify", str(folder), "-q"]) == 0
    out = tmp_path / "r.zarr"
    assert main(["score", str(folder), "--reward", "tests.worlds:brightness", "--out", str(out), "-q"]) == 0
    dataset = open_rewards(out)
    assert dataset["prompt_text"].values.tolist() == expected and dataset.attrs["model"] == MODEL
    last = np.array(Image.open(folder / f"p{first + 1:04d}" / "id002" / "s03.png"))
    assert dataset["base"].values[0, 1, 2, 3] == pytest.approx(last.mean())
    finetune(
        folder, tmp_path / "run", small_config(clip, group_size=3, batch_size=6, max_updates_per_step=1), device="cpu"
    )
    assert (tmp_path / "run" / "curriculum.json").exists()


def test_pictures_are_not_made_again_or_added_to(tmp_path, capsys):
    folder = released(tmp_path / "released")
    import_trajectories(folder, WHOLE, MODEL)
    (folder / "p3601" / "id001" / "s02.png").unlink()
    assert [finding.path for finding in verify(folder).findings] == ["p3601/id001/s02.png"]
    assert main(["verify", str(folder), "-q", "--repair"]) == 1 and "was imported" in capsys.readouterr().err
    with pytest.raises(TrajectoryError, match=r"p3601/id001/s02\.png is missing.*Fetch it"):
        Trajectories(folder).pictures(1)
    assert main(["generate", "--prompts", "pocket:evaluation:1", "--steps", "2", "--out", str(folder), "-q"]) == 1
    assert "was imported" in capsys.readouterr().err


def test_gaps_are_fine_and_other_pictures_are_told_apart(tmp_path):
    folder = released(tmp_path / "one", first=3598, n_prompts=1)
    released(folder, first=3601)
    found = import_trajectories(folder, WHOLE, MODEL)
    assert found.prompts == (WHOLE[3598], WHOLE[3601], WHOLE[3602])
    assert Trajectories(folder).path(2, 0, 1) == folder / "p3602" / "id000" / "s01.png"
    other = released(tmp_path / "other", first=3598, n_prompts=1, seed=1)
    released(other, first=3601, seed=1)
    import_trajectories(other, WHOLE, MODEL)
    assert open_images(folder).digest() != open_images(other).digest()


def test_what_cannot_be_imported_leaves_no_manifest(tmp_path):
    with pytest.raises(TrajectoryError, match="no pictures"):
        import_trajectories(tmp_path, WHOLE, MODEL)
    folder = released(tmp_path / "released")
    for texts in (WHOLE[:3], WHOLE[:3601]):
        with pytest.raises(TrajectoryError, match="position 3601 is p3601"):
            import_trajectories(folder, texts, MODEL)
    (folder / "p3600" / "id000" / "s01.png").unlink()
    with pytest.raises(TrajectoryError, match=r"p3600/id000/s01\.png is missing.*3 images x 4 steps"):
        import_trajectories(folder, WHOLE, MODEL)
    assert not (folder / MANIFEST).exists()
