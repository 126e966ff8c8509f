"""What commands share: how help texts look, and the options of pipelines, settings and rewards."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ttsnap_lib.checks import choice
from ttsnap_lib.errors import ConfigError


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Append the default to an option's help where there is one and the help does not tell it; keep examples as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = isinstance(action.default, bool) or action.default in (None, [])
        return action.help if nothing or "default" in (action.help or "") else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Keep the lines of a paragraph that has indented ones, such as an example."""
        parts = (
            part if "\n  " in part else super(Defaults, self)._fill_text(part, width, indent)
            for part in text.split("\n\n")
        )
        return "\n\n".join(parts)


def add_model_arguments(parser: argparse.ArgumentParser, model: str | None, *, threads: str) -> None:
    """Add the arguments that say which pipeline is loaded and how."""
    shown = "" if model else ", for --repair (default: the folder's)"
    parser.add_argument(
        "--model", default=model, help=f"pocket-flux, pocket-sdxl, a folder, a hub id or a .safetensors file{shown}"
    )
    parser.add_argument(
        "--base", help="folder or hub id that gives what a .safetensors file lacks (default: by its kind)"
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="PATH_OR_ID[:SCALE]", help="LoRA adapter; several add up"
    )
    parser.add_argument("--revision", help="commit, branch or tag of a hub id")
    parser.add_argument("--variant", help="file variant of a hub id, such as fp16")
    parser.add_argument("--scheduler", help="flow-euler, euler, ddim, dpm++ or unipc (default: the model's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", default="auto", help="fp32, bf16 or fp16 (auto: fp32 on the CPU, else bf16)")
    parser.add_argument("--offload", default="none", help="model or sequential: weights rest in main memory")
    parser.add_argument("--fp8", action="store_true", help="keep the denoising model's weights in 8 bits")
    parser.add_argument(
        "--compile", choices=("blocks", "whole"),
        help="compile the denoising model (its repeated blocks, or all of it with CUDA graphs), decoder and rewards",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help=threads)


def digits(value: float) -> str:
    """Return a number without the dust of floating point: four digits, whole numbers as they are."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def old_spelling(parser: argparse.ArgumentParser, option: str, **how: Any) -> None:
    """Take an option's earlier name too, without showing it."""
    parser.add_argument(option, help=argparse.SUPPRESS, default=argparse.SUPPRESS, **how)


def say_loading(arguments: argparse.Namespace, *names: str) -> None:
    """Say on standard error what is loaded next: libraries take seconds, large models minutes."""
    if not arguments.quiet and os.environ.get("LOCAL_RANK", "0") == "0":
        for name in names:
            print(f"loading {name} ...", file=sys.stderr, flush=True)


def loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of load_pipeline; under ``accelerate launch`` each process takes a device of its own."""
    device, rank = arguments.device, os.environ.get("LOCAL_RANK", "")
    if device == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        device = "cpu"
    elif device == "auto" and rank.isdigit():
        import torch

        if torch.cuda.is_available():
            device = f"cuda:{int(rank) % torch.cuda.device_count()}"
    names = ("revision", "variant", "scheduler", "dtype", "offload", "fp8", "compile", "base", "lora")
    return {**{name: getattr(arguments, name) for name in names}, "device": device}


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`settings` reads."""
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps")
    parser.add_argument(
        "--size", type=picture_size, metavar="PIXELS", help="512, or height x width: 512x768 (default: the model's)"
    )
    parser.add_argument("--guidance", type=float, help="guidance strength (default: the model's)")


def settings(arguments: argparse.Namespace, **more: Any) -> Any:
    """Return the settings of the denoising run that the command line asks for."""
    from ttsnap_lib.diffusion.denoise import Settings

    height, width = arguments.size or (None, None)
    return Settings(n_steps=arguments.steps, guidance=arguments.guidance, height=height, width=width, **more)


