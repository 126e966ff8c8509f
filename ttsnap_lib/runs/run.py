"""Runs a notebook headless with strict parameters, in a run folder that tells where every result comes from.

A notebook asks :func:`current_run` where to put its results; the same call works in JupyterLab. :func:`run` executes
a notebook with papermill, in a kernel of the interpreter that calls it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

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
from ttsnap_lib.runs.parameters import (
    cell_source,
    declared_parameters,
    injected_source,
    parameter_hash,
    read_notebook,
    resolve,
    tagged_cell,
)

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas as pd


_PRELOAD_S = 120  # importing torch on a busy machine takes a while


def import_statements(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the import statements at the top level of a notebook's code cells."""
    found = []
    for cell in content["cells"]:
        if cell.get("cell_type") != "code":
            continue
        try:
            tree = ast.parse(cell_source(cell))
        except SyntaxError:
            continue  # magics
        found += [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return tuple(dict.fromkeys(found))


class Forked:
    """A kernel that the server has forked, with as much of ``subprocess.Popen`` as a kernel's manager uses."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        """Return None while the kernel runs, else 0: the code itself stays with the server."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return 0
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the kernel."""
        begin = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() > begin + timeout:
                raise subprocess.TimeoutExpired("kernel", timeout)
            time.sleep(0.02)
        return 0

    def send_signal(self, number: int) -> None:
        """Send a signal to the kernel."""
        os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask the kernel to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the kernel."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The caller's side: starts the server, asks it for kernels. It ends with its caller.

    Parameters
    ----------
    statements : sequence of str
        Import statements to execute beforehand; one that fails is left to the notebook.
    environment : mapping
        The server's environment: libraries read some variables (thread limits) when they load.
    """

    def __init__(self, statements: Sequence[str], environment: Mapping[str, str]) -> None:
        self._guard = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from ttsnap_lib.forkserver import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=dict(environment),
            start_new_session=True,
        )
        self._input, self._output = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        timer = threading.Timer(_PRELOAD_S, self._process.kill)
        timer.start()
        try:
            self.usable = self._ask({"statements": list(statements)}).get("threads") == 1
        except (OSError, ValueError):
            self.usable = False
        finally:
            timer.cancel()
        if not self.usable:
            self.close()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], folder: str, log: str) -> Forked:
        """Return a new kernel with `arguments`, working in `folder`, its output going to the file `log`.

        Raises
        ------
        OSError, ValueError
            When the server is gone.
        """
        answer = self._ask({"arguments": list(arguments), "env": dict(environment), "folder": folder, "log": log})
        return Forked(answer["pid"])

    def close(self) -> None:
        """End the server; kernels that still run end by themselves within a second."""
        self.usable = False
        with contextlib.suppress(OSError):
            self._input.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        with self._guard:
            self._input.write(json.dumps(question) + "\n")
            self._input.flush()
            return json.loads(self._output.readline())


# -- inside the server ---------------------------------------------------------------------------------------------


def serve() -> None:
    """Be the server: one line of JSON in, one out, until the input closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    questions = os.fdopen(os.dup(0), "r", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # what imports print must not mix with the answers
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # read when ipykernel loads: a kernel ends with this server
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as every kernel has it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # kernels leave no zombies
    first = json.loads(questions.readline())
    import ipykernel.ipkernel
    import ipykernel.kernelapp
    import ipykernel.zmqshell  # noqa: F401

    for statement in first["statements"]:
        with contextlib.suppress(Exception):
            exec(statement, {})  # noqa: S102 - the notebook would execute it next
    gc.collect()
    gc.freeze()  # keeps the pages of the imports shared
    _answer(answers, {"threads": _threads()})
    for line in questions:
        question = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(OSError):
                os.close(questions.fileno())
                os.close(answers.fileno())
            _become_kernel(question)
        _answer(answers, {"pid": pid})


def _answer(stream: Any, content: dict[str, Any]) -> None:
    stream.write(json.dumps(content) + "\n")
    stream.flush()


def _threads() -> int:
    """Count the threads of this process; 0 when that cannot be known, or a fork would be unsafe for another reason.

    jemalloc's own (pyarrow brings it) does not count: jemalloc prepares itself for a fork.
    """
    try:
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        if "libcuda.so" in Path("/proc/self/maps").read_text():  # a driver in use does not survive a fork
            return 0
    except OSError:
        return 0
    return sum(not name.startswith("jemalloc_bg") for name in names)


def _become_kernel(question: dict[str, Any]) -> None:
    """Turn this fork into a kernel; does not return."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(question["folder"])
    os.environ.clear()
    os.environ.update(question["env"], JPY_PARENT_PID=str(os.getppid()))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy.random" in sys.modules:
        numpy.random.seed()  # forks must not share a state, as fresh processes do not
    sys.argv = ["ipykernel_launcher", *question["arguments"]]
    from ipykernel.kernelapp import launch_new_instance

    try:
        launch_new_instance()
    finally:
        sys.exit(0)


