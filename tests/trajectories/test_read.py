"""Reading a trajectory folder: batches, damage, verification, how different its images are."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.worlds import FOLDER_STEPS, IDENTITY, PICTURE, fill, picture
from ttsnap_lib.errors import ConfigError, TrajectoryError
from ttsnap_lib.files import HIDDEN
from ttsnap_lib.trajectories.read import Trajectories, folder_diversity, pairwise_distances, verify


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "set", n_prompts=2)


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_what_is_written_is_read_back_to_the_last_bit(tmp_path, image_format):
    identity = {**IDENTITY, "image_format": image_format}
    found = Trajectories(fill(tmp_path / "set", n_prompts=2, identity=identity))
    assert found.path(1, 2, 3).relative_to(found.folder).as_posix() == f"p0001/id002/s03.{image_format}"
    for prompt in range(2):
        assert found.state(prompt).whole == {0, 1, 2}
        np.testing.assert_array_equal(found.read(prompt, 2, -1), picture(prompt, 2, FOLDER_STEPS - 1))
    assert verify(found.folder).ok


def test_pictures_of_a_choice(folder):
    found = Trajectories(folder)
    whole = found.pictures(1)
    assert whole.shape == (3, FOLDER_STEPS, *PICTURE, 3)
    np.testing.assert_array_equal(whole[1, 2], picture(1, 1, 2))
    np.testing.assert_array_equal(found.pictures(1, images=[2, 0], steps=[-1, 0]), whole[[2, 0]][:, [-1, 0]])
    for choice in ({"prompt": 2}, {"prompt": 0, "steps": [4]}, {"prompt": 0, "images": [3]}):
        with pytest.raises(ConfigError):
            found.pictures(**choice)


def test_missing_images_are_named(folder):
    os.unlink(folder / "p0000" / "id002" / "s01.png")
    with pytest.raises(TrajectoryError, match=r"id002/s01\.png is missing"):
        Trajectories(folder).pictures(0)
    Trajectories(folder).pictures(0, images=[0, 1])


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "emptied": lambda path: path.write_bytes(b""),
    "of another size": lambda path: Image.new("RGB", (3, 3)).save(path),
    "no image": lambda path: path.write_text("hello"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("with_checksums", [True, False])
def test_damaged_files_are_found_and_refused(folder, damage, with_checksums):
    DAMAGE[damage](folder / "p0001" / "id001" / "s02.png")
    if not with_checksums:
        shutil.rmtree(folder / HIDDEN)
    report = verify(folder)
    assert [(finding.kind, finding.path) for finding in report.findings] == [("damaged", "p0001/id001/s02.png")]
    assert report.repairs() == {(1, 1): [2]}
    with pytest.raises(TrajectoryError, match=r"p0001/id001/s02\.png"):
        Trajectories(folder).pictures(1)


def test_a_picture_from_elsewhere_is_found_by_its_checksum(folder):
    shutil.copy(folder / "p0000" / "id000" / "s02.png", folder / "p0001" / "id001" / "s02.png")
    Image.new("L", PICTURE[::-1]).save(folder / "p0001" / "id001" / "s03.png")  # can be scored, but was never written
    report = verify(folder)
    assert [(finding.kind, finding.path) for finding in report.findings] == [
        ("changed", "p0001/id001/s02.png"),
        ("changed", "p0001/id001/s03.png"),
    ]


def test_verify_tells_missing_foreign_and_leftover_apart(folder):
    shutil.rmtree(folder / "p0000" / "id001")
    os.unlink(folder / "p0001" / "id000" / "s03.png")
    for stray in ("notes.txt", "p0000/notes.txt", "p0001/id002/x.png", "p0001/id0001/s00.png", "p0001/id007/s00.png"):
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_text("mine")
    (folder / "p0000" / ".id001.abc.part").mkdir()
    (folder / "p0000" / ".DS_Store").write_text("the system's")
    before = sorted(folder.rglob("*"))
    report = verify(folder)
    kinds = {kind: sorted(f.path for f in report.findings if f.kind == kind) for kind in ("foreign", "leftover")}
    assert kinds["foreign"] == [
        "notes.txt",
        "p0000/notes.txt",
        "p0001/id0001",
        "p0001/id002/x.png",
        "p0001/id007",
    ]
    assert kinds["leftover"] == ["p0000/.id001.abc.part"]
    assert report.repairs() == {(0, 1): [0, 1, 2, 3], (1, 0): [3]}
    assert "5 missing, 5 foreign, 1 leftover" in str(report)
    assert sorted(folder.rglob("*")) == before  # nothing was removed or mended


def test_a_torn_journal_line_is_ignored(folder):
    journal = next((folder / HIDDEN / "checksums").glob("*.jsonl"))
    journal.write_bytes(journal.read_bytes()[:-20])
    assert verify(folder).ok
    shutil.rmtree(folder / "p0001" / "id002")
    fill(folder, n_prompts=2)  # appends after the torn line
    assert verify(folder).ok
    assert all(json.loads(line) for line in journal.read_bytes().splitlines()[-1:])


def test_distances_are_what_they_say():
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    half = np.where(np.arange(2)[:, None, None] == 0, black, white)
    distances = pairwise_distances(np.stack([black, white, half]))
    np.testing.assert_allclose(distances, [1, np.sqrt(0.5), np.sqrt(0.5)])  # pairs (0, 1), (0, 2), (1, 2)


def test_diversity_of_a_folder(folder, tmp_path):
    frame = folder_diversity({"plain": folder, "again": folder}, step=1, prompts=[1])
    assert frame["setting"].tolist() == ["plain", "again"]
    expected = pairwise_distances(np.stack([picture(1, image, 1) for image in range(3)])).mean()
    assert frame["distance"].tolist() == [expected, expected]
    assert frame["images"].tolist() == [3, 3]
    with pytest.raises(TrajectoryError, match="two or more"):
        folder_diversity({"plain": fill(tmp_path / "one", n_images=1)})
