"""The table of a notebook's parameters, from its cell tagged ``parameters``."""

from __future__ import annotations

from ttsnap_lib.runs.parameters import declared_parameters, read_notebook
from ttsnap_lib.runs.run import find_notebook

__all__ = ["table"]


def table(notebook: str) -> str:
    """Return the Markdown table of a shipped notebook's parameters."""
    rows = ["| parameter | type | default | what it is |", "| --- | --- | --- | --- |"]
    for one in declared_parameters(read_notebook(find_notebook(notebook)), notebook).values():
        kind = one.annotation.replace("|", "\\|")
        help_text = one.help.replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `{one.name}` | `{kind}` | `{one.default!r}` | {help_text} |")
    return "\n".join(rows) + "\n"
