"""Which notebook runs, with which parameters, and in which folder: all that can be known before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._reading import as_path
from .errors import ConfigError
from .parameters import declared_parameters, parameter_hash, read_notebook, resolve
from .paths import data_cache, notebooks_folder

__all__ = ["Plan", "find_notebook", "plan"]


@dataclass(frozen=True)
class Plan:
    """A checked run that has not started: everything that can be wrong beforehand has been looked at."""

    notebook: Path
    parameters: dict[str, Any]
    folder: Path

    @property
    def run_hash(self) -> str:
        """Hash of the resolved parameters, the name of the run folder."""
        return self.folder.name


def find_notebook(notebook: str | Path) -> Path:
    """Return the path of `notebook`: a path, or the name of a shipped notebook (``simulate``).

    Raises
    ------
    ConfigError
        No such file and no such name.
    """
    path = as_path("notebook", notebook).expanduser()
    if path.suffix == ".ipynb" and path.exists():
        return path.resolve()
    shipped = notebooks_folder() / f"{path.stem}.ipynb"
    if path.parent == Path(".") and shipped.exists():
        return shipped
    names = sorted(found.stem for found in notebooks_folder().glob("*.ipynb"))
    raise ConfigError(
        "notebook", value=str(notebook), bound=f"a path of an .ipynb file, or one of {names}",
        remedy="Check the spelling and the folder.",
    )  # fmt: skip


def plan(
    notebook: str | Path, parameters: Mapping[str, Any] | None = None, *, folder: str | Path | None = None
) -> Plan:
    """Check `notebook` and `parameters` and return where the run will stand, without running anything.

    Returns
    -------
    Plan

    Raises
    ------
    ConfigError
        A notebook that cannot be read, an unknown parameter, a value of the wrong type.
    """
    path = find_notebook(notebook)
    content = read_notebook(path)
    resolved = resolve(declared_parameters(content, path.name), dict(parameters or {}), path.name)
    root = Path(folder) if folder is not None else data_cache() / "runs"
    return Plan(path, resolved, root.absolute() / path.stem / parameter_hash(resolved))
