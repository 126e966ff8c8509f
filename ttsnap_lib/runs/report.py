"""One HTML file of a run or a sweep that loads nothing from elsewhere: parameters, results, where they come from."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap_lib.errors import RunError
from ttsnap_lib.files import as_path, atomic_write, failures_as, read_if_whole
from ttsnap_lib.runs.compare import comparison_text
from ttsnap_lib.style import method_label, reward_label

if TYPE_CHECKING:
    import pandas as pd

_MOST_ROWS = 500
_PROVENANCE = ("git", "device", "seed", "started", "ended", "elapsed_s", "workers", "reused", "notebook_sha256",
               "recorded", "inputs", "versions")  # fmt: skip
# The policy keeps what a notebook shows as HTML from running a script or loading anything.
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-size: 13px; }} td, th {{ padding: .2rem .6rem; text-align: left; }}
.jp-RenderedHTMLCommon {{ overflow-x: auto; }}
.jp-RenderedHTMLCommon table.dataframe td, .jp-RenderedHTMLCommon table.dataframe th {{ text-align: right; }}
img {{ max-width: 100%; }} pre {{ white-space: pre-wrap; }} .anchor-link {{ display: none; }}
</style></head>
<body><h1>{title}</h1>
"""


def render(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run folder or a sweep folder to `output`, ``report.html`` in it by default; return its path."""
    folder = as_path("folder", folder, error=RunError)
    record = read_if_whole(folder / "sweep.json") or read_if_whole(folder / "manifest.json") or {}
    remedy = "Give the folder that `ttsnap run` or `ttsnap sweep` printed."
    if "notebook" not in record:
        raise RunError(f"nothing to report in {folder}, expected a run folder or a sweep folder. {remedy}")
    with failures_as(RunError, f"a file of {folder} is broken. Run it again with --force. {remedy}"):
        title, parts = _sweep_parts(folder, record) if "runs" in record else _run_parts(folder, record)
        parts |= {"Where it comes from": _mapping({key: record[key] for key in _PROVENANCE if record.get(key)})}
    path = Path(output) if output is not None else folder / "report.html"
    with atomic_write(path, "w") as file:
        file.write(_HEAD.format(title=html.escape(title)))
        file.writelines(f"<h2>{heading}</h2>\n{part}\n" for heading, part in parts.items())
        file.write("</body></html>\n")
    return path


def _run_parts(folder: Path, manifest: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic", embed_images=True, exclude_input=True, exclude_output_prompt=True)
    parts = {"Parameters": _mapping(manifest.get("parameters", {}))}
    if manifest.get("error"):
        parts = {"Error": _mapping(manifest["error"]), **parts}
    if (folder / "executed.ipynb").exists():
        parts["Notebook"], _ = exporter.from_filename(str(folder / "executed.ipynb"))
    title = f"{manifest['notebook']} - run {manifest.get('run_hash', folder.name)}: {manifest.get('status')}"
    return title, parts


def _sweep_parts(folder: Path, sweep: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    import pandas as pd

    parts, parameters = {}, [run.get("parameters", {}) for run in sweep["runs"]]
    same = {name: value for name, value in parameters[0].items() if all(one.get(name) == value for one in parameters)}
    if same and len(parameters) > 1:
        parts["The same in all runs"] = _mapping(same)
    if sweep.get("failed"):
        columns = ["label", "cell", "last_line", "folder"]
        parts["Failed"] = pd.DataFrame(sweep["failed"], columns=columns).to_html(index=False, border=0)
    if (folder / "compared.parquet").exists():
        table = comparison_text(told := pd.read_parquet(folder / "compared.parquet"))
        what = ", ".join([*map(method_label, told["method"].unique()), *map(reward_label, told["reward"].unique())])
        parts[f"Runs compared, the best first ({html.escape(what)})"] = _image(folder / "compared.png") + _table(
            table, list(table.columns[1:3])
        )
    if (folder / "summary.png").exists():
        parts["Summary"] = _image(folder / "summary.png")
    if (folder / "results.parquet").exists():
        frame = pd.read_parquet(folder / "results.parquet")
        if len(parameters) > 1:
            frame = frame.drop(columns=[f"{name}{end}" for name in same for end in ("", "_parameter")], errors="ignore")
        shown = f"{min(len(frame), _MOST_ROWS)} of {len(frame)} rows"
        parts[f"Results ({shown})"] = _table(frame.head(_MOST_ROWS))
    complete = sum(run["status"] == "complete" for run in sweep["runs"])
    title = f"{sweep['notebook']} - sweep {sweep['name']}: {complete} of {len(sweep['runs'])} runs complete"
    return title, parts


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'


def _table(frame: pd.DataFrame, right: Sequence[str] = ()) -> str:
    """Return a table with its heads over their own columns: numbers, and the columns of `right`, stand right, text left."""
    numbers = [*frame.select_dtypes("number").columns, *right]
    styled = (
        frame.style.hide(axis="index")
        .format(escape="html")
        .format("{:.4g}", subset=frame.select_dtypes("float").columns)
    )
    return styled.set_table_styles(
        {name: [{"selector": "", "props": "text-align: right"}] for name in numbers}
    ).to_html()


def _mapping(content: Mapping[str, Any]) -> str:
    """Return a two-column table of names and values; nested mappings stand as JSON."""
    import pandas as pd

    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in content.items()
    }
    with pd.option_context("display.max_colwidth", None):
        return pd.Series(texts, dtype=object).to_frame().to_html(header=False, border=0)
