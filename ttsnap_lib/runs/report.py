"""One self-contained HTML file of a run or a sweep: parameters, provenance, tables, figures and the notebook.

The file loads nothing from elsewhere and runs no script: every text is escaped, what a notebook shows as HTML is
cleaned, and a content policy forbids the rest.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap_lib.errors import RunError
from ttsnap_lib.files import as_path, atomic_write, failures_as, read_if_whole

if TYPE_CHECKING:
    import pandas as pd


_MOST_ROWS = 500


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #eee; }
td { overflow-wrap: anywhere; } th { white-space: nowrap; }
.scroll { overflow-x: auto; max-height: 36rem; } img { max-width: 100%; height: auto; }
pre { background: #f6f6f4; padding: .6rem; overflow-x: auto; font-size: 13px; white-space: pre-wrap; }
.good { color: #00664d; } .bad { color: #a12a00; } figcaption, .note { color: #555; font-size: 13px; }
.jp-InputPrompt, .jp-OutputPrompt, .anchor-link { display: none; }
"""


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run folder or a sweep folder and return its path.

    Parameters
    ----------
    folder : str or Path
        A run folder (with ``manifest.json``) or a sweep folder (with ``sweep.json``).
    output : str or Path, optional
        The HTML file; ``report.html`` in the folder by default.

    Returns
    -------
    Path
        The HTML file.

    Raises
    ------
    RunError
        When the folder is neither.
    """
    folder = as_path("folder", folder, error=RunError)
    manifest, sweep = read_if_whole(folder / "manifest.json"), read_if_whole(folder / "sweep.json")
    remedy = "Give the folder that `ttsnap run` or `ttsnap sweep` printed."
    with failures_as(
        RunError,
        f"a file of {folder} is broken: got {folder}, expected records, tables and notebook as the run wrote them. Run "
        f"it again with --force. {remedy}",
    ):
        if sweep is not None and "runs" in sweep:
            title, parts = _sweep_parts(folder, sweep)
        elif manifest is not None and "notebook" in manifest:
            title, parts = _run_parts(folder, manifest)
        else:
            raise RunError(
                f"nothing to report: got {folder}, expected a run folder (manifest.json of a notebook) or a sweep "
                f"folder (sweep.json). {remedy}"
            )
    path = Path(output) if output is not None else folder / "report.html"
    body = "\n".join([f"<h1>{_text(title)}</h1>", *parts])
    with atomic_write(path, "w") as file:
        file.write(
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f'<meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
            f"<style>{_STYLE}{_highlight_style()}</style></head>\n<body>\n{body}\n</body></html>\n"
        )
    return path


def _run_parts(folder: Path, manifest: Mapping[str, Any]) -> tuple[str, list[str]]:
    title = f"{manifest['notebook']} - run {manifest.get('run_hash', folder.name)}"
    parts = [_status(manifest.get("status", "unknown"))]
    if manifest.get("error"):
        error = manifest["error"]
        parts.append(f"<pre>{_text(error['cell'])}\n{_text(error['last_line'])}</pre>")
    parts.append(_section("Parameters", _mapping(manifest.get("parameters", {}))))
    for path in sorted(folder.glob("*.csv")):
        parts.append(_section(f"Table {path.stem}", _table(_frame(path))))
    for path in sorted(folder.glob("*.png")):
        parts.append(_section(f"Figure {path.stem}", _figure(path)))
    executed = folder / "executed.ipynb"
    if executed.exists():
        parts.append(_section("Notebook", _notebook(executed)))
    parts.append(_section("Provenance", _provenance(manifest)))
    return title, parts


def _sweep_parts(folder: Path, sweep: Mapping[str, Any]) -> tuple[str, list[str]]:
    counts = {"complete": 0, "failed": 0}
    for run in sweep["runs"]:
        counts[run["status"]] = counts.get(run["status"], 0) + 1
    told = f"{len(sweep['runs'])} runs: {counts['complete']} complete, {counts['failed']} failed"
    parts = [_status("failed" if counts["failed"] else "complete", told)]
    for failure in sweep.get("failed", ()):
        parts.append(
            f"<pre>{_text(failure['label'])}\n{_text(failure['cell'])}\n{_text(failure['last_line'])}\n"
            f"{_text(failure['folder'])}</pre>"
        )
    for path in sorted(folder.glob("*.png")):
        parts.append(_section("Summary" if path.stem == "summary" else f"Figure {path.stem}", _figure(path)))
    if (folder / "results.csv").exists():
        parts.append(_section("Results", _table(_frame(folder / "results.csv"))))
    parts.append(_section("Provenance", _provenance(sweep)))
    return f"{sweep['notebook']} - sweep {sweep['name']}", parts


def _text(value: Any) -> str:
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>\n{content}</section>"


def _status(status: str, told: str = "") -> str:
    return f'<p class="{"good" if status == "complete" else "bad"}">{_text(told or status)}</p>'


def _mapping(content: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in content.items())
    return f"<table>{rows}</table>" if rows else '<p class="note">none</p>'


def _provenance(manifest: Mapping[str, Any]) -> str:
    git = manifest.get("git") or {}
    commit = f"{git['commit']}{' with local changes' if git.get('dirty') else ''}" if git.get("commit") else "unknown"
    rows = {"commit": commit}
    rows |= {name: manifest[name] for name in ("device", "seed", "started", "ended", "elapsed_s", "workers", "reused",
                                               "notebook_sha256", "recorded") if manifest.get(name) not in (None, {})}  # fmt: skip
    rows |= {f"input {path}": digest for path, digest in (manifest.get("inputs") or {}).items()}
    rows |= {f"version of {name}": version for name, version in (manifest.get("versions") or {}).items()}
    return _mapping(rows)


def _frame(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_csv(path, keep_default_na=False)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


def _table(frame: pd.DataFrame) -> str:
    shown = frame.head(_MOST_ROWS)
    note = f'<p class="note">the first {_MOST_ROWS} of {len(frame)} rows</p>' if len(frame) > _MOST_ROWS else ""
    return f'{note}<div class="scroll">{shown.to_html(index=False, border=0, escape=True)}</div>'


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{_text(path.stem)}" src="data:image/png;base64,{data}"></figure>'


_TAGS = (
    "a abbr b blockquote br caption code dd del div dl dt em h1 h2 h3 h4 h5 h6 hr i kbd li ol p pre s small span strong "
    "sub sup table tbody td tfoot th thead tr ul"
)


def _notebook(path: Path) -> str:
    """Return the executed notebook as an HTML fragment, cleaned of scripts, styles and foreign images."""
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    node = nbformat.read(path, as_version=4)
    for cell in node.cells:
        for output in cell.get("outputs", ()):
            shown = output.get("data", {})
            if "text/html" in shown:  # the cleaner would show their content as text
                shown["text/html"] = re.sub(r"(?is)<(style|script)\b.*?</\1\s*>", "", shown["text/html"])
    config = Config()
    config.SanitizeHTML.tags = _TAGS.split()
    exporter = HTMLExporter(config=config, template_name="basic", sanitize_html=True)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    fragment, _ = exporter.from_notebook_node(node)
    return fragment


def _highlight_style() -> str:
    from pygments.formatters import HtmlFormatter

    return HtmlFormatter(style="default").get_style_defs(".highlight")
