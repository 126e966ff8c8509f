"""Griffe extension: Sphinx roles in docstrings (``:func:`name```) become links where the name has a page."""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["Roles"]

_ROLE = re.compile(r":(?:func|class|meth|data|attr|mod|exc):`(~?)([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring; a name without a module is taken from the object's own."""
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            short, target = match.groups()
            shown = target.rpartition(".")[2] if short else target
            path = target if target.startswith("ttsnap_lib.") else f"{obj.module.path}.{target}"
            return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'

        obj.docstring.value = _ROLE.sub(link, obj.docstring.value)
