"""How things look: labels and colours of methods and rewards, axes, progress bars."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from ttsnap_lib.checks import choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHOD_LABELS = {"best_of_n": "Best-of-N", "ttsp": "TTSp", "ttsnap": "TTSnap", "draft": "Drafts"}
# Ten of seaborn's colour-blind palette; seaborn itself, with the widgets it imports, would slow every command down.
COLORS = (
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9",
)  # fmt: skip
# Colour, marker, line: a method looks the same in every figure, also without colour.
_STYLES = {"best_of_n": (7, "s", "--"), "ttsp": (1, "^", "-."), "ttsnap": (0, "o", "-")}
_REWARD_LABELS = {
    "image_reward": "ImageReward",
    "pickscore": "PickScore",
    "hpsv2": "HPSv2",
    "clipscore": "CLIPScore",
    "mps": "MPS",
    "cyclereward": "CycleReward",
    "aesthetic": "LAION aesthetic",
    "hpsv3": "HPSv3",
    "vqascore": "VQAScore",
    "pocket-clip": "pocket CLIP",
    "oracle_score": "oracle",
}
_open_bars: list[Any] = []
_paper_width: contextvars.ContextVar[float | None] = contextvars.ContextVar("paper_width", default=None)  # in inches


def reward_label(name: str) -> str:
    """Return how a reward is written in a figure."""
    return _REWARD_LABELS.get(name, name)


def method_label(method: str) -> str:
    """Return how a method is written in a figure."""
    return METHOD_LABELS.get(method, method)


def method_style(method: str) -> dict:
    """Return colour, marker and line style of a method, for ``Axes.plot``."""
    index, marker, line = _STYLES.get(method, (4, "D", ":"))
    return {"color": COLORS[index], "marker": marker, "linestyle": line}


def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return `ax`, or the axes of a new figure of `size` in inches, which a paper makes smaller."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figure_size(*size), layout="constrained")[1]


def figure_size(width: float, height: float) -> tuple[float, float]:
    """Return the size of a new figure in inches; inside :func:`paper_style` as wide as the paper has it."""
    paper = _paper_width.get()
    # Type does not shrink with a figure, so its height shrinks less than its width.
    return (width, height) if paper is None else (paper, height * min(1.0, max(paper / width, 0.7)))


@contextlib.contextmanager
def paper_style(width: str = "column") -> Iterator[None]:
    """Return a context for the figures of a paper: as wide as a ``"column"`` or the ``"page"``, small type, text as text.

    It holds for the figures that the plots make themselves, and for axes of your own: ``figure, ax = plt.subplots(...)``.
    """
    import matplotlib.pyplot as plt

    inches = {"column": 3.3, "page": 6.8}[choice("width", width, ("column", "page"))]
    small: dict[Any, Any] = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 7)
    token = _paper_width.set(inches)
    try:
        with plt.rc_context({"figure.figsize": (inches, 2.4), "font.size": 8, "pdf.fonttype": 42, **small}):
            yield
    finally:
        _paper_width.reset(token)


def tidy(ax: Axes, grid: Literal["x", "y"] = "y") -> Axes:
    """Return `ax` with a light grid along one axis and without a frame above and on the right."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


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
            _open_bars.append(bar)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            _open_bars.remove(bar)
            bar = None

    return show


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the bars that transformers 5 draws while it reads a model from disk; nothing is fetched there."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def close_bars() -> None:
    """End the lines of bars that an error or an interruption has left open."""
    while _open_bars:
        _open_bars.pop().close()
