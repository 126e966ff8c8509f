"""Runs a notebook headless with strict parameters, in a run folder that tells where every result comes from.

A notebook asks :func:`current_run` where to put its results; the same call works in JupyterLab. :func:`run` executes
a notebook with papermill, in a kernel of the interpreter that calls it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import provenance
from ._current_run import FOLDER_VARIABLE, TOKEN_VARIABLE, Run, current_run, read_if_whole
from ._run_plan import Plan, find_notebook, plan
from .checks import real
from .errors import DiskError, RunError
from .parameters import injected_source, read_notebook, tagged_cell
from .paths import git_state, lock, repository_root, typed_disk_errors, write_json

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Run", "RunResult", "current_run", "find_notebook", "plan", "run"]


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, its parameters and its manifest.

    ``reused`` tells that an earlier run with the same parameters was found and nothing was executed.
    """

    notebook: str
    folder: Path
    run_hash: str
    parameters: dict[str, Any]
    manifest: dict[str, Any]
    reused: bool = False

    @property
    def tables(self) -> dict[str, Path]:
        """Names and CSV paths of the tables that the notebook saved."""
        return {path.stem: path for path in sorted(self.folder.glob("*.csv"))}

    @property
    def figures(self) -> dict[str, Path]:
        """Names and PNG paths of the figures that the notebook saved."""
        return {path.stem: path for path in sorted(self.folder.glob("*.png"))}

    def table(self, name: str = "results") -> pd.DataFrame:
        """Return a saved table, read from Parquet."""
        import pandas as pd

        if name not in self.tables:
            raise RunError(
                f"{self.notebook} saved no such table", value=name, bound=f"one of {sorted(self.tables)}",
                remedy="Save it in the notebook with current_run().save_table(frame, name).",
            )  # fmt: skip
        return pd.read_parquet(self.folder / f"{name}.parquet")


@dataclass(frozen=True)
class _Kernel:
    """How a notebook is executed; see :func:`run`."""

    say: Callable[[str], None]
    echo: bool
    timeout_s: float | None
    environment: Mapping[str, str]
    warm: bool


def run(
    notebook: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    folder: str | Path | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
    echo: bool = False,
    timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    warm: bool = False,
) -> RunResult:
    """Execute `notebook` with `parameters` over its defaults, in a run folder named by their hash.

    A run that has finished with the same parameters, notebook code and input files is not executed again. Two
    processes that ask for the same run do it once: the second waits, then takes the first one's result.

    Parameters
    ----------
    notebook : str or Path
        Path of a notebook, or the name of a shipped one.
    parameters : mapping, optional
        Plain literals by name; unknown names and wrong types are refused before anything runs.
    folder : str or Path, optional
        Holds the run folders ``<notebook>/<hash>``; ``data_cache/runs`` by default.
    force : bool
        Execute even when a finished run exists; it is replaced.
    progress : callable, optional
        Called with a line of text when a cell starts.
    echo : bool
        Show what the notebook prints as it prints it.
    timeout_s : float, optional
        Longest time for one cell, rounded up to whole seconds.
    environment : mapping, optional
        Environment variables for the kernel, over those of this process (thread limits in a sweep).
    warm : bool
        Fork the kernel from a process that has made the notebook's imports. The first run pays for that process, each
        later one saves a second and the imports; a sweep's workers do so.

    Returns
    -------
    RunResult

    Raises
    ------
    ConfigError
        Before anything runs; see :func:`plan`.
    RunError
        A cell failed. Its executed notebook is kept, and the message names it, the cell and the error's last line.
    DiskError
        A full disk, or a folder that cannot be written.
    """
    planned = plan(notebook, parameters, folder=folder)
    timeout_s = None if timeout_s is None else real("timeout_s", timeout_s, 0, open_low=True)
    say = progress or (lambda line: None)
    kernel = _Kernel(say, echo, timeout_s, dict(environment or {}), warm)
    gate = planned.folder.parent / ".locks" / planned.run_hash
    try:
        with lock(gate):
            return _run_locked(planned, force, kernel)
    except DiskError as error:
        if error.value != str(gate):
            raise
    say("another process is at this run; waiting for it")
    with lock(gate, wait=True):
        return _run_locked(planned, False, kernel)


