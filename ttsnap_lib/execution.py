"""Executes a notebook with papermill in a kernel of this very interpreter, with an environment of its own."""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from .forkserver import ForkServer, import_statements

__all__ = ["execute", "lean_imports"]

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
