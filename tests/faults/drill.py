"""Starts a command in a process of its own, disturbs it, and tells how it ended; what every fault has in common."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 900.0  # longer than any command here takes on a busy machine: what is still there then hangs


def wait_for(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Wait until `condition` holds; fail when it takes too long."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def _stats() -> dict[int, tuple[int, int]]:
    """Return parent, and ticks of work with those of ended children, of every process."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        found[int(stat.parent.name)] = (int(words[1]), sum(map(int, words[11:15])))
    return found


def _below(pid: int, stats: Mapping[int, tuple[int, int]]) -> list[int]:
    found, layer = [], [pid]
    while layer:
        layer = [child for child, (parent, _) in stats.items() if parent in layer]
        found += layer
    return found


def below(pid: int) -> list[int]:
    """Return the processes below `pid`."""
    return _below(pid, _stats())


def alive(pid: int) -> bool:
    """Return whether the process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status (negative: a signal), what it said on both streams, seconds of work."""

    code: int
    said: str
    work_s: float

    @property
    def traceback(self) -> bool:
        """Whether it showed a Python traceback."""
        return "Traceback (most recent call last)" in self.said or "Exception ignored" in self.said

    def check_refused(self, says: str) -> None:
        """Hold it to a clean end: exit status 1 and a line of ours that holds `says`, no traceback."""
        assert self.code == 1, (self.code, self.said[-3000:])
        assert not self.traceback, self.said[-3000:]
        assert "ttsnap: " in self.said and says in self.said, self.said[-3000:]


class Started:
    """A command at work."""

    def __init__(self, process: multiprocessing.Process | subprocess.Popen, said: Path) -> None:
        self._process, self._said = process, said
        self.pid: int = process.pid
        self.work_s = 0.0
        """Seconds that the processor has worked for it and for what it started, as last looked at."""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._code() is None

    def _code(self) -> int | None:
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def until(self, work_s: float, limit_s: float = LIMIT_S) -> None:
        """Wait until it has had so much work done, or has ended: a moment that other programs do not shift."""
        end = time.monotonic() + limit_s
        while self.running and self.work_s < work_s and time.monotonic() < end:
            stats = _stats()
            ticks = sum(stats[pid][1] for pid in (self.pid, *_below(self.pid, stats)) if pid in stats)
            self.work_s = max(self.work_s, ticks / os.sysconf("SC_CLK_TCK"))
            time.sleep(0.03)

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended; an interrupt waits until there is a command to be interrupted."""
        if number == signal.SIGINT and not isinstance(self._process, subprocess.Popen):
            wait_for(lambda: _at_work(self._said).exists() or not self.running)
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> Ended:
        """Kill it by signal 9, unless it has ended, and wait until its workers and kernels are gone with it."""
        children = below(self.pid)
        self.send(signal.SIGKILL)
        ended = self.end()
        wait_for(lambda: not any(alive(pid) for pid in children), 60)
        return ended

    def end(self, limit_s: float = LIMIT_S) -> Ended:
        """Wait for its end; one that hangs is killed, and fails the test."""
        self.until(math.inf, limit_s)
        hangs = self.running
        if hangs:
            os.kill(self.pid, signal.SIGKILL)
        if isinstance(self._process, subprocess.Popen):
            self._process.wait()
        else:
            self._process.join()
        ended = Ended(self._code(), self._said.read_text("utf-8", "replace"), self.work_s)
        assert not hangs, f"it hangs; it said: {ended.said[-3000:]}"
        return ended


def _at_work(said: Path) -> Path:
    return said.with_suffix(".at-work")


def _forked(words: list[str], said: str, environment: Mapping[str, str], prepare: Callable[[], None] | None) -> None:
    """Be the command, in a process forked from one that has the imports."""
    import torch

    from ttsnap_lib.__main__ import run

    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["ttsnap", *words]
    _at_work(Path(said)).touch()
    if prepare is not None:
        prepare()
    sys.exit(run())


def start(
    words: Sequence[object],
    said: Path,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Started:
    """Start ``ttsnap WORDS``; its imports are there already, so that a random moment falls into its work.

    Parameters
    ----------
    said : Path
        Takes what it says on both streams.
    prepare : callable, optional
        Called in the process before the command begins; puts a fault in place. Must be importable.
    """
    said.touch()  # it may be killed before it opens it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["papermill", "torch", "ttsnap_lib.__main__"])
    process = context.Process(
        target=_forked, args=([str(word) for word in words], str(said), environment or {}, prepare)
    )
    process.start()
    return Started(process, said)


def start_program(
    words: Sequence[object], said: Path, environment: Mapping[str, str] | None = None, head: Sequence[str] = ()
) -> Started:
    """Start ``python -m ttsnap_lib WORDS`` as a user does, from nothing; `head` comes in the place of ``python``."""
    whole = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    paths = [*([whole["PYTHONPATH"]] if whole.get("PYTHONPATH") else []), str(ROOT)]
    whole["PYTHONPATH"] = os.pathsep.join(paths)
    command = [*(head or [sys.executable]), "-m", "ttsnap_lib", *map(str, words)]
    with open(said, "wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=whole, cwd=ROOT)
    return Started(process, said)
