"""The run folders that there are: by age, one by the beginning of its hash, and their removal."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttsnap_lib.errors import ConfigError, RunError, TTSnapError
from ttsnap_lib.files import InUseError, data_cache, lock, read_if_whole
from ttsnap_lib.runs.parameters import declared_parameters, read_notebook
from ttsnap_lib.runs.run import RunResult


@dataclass(frozen=True)
class RunFolder:
    """A run folder, whatever became of the run."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """Notebook and hash."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def status(self) -> str:
        """``"complete"``, ``"failed"``, ``"running"`` or ``"killed"``."""
        status = str(self.manifest.get("status"))
        if status == "running":
            try:
                with self._held():
                    return "killed"
            except InUseError:
                pass
        return status

    @property
    def result(self) -> RunResult:
        """Its tables and figures."""
        return RunResult(self.folder.parent.name, self.folder, self.manifest, reused=True)

    def changed(self) -> dict[str, Any]:
        """Return the parameters that are not the notebook's defaults; all of them where the notebook is gone."""
        given = dict(self.manifest.get("parameters") or {})
        with contextlib.suppress(TTSnapError, OSError, KeyError):
            declared = declared_parameters(read_notebook(Path(self.manifest["notebook_path"])))
            given = {k: v for k, v in given.items() if k not in declared or declared[k].default != v}
        return given

    def remove(self) -> None:
        """Delete the folder; a RunError while a process is at it."""
        try:
            with self._held():
                shutil.rmtree(self.folder)
        except InUseError:
            raise RunError(
                f"{self.folder} is in use: got a process at work on it, expected none. Stop it first."
            ) from None

    def _held(self) -> contextlib.AbstractContextManager[Any]:
        return lock(self.folder.parent / ".locks" / self.folder.name)


def run_folders(folder: str | Path | None = None) -> list[RunFolder]:
    """Return the runs below `folder`, ``data_cache/runs`` by default, the newest first."""
    root = data_cache() / "runs" if folder is None else Path(folder)
    found = [
        RunFolder(path.parent, manifest)
        for path in root.glob("*/*/manifest.json")
        if isinstance(manifest := read_if_whole(path), dict) and "run_hash" in manifest
    ]
    return sorted(found, key=lambda run: str(run.manifest.get("started")), reverse=True)


def find_run(name: str, folder: str | Path | None = None) -> RunFolder:
    """Return the run whose hash, or ``notebook/hash``, begins with `name`; a ConfigError when it is not exactly one."""
    runs = run_folders(folder)
    found = [run for run in runs if run.folder.name.startswith(name) or run.name.startswith(name)] if name else []
    if len(found) != 1:
        known = [run.name for run in (found or runs)[:5]]
        raise ConfigError(
            f"run: got {name!r}, which names {len(found)} runs, expected one of {known}{' ...' * (len(found or runs) > 5)}. "
            "`ttsnap runs list` shows all."
        )
    return found[0]
