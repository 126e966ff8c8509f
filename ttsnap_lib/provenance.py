"""Where a result comes from: versions, code and input hashes, times. Every value is a plain JSON value."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ttsnap_lib.files import repository_root

_PACKAGES = (
    "ttsnap", "numpy", "scipy", "pandas", "xarray", "zarr", "numba", "torch", "torchvision", "diffusers",
    "transformers", "accelerate", "peft", "open_clip_torch", "matplotlib", "seaborn", "papermill",
    "ipykernel", "dask", "distributed",
)  # fmt: skip
_WHOLE_BYTES = 256 * 2**20  # above this, a folder is known by names, sizes and times instead of its content


def now() -> str:
    """Return the present time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed key packages."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def device() -> str:
    """Return the device at hand in words, without loading torch: the GPU's name, or the processor and its cores."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1") and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            names = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")
            if names[0].strip():
                return ", ".join(name.strip() for name in names if name.strip())
        except (OSError, subprocess.SubprocessError):
            pass
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"


def code_hash(notebook: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a notebook's code cells; prose, outputs and metadata play no part."""
    digest = hashlib.sha256()
    for cell in notebook["cells"]:
        if cell.get("cell_type") == "code":
            source = cell.get("source", "")
            digest.update((source if isinstance(source, str) else "".join(source)).encode() + b"\0")
    return digest.hexdigest()


def inputs(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of each file or folder that a parameter names, by path.

    A text (also one in a list) counts as a path when it exists and looks like one: it holds a separator or a suffix.
    Parameters named ``output...`` or ``out`` are results, not inputs.
    """
    found = {}
    for name, value in parameters.items():
        if name == "out" or name.startswith(("out_", "output")) or name.endswith(("_out", "_output")):
            continue
        for text in _texts(value):
            if ("/" in text or os.sep in text or Path(text).suffix) and len(text) < 4096 and "\0" not in text:
                path = Path(text).expanduser()
                try:
                    if path.exists():
                        found[text] = path_hash(path)
                except OSError:
                    continue  # a text too odd to be a path
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)


def path_hash(path: Path) -> str:
    """Return ``sha256:...`` of a file, or of a folder's names and contents.

    A folder of more than 256 MiB gives ``listing:...`` instead: names, sizes and modification times.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    states = [file.stat() for file in files]
    whole = path.is_file() or sum(state.st_size for state in states) <= _WHOLE_BYTES
    digest = hashlib.sha256()
    for file, state in zip(files, states, strict=True):
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\0{state.st_size}\0".encode("utf-8", "surrogateescape"))
        if whole:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            digest.update(f"{state.st_mtime_ns}\0".encode())
    return f"{'sha256' if whole else 'listing'}:{digest.hexdigest()}"


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


class Clock:
    """Adds up where the time goes; a part inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[part] = self.seconds.get(part, 0.0) + spent - self._inside.pop()
            if self._inside:
                self._inside[-1] += spent
