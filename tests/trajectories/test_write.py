"""Writing: an image is there whole or not at all, also when the disk fills up or refuses."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.worlds import FOLDER_STEPS, IDENTITY, fill, picture, prompts_of
from ttsnap_lib.errors import DiskError
from ttsnap_lib.trajectories import write
from ttsnap_lib.trajectories.layout import Manifest, extend, scan_prompt
from ttsnap_lib.trajectories.read import Trajectories, verify
from ttsnap_lib.trajectories.write import ImageWriter

PROMPTS = prompts_of(2)


def test_an_image_appears_only_when_whole(tmp_path):
    with ImageWriter(tmp_path, "png", "test") as writer:
        writer.start(0, 0, range(FOLDER_STEPS))
        writer.start(0, 1, range(FOLDER_STEPS))
        for step in range(FOLDER_STEPS):
            writer.put(0, 0, step, lambda step=step: picture(0, 0, step))
        writer.put(0, 1, 0, lambda: picture(0, 1, 0))
    assert sorted(path.name for path in (tmp_path / "p0000").iterdir()) == ["id000"]
    assert writer.bytes_written > 0


def test_mending_keeps_what_else_stands_there(tmp_path):
    folder = fill(tmp_path / "set", n_prompts=1, n_images=1)
    stray = folder / "p0000" / "id000" / "mine.txt"
    stray.write_text("mine")
    good = (folder / "p0000" / "id000" / "s01.png").read_bytes()
    (folder / "p0000" / "id000" / "s02.png").write_bytes(b"")
    with ImageWriter(folder, "png", "again") as writer:
        writer.start(0, 0, [2])
        for step in range(FOLDER_STEPS):
            writer.put(0, 0, step, lambda step=step: picture(0, 0, step))
    assert stray.read_text() == "mine"
    assert (folder / "p0000" / "id000" / "s01.png").read_bytes() == good
    assert {finding.kind for finding in verify(folder).findings} == {"foreign"}


class Full:
    """A file on a disk that is full from the 7th file on: in the middle of the second image."""

    written = 0

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, content):
        Full.written += 1
        if Full.written > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(content)


def test_full_disk_is_a_typed_error_and_leaves_whole_images(tmp_path, monkeypatch):
    extend(tmp_path, IDENTITY, PROMPTS, 2)
    monkeypatch.setattr(write, "open", lambda path, mode: Full(open(path, mode)), raising=False)  # noqa: SIM115

    def write_all():
        with ImageWriter(tmp_path, "png", "test", workers=1) as writer:
            for image in range(2):
                writer.start(0, image, range(FOLDER_STEPS))
                for step in range(FOLDER_STEPS):
                    writer.put(0, image, step, lambda key=(0, image, step): picture(*key))

    with pytest.raises(DiskError, match="disk full"):
        write_all()
    assert sorted(path.name for path in (tmp_path / "p0000").iterdir()) == ["id000"]
    assert scan_prompt(tmp_path / "p0000", FOLDER_STEPS, "png").whole == {0}
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
