"""Notebooks as they ran, for the site: their code with its outputs, from finished runs with the parameters they come with."""

from __future__ import annotations

from pathlib import Path

from ttsnap_lib.errors import TTSnapError
from ttsnap_lib.provenance import code_hash
from ttsnap_lib.runs.folders import RunFolder, run_folders
from ttsnap_lib.runs.parameters import read_notebook

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
TITLE = "The notebook as it ran"


def runs() -> dict[str, RunFolder]:
    """Return by notebook the newest run of today's code that finished and changed no parameter."""
    found: dict[str, RunFolder] = {}
    for run in run_folders():
        name, source = run.folder.parent.name, NOTEBOOKS / f"{run.folder.parent.name}.ipynb"
        if name in found or not source.exists() or run.status != "complete" or run.changed():
            continue
        try:
            same = run.manifest.get("notebook_sha256") == code_hash(read_notebook(source))
        except TTSnapError:
            continue
        if same and (run.folder / "executed.ipynb").exists():
            found[name] = run
    return found


def page(run: RunFolder) -> str:
    """Return a run's notebook as one HTML file."""
    from nbconvert import HTMLExporter

    return HTMLExporter(embed_images=True).from_filename(str(run.folder / "executed.ipynb"))[0]


def link(markdown: str, name: str) -> str:
    """Return a notebook's page with a link to its executed form under the heading."""
    heading, _, rest = markdown.partition("\n")
    return f"{heading}\n\n[{TITLE}, with its outputs]({name}-executed.html)\n{rest}"
