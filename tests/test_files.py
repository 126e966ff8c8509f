"""Writing so that a process may end at any point, and errors of the disk in our words."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref

import pytest

from ttsnap_lib import files
from ttsnap_lib.__main__ import main
from ttsnap_lib.errors import ConfigError, DiskError, TensorError
from ttsnap_lib.files import (
    InUseError,
    atomic_folder,
    atomic_write,
    disk_error,
    lock,
    others_at_work,
    parse_shard,
    parse_yaml,
    prefetch,
    read_json,
    read_yaml,
    refuse_other,
    shard_lock,
    tidy,
    typed_disk_errors,
)  # fmt: skip


class Killed(BaseException):
    """Stands for a process that ends between two instructions."""


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _write(folder, text):
    with atomic_folder(folder) as part:
        (part / "file").write_text(text)


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        _write(tmp_path / "set", text)
    assert (tmp_path / "set" / "file").read_text() == "new"
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "set") as part:
        (part / "file").write_text("broken")
        raise ZeroDivisionError
    assert (tmp_path / "set" / "file").read_text() == "new" and _names(tmp_path) == ["set"]


def test_a_folder_that_was_being_replaced_comes_back(tmp_path, monkeypatch):
    _write(tmp_path / "set", "old")
    monkeypatch.setattr(files.shutil, "rmtree", lambda *given, **options: None)  # the process is gone: nothing tidies
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


def test_what_a_killed_writer_left_is_gone_after_the_next_write(tmp_path):
    code = f"import os\nfrom ttsnap_lib.files import atomic_write\nwith atomic_write({str(tmp_path / 'file')!r}) as file:\n    os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = _names(tmp_path)
    with atomic_write(tmp_path / "file") as file:  # the writer of the leftover is gone, this one is at work
        file.write(b"whole")
        (part,) = _names(tmp_path)
        assert part != left
        with atomic_write(tmp_path / "file", "w") as other:
            other.write("another writer at the same time")
    assert (tmp_path / "file").read_text() == "whole" and _names(tmp_path) == ["file"]


def test_a_lock_has_one_holder_and_ends_with_it(tmp_path):
    with (
        lock(tmp_path / "a.lock"),
        pytest.raises(InUseError, match="in use by another process"),
        lock(tmp_path / "a.lock"),
    ):
        pass
    with lock(tmp_path / "a.lock", wait=True):
        pass


def test_shards_of_one_count_share_a_folder(tmp_path):
    with shard_lock(tmp_path, (0, 2)) as first:
        pass
    assert others_at_work(tmp_path, (1, 2)) and not others_at_work(tmp_path, (0, 2))
    for taken in ((0, 2), (0, 3)):
        with pytest.raises(InUseError, match=f"asked for shard {taken[0]}/{taken[1]}"), shard_lock(tmp_path, taken):
            pass
    with shard_lock(tmp_path, (1, 2)) as second:
        second.close()
    first.close()
    with shard_lock(tmp_path, (0, 3)) as held:
        held.close()


@pytest.mark.parametrize("shard", ["1/1", "x", (1, 2, 3), "-1/2", (0, 0)])
def test_a_shard_that_cannot_be_is_refused(shard):
    with pytest.raises(ConfigError, match="shard"):
        parse_shard(shard)


def test_a_launcher_tells_the_shard(monkeypatch):
    assert parse_shard(None) == (0, 1) and parse_shard("1/3") == parse_shard((1, 3)) == (1, 3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_shard(None) == (1, 4)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", '{"a": 1, "a": 2}', "'a' stands twice"),
        ("a.json", '{"a": ', "not whole JSON"),
        ("a.json", "[1]", "mapping at the top"),
        ("a.yaml", "a: 1\na: 2", "'a' stands twice"),
        ("a.yaml", "a: !!python/object:os.system {}", "cannot be read as YAML"),
    ],
)
def test_a_broken_file_is_named_with_its_reason(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_text(content)
    read = read_json if name.endswith("json") else read_yaml
    with pytest.raises(ConfigError, match=says) as caught:
        read(path, "settings", remedy="Write it again.")
    assert str(path) in str(caught.value) and "Write it again." in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "absent", "settings", remedy="")
    with pytest.raises(ConfigError, match="not a file"):
        read(tmp_path, "settings", remedy="")


def test_numbers_in_yaml_are_numbers():
    assert parse_yaml("{rate: 1e-3, base: &b {a: 1}, more: {<<: *b, c: 2}}", "text", remedy="") == {
        "rate": 0.001, "base": {"a": 1}, "more": {"a": 1, "c": 2},
    }  # fmt: skip


def test_other_settings_are_refused_with_each_difference():
    old = {"seed": 0, "scheduler": {"class": "Euler", "shift": 3.0}, "steps": [1, 2]}
    refuse_other("folder", old, {**old, "steps": (1, 2)}, ConfigError, "")
    with pytest.raises(ConfigError, match="scheduler.shift: 3.0 there, 1.0 now; seed: 0 there, 1 now") as caught:
        refuse_other(
            "folder", old, {**old, "seed": 1, "scheduler": {"class": "Euler", "shift": 1.0}}, ConfigError, "Go."
        )
    assert str(caught.value).endswith("Go.")


def test_reading_ahead_keeps_the_order_and_passes_errors_on():
    assert list(prefetch(lambda k: k * k, range(20), workers=3, ahead=5)) == [k * k for k in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda k: 1 / k, [2, 1, 0, 1]))


def test_reading_ahead_may_end_in_one_of_its_own_threads(monkeypatch):
    complaints, dropped, ended = [], threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)

    def make(k):
        if k == 1:
            dropped.wait(10)
            gc.collect()  # finds the generator below, which nothing but itself refers to
            ended.set()
        return k

    ahead = prefetch(make, range(3))
    assert next(ahead) == 0
    cycle = [ahead]
    cycle.append(cycle)
    gone = weakref.ref(ahead)
    del ahead, cycle
    dropped.set()
    assert ended.wait(10) and gone() is None and complaints == []


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
        assert str(tmp_path) in str(error) and "disk full" in str(error)
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
        raise TensorError("ours stay as they are") from full


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
