"""MkDocs hooks: pages that come from the code, tables in other pages, and the navigation of these and of the pocket world."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # the package and the tools of this checkout

from ttsnap_docs import api, commands, estimates, executed, parameters, rooms

TABLES = {"parameters": parameters.table, "estimates": estimates.table, "rooms": rooms.table}
"""``<!-- KIND: NAME -->`` in a page is replaced by the table."""
_MARKER = re.compile(r"<!-- (\w+): ([\w-]+) -->")


def home() -> str:
    """Return the home page: the README, with its links as the site needs them."""
    text = (ROOT / "README.md").read_text("utf-8")
    text = text.replace("[CHANGELOG.md](CHANGELOG.md)", "`CHANGELOG.md`")  # stands beside the site's sources
    return re.sub(r"\]\(docs/", "](", text)


def fill(markdown: str, page: str) -> str:
    """Return `markdown` with its markers replaced."""

    def table(match: re.Match[str]) -> str:
        kind, name = match.groups()
        if kind not in TABLES:
            raise PluginError(f"{page}: no table of kind {kind!r}; known: {sorted(TABLES)}")
        return TABLES[kind](name)

    return _MARKER.sub(table, markdown)


def wrap_commands(markdown: str, width: int = 78) -> str:
    """Return `markdown` with long commands of blocks without a language broken before options, as a shell takes them."""

    def block(match: re.Match[str]) -> str:
        language, code = match.groups()
        return match[0] if language else "```\n" + "".join(f"{_wrapped(x, width)}\n" for x in code.splitlines()) + "```"

    return re.sub(r"^```(\w*)\n(.*?)^```$", block, markdown, flags=re.MULTILINE | re.DOTALL)


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width or "  #" in line:
        return line
    rows = [""]
    for part in re.split(r" (?=-p |--)", line):
        if rows[-1] and len(rows[-1]) + len(part) + 3 > width:
            rows.append("    " + part)
        else:
            rows[-1] += f" {part}" if rows[-1] else part
    return " \\\n".join(rows)


def on_config(config: Any) -> Any:
    """Put the pages of the pocket world and of the API into the navigation."""
    docs = Path(config.docs_dir)
    # The page's own heading is its title.
    pocket = [f"pocket/{page.name}" for page in sorted((docs / "pocket").glob("*.md"), key=_index_first)]
    reference = [{"Python interface": "api/index.md"}]
    reference += [{api.title(room): f"api/{room}.md"} for room in api.rooms()]
    for section in config.nav:
        if "Background" in section:
            section["Background"] += pocket
        if "Reference" in section:
            section["Reference"] += [{"Python": reference}]
    return config


def _index_first(page: Path) -> tuple[bool, str]:
    return page.name != "index.md", page.name


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    generated = {"index.md": home(), "commands.md": commands.page(), **api.pages()}
    generated |= {f"notebooks/{name}-executed.html": executed.page(run) for name, run in executed.runs().items()}
    for path, content in generated.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Fill the tables of a page, wrap its commands, and lead from a notebook's page to the notebook as it ran."""
    place = Path(page.file.src_uri)
    if files.get_file_from_path(f"{place.with_suffix('')}-executed.html"):
        markdown = executed.link(markdown, place.stem)
    return wrap_commands(fill(markdown, page.file.src_uri))
