"""Runs a notebook headless with strict parameters, in a run folder that tells where every result comes from.

A notebook asks :func:`current_run` where to put its results; the same call works in JupyterLab. :func:`run` executes
a notebook with papermill, in a kernel of the interpreter that calls it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ttsnap_lib.checks import plain_name, real
from ttsnap_lib.errors import ConfigError, RunError
from ttsnap_lib.files import (
    InUseError,
    as_path,
    atomic_write,
    data_cache,
    lock,
    notebooks_folder,
    read_if_whole,
    repository_root,
    typed_disk_errors,
    write_json,
)
from ttsnap_lib.provenance import code_hash, device, git_state, inputs, now, versions
from ttsnap_lib.runs.parameters import declared_parameters, parameter_hash, read_notebook, resolve, settle
from ttsnap_lib.style import progress_bar

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas as pd

FOLDER_VARIABLE, TOKEN_VARIABLE = "TTSNAP_RUN_FOLDER", "TTSNAP_RUN_TOKEN"
KERNEL_DIED = "the kernel died"
_STARTUP_S = 300  # a laptop under load may take a minute; a kernel that dies is noticed at once


# The notebook's side


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
        return self._told(write_table(frame, self._path(name, ".csv")))

    def save_figure(self, figure: Any, name: str = "figure") -> Path:
        """Write a matplotlib figure (or the figure of an ``Axes``) as PNG at 200 dpi and PDF; return the PNG's path."""
        drawn = figure if hasattr(figure, "savefig") else figure.figure
        return self._told(write_figure(drawn, self._path(name, ".png")))

    @property
    def data_cache(self) -> Path:
        """The folder of everything computed: what several notebooks use stands there."""
        return data_cache()

    def progress(self, what: str = "images") -> Any:
        """Return a callback ``(done, total)`` that shows a bar: a widget in JupyterLab, a line of text headless."""
        return progress_bar(what)

    def record(self, **facts: Any) -> None:
        """Add plain facts (the device that was used, a model's revision) to the manifest under ``recorded``."""
        path = self._path("recorded", ".json")
        write_json(path, {**(read_if_whole(path) or {}), **facts})

    def _path(self, name: str, suffix: str) -> Path:
        plain_name("name of a result", name)
        # A notebook whose runner was killed may live on for a moment, while the run has begun again.
        if self.headless and (read_if_whole(self.folder / "manifest.json") or {}).get("token") != self._token:
            raise RunError(f"{self.folder} belongs to a newer run: this process is a remnant. Nothing to do.")
        return self.folder / f"{name}{suffix}"

    @staticmethod
    def _told(path: Path) -> Path:
        print(f"saved {path}")
        return path


def write_table(frame: pd.DataFrame, path: Path) -> Path:
    """Write `frame`, without its index, to the CSV file `path` and as Parquet beside it; return `path`."""
    with atomic_write(path, "w") as file:
        frame.to_csv(file, index=False, lineterminator="\n")
    with atomic_write(path.with_suffix(".parquet")) as file:
        frame.to_parquet(file, index=False)
    return path


