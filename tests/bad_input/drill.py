"""What a case of bad input is, and what has to happen to it."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ttsnap_lib.errors import TTSnapError

CPU_S, WALL_S = 10, 120  # of one case; the second only ends a wait, on a machine with other work
GROWTH_MB = 900
"""Most memory a case may take on top: bombs ask for gigabytes; lazily imported libraries need some hundred megabytes."""


@dataclass(frozen=True)
class Case:
    """One bad input.

    Parameters
    ----------
    kind : str
        Row of the table in the documentation.
    what : str
        What is wrong with it.
    run : callable
        Gives the input to the library, in a folder of its own.
    names : str
        Regular expression for what the message has to name besides value, bound and remedy; empty where `skip` is set.
    skip : str
        Documented handling that is no error; `run` then checks it itself and returns True.
    """

    kind: str
    what: str
    run: Callable[[Path], Any]
    names: str = ""
    skip: str = ""

    @property
    def id(self) -> str:
        """Name of the test."""
        return re.sub(r"[^\w.-]+", "_", f"{self.kind}-{self.what}")[:90]


class TooSlowError(BaseException):
    """A case ran out of time. No Exception: a handler of the library must not swallow it."""


@contextlib.contextmanager
def time_limit(cpu_s: float = CPU_S, wall_s: float = WALL_S) -> Iterator[None]:
    """Interrupt the block when it computes or waits too long."""

    def stop(number: int, _: Any) -> None:
        raise TooSlowError(f"{'computed' if number == signal.SIGPROF else 'waited'} too long")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, cpu_s), signal.SIGALRM: (signal.ITIMER_REAL, wall_s)}
    before = {number: signal.signal(number, stop) for number in timers}
    try:
        for timer, seconds in timers.values():
            signal.setitimer(timer, seconds)
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def peak_mb(*, reset: bool = False) -> float:
    """Return the most memory held since the last reset; the maximum of the whole process would hide all later cases."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024


def check(case: Case, folder: Path) -> None:
    """Run a case in `folder` and hold what every bad input has to end in."""
    inside, outside = folder / "inside", folder / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    memory = peak_mb(reset=True)
    with time_limit():
        if case.skip:
            assert case.run(inside) is True, f"not handled as documented: {case.skip}"
        else:
            with pytest.raises(TTSnapError) as caught:
                case.run(inside)
            check_message(caught.value, case.names)
    grown = peak_mb() - memory
    assert grown < GROWTH_MB, f"{grown:.0f} MB more"
    # Nothing ran, and nothing was written, outside of the folder that the case was given.
    there = {path.name: path.read_text() for path in outside.iterdir()}
    assert there == {"secret.txt": "secret"}, f"something was written outside: {there}"
    beside = sorted(path.name for path in folder.iterdir())
    assert beside == ["inside", "outside"], f"something was written beside: {beside}"


def check_message(error: TTSnapError, names: str = "") -> None:
    """Hold that a message is short enough for a terminal and names what is wrong."""
    message = str(error)
    assert len(message) < 1500, f"{len(message)} characters"
    assert re.search(names, message, re.DOTALL), f"{names!r} not in: {message}"


class Cases(list):
    """The cases of a module."""

    def add(self, kind: str, what: str, run: Callable[[Path], Any], names: str = "", skip: str = "") -> None:
        """Add one case."""
        self.append(Case(kind, what, run, names, skip))

    def each(self, kind: str, call: Callable[[Any], Any], values: Iterable[tuple[str, Any, str]]) -> None:
        """Add a case for each (what, value, names): `call` is given the value."""
        for what, value, names in values:
            self.add(kind, what, lambda folder, value=value: call(value), names)

    def files(
        self, kind: str, name: str, read: Callable[[Path], Any], contents: Iterable[tuple[str, Any, str]]
    ) -> None:
        """Add a case for each (what, content, names): `read` is given a file of that content."""

        def write(folder: Path, content: Any) -> Any:
            path = folder / name
            path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
            return read(path)

        for what, content, names in contents:
            self.add(kind, what, lambda folder, content=content: write(folder, content), names)
