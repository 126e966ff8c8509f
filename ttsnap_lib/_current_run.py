"""The run that a notebook is part of: where its tables and figures go, headless or in JupyterLab."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._reading import read_json
from .checks import plain_name
from .errors import ConfigError, RunError
from .paths import atomic_write, data_cache, typed_disk_errors, write_json

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas as pd

__all__ = ["FOLDER_VARIABLE", "TOKEN_VARIABLE", "Run", "current_run", "read_if_whole"]

FOLDER_VARIABLE, TOKEN_VARIABLE = "TTSNAP_RUN_FOLDER", "TTSNAP_RUN_TOKEN"


@dataclass(frozen=True)
class Run:
    """The run that a notebook is part of: where its tables and figures go.

    Attributes
    ----------
    folder : Path
        The run folder. Exists.
    headless : bool
        Whether :func:`run` started the notebook; False in JupyterLab and under plain papermill.
    """

    folder: Path
    headless: bool = False
    _token: str = field(default="", repr=False)

    def save_table(self, frame: pd.DataFrame, name: str = "results") -> Path:
        """Write `frame` (without its index) as ``<name>.csv`` and ``<name>.parquet``; return the CSV's path.

        A table named ``results`` is what a sweep collects.
        """
        path = self._path(name, ".csv")
        with atomic_write(path, "w") as file:
            frame.to_csv(file, index=False, lineterminator="\n")
        with atomic_write(path.with_suffix(".parquet")) as file:
            frame.to_parquet(file, index=False)
        return self._told(path)

    def save_figure(self, figure: Any, name: str = "figure") -> Path:
        """Write a matplotlib figure (or the figure of an ``Axes``) as PNG at 200 dpi and PDF; return the PNG's path."""
        drawn: matplotlib.figure.Figure = figure if hasattr(figure, "savefig") else figure.figure
        path = self._path(name, ".png")
        with atomic_write(path) as file:
            drawn.savefig(file, format="png", dpi=200, bbox_inches="tight")
        with atomic_write(path.with_suffix(".pdf")) as file:  # without its date, so that a rerun gives the same bytes
            drawn.savefig(file, format="pdf", bbox_inches="tight", metadata={"CreationDate": None})
        return self._told(path)

    def record(self, **facts: Any) -> None:
        """Add plain facts (the device that was used, a model's revision) to the manifest under ``recorded``."""
        path = self._path("recorded", ".json")
        write_json(path, {**(read_if_whole(path) or {}), **facts})

    def _path(self, name: str, suffix: str) -> Path:
        plain_name("name of a result", name)
        # A notebook whose runner was killed may live on for a moment, while the run has begun again.
        if self.headless and (read_if_whole(self.folder / "manifest.json") or {}).get("token") != self._token:
            raise RunError(
                f"{self.folder} belongs to a newer run",
                value=self._token,
                bound="the token of the run that is going on",
                remedy="Nothing to do: this process is a remnant.",
            )
        return self.folder / f"{name}{suffix}"

    @staticmethod
    def _told(path: Path) -> Path:
        print(f"saved {path}")
        return path


def current_run(name: str | None = None) -> Run:
    """Return the run this notebook is part of.

    Under :func:`run` that is its run folder. In JupyterLab (or plain papermill) it is
    ``data_cache/runs/<notebook>/interactive``, where a later Run All replaces the files of an earlier one.

    Parameters
    ----------
    name : str, optional
        Name of the notebook for interactive use; else JupyterLab's own, else ``"notebook"``.

    Raises
    ------
    DiskError
        The interactive folder cannot be made.
    """
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Run(Path(given), headless=True, _token=os.environ.get(TOKEN_VARIABLE, ""))
    stem = name or Path(os.environ.get("JPY_SESSION_NAME", "notebook")).stem
    folder = data_cache() / "runs" / stem / "interactive"
    with typed_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return Run(folder)


def read_if_whole(path: Path) -> dict[str, Any] | None:
    """Return the JSON mapping in `path`, or None when there is none to read."""
    try:
        return read_json(path, "record", remedy="")
    except ConfigError:
        return None
