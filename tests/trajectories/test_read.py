from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ttsnap_lib.errors import ConfigError, DiskError, TrajectoryError
from ttsnap_lib.trajectories import layout as _images
from ttsnap_lib.trajectories import write as _image_writer
from ttsnap_lib.trajectories.layout import (
    HIDDEN,
    MANIFEST,
    Manifest,
    extend,
    image_name,
    prompt_name,
    scan_prompt,
    step_name,
)
from ttsnap_lib.trajectories.read import Trajectories, read_batches, verify
from ttsnap_lib.trajectories.write import ImageWriter

N_STEPS, SIZE = 4, (6, 8)
IDENTITY = {"n_steps": N_STEPS, "height": SIZE[0], "width": SIZE[1], "image_format": "png", "seed": 0, "model": "tiny"}
PROMPTS = ["a cat", "a dog"]


def picture(prompt, image, step):
    rng = np.random.default_rng([prompt, image, step])
    return rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def fill(folder, images=3, image_format="png", prompts=(0, 1)):
    extend(folder, {**IDENTITY, "image_format": image_format}, PROMPTS, images)
    with ImageWriter(folder, image_format, "test", workers=2) as writer:
        for prompt in prompts:
            for image in range(images):
                writer.start(prompt, image, range(N_STEPS))
            for step in range(N_STEPS):
                for image in range(images):
                    writer.put(prompt, image, step, lambda key=(prompt, image, step): picture(*key))
    return folder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "set")


def test_names_widen_when_needed():
    assert (prompt_name(7), image_name(7), step_name(7, "png")) == ("p0007", "id007", "s07.png")
    assert (prompt_name(12345), image_name(1234), step_name(123, "webp")) == ("p12345", "id1234", "s123.webp")


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_what_is_written_is_read_back_to_the_last_bit(tmp_path, image_format):
    found = Trajectories(fill(tmp_path / "set", image_format=image_format))
    assert found.path(1, 2, 3).relative_to(found.folder).as_posix() == f"p0001/id002/s03.{image_format}"
    for prompt in range(2):
        assert found.state(prompt).whole == {0, 1, 2}
        np.testing.assert_array_equal(found.read(prompt, 2, -1), picture(prompt, 2, N_STEPS - 1))
    assert verify(found.folder).ok


def test_batches_come_in_order_and_never_mix_prompts(folder):
    batches = list(read_batches(folder, batch_size=5))
    assert [(batch.prompt, len(batch.pixels)) for batch in batches] == [(0, 5), (0, 5), (0, 2), (1, 5), (1, 5), (1, 2)]
    keys = [(b.prompt, i, s) for b in batches for i, s in zip(b.image.tolist(), b.step.tolist(), strict=True)]
    assert keys == [(p, i, s) for p in range(2) for i in range(3) for s in range(N_STEPS)]
    np.testing.assert_array_equal(batches[3].pixels[1], picture(1, 0, 1))
    assert batches[3].text == "a dog"
    assert batches[3].pil()[0].size == (SIZE[1], SIZE[0])


def test_batches_of_a_choice(folder):
    batches = list(read_batches(folder, steps=[-1, 0], prompts=[1], images=[2, 0], batch_size=99))
    assert len(batches) == 1
    assert batches[0].image.tolist() == [2, 2, 0, 0]
    assert batches[0].step.tolist() == [3, 0, 3, 0]
    for options in ({"steps": [4]}, {"prompts": [2]}, {"images": [3]}, {"batch_size": 0}, {"on_missing": "x"}):
        with pytest.raises(ConfigError):
            read_batches(folder, **options)


def test_a_consumer_may_stop_early(folder):
    reader = read_batches(folder, batch_size=1, prefetch=2)
    next(reader)
    reader.close()