def add_prompts_argument(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add what read_prompts takes: where the prompts are, and in which column."""
    parser.add_argument(
        "--prompts", default=default, metavar="FILE",
        help=".json, .jsonl, .txt, .csv, .tsv or .parquet file, or pocket[:split[:count]]",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-column", metavar="NAME",
        help="the file's column or key of prompts (default: prompt, prompts, caption or text)",
    )  # fmt: skip


def add_negtome_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that :func:`negtome` reads."""
    parser.add_argument(
        "--negtome", type=int, nargs="?", const=4, metavar="GROUP",
        help="Negative Token Merging, for variety, in groups of GROUP images, which share a batch (alone: of 4)",
    )  # fmt: skip


def negtome(arguments: argparse.Namespace) -> Any:
    """Return the Negative Token Merging that the command line asks for, or None."""
    if arguments.negtome is None:
        return None
    from ttsnap_lib.diffusion.negtome import NegToMe

    return NegToMe(arguments.negtome)


def reward_device(arguments: argparse.Namespace) -> str | None:
    """Return where the rewards beside a pipeline run: on its device."""
    device = loading(arguments)["device"]
    return None if device == "auto" else device


def picture_size(text: str) -> tuple[int, int]:
    """Read ``512`` or ``512x768`` (height x width)."""
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 512 or 512x768 (height x width)")
    return int(parts[0]), int(parts[-1])


def add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`given_rewards` reads."""
    parser.add_argument(
        "--reward", action="append", default=[], metavar="[NAME=]SOURCE",
        help="image_reward, pickscore, hpsv2, hpsv2.1, clipscore, mps, cyclereward, aesthetic, hpsv3, vqascore, pocket-clip, "
        "a folder, a hub id, your own function as module:function or ./file.py:function, "
        "def reward(prompts: list[str], images: list[Image]) -> list[float], or judge.yaml, a judge over HTTP; several are "
        "scored in one pass (default: pocket-clip)",
    )  # fmt: skip
    parser.add_argument(
        "--reward-option", action="append", default=[], metavar="[NAME.]KEY=VALUE",
        help="an option of a reward, such as hpsv2.weights=HPS_v2_compressed.pt or vqascore.model=Qwen/Qwen3-VL-8B-Instruct",
    )  # fmt: skip
    parser.add_argument(
        "--noise-aware", action="append", default=[], metavar="[NAME=]FOLDER",
        help="run folder of `ttsnap finetune`: fills noise_aware at its steps",
    )  # fmt: skip


def given_rewards(arguments: argparse.Namespace, **common: Any) -> list[Any]:
    """Return the rewards that the command line asks for, loaded with `common`, with their noise-aware series."""
    from ttsnap_lib.rewards.loading import load_reward
    from ttsnap_lib.scoring.score import load_rewards

    sources: dict[str, str] = {}
    for entry in arguments.reward or ["pocket-clip"]:
        *named, source = entry.split("=", 1)
        path = Path(source)
        own = path.stem if path.suffix in (".yaml", ".yml") else path.name
        name = named[0] if named else source.rpartition(":")[2] if ":" in source else own
        if name in sources:
            raise ConfigError(f"--reward: got {name!r} twice. Write another name: --reward other={source}.")
        sources[name] = source

    def of(name: str, what: str) -> str:
        if not name and len(sources) > 1:
            raise ConfigError(f"{what}: say for which reward it is, one of {list(sources)}.")
        return choice(what, name, sources) if name else next(iter(sources))

    options: dict[str, dict[str, Any]] = {name: {} for name in sources}
    for entry in arguments.reward_option:
        key, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError(f"--reward-option: got {entry!r}, expected KEY=VALUE. Write for example scale=2.5.")
        name, _, option = key.rpartition(".")
        options[of(name, "--reward-option")][option] = _value(value)
    series = {}
    for entry in arguments.noise_aware:
        *named, folder = entry.split("=", 1)
        series[of(named[0] if named else "", "--noise-aware")] = folder
    models = []
    for name, source in sources.items():
        say_loading(arguments, source)
        models.append(load_reward(source, name=name, **common, **options[name]))
    return load_rewards(models, series or None)


def _value(text: str) -> Any:
    """Return true and false and numbers as such, everything else as text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text
