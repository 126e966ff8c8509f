"""The picture of the rooms and what stands in each, from the table that the test of the imports reads."""

from __future__ import annotations

import re

from tests.test_rooms import FLOORS, IMPORTS, MODULES, room_of
from ttsnap_docs import api


def table(name: str) -> str:
    """Return ``floors``, the picture, or ``rooms``, a paragraph a room."""
    return {"floors": _floors, "rooms": _rooms}[name]()


def _floors() -> str:
    """Return the floors from the top down, each with its rooms, as plain HTML."""
    lines = ['<div class="house">']
    for floor in sorted({floor for floor, _ in FLOORS.values()}, reverse=True):
        lines.append(f'<div class="floor"><span>{floor or "ground"}</span>')
        for room, (at, job) in FLOORS.items():
            if at == floor:
                lines.append(f'<a class="room" href="#{room}"><b>{room}</b><br>{_cell(job)}</a>')
        lines.append("</div>")
    return "\n".join([*lines, "</div>"]) + "\n"


def _rooms() -> str:
    parts = []
    for room, (floor, job) in FLOORS.items():
        names = [name for name in MODULES if room_of(name) == room and name not in ("", room)]
        place = "Ground floor" if not floor else f"Floor {floor}"
        text = f"{place}: {job}."
        below = {room_of(other) for name in names if name != "__main__" for other in IMPORTS[name]} - {room, "ground"}
        if below:
            text += f" It imports {', '.join(f'`{other}`' for other in FLOORS if other in below)}."
        if room in api.rooms():
            text += f" [Its Python interface](api/{room}.md)."
        files = [f"- `{name.removeprefix(f'{room}.')}`: {_cell(api.first_line(name))}" for name in names
                 if not name.startswith("pocket.training.")]  # fmt: skip
        parts += [f"### {room}\n", f"{text}\n", *files, ""]
    return "\n".join(parts)


def _cell(text: str) -> str:
    return re.sub(r":\w+:`", "`", text.replace("<", "&lt;").replace(">", "&gt;"))
