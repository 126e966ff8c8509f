"""``ttsnap generate`` and ``ttsnap verify``: fill a trajectory folder, check it, mend it."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ._help import Defaults
from .score import add_reward_arguments, given_rewards

__all__ = ["add", "add_model_arguments"]

_SHOWN = 20


def add(commands: Any) -> None:
    """Register the commands with argparse's subparsers."""
    generate = commands.add_parser(
        "generate",
        help="generate images with their x0 estimate at every step",
        description="Fill a trajectory folder. Run the same command again to go on where it stopped; raise --images "
        "or add prompts at the end to widen it. Under `accelerate launch`, or with --shard, several processes share "
        "the work and write the same bytes as one.",
        formatter_class=Defaults,
    )
    generate.add_argument(
        "--prompts", default="pocket", help=".json, .txt, .csv or .parquet file, or pocket[:split[:count]]"
    )
    generate.add_argument("--limit", type=int, metavar="N", help="take the first N prompts only")
    generate.add_argument("--out", metavar="FOLDER", help="the trajectory folder; may be left out with --score")
    generate.add_argument(
        "--score", metavar="TENSOR.zarr",
        help="score the images into a reward tensor; without --out while they are made, and none is kept",
    )  # fmt: skip
    add_reward_arguments(generate)
    generate.add_argument("--images", type=int, default=8, metavar="N", help="images per prompt")
    generate.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps")
    generate.add_argument(
        "--size", type=_size, metavar="PIXELS", help="512 or height x width, 512x768 (default: the model's)"
    )
    generate.add_argument("--guidance", type=float, help="guidance strength (default: the model's)")
    generate.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    generate.add_argument("--max-sequence-length", type=int, metavar="N", help="text tokens of the T5 encoder")
    generate.add_argument(
        "--negtome", type=int, nargs="?", const=0, metavar="GROUP",
        help="Negative Token Merging, for variety, in groups of GROUP images (alone: of 4)",
    )  # fmt: skip
    generate.add_argument("--seed", type=int, default=0, help="base seed")
    generate.add_argument(
        "--batch-size", type=int, metavar="N", help="images per batch (default: the folder's, else 8)"
    )
    generate.add_argument("--format", choices=("png", "webp"), help="lossless both (default: the folder's, else png)")
    generate.add_argument("--shard", metavar="I/N", help="make every N-th batch, from the I-th: 0/4, 1/4, ...")
    _run_arguments(generate, "pocket-flux")
    generate.set_defaults(func=_generate)

    verify = commands.add_parser(
        "verify",
        help="check a trajectory folder, and mend it",
        description="Find missing, damaged, changed and foreign files. Exit status 1 when there are any. "
        "--repair makes missing and damaged pictures again, and nothing else; foreign files stay.",
        formatter_class=Defaults,
    )
    verify.add_argument("folder")
    verify.add_argument("--repair", action="store_true", help="make what is missing or damaged again")
    _run_arguments(verify, None)
    verify.set_defaults(func=_verify)


def add_model_arguments(parser: argparse.ArgumentParser, model: str | None, *, threads: str) -> None:
    """Add the arguments that say which pipeline is loaded and how; `ttsnap search` and `cost` take the same."""
    shown = "" if model else ", for --repair (default: the folder's)"
    parser.add_argument("--model", default=model, help=f"pocket-flux, pocket-sdxl, a folder or a hub id{shown}")
    parser.add_argument("--revision", help="commit, branch or tag of a hub id")
    parser.add_argument("--variant", help="file variant of a hub id, such as fp16")
    parser.add_argument("--scheduler", help="flow-euler, euler, ddim, dpm++ or unipc (default: the model's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", default="auto", help="fp32, bf16 or fp16 (auto: fp32 on the CPU, else bf16)")
    parser.add_argument("--offload", default="none", help="model or sequential: weights rest in main memory")
    parser.add_argument("--fp8", action="store_true", help="keep the denoising model's weights in 8 bits")
    parser.add_argument("--threads", type=int, metavar="N", help=threads)


