"""Where things are kept. How they are written (beside, then renamed, under a lock) stands in a module of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from ._writing import (
    atomic_folder,
    atomic_write,
    disk_error,
    lock,
    require_space,
    tidy,
    typed_disk_errors,
    write_json,
)

__all__ = [
    "SHIPPED_TENSORS",
    "atomic_folder",
    "atomic_write",
    "data_cache",
    "disk_error",
    "git_state",
    "lock",
    "notebooks_folder",
    "repository_root",
    "require_space",
    "shipped_tensor",
    "tidy",
    "typed_disk_errors",
    "write_json",
]

_PACKAGE = Path(__file__).resolve().parent

SHIPPED_TENSORS = {"pocket-flux": "flux", "pocket-sdxl": "sdxl"}
"""Names of the tensors that come with the package, and their folders in ``data_cache/pocket``."""


def repository_root() -> Path | None:
    """Return the checkout this package stands in, or None when it is installed from a wheel."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").exists() and (root / "notebooks").is_dir() else None


def data_cache() -> Path:
    """Return the folder of everything computed: ``TTSNAP_DATA_CACHE``, else the repository's, else the user's cache."""
    given = os.environ.get("TTSNAP_DATA_CACHE")
    if given:
        return Path(given).expanduser()
    root = repository_root()
    if root is not None:
        return root / "data_cache"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ttsnap"


def notebooks_folder() -> Path:
    """Return the folder of the shipped notebooks: the repository's, else the copy in the wheel."""
    root = repository_root()
    return root / "notebooks" if root is not None else _PACKAGE / "_notebooks"


def shipped_tensor(name: str) -> Path:
    """Return the folder of a shipped pocket tensor: in the data cache, else in the repository, else in the wheel."""
    relative = Path("pocket") / f"{SHIPPED_TENSORS[name]}.zarr"
    root = repository_root()
    places = [data_cache(), *([root / "data_cache"] if root else []), _PACKAGE / "_data_cache"]
    return next((place / relative for place in places if (place / relative).is_dir()), places[-1] / relative)


def git_state() -> dict[str, Any]:
    """Return the commit of the checkout and whether it is dirty; both None outside one."""
    root = repository_root()
    if root is None:
        return {"commit": None, "dirty": None}
    try:
        run = [
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": run[0].stdout.strip(), "dirty": bool(run[1].stdout.strip())}
