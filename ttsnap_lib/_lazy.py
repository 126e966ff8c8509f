"""Names of a package that load on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package whose `names` stand in its modules (name -> module).

    A name that is its module's own (``simulate``) gives the module: it is callable and stands for both.
    """
    known = vars(sys.modules[package])

    def load(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f".{names[name]}", package)
        known[name] = module if name == names[name] else getattr(module, name)
        return known[name]

    def listed() -> list[str]:
        return sorted({*known, *names})

    return load, listed
