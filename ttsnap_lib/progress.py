"""A progress bar as a callback: in a notebook a widget, in a terminal a line, headless plain text."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

__all__ = ["close_bars", "progress_bar"]

_open: list[Any] = []


def progress_bar(what: str = "images", *, quiet: bool = False) -> Callable[[int, int], None] | None:
    """Return a callback ``(done, total)`` that shows a tqdm bar with the rate and the time left.

    What was done before the first call does not count for the rate. None when `quiet`.
    """
    if quiet:
        return None
    # A widget that nobody watches would leave an empty box in the executed notebook.
    if os.environ.get("TTSNAP_RUN_FOLDER"):
        from tqdm import tqdm
    else:
        from tqdm.auto import tqdm

    bar: tqdm | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, initial=done, unit=what.rstrip("s"), desc=what, mininterval=0.5)
            _open.append(bar)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            _open.remove(bar)
            bar = None

    return show


def close_bars() -> None:
    """End the lines of bars that an error or an interruption has left open."""
    while _open:
        _open.pop().close()
