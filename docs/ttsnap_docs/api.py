"""The pages of the Python reference: one a room, with the public names of its modules."""

from __future__ import annotations

import ast

import ttsnap_lib
from tests.test_rooms import FLOORS, MODULES, room_of

HIDDEN = ("commands", "pocket.training")
"""Not in the reference: the command line has a page of its own, the training of the pocket models is for ourselves."""


def pages() -> dict[str, str]:
    """Return the path of each page and its Markdown."""
    return {"api/index.md": _index()} | {f"api/{room}.md": _page(room) for room in rooms()}


def rooms() -> list[str]:
    """Return the rooms that have a page, from the top floor down."""
    return [room for room in FLOORS if room not in HIDDEN]


def modules(room: str) -> list[str]:
    """Return the modules of a room that have something to show, without the package's name."""
    found = [name for name in MODULES if room_of(name) == room and not name.startswith(HIDDEN)]
    return [name for name in found if name and shown(name)]


def shown(module: str) -> list[str]:
    """Return the names without underscore that a module defines and documents, in their order."""
    body, found = ast.parse(MODULES[module].read_text("utf-8")).body, []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            found.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(after, ast.Expr):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(after.value, ast.Constant) and isinstance(target, ast.Name):
                found.append(target.id)
    return [name for name in found if not name.startswith("_")]


def first_line(module: str) -> str:
    """Return the first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(MODULES[module].read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def _page(room: str) -> str:
    lines = [f"# {title(room)}\n", f"{FLOORS[room][1].capitalize()}.\n"]
    for module in modules(room):
        path = f"ttsnap_lib.{module}"
        lines += [f"::: {path}", "    options:", "      heading_level: 2", f"      members: {shown(module)}\n"]
    return "\n".join(lines)


def title(room: str) -> str:
    """Return the heading of a room's page."""
    return "Ground files" if room == "ground" else f"ttsnap_lib.{room}"


def _index() -> str:
    """Return the page of the names that ``import ttsnap_lib`` gives."""
    rows = ["| name | what it does |", "| --- | --- |"]
    for name, module in ttsnap_lib._HOME.items():
        rows.append(f"| [`{name}`][ttsnap_lib.{module}.{name}] | {_summary(name)} |")
    listed = [
        f"- [{title(room)}]({room}.md), {FLOORS[room][1]}: {', '.join(f'`{name}`' for name in modules(room))}"
        for room in rooms()
    ]
    return "\n".join([
        "# Python interface\n",
        "What `import ttsnap_lib` gives. Names load on first use; what simulates, tunes or draws loads no torch.\n",
        *rows,
        "\n## Rooms\n",
        "Everything else is imported from its room, as in `from ttsnap_lib.simulation import metrics`.",
        "[How the rooms stand on each other](../rooms.md).\n",
        *listed,
        "\nEvery error is a [`TTSnapError`][ttsnap_lib.errors.TTSnapError] that names the value, the bound and the remedy.\n",
    ])  # fmt: skip


def _summary(name: str) -> str:
    if name == "PUBLISHED_SCHEDULE":
        return f"The schedule of the paper's simulation: `{ttsnap_lib.PUBLISHED_SCHEDULE!r}`."
    body = ast.parse(MODULES[ttsnap_lib._HOME[name]].read_text("utf-8")).body
    text = next(ast.get_docstring(node) for node in body if getattr(node, "name", None) == name)
    return (text or "").splitlines()[0].replace("|", "\\|")
