"""What a case of bad input is, and what has to happen to it."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ttsnap_lib.errors import TTSnapError

CPU_S, WALL_S = 10, 120  # of one case; the second only ends a wait, on a machine with other work


@dataclass(frozen=True)
class Case:
    """One bad input: its name, what gives it to the library in a folder of its own, and what the message names."""

    what: str
    run: Callable[[Path], Any]
    names: str


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


def check(case: Case, folder: Path) -> None:
    """Run a case in `folder` and hold what every bad input has to end in."""
    inside, outside = folder / "inside", folder / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    with time_limit(), pytest.raises(TTSnapError) as caught:
        case.run(inside)
    check_message(caught.value, case.names)
    # Nothing ran, and nothing was written, outside of the folder that the case was given.
    there = {path.name: path.read_text() for path in outside.iterdir()}
    assert there == {"secret.txt": "secret"}, f"something was written outside: {there}"
    beside = sorted(path.name for path in folder.iterdir())
    assert beside == ["inside", "outside"], f"something was written beside: {beside}"


def check_message(error: TTSnapError, names: str = "") -> None:
    """Hold that a message is short, names the value that is wrong, and ends in a remedy."""
    message = str(error)
    assert len(message) < 1300, f"{len(message)} characters"
    assert re.search(names, message, re.DOTALL), f"{names!r} not in: {message}"
    assert re.search(r"[.?:;)] +[A-Z`]", message), f"no remedy in: {message}"


class Cases(list[Case]):
    """The cases of a module."""

    def add(self, what: str, run: Callable[[Path], Any], names: str) -> None:
        """Add one case."""
        self.append(Case(what, run, names))

    def each(self, kind: str, call: Callable[[Any], Any], values: Iterable[tuple[str, Any, str]]) -> None:
        """Add a case for each (what, value, names): `call` is given the value."""
        for what, value, names in values:
            self.add(f"{kind}: {what}", lambda folder, value=value: call(value), names)

    def files(
        self, kind: str, name: str, read: Callable[[Path], Any], contents: Iterable[tuple[str, Any, str]]
    ) -> None:
        """Add a case for each (what, content, names): `read` is given a file of that content."""

        def write(folder: Path, content: Any) -> Any:
            path = folder / name
            path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
            return read(path)

        for what, content, names in contents:
            self.add(f"{kind}: {what}", lambda folder, content=content: write(folder, content), names)


def held(cases: list[Case]) -> Callable:
    """Return the test of these cases."""

    @pytest.mark.parametrize("case", cases, ids=lambda case: re.sub(r"[^\w.-]+", "_", case.what)[:90])
    def test(case: Case, tmp_path: Path) -> None:
        check(case, tmp_path)

    return test
