"""``ttsnap import-published``: the authors' YAML folders in, a reward tensor out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add"]


def add(commands: Any) -> None:
    """Register the command with argparse's subparsers."""
    parser = commands.add_parser(
        "import-published",
        help="import published YAML reward values into a reward tensor",
        description="Import published reward values (folders such as flux_imr_val_base) to the last bit.",
    )
    parser.add_argument("values", type=Path, help="folder that holds the published folders")
    parser.add_argument("--model", required=True, help="flux, sdxl, ...")
    parser.add_argument("--rewards", nargs="+", help="image_reward, pickscore, hpsv2 (default: all that are there)")
    parser.add_argument("--prompts", type=Path, help="JSON list of the prompt texts")
    parser.add_argument("--distinct", action="store_true", help="drop repeated trajectories")
    parser.add_argument(
        "-o", "--out", type=Path, help="Zarr folder to write (default: data_cache/published/<model>.zarr)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tensor")
    parser.set_defaults(func=_import)


def _import(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.errors import TensorError
    from ttsnap_lib.paths import data_cache
    from ttsnap_lib.progress import progress_bar
    from ttsnap_lib.published import import_published
    from ttsnap_lib.tensors import save_rewards

    out = arguments.out or data_cache() / "published" / f"{arguments.model}.zarr"
    if out.exists() and not arguments.overwrite:  # before the import, which takes a while
        raise TensorError("output", value=str(out), bound="a new path", remedy="Pass --overwrite or another --out.")
    dataset = import_published(
        arguments.values,
        arguments.model,
        arguments.rewards,
        arguments.distinct,
        prompts=arguments.prompts,
        progress=progress_bar("files"),
    )
    save_rewards(dataset, out, overwrite=arguments.overwrite)
    sizes = " x ".join(f"{size} {dim}s" for dim, size in dataset["base"].sizes.items())
    print(
        f"{out}: {sizes}\nnext: ttsnap run simulate -p tensor {out} -p cost flux-512+image_reward  (name your model and reward)"
    )
    return 0
