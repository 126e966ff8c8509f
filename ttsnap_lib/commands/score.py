"""``ttsnap score`` and ``ttsnap export``: trajectories into a reward tensor, and tensors into the authors' files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add"]


def add(commands: Any) -> None:
    """Register the commands with argparse's subparsers."""
    score = commands.add_parser(
        "score",
        help="score a trajectory folder into a reward tensor",
        description="Score the pictures of a trajectory folder. The same command goes on where it stopped; other rewards, "
        "steps, or a noise-aware series are added to the tensor.",
    )
    score.add_argument("folder", type=Path, help="trajectory folder of `ttsnap generate`")
    add_reward_arguments(score)
    score.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the accelerator when there is one)")
    score.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    score.add_argument("--compile", action="store_true", help="compile the reward with torch.compile")
    score.add_argument(
        "-o", "--out", type=Path, help="the tensor, a Zarr folder (default: beside FOLDER, as FOLDER.zarr)"
    )
    score.add_argument("--steps", type=int, nargs="+", metavar="STEP", help="steps to score (default: all)")
    score.add_argument("--batch-size", type=int, default=32, help="pictures per forward pass (default: %(default)s)")
    score.add_argument("--shard", metavar="I/N", help="score every N-th chunk of 25 prompts, from the I-th (from 0)")
    score.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="a damaged picture or a score that is not finite: stop, or leave NaN and list it (default: %(default)s)",
    )
    score.add_argument("--workers", type=int, default=4, help="reading threads (default: %(default)s)")
    score.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    score.set_defaults(func=_score)

    export = commands.add_parser(
        "export",
        help="write a reward tensor in the authors' YAML layouts",
        description="Write reward values per step (published) or the clean images' rewards (ground-truth), exactly.",
    )
    export.add_argument("tensor", type=Path, help="Zarr folder")
    export.add_argument("-o", "--out", type=Path, required=True, help="folder (published) or file (ground-truth)")
    export.add_argument("--layout", choices=("published", "ground-truth"), default="published")
    export.add_argument("--model", help="first part of the published folder names, such as flux")
    export.add_argument("--reward", action="append", metavar="NAME", help="rewards to export (default: all)")
    export.set_defaults(func=_export)


def add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`given_rewards` reads; `ttsnap generate --score` takes the same."""
    parser.add_argument(
        "--reward", action="append", default=[], metavar="[NAME=]SOURCE",
        help="image_reward, pickscore, hpsv2, hpsv2.1, clipscore, pocket-clip, a folder, a hub id, or module:function; "
        "several are scored in one pass (default: pocket-clip)",
    )  # fmt: skip
    parser.add_argument(
        "--reward-option", action="append", default=[], metavar="[NAME.]KEY=VALUE",
        help="an option of a reward, such as hpsv2.weights=HPS_v2_compressed.pt",
    )  # fmt: skip
    parser.add_argument(
        "--noise-aware", action="append", default=[], metavar="[NAME=]FOLDER",
        help="run folder of `ttsnap finetune`: fills noise_aware at its steps",
    )  # fmt: skip


def given_rewards(arguments: argparse.Namespace, **loading: Any) -> list[Any]:
    """Return the rewards that the command line asks for, loaded with `loading`, with their noise-aware series."""
    from ttsnap_lib.errors import ConfigError
    from ttsnap_lib.rewards import load_reward
    from ttsnap_lib.score import load_rewards

    sources: dict[str, str] = {}
    for entry in arguments.reward or ["pocket-clip"]:
        name, source = _split(entry)
        name = name or (source.rpartition(":")[2] if ":" in source else Path(source).name)
        if name in sources:
            raise ConfigError(
                "--reward", value=name, bound="each name once", remedy=f"Write another name: --reward other={source}."
            )
        sources[name] = source
    options: dict[str, dict[str, Any]] = {name: {} for name in sources}
    for entry in arguments.reward_option:
        key, value = _pair("--reward-option", entry)
        name, dot, option = key.rpartition(".")
        options[_of(name if dot else "", sources, "--reward-option")][option] = _value(value)
    models = {name: load_reward(source, name=name, **loading, **options[name]) for name, source in sources.items()}
    series = {}
    for entry in arguments.noise_aware:
        name, folder = _split(entry)
        series[_of(name or "", sources, "--noise-aware")] = folder
    return load_rewards(list(models.values()), series or None)


def _score(arguments: argparse.Namespace) -> int:
    import sys

    from ttsnap_lib.progress import progress_bar
    from ttsnap_lib.score import score
    from ttsnap_lib.trajectories import Trajectories

    Trajectories(arguments.folder)  # a wrong folder is told before a model is loaded
    out = arguments.out or arguments.folder.absolute().with_name(arguments.folder.absolute().name + ".zarr")
    report = score(
        arguments.folder,
        given_rewards(arguments, device=arguments.device, dtype=arguments.dtype, compile=arguments.compile),
        out,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        shard=arguments.shard,
        on_error=arguments.on_error,
        workers=arguments.workers,
        progress=progress_bar("pictures", quiet=arguments.quiet),
    )
    print(report)
    for skipped in report.skipped[:20]:
        print(
            f"skipped: {skipped.reward} ({skipped.variant}), prompt {skipped.prompt}, image {skipped.image}, "
            f"step {skipped.step}: {skipped.reason}",
            file=sys.stderr,
        )
    if len(report.skipped) > 20:
        print(f"... {len(report.skipped) - 20} more in {report.path}.skipped.json", file=sys.stderr)
    print(f"next: ttsnap run simulate -p tensor {out} -p cost COST{' -p missing drop' if report.skipped else ''}")
    print("(COST: a preset or a file of `ttsnap cost`; few images a prompt allow small budgets only: -p multiples)")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.errors import ConfigError
    from ttsnap_lib.interop import export_ground_truth, export_published
    from ttsnap_lib.tensors import open_rewards

    dataset = open_rewards(arguments.tensor)
    rewards = arguments.reward
    if arguments.layout == "ground-truth":
        if rewards and len(rewards) > 1:
            raise ConfigError("--reward", value=rewards, bound="one", remedy="Export one file per reward.")
        print(export_ground_truth(dataset, arguments.out, reward=rewards[0] if rewards else None))
        return 0
    model = arguments.model or str(dataset.attrs.get("model", "")).rpartition("/")[2] or "model"
    files = export_published(dataset, arguments.out, model, rewards=rewards)
    print(f"{arguments.out}: {len(files)} files\nnext: ttsnap import-published {arguments.out} --model {model}")
    return 0


def _split(entry: str) -> tuple[str | None, str]:
    name, equals, value = entry.partition("=")
    return (name, value) if equals else (None, entry)


def _pair(what: str, entry: str) -> tuple[str, str]:
    from ttsnap_lib.errors import ConfigError

    key, equals, value = entry.partition("=")
    if not equals:
        raise ConfigError(what, value=entry, bound="KEY=VALUE", remedy="Write for example scale=2.5.")
    return key, value


def _of(name: str, sources: dict[str, str], what: str) -> str:
    from ttsnap_lib.checks import choice
    from ttsnap_lib.errors import ConfigError

    if name:
        return choice(what, name, sources)
    if len(sources) > 1:
        raise ConfigError(what, value="no name", bound=f"one of {list(sources)}", remedy="Say for which reward it is.")
    return next(iter(sources))


def _value(text: str) -> Any:
    """Return true and false and numbers as such, everything else as text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text
