"""A real JupyterLab, Notebook 7 or Voila on loopback, and a headless Chromium that looks at it.

``with serve("lab", folder) as site, browser() as page:`` then ``page.goto(site.url("x.ipynb"))`` and
``run_all(page)``, which presses Run All and returns the notebook with its outputs. :func:`check_outputs` fails on an
error in a cell.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "test-artifacts"
"""Screenshots are kept here; git ignores it."""

_ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Not ours: a missing icon, news, and the fonts that Voila takes from a CDN, which may be out of reach.
_HARMLESS = ("favicon", "/lab/api/news", "net::ERR_INTERNET_DISCONNECTED", "cdn.jsdelivr.net", "cdnjs.cloudflare.com")
_START_S = 240


@dataclass(frozen=True)
class Site:
    """A running server."""

    kind: str
    base: str
    token: str

    def url(self, notebook: str) -> str:
        """Return the address of a notebook in the served folder."""
        # A workspace of its own, or Lab opens the notebooks of the last visit again beside this one.
        lab = f"lab/workspaces/{Path(notebook).stem}/tree/"
        path = {"lab": lab, "notebook": "notebooks/", "voila": "voila/render/"}[self.kind]
        return f"{self.base}/{path}{notebook}?token={self.token}"


def chromium() -> str:
    """Return the path of Chromium, or skip the test with the line that installs it."""
    pytest.importorskip("playwright", reason="pip install playwright")
    found = os.environ.get("TTSNAP_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("Chromium not found: apt-get update && apt-get install -y chromium")
    return found


def copy_notebook(name: str, folder: Path, **parameters: Any) -> Path:
    """Copy a shipped notebook (so that saving it does not touch the repository), with parameters changed."""
    import nbformat

    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    if parameters:
        lines = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        at = next(k for k, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        cell = nbformat.v4.new_code_cell(lines, metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(at + 1, cell)
    path = folder / name
    nbformat.write(notebook, path)
    return path


@contextlib.contextmanager
def serve(kind: str, folder: Path) -> Iterator[Site]:
    """Serve `folder` by JupyterLab (``"lab"``), Notebook 7 (``"notebook"``) or Voila (``"voila"``)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    site = Site(kind, f"http://127.0.0.1:{port}", token)
    with tempfile.TemporaryDirectory(prefix="ttsnap-lab-", ignore_cleanup_errors=True) as home:
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {
            # Tests draw without a screen; a reader's kernel draws into the notebook.
            **{key: value for key, value in os.environ.items() if key != "MPLBACKEND"},
            "PYTHONPATH": python_path,
            "JUPYTER_CONFIG_DIR": f"{home}/config",
            "JUPYTER_DATA_DIR": f"{home}/data",
            "JUPYTER_RUNTIME_DIR": f"{home}/runtime",
            "IPYTHONDIR": f"{home}/ipython",
            "TTSNAP_DATA_CACHE": f"{home}/cache",
        }
        # Lab asks once whether it may fetch news: no.
        settings = Path(home) / "config/lab/user-settings/@jupyterlab/apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
        log = Path(home) / "server.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                _command(kind, port, token, folder),
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_until_up(site, server, log)
            yield site
        finally:
            # The session holds the server and its kernels, nothing else.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(20)
            ARTIFACTS.mkdir(exist_ok=True)
            shutil.copyfile(log, ARTIFACTS / f"server-{kind}.log")


def _command(kind: str, port: int, token: str, folder: Path) -> list[str]:
    module = {"lab": "jupyterlab", "notebook": "notebook", "voila": "voila"}[kind]
    command = [sys.executable, "-m", module, "--no-browser"]
    if kind == "voila":
        return [*command, f"--port={port}", "--Voila.ip=127.0.0.1", str(folder), "--show_tracebacks=True"]
    app = {"lab": "LabApp", "notebook": "JupyterNotebookApp"}[kind]
    return [
        *command,
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}",
        f"--{app}.expose_app_in_browser=True",
    ]