def _run_arguments(parser: argparse.ArgumentParser, model: str | None) -> None:
    add_model_arguments(
        parser, model, threads="CPU threads of the model (default: the folder's, else all cores, 1 for small models)"
    )
    parser.add_argument(
        "--workers", type=int, default=4, metavar="N", help="threads that read, encode and write pictures"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 512 or 512x768 (height x width)")
    return int(parts[0]), int(parts[-1])


def _generate(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.checks import integer
    from ttsnap_lib.errors import ConfigError
    from ttsnap_lib.prompts import read_prompts
    from ttsnap_lib.trajectories import MAX_IMAGES

    # What costs nothing to check comes before a model of many gigabytes is loaded.
    prompts = read_prompts(arguments.prompts, limit=arguments.limit)
    integer("--images", arguments.images, 1, MAX_IMAGES)
    if not arguments.out and not arguments.score:
        raise ConfigError(
            "neither --out nor --score",
            value=None,
            bound="one of them",
            remedy="Say where the images go, or where their rewards go.",
        )
    if not arguments.score and (arguments.reward or arguments.reward_option or arguments.noise_aware):
        raise ConfigError(
            "--reward, --reward-option or --noise-aware without --score",
            value=[*arguments.reward, *arguments.reward_option, *arguments.noise_aware],
            bound="rewards with --score alone",
            remedy="Add --score TENSOR.zarr, or run `ttsnap score` on the folder afterwards.",
        )

    from ttsnap_lib.denoise import Settings
    from ttsnap_lib.generate import generate
    from ttsnap_lib.negtome import NegToMe
    from ttsnap_lib.pipelines import load_pipeline
    from ttsnap_lib.progress import progress_bar

    height, width = arguments.size or (None, None)
    settings = Settings(
        n_steps=arguments.steps,
        guidance=arguments.guidance,
        height=height,
        width=width,
        max_sequence_length=arguments.max_sequence_length,
        negative_prompt=arguments.negative_prompt,
    )
    negtome = None
    if arguments.negtome is not None:
        negtome = NegToMe(arguments.negtome) if arguments.negtome else NegToMe()
    loading = _loading(arguments)
    pipeline = load_pipeline(arguments.model, **loading)
    rewards = []
    if arguments.score:
        device = None if loading["device"] == "auto" else loading["device"]
        rewards = given_rewards(arguments, device=device)
    common = {
        "images_per_prompt": arguments.images,
        "settings": settings,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "shard": arguments.shard,
        "negtome": negtome,
        "cpu_threads": arguments.threads,
        "workers": arguments.workers,
        "source": arguments.prompts,
        "progress": progress_bar(quiet=arguments.quiet),
    }
    if not arguments.out:
        from ttsnap_lib.inline_score import generate_scores

        print(generate_scores(pipeline, prompts, arguments.score, rewards, **common))
        return 0
    print(generate(pipeline, prompts, arguments.out, image_format=arguments.format, **common))
    if arguments.score:
        from ttsnap_lib.score import score

        bar = progress_bar("pictures", quiet=arguments.quiet)
        print(score(arguments.out, rewards, arguments.score, shard=arguments.shard, progress=bar))
    return 0


def _loading(arguments: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Return the options of load_pipeline; under ``accelerate launch`` each process takes a device of its own."""
    device, rank = arguments.device, os.environ.get("LOCAL_RANK", "")
    if device == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        device = "cpu"
    elif device == "auto" and rank.isdigit():
        import torch

        if torch.cuda.is_available():
            device = f"cuda:{int(rank) % torch.cuda.device_count()}"
    names = ("revision", "variant", "scheduler", "dtype", "offload", "fp8")
    return {**{name: getattr(arguments, name) for name in names}, "device": device, **changes}


def _verify(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.progress import progress_bar
    from ttsnap_lib.trajectories import verify

    bar = progress_bar("prompts", quiet=arguments.quiet)
    report = verify(arguments.folder, workers=arguments.workers, progress=bar)
    _show(report)
    if not arguments.repair or not (report.repairs() or report.count("leftover")):
        return 0 if report.ok else 1

    from ttsnap_lib.generate import pipeline_of, repair

    pipeline = pipeline_of(arguments.folder, arguments.model, **_loading(arguments))
    after = repair(
        pipeline,
        arguments.folder,
        report=report,
        workers=arguments.workers,
        progress=progress_bar(quiet=arguments.quiet),
    )
    print("after the repair:")
    _show(after)
    return 0 if after.ok else 1


def _show(report: Any) -> None:
    for finding in report.findings[:_SHOWN]:
        print(f"{finding.kind:9}{finding.path}{f'  ({finding.detail})' if finding.detail else ''}")
    if len(report.findings) > _SHOWN:
        print(f"... and {len(report.findings) - _SHOWN} more")
    print(report)