_STARTUP_S = 300  # a laptop under load may take a minute; a kernel that dies is noticed at once


def execute(
    node: Any,
    output: Path,
    *,
    parameters: Mapping[str, Any],
    environment: Mapping[str, str],
    say: Callable[[str], None],
    echo: TextIO | None,
    timeout_s: float | None,
    warm: bool = False,
) -> tuple[str, str] | None:
    """Execute the notebook `node` and write it to `output` after each cell.

    With `warm` the kernel is forked from a server that has made the notebook's imports, where that is possible.

    Returns
    -------
    tuple of str or None
        Which cell failed and the last line of its error; None when all went well. A kernel that dies is a failure of
        the cell it died in.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from papermill.iorw import write_ipynb

    _register_engine()
    total = sum(cell.cell_type == "code" for cell in node.cells)
    at: dict[str, Any] = {"cell": "", "code": 0}

    def on_cell(cell: Any) -> None:
        at["code"] += 1
        at["cell"] = _cell_label(cell, at["code"])
        say(f"cell {at['code']}/{total}")

    scratch = Path(tempfile.mkdtemp(prefix="ttsnap-"))  # short: the path of a socket has about 100 characters
    log = output.parent / "kernel.log"
    server = _server(import_statements(node), environment) if warm else None
    node.metadata.setdefault("papermill", {})
    try:
        with open(log, "wb") as stream:
            papermill.execute_notebook(
                node,
                str(output).replace("{", "{{").replace("}", "}}"),  # papermill formats the path
                engine_name="ttsnap",
                on_cell=on_cell,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                start_timeout=_STARTUP_S,
                execution_timeout=None if timeout_s is None else math.ceil(timeout_s),
                kernel_manager_class=_manager_class(scratch, environment, stream, server),
                stdout_file=echo,
                stderr_file=echo,
            )
    except PapermillExecutionError as error:
        text = error.evalue
        if error.ename == "CellExecutionError" and not error.evalue:  # papermill had no traceback to read
            text = _last_line(log.read_text("utf-8", "replace")) or "the cell failed without a message"
        last = _last_line(text)
        return at["cell"] or "the first cell", last if last.startswith(error.ename) else f"{error.ename}: {last}"
    except (CellTimeoutError, DeadKernelError, RuntimeError) as error:
        write_ipynb(node, str(output))
        text = _last_line(str(error)) or type(error).__name__
        if isinstance(error, CellTimeoutError):
            text = f"the cell ran longer than {timeout_s:g} s"
        elif isinstance(error, DeadKernelError):
            text = "the kernel died (out of memory, or a crash of a native library); see kernel.log"
        return at["cell"] or "the start of the kernel", text
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    log.unlink(missing_ok=True)  # of use only when something went wrong
    executed = nbformat.read(output, as_version=4)
    executed.metadata.setdefault("papermill", {})["parameters"] = _plain(parameters)
    write_ipynb(executed, str(output))
    return None


@functools.cache
def _register_engine() -> None:
    """Register, once, papermill's own engine with a hook that tells which cell starts."""
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, *, on_cell: Any, **options: Any) -> Any:
            start = nb_man.cell_start

            def cell_start(cell: Any, cell_index: int | None = None, **rest: Any) -> None:
                if cell.cell_type == "code":
                    on_cell(cell)
                start(cell, cell_index, **rest)

            nb_man.cell_start = cell_start
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("ttsnap", Engine)


_servers: dict[tuple[str, ...], ForkServer] = {}