def _wait_until_up(site: Site, server: subprocess.Popen, log: Path) -> None:
    address = f"{site.base}/" if site.kind == "voila" else f"{site.base}/api/status?token={site.token}"
    limit = time.monotonic() + _START_S
    while time.monotonic() < limit:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"{site.kind} did not start:\n{log.read_text(errors='replace')[-3000:]}")


@contextlib.contextmanager
def browser(width: int = 1500, height: int = 1000) -> Iterator[Any]:
    """Open a page in a fresh Chromium; ``page.problems`` collects errors of the console and uncaught exceptions."""
    executable = chromium()
    with _playwright() as playwright, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=executable,
            headless=True,
            args=_ARGUMENTS,
            viewport={"width": width, "height": height},
            permissions=["clipboard-read", "clipboard-write"],
        )
        try:
            page = context.pages[0] if context.pages else context.new_page()
            page.set_default_timeout(120_000)
            page.problems = []
            page.on("console", lambda message: _collect(page, message))
            page.on("pageerror", lambda error: page.problems.append(f"uncaught: {error}"))
            yield page
        finally:
            context.close()


_shared: list[Any] = []  # Playwright and how many use it: a thread can hold only one


@contextlib.contextmanager
def _playwright() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    if not _shared:
        _shared.extend([sync_playwright().start(), 0])
    _shared[1] += 1
    try:
        yield _shared[0]
    finally:
        _shared[1] -= 1
        if not _shared[1]:
            _shared[0].stop()
            _shared.clear()


def _collect(page: Any, message: Any) -> None:
    place = (message.location or {}).get("url", "")
    text = f"{message.text} ({place})"
    if message.type == "error" and not any(word in text for word in _HARMLESS):
        page.problems.append(text)


def run_all(page: Any, timeout_s: float = 600) -> dict:
    """Run all cells of the notebook that is open in JupyterLab or Notebook 7; return it with its outputs."""
    page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell.currentWidget", timeout=240_000)
    page.wait_for_selector(".jp-Notebook", timeout=240_000)
    page.evaluate(
        """async (limit) => {
            const app = window.jupyterapp;
            const panel = app.shell.currentWidget;
            await panel.context.ready;
            await panel.sessionContext.ready;
            await panel.sessionContext.session.kernel.info;
            const late = new Promise((_, reject) => setTimeout(() => reject(new Error("cells took too long")), limit));
            await Promise.race([app.commands.execute("notebook:run-all-cells"), late]);
        }""",
        timeout_s * 1000,
    )
    return page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.toJSON()")


def keep_pages(page: Any, name: str, page_px: int = 1400) -> list[Path]:
    """Keep the whole notebook that is open in JupyterLab as ``<name>-1.png`` and so on, from top to bottom."""
    for old in ARTIFACTS.glob(f"{name}-*.png"):
        old.unlink()
    before = page.viewport_size
    page.set_viewport_size({"width": before["width"], "height": page_px})
    panel = page.locator(".jp-NotebookPanel:visible .jp-WindowedPanel-outer")
    kept: list[Path] = []
    place, last = 0, -1
    while place != last and len(kept) < 40:
        last = place
        # Cells are drawn when they come into view, so each page is scrolled to and waited for.
        panel.evaluate(
            "(outer, k) => { outer.scrollTop = k ? outer.scrollTop + outer.clientHeight - 40 : 0; }", len(kept)
        )
        page.wait_for_timeout(2000)
        place = panel.evaluate("(outer) => outer.scrollTop + 1")
        if place != last:
            kept.append(ARTIFACTS / f"{name}-{len(kept) + 1}.png")
            page.screenshot(path=kept[-1])
    page.set_viewport_size(before)
    return kept


def shut_down(page: Any) -> None:
    """End the kernel of the notebook that is open."""
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def check_outputs(notebook: dict) -> None:
    """Fail when a cell of an executed notebook ended in an error, or none ran."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any(cell["execution_count"] for cell in cells), "no cell ran"
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] != "error", f"{output['ename']}: {output['evalue']}"