def write_figure(figure: matplotlib.figure.Figure, path: Path) -> Path:
    """Write `figure` to the PNG file `path` and as PDF beside it; the same figure gives the same bytes."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=200, bbox_inches="tight")
    with atomic_write(path.with_suffix(".pdf")) as file:
        figure.savefig(file, format="pdf", bbox_inches="tight", metadata={"CreationDate": None})
    return path


def current_run(name: str | None = None, variables: dict[str, Any] | None = None) -> Run:
    """Return the run this notebook is part of.

    Under :func:`run` that is its run folder. In JupyterLab (or plain papermill) it is
    ``data_cache/runs/<notebook>/interactive``, where a later Run All replaces the files of an earlier one.

    Parameters
    ----------
    name : str, optional
        Name of the notebook for interactive use; else JupyterLab's own, else ``"notebook"``.
    variables : dict, optional
        The notebook's ``globals()``: its parameters are brought to their declared types in place, for plain papermill
        gives ``-p multiples "[2, 4]"`` as text. :func:`run` has done that before.

    Returns
    -------
    Run

    Raises
    ------
    ConfigError
        A parameter is not of its declared type.
    DiskError
        The interactive folder cannot be made.
    """
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Run(Path(given), headless=True, _token=os.environ.get(TOKEN_VARIABLE, ""))
    stem = name or Path(os.environ.get("JPY_SESSION_NAME", "notebook")).stem
    settle({} if variables is None else variables, stem)
    folder = data_cache() / "runs" / stem / "interactive"
    with typed_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return Run(folder)


# The caller's side


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


@dataclass(frozen=True)
class RunResult:
    """A finished run; ``reused`` tells that an earlier one with the same parameters was found and nothing executed."""

    notebook: str
    folder: Path
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
            known = sorted(self.tables)
            raise RunError(
                f"{self.notebook} saved no table {name!r}, expected one of {known}. Save it in the notebook."
            )
        return pd.read_parquet(self.folder / f"{name}.parquet")


def find_notebook(notebook: str | Path) -> Path:
    """Return the path of `notebook`: a path, or the name of a shipped notebook (``simulate``)."""
    path = as_path("notebook", notebook).expanduser()
    if path.suffix == ".ipynb" and path.exists():
        return path.resolve()
    shipped = notebooks_folder() / f"{path.stem}.ipynb"
    if path.parent == Path(".") and shipped.exists():
        return shipped
    names = sorted(found.stem for found in notebooks_folder().glob("*.ipynb"))
    raise ConfigError(f"notebook: got {notebook}, expected an .ipynb file or one of {names}. Check the path.")


def plan(
    notebook: str | Path, parameters: Mapping[str, Any] | None = None, *, folder: str | Path | None = None
) -> Plan:
    """Check `notebook` and `parameters` and return where the run will stand, without running anything."""
    path = find_notebook(notebook)
    resolved = resolve(declared_parameters(read_notebook(path), path.name), dict(parameters or {}), path.name)
    root = Path(folder) if folder is not None else data_cache() / "runs"
    return Plan(path, resolved, root.absolute() / path.stem / parameter_hash(resolved))


def finished(planned: Plan) -> RunResult | None:
    """Return the run that has already finished as `planned`, or None.

    A change of the notebook's code or of an input file since then makes it another run.
    """
    manifest = read_if_whole(planned.folder / "manifest.json") or {}
    then = manifest.get("inputs")
    if manifest.get("status") != "complete" or not isinstance(then, dict):
        return None
    same_code = manifest.get("notebook_sha256") == code_hash(read_notebook(planned.notebook))
    if not same_code or not then.items() <= inputs(planned.parameters).items():
        return None
    return RunResult(planned.notebook.stem, planned.folder, manifest, reused=True)


def run(
    notebook: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    folder: str | Path | None = None,
    force: bool = False,
    progress: bool = False,
    echo: bool = False,
    timeout_s: float | None = None,
) -> RunResult:
    """Execute `notebook` with `parameters` over its defaults, in a run folder named by their hash.

    A run that has finished with the same parameters, notebook code and input files is not executed again, unless
    `force` is given. Two processes that ask for the same run do it once: the second waits, then takes the first one's
    result. `folder` holds the run folders ``<notebook>/<hash>``, ``data_cache/runs`` by default; `progress` shows a bar
    of the cells, `echo` what the notebook prints as it prints it; `timeout_s` is the longest time for one cell. A
    RunError names the cell that failed, the error's last line and the executed notebook, which is kept.
    """
    planned = plan(notebook, parameters, folder=folder)
    if timeout_s is not None:
        timeout_s = math.ceil(real("timeout_s", timeout_s, 0, open_low=True))
    gate = planned.folder.parent / ".locks" / planned.run_hash
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock(gate))
        except InUseError:
            print(f"another process is at {planned.folder}; waiting for it", file=sys.stderr)
            held.enter_context(lock(gate, wait=True))
            force = False
        done = None if force else finished(planned)
        if done is not None:
            return done
        with typed_disk_errors(planned.folder):
            return _run_anew(planned, progress, echo, timeout_s)


def _run_anew(planned: Plan, progress: bool, echo: bool, timeout_s: float | None) -> RunResult:
    shutil.rmtree(planned.folder, ignore_errors=True)  # the remains of a failed or killed run
    manifest: dict[str, Any] = {
        "status": "running",
        "token": uuid.uuid4().hex,
        "notebook": planned.notebook.stem,
        "notebook_path": str(planned.notebook),
        "notebook_sha256": code_hash(read_notebook(planned.notebook)),
        "parameters": planned.parameters,
        "run_hash": planned.run_hash,
        "seed": planned.parameters.get("seed"),
        "device": planned.parameters.get("device") or device(),
        "git": git_state(),
        "versions": versions(),
        "inputs": inputs(planned.parameters),
        "started": now(),
    }
    write_json(planned.folder / "manifest.json", manifest)
    begin = time.monotonic()
    error = _execute(planned, manifest["token"], progress, echo, timeout_s)
    recorded = read_if_whole(planned.folder / "recorded.json") or {}
    (planned.folder / "recorded.json").unlink(missing_ok=True)
    manifest |= {
        "status": "failed" if error else "complete",
        "ended": now(),
        "elapsed_s": round(time.monotonic() - begin, 3),
        "recorded": recorded,
        "device": recorded.get("device", manifest["device"]),
        "error": {"cell": error.cell, "last_line": error.last_line} if error else None,
        "outputs": sorted(path.name for path in planned.folder.iterdir() if path.name != "manifest.json"),
    }
    write_json(planned.folder / "manifest.json", manifest)  # last: a run without it has not finished
    if error:
        raise error
    return RunResult(planned.notebook.stem, planned.folder, manifest)


def _execute(planned: Plan, token: str, progress: bool, echo: bool, timeout_s: float | None) -> RunError | None:
    """Execute into ``executed.ipynb`` of the run folder; return the failure of a cell, if one failed."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    # It tells twice what fails, and warns of every parameter annotated `int | None`.
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    output = planned.folder / "executed.ipynb"
    source, target = (str(path).replace("{", "{{").replace("}", "}}") for path in (planned.notebook, output))
    environment = {FOLDER_VARIABLE: str(planned.folder), TOKEN_VARIABLE: token}
    if repository_root() is not None:  # the kernel imports the package that runs it, installed or not
        paths = [str(repository_root()), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    scratch = tempfile.TemporaryDirectory(prefix="ttsnap-", ignore_cleanup_errors=True)
    with scratch as folder, tempfile.TemporaryFile() as stderr:
        try:
            papermill.execute_notebook(
                source,
                target,
                planned.parameters,
                kernel_name="python3",
                language="python",
                kernel_manager_class=_kernel_manager(folder, environment, stderr),
                start_timeout=_STARTUP_S,
                execution_timeout=timeout_s,
                coalesce_streams=True,  # of a progress bar the last state stays
                progress_bar={"desc": planned.notebook.stem} if progress else False,
                stdout_file=sys.stdout if echo else None,
                stderr_file=sys.stderr if echo else None,
            )
        except PapermillExecutionError as error:
            last = (error.evalue.strip().splitlines() or ["without a message"])[-1].strip()
            return _failure(planned, output, last if last.startswith(error.ename) else f"{error.ename}: {last}")
        except CellTimeoutError:
            return _failure(planned, output, f"the cell ran longer than {timeout_s:g} s")
        except (DeadKernelError, RuntimeError) as error:  # nbclient's RuntimeError: it died before its first answer
            what = KERNEL_DIED if "died" in str(error) else f"{type(error).__name__}: {error}"
            stderr.seek(0)
            lines = [line.strip() for line in stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]
            why = " / ".join(lines[-2:])[-400:] or "out of memory, or a crash of a native library"
            return _failure(planned, output, f"{what} ({why})")
    return None


def _kernel_manager(scratch: str, environment: Mapping[str, str], stderr: IO[bytes]) -> type:
    """Return a kernel manager whose kernels are of this interpreter, whatever kernelspecs are installed.

    What a kernel itself says (a notebook's own output goes another way) is written to `stderr`.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    # Jupyter fills in ${...} here.
    env = {name: value.replace("$", "$$") for name, value in environment.items()}

    class Manager(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            # Sockets in a folder of this run alone: no port can be taken by a kernel that starts at the same moment,
            # and nothing listens on the network.
            sockets = {"transport": "ipc", "ip": f"{scratch}/s", "connection_file": f"{scratch}/c.json"}
            super().__init__(**options, **sockets)

        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]  # async there too
            await super().start_kernel(**options, stderr=stderr)

        @property
        def kernel_spec(self) -> KernelSpec:
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50"]
            return KernelSpec(argv=argv, display_name="Python 3", language="python", env=env)

    return Manager


def _failure(planned: Plan, output: Path, last_line: str) -> RunError:
    """Return the failure of the cell that was the last to start."""
    cells = (read_if_whole(output) or {}).get("cells", [])
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    code = [cell for cell in code if cell["metadata"].get("papermill", {}).get("start_time")]
    cell = "the start of the kernel"
    if code:
        first = "".join(code[-1]["source"]).strip().split("\n")[0]
        cell = f"code cell {len(code)} ({first[:60]})"
    error = RunError(f"{planned.notebook.name}: {cell} failed: {last_line}. See {output}, and run it again.")
    error.cell, error.last_line, error.folder = cell, last_line, planned.folder
    return error