def test_missing_images_are_named_or_skipped(folder):
    shutil.rmtree(folder / "p0001" / "id001")
    os.unlink(folder / "p0000" / "id002" / "s01.png")
    with pytest.raises(TrajectoryError, match="id002"):
        list(read_batches(folder))
    images = {(b.prompt, i) for b in read_batches(folder, on_missing="skip") for i in b.image.tolist()}
    assert images == {(0, 0), (0, 1), (1, 0), (1, 2)}


def truncated(path):
    path.write_bytes(path.read_bytes()[:-30])


def emptied(path):
    path.write_bytes(b"")


def wrong_size(path):
    Image.new("RGB", (3, 3)).save(path)


def no_image(path):
    path.write_text("hello")


def gray(path):
    Image.new("L", SIZE[::-1]).save(path)


def bomb(path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))


@pytest.mark.parametrize("damage", [truncated, emptied, wrong_size, no_image, gray, bomb])
@pytest.mark.parametrize("with_checksums", [True, False])
def test_damaged_files_are_found_and_refused(folder, damage, with_checksums):
    path = folder / "p0001" / "id001" / "s02.png"
    damage(path)
    if not with_checksums:
        shutil.rmtree(folder / HIDDEN)
    report = verify(folder)
    assert [(finding.kind, finding.path) for finding in report.findings] == [("damaged", "p0001/id001/s02.png")]
    assert report.repairs() == {(1, 1): [2]}
    with pytest.raises(TrajectoryError, match=r"p0001/id001/s02\.png"):
        list(read_batches(folder))