_servers_guard = threading.Lock()


def _server(statements: tuple[str, ...], environment: Mapping[str, str]) -> ForkServer | None:
    """Return this process's fork server for a notebook's imports, or None where it is of no use."""
    if not hasattr(os, "fork") or sys.platform == "darwin":  # system libraries of macOS do not survive a fork
        return None
    with _servers_guard:
        if statements not in _servers:
            _servers[statements] = ForkServer(statements, {**os.environ, **environment})
        return _servers[statements] if _servers[statements].usable else None


def _manager_class(scratch: Path, environment: Mapping[str, str], log: Any, server: ForkServer | None) -> type:
    """Return a kernel manager whose kernels are of this interpreter, whatever kernelspecs are installed."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_client.provisioning import LocalProvisioner

    env = {**os.environ, **environment}

    class Provisioner(LocalProvisioner):
        """Launches by forking the server, and in the ordinary way when the server is gone."""

        process: Any  # a Popen or a Forked

        async def launch_kernel(self, cmd: list[str], **options: Any) -> Any:
            if server is None:
                return await super().launch_kernel(cmd, **options)
            folder = options.get("cwd") or os.getcwd()
            try:
                self.process = server.start(cmd[cmd.index("-f") :], env, str(folder), log.name)
            except (OSError, ValueError):
                server.usable = False
                return await super().launch_kernel(cmd, **options)
            self.pid = self.pgid = self.process.pid
            self.cwd = folder
            return self.connection_info

    class Manager(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            # Sockets in a folder of this run alone: no port can be taken by a kernel that starts at the same moment,
            # and nothing listens on the network.
            self.transport = "ipc"
            self.ip = str(scratch / "s")
            self.connection_file = str(scratch / "c.json")

        @property
        def kernel_spec(self) -> KernelSpec:
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="Python 3", language="python", env={})

        async def _async_pre_start_kernel(self, **options: Any) -> Any:
            if server is not None and self.provisioner is None:
                self.provisioner = Provisioner(kernel_id="", kernel_spec=self.kernel_spec, parent=self)
            return await super()._async_pre_start_kernel(**{**options, "env": env, "stdout": log, "stderr": log})

    return Manager


def lean_imports() -> None:
    """Keep papermill's import short in a process of our own.

    jsonschema parses a grammar of URLs as it loads, for 2 s, to check a format that notebooks do not use.
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]


def _cell_label(cell: Any, number: int) -> str:
    first = next((line.strip() for line in cell.source.splitlines() if line.strip()), "")
    return f"code cell {number} ({first[:60]})"


def _last_line(text: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    line = lines[-1] if lines else ""
    return line if len(line) <= 300 else f"{line[:150]} ... {line[-145:]}"  # the remedy stands at the end


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in parameters.items()}


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
                f"{self.folder} belongs to a newer run: got {self._token!r}, expected the token of the run that is "
                "going on. Nothing to do: this process is a remnant."
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
        f"notebook: got {notebook}, expected a path of an .ipynb file, or one of {names}. Check the spelling and the "
        "folder."
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
                f"{self.notebook} saved no such table: got {name!r}, expected one of {sorted(self.tables)}. Save it in "
                "the notebook with current_run().save_table(frame, name)."
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
    except InUseError as error:
        if str(gate.parent) not in str(error):
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
    if manifest.get("notebook_sha256") != code_hash(read_notebook(planned.notebook)):
        return None
    now = inputs(planned.parameters)
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
        "notebook_sha256": code_hash(content),
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
    error = _execute(planned, content, manifest["token"], kernel)
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
    return RunResult(planned.notebook.stem, planned.folder, planned.run_hash, planned.parameters, manifest)


def _execute(planned: Plan, content: dict[str, Any], token: str, kernel: _Kernel) -> RunError | None:
    """Execute into ``executed.ipynb`` of the run folder; return the failure of a cell, if one failed."""
    import nbformat

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
    failure = execute(
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
        f"{planned.notebook.name}: {cell} failed: got {last_line!r}, expected cells that run without an error. See "
        f"{planned.folder / 'executed.ipynb'}; correct the cause and run again."
    )
    error.cell, error.last_line, error.folder = cell, last_line, planned.folder
    return error
