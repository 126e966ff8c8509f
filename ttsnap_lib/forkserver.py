"""Kernels that start warm: forked from a process that has already made a notebook's imports.

A kernel that starts from nothing spends a second, and a notebook's imports several, on what every run of a sweep does
alike. The server is a small process without threads that executes the notebook's import statements once; each run
then is a fork of it, a fresh kernel in which those imports cost nothing. Where the imports have started threads, a
fork would not be safe: the server says so, and kernels start in the ordinary way.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from .parameters import cell_source

__all__ = ["ForkServer", "Forked", "import_statements"]

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
