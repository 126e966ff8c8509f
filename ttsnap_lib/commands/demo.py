"""``ttsnap demo``: the main job on what comes with the package, headless."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
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
    made = []
    if arguments.values:
        model, rewards = next(iter(find_published(arguments.values).items()), ("flux", None))
        tensor = data_cache() / "published" / f"{model}.zarr"
        if not tensor.exists():
            dataset = import_published(arguments.values, model, rewards, progress=progress_bar("files"))
            save_rewards(dataset, tensor)
        # Published rewards are of the real models, so they are priced as those, and one reward selects.
        reward = (rewards or ["image_reward"])[0]
        parameters = {"tensor": str(tensor), "rewards": [reward], "cost": f"{model}-512+{reward}"}
    else:
        made.append(runner.run("generate", _GENERATE, progress=_say("generate")))
        made.append(runner.run("finetune", _FINETUNE, progress=_say("finetune")))
    made.append(runner.run("simulate", parameters, progress=_say("simulate")))
    print(f"\nDone in {time.monotonic() - start:.0f} s. What it made:")
    for result in made:
        print(f"  {result.folder}")
        for path in [*result.tables.values(), *result.figures.values(), result.folder / "executed.ipynb"]:
            print(f"    {path.name}")
    if not arguments.values:
        print("\nKendall tau of a small finetuning on held-out prompts, base and noise-aware:")
        shown = made[1].table("comparison")[["step", "base_tau", "noise_aware_tau", "gain", "gain_low", "gain_high"]]
        print(shown.round(3).to_string(index=False))
    print("\nRelative gain over Best-of-N in percent, with its 95% interval over prompts:")
    print(made[-1].table("relative_gains").round(1).to_string(index=False))
    print(_NEXT)
    return 0


def _say(name: str) -> Callable[[str], None]:
    return lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True)


_GENERATE = {"prompts": "pocket:evaluation:3", "images": 4, "compare_diversity": False}
_FINETUNE = {"trajectories": "pocket-sdxl:train:96x8+mirror", "steps": [2, 0]}
_NEXT = """
Next:
  make lab                                  open the notebooks: explore.ipynb moves a schedule by hand
  .venv/bin/ttsnap run simulate --list      the parameters of a notebook
  .venv/bin/ttsnap search "a large red ring left of a small blue square on a white background" \\
      --candidates 8 --out data_cache/search   one prompt, for real
"""