def test_huge_pictures_are_not_opened(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(_images, "MAX_PIXELS", 100)
    with pytest.raises(TrajectoryError, match="too large"):
        _images.read_image(tmp_path / "a.png")


def test_a_picture_from_elsewhere_is_found_by_its_checksum(folder):
    shutil.copy(folder / "p0000" / "id000" / "s02.png", folder / "p0001" / "id001" / "s02.png")
    report = verify(folder)
    assert [(finding.kind, finding.path) for finding in report.findings] == [("changed", "p0001/id001/s02.png")]


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
    fill(folder)  # appends after the torn line
    assert verify(folder).ok
    assert all(json.loads(line) for line in journal.read_bytes().splitlines()[-1:])


# -- manifest -------------------------------------------------------------------------------------------------


def test_manifest_goes_round_and_only_grows(tmp_path):
    extend(tmp_path, IDENTITY, PROMPTS, 3, {"host": "a", "time": "1"})
    again = extend(tmp_path, IDENTITY, PROMPTS[:1], 2, {"host": "a", "time": "2"})
    assert (again.prompts, again.images_per_prompt, len(again.provenance)) == (tuple(PROMPTS), 3, 1)
    wider = extend(tmp_path, IDENTITY, [*PROMPTS, "a bird"], 5, {"host": "b"})
    assert Manifest.read(tmp_path) == wider
    assert (len(wider.prompts), wider.images_per_prompt, len(wider.provenance)) == (3, 5, 2)


def test_other_settings_are_refused_with_the_difference(tmp_path):
    extend(tmp_path, {**IDENTITY, "scheduler": {"class": "Euler", "shift": 1.0}}, PROMPTS, 3)
    before = (tmp_path / MANIFEST).read_bytes()
    with pytest.raises(TrajectoryError, match=r"scheduler\.shift: 1\.0 there, 3\.0 now.*seed: 0 there, 1 now"):
        extend(tmp_path, {**IDENTITY, "seed": 1, "scheduler": {"class": "Euler", "shift": 3.0}}, PROMPTS, 3)
    with pytest.raises(TrajectoryError, match="prompt 1 differs"):
        extend(tmp_path, {**IDENTITY, "scheduler": {"class": "Euler", "shift": 1.0}}, ["a cat", "a cow"], 3)
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_equal_weights_outweigh_the_name_of_the_model():
    old = Manifest({**IDENTITY, "weights": "aa"}, ("x",), 1)
    assert old.differences({**IDENTITY, "model": "/elsewhere/tiny", "weights": "aa"}) == []
    assert len(old.differences({**IDENTITY, "weights": "bb"})) == 1
    assert len(old.differences({**IDENTITY, "model": "other", "weights": None})) == 1


def test_images_without_manifest_are_left_alone(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(TrajectoryError, match="holds images but no"):
        extend(folder, IDENTITY, PROMPTS, 3)
    assert (folder / "p0000" / "id000" / "s00.png").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 9}', '{"schema": 1, "identity": {}}', "\xff"])
def test_broken_manifests(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content.encode("latin-1"))
    with pytest.raises(TrajectoryError):
        Trajectories(tmp_path)
    with pytest.raises(TrajectoryError):
        extend(tmp_path, IDENTITY, PROMPTS, 1)


def test_no_folder(tmp_path):
    with pytest.raises(TrajectoryError, match="no trajectory folder"):
        verify(tmp_path / "none")


# -- writing --------------------------------------------------------------------------------------------------


def test_an_image_appears_only_when_whole(tmp_path):
    extend(tmp_path, IDENTITY, PROMPTS, 1)
    with ImageWriter(tmp_path, "png", "test") as writer:
        writer.start(0, 0, range(N_STEPS))
        writer.start(0, 1, range(N_STEPS))
        for step in range(N_STEPS):
            writer.put(0, 0, step, lambda step=step: picture(0, 0, step))
        writer.put(0, 1, 0, lambda: picture(0, 1, 0))
    assert sorted(path.name for path in (tmp_path / "p0000").iterdir()) == ["id000"]
    assert writer.images_written == 1
    assert writer.bytes_written > 0


def test_mending_keeps_what_else_stands_there(folder):
    stray = folder / "p0000" / "id000" / "mine.txt"
    stray.write_text("mine")
    good = (folder / "p0000" / "id000" / "s01.png").read_bytes()
    truncated(folder / "p0000" / "id000" / "s02.png")
    with ImageWriter(folder, "png", "again") as writer:
        writer.start(0, 0, [2])
        for step in range(N_STEPS):
            writer.put(0, 0, step, lambda step=step: picture(0, 0, step))
    assert stray.read_text() == "mine"
    assert (folder / "p0000" / "id000" / "s01.png").read_bytes() == good
    assert {finding.kind for finding in verify(folder).findings} == {"foreign"}


def test_full_disk_is_a_typed_error_and_leaves_whole_images(tmp_path, monkeypatch):
    extend(tmp_path, IDENTITY, PROMPTS, 2)
    count = iter(range(100))

    # The disk is full from the 7th file on: in the middle of the second image.
    class Full:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def write(self, content):
            if next(count) >= 6:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(content)

    monkeypatch.setattr(_image_writer, "open", lambda path, mode: Full(open(path, mode)), raising=False)  # noqa: SIM115

    def write_all():
        with ImageWriter(tmp_path, "png", "test", workers=1) as writer:
            for image in range(2):
                writer.start(0, image, range(N_STEPS))
                for step in range(N_STEPS):
                    writer.put(0, image, step, lambda key=(0, image, step): picture(*key))

    with pytest.raises(DiskError, match="disk full"):
        write_all()
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "p0000").iterdir()) == ["id000"]
    assert scan_prompt(tmp_path / "p0000", N_STEPS, "png").whole == {0}
    np.testing.assert_array_equal(Trajectories(tmp_path).read(0, 0, 3), picture(0, 0, 3))


@pytest.fixture
def read_only():
    """Give a folder that this process, root or not, may not write to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extend(folder, IDENTITY, PROMPTS, 2)
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_read_only_folder(read_only):
    with pytest.raises(DiskError, match="cannot write"):
        ImageWriter(read_only, "png", "test")
    with pytest.raises(DiskError, match="cannot write"):
        extend(read_only, IDENTITY, PROMPTS, 3)
    assert Manifest.read(read_only).images_per_prompt == 2
