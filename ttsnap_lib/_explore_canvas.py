"""The picture of the explorer: what stays is drawn once and kept, what moves is drawn on top, panel by panel.

Everything that a slider moves is an animated artist: the rest (axes, ticks, labels, legends) is drawn once and kept as
a picture. Each panel has a tile of the picture to itself, so that a move costs the moving artists of the panels that
changed, and new limits cost the ticks of one panel. A saved figure holds all.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PANELS", "Canvas", "new_figure"]

PANELS = ("reward", "tau", "funnel", "gain", "change")
_TILES = {  # left, bottom, right, top in parts of the figure: an axes with its title, ticks and labels
    "reward": (0.0, 0.49, 0.605, 1.0),
    "tau": (0.605, 0.49, 1.0, 1.0),
    "funnel": (0.0, 0.255, 1.0, 0.49),
    "gain": (0.0, 0.0, 0.46, 0.255),
    "change": (0.46, 0.0, 1.0, 0.255),
}


def new_figure(dpi: float = 100) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure outside pyplot and its five axes by name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 7.4), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    places = {
        "reward": (0.075, 0.565, 0.515, 0.375),
        "tau": (0.665, 0.565, 0.32, 0.375),
        "funnel": (0.02, 0.295, 0.965, 0.175),
        "gain": (0.12, 0.075, 0.30, 0.135),
        "change": (0.55, 0.075, 0.435, 0.145),
    }
    return figure, {name: figure.add_axes(place) for name, place in places.items()}


class Canvas:
    """Five axes, and the picture of them.

    Parameters
    ----------
    axes : mapping of str to Axes, optional
        On a figure of their own by default.

    Attributes
    ----------
    stale : set of str
        Panels whose part that stays has to be drawn anew.
    touched : set of str
        Panels whose moving artists have to be drawn anew.
    """

    def __init__(self, axes: Mapping[str, Axes] | None = None) -> None:
        self.axes = dict(axes) if axes is not None else new_figure()[1]
        self.figure = self.axes["reward"].figure
        self._own = axes is None
        self._names = {ax: name for name, ax in self.axes.items()}
        self.forget()

    def forget(self) -> None:
        """Start anew: no artist moves, and nothing has been drawn."""
        self.stale, self.touched = set(PANELS), set(PANELS)
        self._moving: dict[str, list[Any]] = {name: [] for name in PANELS}
        self._background: np.ndarray | None = None  # the parts that stay, (height, width, RGBA)

    def move(self, ax: Axes, artist: Any) -> Any:
        """Take `artist` as one that moves: it is left out of what stays, and drawn on top of it. Return it."""
        artist.set_animated(True)
        name = self._names[ax]
        self._moving[name].append(artist)
        if self._own and not artist.get_clip_on():  # text may not reach into another panel's tile: it would stay there
            from matplotlib.transforms import Bbox, TransformedBbox

            artist.set_clip_box(TransformedBbox(Bbox(np.reshape(_TILES[name], (2, 2))), self.figure.transFigure))
            artist.set_clip_on(True)
        return artist

    def png(self) -> bytes:
        """Return the picture; only what has changed is drawn. The figure must be one of :func:`new_figure`."""
        canvas: Any = self.figure.canvas  # Agg
        if self._background is None:
            canvas.draw()  # leaves the animated artists out
        picture = np.asarray(canvas.buffer_rgba())
        tiles = {name: self._tile(name) for name in self.touched | self.stale}
        if self._background is None:
            self._background = picture.copy()
        else:
            for name in self.stale:
                picture[tiles[name]] = 255
                self.axes[name].draw(canvas.get_renderer())
                self._background[tiles[name]] = picture[tiles[name]]
        for name, tile in tiles.items():
            picture[tile] = self._background[tile]
            for artist in self._moving[name]:
                if artist.get_visible():
                    self.axes[name].draw_artist(artist)
        self.stale, self.touched = set(), set()
        return _png(picture)

    def _tile(self, name: str) -> tuple[slice, slice]:
        left, bottom, right, top = _TILES[name]
        width, height = self.figure.canvas.get_width_height(physical=True)
        rows = slice(round((1 - top) * height), round((1 - bottom) * height))
        return rows, slice(round(left * width), round(right * width))


def _png(rgba: np.ndarray) -> bytes:
    """Encode without row filters at the lowest level: a chart packs well anyway, three times quicker than Pillow."""
    height, width, _ = rgba.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)
    rows[:, 1:] = rgba[:, :, :3].reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows.tobytes(), 1)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
