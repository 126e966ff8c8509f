"""``ttsnap demo``: the main job on what comes with the package, headless."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["add"]


def add(commands: Any) -> None:
    """Register the command with argparse's subparsers."""
    parser = commands.add_parser("demo", help="run the main job on the embedded default (`make demo`)")
    parser.add_argument("--values", type=Path, help="folder of published reward values to simulate on instead")
    parser.set_defaults(func=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from ttsnap_lib import runner
    from ttsnap_lib.paths import data_cache
    from ttsnap_lib.progress import progress_bar
    from ttsnap_lib.published import find_published, import_published
    from ttsnap_lib.tensors import save_rewards

    start = time.monotonic()
    parameters: dict[str, Any] = {}
    if arguments.values:
        model, rewards = next(iter(find_published(arguments.values).items()), ("flux", None))
        tensor = data_cache() / "published" / f"{model}.zarr"
        if not tensor.exists():
            dataset = import_published(arguments.values, model, rewards, progress=progress_bar("files"))
            save_rewards(dataset, tensor)
        parameters["tensor"] = str(tensor)
    result = runner.run("simulate", parameters, progress=lambda line: print(f"simulate: {line}", file=sys.stderr))
    print(f"\nMade in {time.monotonic() - start:.0f} s, all in {result.folder}:")
    for path in [*result.tables.values(), *result.figures.values(), result.folder / "executed.ipynb"]:
        print(f"  {path.name}")
    print("\nRelative gain over Best-of-N in percent, with its 95% interval:")
    print(result.table("relative_gains").round(1).to_string(index=False))
    print("\nNext:\n  make lab                       open the notebooks, start with simulate.ipynb")
    print("  .venv/bin/ttsnap run simulate --list   the parameters to change")
    return 0
