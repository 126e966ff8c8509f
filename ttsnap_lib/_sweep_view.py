"""The live table of a sweep: redrawn in a terminal, one line for each finished run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TextIO

__all__ = ["SweepView", "short_parameters"]


def short_parameters(parameters: Mapping[str, Any], axes: tuple[str, ...], case: str = "") -> str:
    """Return the varied parameters in one short line."""
    parts = [case] if case else []
    parts += [f"{name}={_short(parameters[name])}" for name in axes]
    return ", ".join(parts) or "defaults"


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 30 else text[:27] + "..."


class SweepView:
    """Counts runs and tells about them on `stream`; a stream of None keeps it silent.

    Parameters
    ----------
    stream : TextIO or None
        Redrawn in place when it is a terminal.
    labels : dict
        What to call each run, by key.
    reused : int
        Runs that had finished before.
    """

    def __init__(self, stream: TextIO | None, name: str, labels: Mapping[str, str], reused: int) -> None:
        self._stream, self._name, self._labels = stream, name, labels
        self._total, self._reused = len(labels), reused
        self._done, self._failed = reused, 0
        self._running: dict[str, tuple[int, float, str]] = {}
        self._begin = time.monotonic()
        self._drawn_lines, self._drawn_at = 0, 0.0
        self._live = stream is not None and stream.isatty()
        if stream is not None:
            before = f", {reused} finished before" if reused else ""
            self._write(f"sweep {name}: {self._total} runs{before}\n")

    def start(self, key: str, worker: int) -> None:
        """Tell that a worker has begun a run."""
        self._running[key] = (worker, time.monotonic(), "starting")
        self._draw()

    def said(self, key: str, line: str) -> None:
        """Tell what a run reports (its cell)."""
        if key in self._running:
            worker, begin, _ = self._running[key]
            self._running[key] = (worker, begin, line)
            self._draw()

    def end(self, key: str, outcome: Mapping[str, Any]) -> None:
        """Tell how a run ended."""
        _, begin, _ = self._running.pop(key, (0, 0.0, ""))
        failed = outcome["status"] != "complete"
        self._failed += failed
        self._done += not failed
        seconds = outcome.get("elapsed_s") or (time.monotonic() - begin if begin else 0.0)
        count = f"[{self._done + self._failed:>{len(str(self._total))}}/{self._total}]"
        if self._stream is None:
            return
        tail = f": {outcome['last_line']}" if failed else ""
        line = f"{count} {outcome['status']:<8} {seconds:7.1f} s  {self._labels[key]}{tail}\n"
        if self._live and not failed:
            self._draw(force=True)
            return
        self._clear()
        self._write(line)
        self._draw(force=True)

    def close(self) -> None:
        """Leave one last line with the counts."""
        if self._stream is not None:
            self._clear()
            self._write(self._summary() + "\n")

    def _summary(self) -> str:
        gone = time.monotonic() - self._begin
        ran = self._done + self._failed - self._reused
        left = self._total - self._done - self._failed
        rest = f", about {_clock(gone / ran * left)} left" if ran and left else ""
        return f"sweep {self._name}: {self._done}/{self._total} done, {self._failed} failed, {_clock(gone)} gone{rest}"

    def _draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if not self._live or (not force and now - self._drawn_at < 0.2):
            return
        self._clear()
        lines = [self._summary()]
        for key, (worker, begin, said) in sorted(self._running.items(), key=lambda item: item[1][0]):
            label = self._labels[key]
            lines.append(f"  worker {worker + 1:<3} {_clock(now - begin)}  {said:<12} {label[:80]}")
        self._write("".join(line + "\n" for line in lines))
        self._drawn_lines, self._drawn_at = len(lines), now

    def _clear(self) -> None:
        if self._drawn_lines:
            self._write(f"\x1b[{self._drawn_lines}A\x1b[J")
            self._drawn_lines = 0

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