def finished(planned: Plan) -> RunResult | None:
    """Return the run that has already finished as `planned`, or None.

    A change of the notebook's code or of an input file since then makes it another run.
    """
    manifest = read_if_whole(planned.folder / "manifest.json")
    if not manifest or manifest.get("status") != "complete" or not isinstance(manifest.get("inputs"), dict):
        return None
    if manifest.get("notebook_sha256") != provenance.code_hash(read_notebook(planned.notebook)):
        return None
    now = provenance.inputs(planned.parameters)
    if any(now.get(name) != then for name, then in manifest["inputs"].items()):
        return None
    return RunResult(planned.notebook.stem, planned.folder, planned.run_hash, planned.parameters, manifest, reused=True)


def _run_locked(planned: Plan, force: bool, kernel: _Kernel) -> RunResult:
    done = None if force else finished(planned)
    if done is not None:
        kernel.say(f"finished before: {done.folder}")
        return done
    with typed_disk_errors(planned.folder):
        return _run_anew(planned, kernel)


def _run_anew(planned: Plan, kernel: _Kernel) -> RunResult:
    shutil.rmtree(planned.folder, ignore_errors=True)  # the remains of a failed or killed run
    content = read_notebook(planned.notebook)
    manifest: dict[str, Any] = {
        "status": "running",
        "token": uuid.uuid4().hex,
        "notebook": planned.notebook.stem,
        "notebook_path": str(planned.notebook),
        "notebook_sha256": provenance.code_hash(content),
        "parameters": planned.parameters,
        "run_hash": planned.run_hash,
        "seed": planned.parameters.get("seed"),
        "device": planned.parameters.get("device") or provenance.device(),
        "git": git_state(),
        "versions": provenance.versions(),
        "inputs": provenance.inputs(planned.parameters),
        "started": provenance.now(),
    }
    write_json(planned.folder / "manifest.json", manifest)
    begin = time.monotonic()
    error = _execute(planned, content, manifest["token"], kernel)
    recorded = read_if_whole(planned.folder / "recorded.json") or {}
    (planned.folder / "recorded.json").unlink(missing_ok=True)
    manifest |= {
        "status": "failed" if error else "complete",
        "ended": provenance.now(),
        "elapsed_s": round(time.monotonic() - begin, 3),
        "recorded": recorded,
        "device": recorded.get("device", manifest["device"]),
        "error": {"cell": error.cell, "last_line": error.last_line} if error else None,
        "outputs": sorted(path.name for path in planned.folder.iterdir() if path.name != "manifest.json"),
    }
    write_json(planned.folder / "manifest.json", manifest)  # last: a run without it has not finished
    if error:
        raise error
    return RunResult(planned.notebook.stem, planned.folder, planned.run_hash, planned.parameters, manifest)


def _execute(planned: Plan, content: dict[str, Any], token: str, kernel: _Kernel) -> RunError | None:
    """Execute into ``executed.ipynb`` of the run folder; return the failure of a cell, if one failed."""
    import nbformat

    from . import execution

    parameters_cell = tagged_cell(content, "parameters")
    node = nbformat.from_dict(content)
    node = nbformat.v4.upgrade(node)
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    node.cells = [cell for cell in node.cells if "injected-parameters" not in cell.metadata.get("tags", ())]
    if parameters_cell is not None:
        injected = nbformat.v4.new_code_cell(injected_source(planned.parameters))
        injected.metadata["tags"] = ["injected-parameters"]
        node.cells.insert(cast("int", tagged_cell(node, "parameters")) + 1, injected)
    extra = {FOLDER_VARIABLE: str(planned.folder), TOKEN_VARIABLE: token}
    if repository_root() is not None:  # the kernel imports the package that runs it, installed or not
        old = os.environ.get("PYTHONPATH")
        extra["PYTHONPATH"] = os.pathsep.join([str(repository_root()), *([old] if old else [])])
    failure = execution.execute(
        node,
        planned.folder / "executed.ipynb",
        parameters=planned.parameters,
        environment={**kernel.environment, **extra},
        say=kernel.say,
        echo=sys.stdout if kernel.echo else None,
        timeout_s=kernel.timeout_s,
        warm=kernel.warm,
    )
    if failure is None:
        return None
    cell, last_line = failure
    error = RunError(
        f"{planned.notebook.name}: {cell} failed",
        value=last_line,
        bound="cells that run without an error",
        remedy=f"See {planned.folder / 'executed.ipynb'}; correct the cause and run again.",
    )
    error.cell, error.last_line, error.folder = cell, last_line, planned.folder
    return error
