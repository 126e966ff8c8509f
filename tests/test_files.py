"""Writing so that a process may end at any point, and errors of the disk in our words."""

from __future__ import annotations

import errno
import os
import resource
import signal

import pytest

from ttsnap_lib import files as _writing
from ttsnap_lib.__main__ import main
from ttsnap_lib.errors import DiskError, TensorError
from ttsnap_lib.files import atomic_folder, atomic_write, disk_error, tidy, typed_disk_errors


class Killed(BaseException):
    """Stands for a process that ends between two instructions."""


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _write(folder, text):
    with atomic_folder(folder) as part:
        (part / "file").write_text(text)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(_writing, "_exchange", lambda one, other: False)
    for text in ("old", "new"):
        _write(tmp_path / "set", text)
    assert (tmp_path / "set" / "file").read_text() == "new"
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "set") as part:
        (part / "file").write_text("broken")
        raise ZeroDivisionError
    assert (tmp_path / "set" / "file").read_text() == "new" and _names(tmp_path) == ["set"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux swaps two folders in one step")
def test_no_reader_finds_the_place_empty(tmp_path, monkeypatch):
    _write(tmp_path / "set", "old")
    monkeypatch.setattr(os, "replace", None)  # nothing but the swap is used
    _write(tmp_path / "set", "new")
    assert (tmp_path / "set" / "file").read_text() == "new"


def test_a_folder_that_was_being_replaced_comes_back(tmp_path, monkeypatch):
    _write(tmp_path / "set", "old")
    monkeypatch.setattr(_writing, "_exchange", lambda one, other: False)
    monkeypatch.setattr(
        _writing.shutil, "rmtree", lambda *given, **options: None
    )  # the process is gone: nothing tidies
    real, count = os.replace, iter(range(9))

    def ends(one, other):
        if next(count) == 1:  # the old folder is away, the new one not there
            raise Killed
        real(one, other)

    monkeypatch.setattr(os, "replace", ends)
    with pytest.raises(Killed):
        _write(tmp_path / "set", "new")
    monkeypatch.undo()
    assert not (tmp_path / "set").exists()
    (tmp_path / ".other.x.part").mkdir()
    (tmp_path / ".set.csv").write_text("hidden, and not ours")
    tidy(tmp_path, "set")
    assert (tmp_path / "set" / "file").read_text() == "old"
    assert _names(tmp_path) == [".other.x.part", ".set.csv", "set"]


def test_a_half_written_file_is_gone_after_the_next_write(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "unlink", lambda *given: None)
    with pytest.raises(Killed), atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise Killed
    monkeypatch.undo()
    (left,) = _names(tmp_path)
    with atomic_write(tmp_path / "file") as file:  # the writer of the leftover is gone, this one is at work
        file.write(b"whole")
        (part,) = _names(tmp_path)
        assert part != left
        with atomic_write(tmp_path / "file", "w") as other:
            other.write("another writer at the same time")
    assert (tmp_path / "file").read_text() == "whole" and _names(tmp_path) == ["file"]


def _limited(write):
    """Call `write` where no file may have more than 4096 bytes, and return the error."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DiskError, match="disk full") as caught:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return caught.value


def test_libraries_that_hide_the_reason_are_understood(tmp_path):
    import pandas as pd
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python sets it at its start
    weights = torch.zeros(100_000)

    def tensors():
        with atomic_folder(tmp_path / "folder") as part:
            save_file({"a": weights}, part / "a.safetensors")

    def state():
        with atomic_write(tmp_path / "state.pt") as file:
            torch.save(weights, file)

    def picture():
        with atomic_write(tmp_path / "a.png") as file:
            Image.effect_noise((300, 300), 80).save(file, format="PNG")

    def table():
        with atomic_write(tmp_path / "a.parquet") as file:
            pd.DataFrame({"a": torch.rand(10_000).numpy()}).to_parquet(file)

    for write in (tensors, state, picture, table):
        error = _limited(write)
        assert str(tmp_path) in str(error) and "room for what is written" in str(error)
    signal.signal(signal.SIGXFSZ, old)
    assert _names(tmp_path) == []


def test_which_errors_are_of_the_disk():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there")
    assert "disk full while writing x" in str(disk_error(full, "x"))
    assert "disk full" in str(disk_error(RuntimeError("IoError: No space left on device (os error 28)"), "x"))
    wrapped = RuntimeError("writer failed")
    wrapped.__cause__ = full
    assert "disk full" in str(disk_error(wrapped, "x"))
    assert "cannot read x" in str(disk_error(PermissionError(errno.EACCES, "Permission denied"), "x", "read"))
    for other in (FileNotFoundError(errno.ENOENT, "no"), ValueError("no"), KeyError(28)):
        assert disk_error(other, "x") is None
        with pytest.raises(type(other)), typed_disk_errors("x"):
            raise other
    bug = ValueError("a bug")  # while something else went on after a file could not be read
    bug.__context__ = PermissionError(errno.EACCES, "Permission denied")
    assert disk_error(bug, "x") is None
    with pytest.raises(TensorError), typed_disk_errors("x"):
        raise TensorError("ours stay as they are", remedy="none") from full


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "disk full"), (errno.EROFS, "cannot open or write")])
def test_a_library_that_meets_a_bad_disk_gives_one_line(monkeypatch, capsys, number, says):
    def broken(path):
        raise OSError(number, os.strerror(number), "/cache/file")

    monkeypatch.setattr("ttsnap_lib.trajectories.read.verify", lambda folder, **options: broken(folder))
    assert main(["verify", "somewhere"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"ttsnap: {says}") and "/cache/file" in said and said.count("\n") == 1
    with pytest.raises(OSError):
        main(["--traceback", "verify", "somewhere"])
