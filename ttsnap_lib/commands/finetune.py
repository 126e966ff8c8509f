"""``ttsnap finetune``: a noise-aware series of a reward, one checkpoint per denoising step."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ttsnap_lib.commands.options import say_loading


def add(commands: Any) -> None:
    """Register the commands with argparse's subparsers."""
    parser = commands.add_parser(
        "finetune",
        help="finetune a reward to judge noisy estimates, step by step",
        description="Finetune a reward by curriculum self-distillation. The same command goes on where an earlier "
        "one was stopped. Several GPUs: accelerate launch -m ttsnap_lib finetune ...",
        epilog="Shipped configurations: pocket-flux, pocket-sdxl, and flux- or sdxl- with image_reward, pickscore, "
        "hpsv2. `--show` prints the resolved settings.",
    )
    parser.add_argument(
        "--config", default="pocket-flux", metavar="NAME|FILE", help="configuration (default: pocket-flux)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the run folder")
    parser.add_argument("--trajectories", metavar="FOLDER", help="pictures to train on (default: the configuration's)")
    parser.add_argument("--validation", metavar="FOLDER", help="pictures of held-out prompts")
    parser.add_argument("--targets", type=Path, metavar="FILE", help="ground truth of the training pictures")
    parser.add_argument("--validation-targets", type=Path, metavar="FILE", help="ground truth of the held-out pictures")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="local weights of the base reward")
    parser.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set one field of the settings, as YAML (may stand several times)",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda (default: the accelerator when there is one)")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run in the folder")
    parser.add_argument("--show", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on the terminal")
    parser.set_defaults(func=_finetune)

    adopt = commands.add_parser(
        "import-checkpoints",
        help="turn full checkpoints (Ct14.pt, ...) into a noise-aware series",
        description="Read full state dicts, one per step, as plain tensors, check them against the base reward, and "
        "write a run folder that every command takes.",
    )
    adopt.add_argument("checkpoints", type=Path, help="folder of Ct14.pt and its like")
    adopt.add_argument("--reward", required=True, help="the base reward: image_reward, pickscore, hpsv2, a folder")
    adopt.add_argument("--weights", type=Path, metavar="FILE", help="local weights of the base reward")
    adopt.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the run folder, new or empty")
    adopt.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16")
    adopt.set_defaults(func=_adopt)


def _finetune(arguments: argparse.Namespace) -> int:
    import yaml

    from ttsnap_lib.files import data_cache, parse_yaml
    from ttsnap_lib.finetuning.config import load_config
    from ttsnap_lib.style import progress_bar

    changes = {name: parse_yaml(value, name, remedy="Quote it for the shell.") for name, value in arguments.parameters}
    config = load_config(arguments.config, **changes)
    if arguments.show:
        yaml.safe_dump(config.to_dict(), sys.stdout, sort_keys=False)
        return 0
    say_loading(arguments, "torch, transformers")
    from ttsnap_lib.finetuning.train import finetune

    say_loading(arguments, config.reward)
    folder = arguments.out or data_cache() / "finetune" / Path(arguments.config).stem
    result = finetune(
        arguments.trajectories,
        folder,
        config,
        reward_options=_local(arguments),
        validation=arguments.validation,
        targets=arguments.targets,
        validation_targets=arguments.validation_targets,
        device=arguments.device,
        overwrite=arguments.overwrite,
        progress=progress_bar("updates", quiet=arguments.quiet),
    )
    shown = result.table.filter(["step", "base_tau", "before_tau", "after_tau", "updates", "kept_update"])
    print(shown.round(3).to_string(index=False))
    print(result)
    print(f"next: ttsnap score TRAJECTORIES --reward {config.reward} --noise-aware {folder}")
    return 0


def _adopt(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.finetuning.weights import import_series
    from ttsnap_lib.rewards.loading import load_reward

    reward = load_reward(arguments.reward, device="cpu", **_local(arguments))
    print(import_series(arguments.checkpoints, arguments.out, reward, dtype=arguments.dtype))
    return 0


def _local(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"weights": arguments.weights} if arguments.weights else {}
