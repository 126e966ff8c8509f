"""``ttsnap lab`` and ``ttsnap explore``: the notebooks in a browser."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any


def add(subparsers: Any) -> None:
    """Register the commands with argparse's subparsers."""
    lab = subparsers.add_parser(
        "lab", help="open the notebooks in JupyterLab", description="Open the shipped notebooks in JupyterLab."
    )
    explore = subparsers.add_parser(
        "explore",
        help="open the explorer alone in a browser: sliders over a reward tensor",
        description="Serve explore.ipynb by Voila: the controls and figures without the code. Ctrl-C ends it.",
    )
    explore.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set one parameter of explore.ipynb (may stand several times)",
    )  # fmt: skip
    for parser in (lab, explore):
        parser.add_argument("--port", type=int, metavar="N", help="port of the server (default: a free one)")
        parser.add_argument("--no-browser", action="store_true", help="print the address, and open nothing")
    lab.set_defaults(func=_lab)
    explore.set_defaults(func=_explore)


def _lab(arguments: argparse.Namespace) -> int:
    import jupyterlab  # noqa: F401 (an installation without it is told in a sentence)

    from ttsnap_lib.files import notebooks_folder

    port = [] if arguments.port is None else [f"--port={arguments.port}"]
    return _serve(["-m", "jupyterlab", str(notebooks_folder()), *port], arguments)


def _explore(arguments: argparse.Namespace) -> int:
    import nbformat
    import voila  # noqa: F401 (told in a sentence, too)
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    from ttsnap_lib.files import atomic_write, data_cache
    from ttsnap_lib.runs.parameters import declared_parameters, from_text, read_notebook, resolve
    from ttsnap_lib.runs.run import find_notebook

    path = find_notebook("explore")
    declared = declared_parameters(read_notebook(path), path.name)
    given = {name: from_text(text, declared.get(name)) for name, text in arguments.parameters}
    resolve(declared, given, path.name)
    target = data_cache() / "explore" / "explore.ipynb"
    with atomic_write(target, "w") as file:
        nbformat.write(parameterize_notebook(load_notebook_node(str(path)), given), file)
    port = [] if arguments.port is None else [f"--port={arguments.port}"]
    return _serve(["-m", "voila", str(target), *port], arguments)


def _serve(words: list[str], arguments: argparse.Namespace) -> int:
    """Run a server until Ctrl-C; its kernels import the package that runs it, installed or not."""
    from ttsnap_lib.files import repository_root

    words += ["--no-browser"] if arguments.no_browser else []
    places = [str(repository_root() or ""), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    return subprocess.call([sys.executable, *words], env=environment)
