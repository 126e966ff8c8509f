"""``ttsnap search`` and ``ttsnap cost``: the online run, and what it costs on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .generate import _loading, _model_arguments, _size

__all__ = ["add"]


def add(commands: Any) -> None:
    """Register the commands with argparse's subparsers."""
    search = commands.add_parser(
        "search",
        help="find the best image of many seeds within a budget, pruning on the way",
        description="One prompt, or every prompt of a file. Candidates are pruned at the steps of the schedule by the "
        "score of their x0 estimate; with --adapters by the noise-aware reward (TTSnap), else by the base one (TTSp).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    search.add_argument("prompt", nargs="?", help="the prompt")
    search.add_argument("--prompts", metavar="FILE", help="a prompt file instead; one folder a prompt, resumable")
    search.add_argument("--limit", type=int, metavar="N", help="take the first N prompts of the file only")
    search.add_argument("--reward", nargs="+", default=["pocket-clip"], help="reward models; several select jointly")
    search.add_argument("--report", nargs="+", default=[], help="rewards that are measured but never select")
    search.add_argument("--adapters", metavar="FOLDER", help="noise-aware checkpoints of the first reward")
    search.add_argument("--schedule", metavar="FILE", help="YAML of `ttsnap optimize`; no pruning without one")
    search.add_argument("--method", choices=("best_of_n", "ttsp", "ttsnap"), help="default: by schedule and adapters")
    search.add_argument("--budget", type=float, help="compute per prompt in the unit of --cost")
    search.add_argument("--candidates", type=int, metavar="N", help="seeds to try, instead of a budget")
    search.add_argument("--cost", metavar="PRESET_OR_FILE", help="cost model; see `ttsnap cost`")
    search.add_argument("--deadline", type=float, metavar="SECONDS", help="stop then, with the best so far")
    search.add_argument("--combine", default="rank_sum", choices=("rank_sum", "z_score"), help="of several rewards")
    search.add_argument("--tiny", metavar="MODEL", help="AutoencoderTiny that decodes at the checks (or pocket-tiny)")
    search.add_argument("--seed", type=int, default=0, help="base seed")
    search.add_argument("--batch-size", type=int, default=16, metavar="N", help="candidates at once")
    search.add_argument("--shard", metavar="I/N", help="every N-th prompt of the file, from the I-th")
    search.add_argument("-o", "--out", metavar="FOLDER", required=True, help="gets the image and the record")
    _settings_arguments(search)
    search.set_defaults(func=_search)

    cost = commands.add_parser(
        "cost",
        help="measure FLOPs and seconds of a step, a decode and a check on this machine",
        description="Writes a cost file that search, simulate and optimize read.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cost.add_argument("--reward", default="pocket-clip", help="reward model")
    cost.add_argument("--tiny", metavar="MODEL", help="AutoencoderTiny for the checks (or pocket-tiny)")
    cost.add_argument("--unit", default="TFLOPs", choices=("TFLOPs", "seconds"), help="of the written model")
    cost.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="the last one gives the seconds")
    cost.add_argument("--repeats", type=int, default=3, help="runs per number; medians are taken")
    cost.add_argument("-o", "--out", metavar="FILE", required=True, help="JSON file to write")
    _settings_arguments(cost)
    cost.set_defaults(func=_cost)


def _settings_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps")
    parser.add_argument("--size", type=_size, metavar="PIXELS", help="512 or 512x768 (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance strength (default: the model's)")
    _model_arguments(parser, "pocket-flux")


def _settings(arguments: argparse.Namespace) -> Any:
    from ttsnap_lib.denoise import Settings

    height, width = arguments.size or (None, None)
    return Settings(n_steps=arguments.steps, guidance=arguments.guidance, height=height, width=width)


def _tiny(name: str | None) -> Any:
    if name is None:
        return None
    from diffusers import AutoencoderTiny

    from ttsnap_lib.errors import PipelineError
    from ttsnap_lib.pocket import POCKET_MODELS, pocket_folder

    source = pocket_folder(name) if name in POCKET_MODELS else name
    try:
        return AutoencoderTiny.from_pretrained(source).eval()
    except (OSError, ValueError) as error:
        raise PipelineError(
            "tiny decoder cannot be loaded", value=str(name), bound="a folder or hub id of an AutoencoderTiny",
            remedy="For FLUX madebyollin/taef1, for SDXL madebyollin/taesdxl; the hub must be reachable.",
        ) from error  # fmt: skip


def _search(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.costs import CostModel
    from ttsnap_lib.prompts import read_prompts
    from ttsnap_lib.schedule import Schedule
    from ttsnap_lib.search_many import check_one_source, search_many

    # What costs nothing to check comes before any model is loaded.
    check_one_source(arguments.prompt, arguments.prompts)
    prompts = read_prompts(arguments.prompts, limit=arguments.limit) if arguments.prompts else [arguments.prompt]
    schedule = Schedule.from_yaml(Path(arguments.schedule)) if arguments.schedule else None
    cost = CostModel.load(arguments.cost) if arguments.cost else None

    from ttsnap_lib.pipelines import load_pipeline
    from ttsnap_lib.progress import progress_bar
    from ttsnap_lib.rewards import load_reward
    from ttsnap_lib.search import search

    rewards = [
        load_reward(name, adapters=arguments.adapters if k == 0 else None)
        for k, name in enumerate([*arguments.reward, *arguments.report])
    ]
    options = {
        "schedule": schedule, "budget": arguments.budget, "candidates": arguments.candidates, "cost": cost,
        "seed": arguments.seed, "method": arguments.method, "settings": _settings(arguments),
        "combine": arguments.combine, "report": [one.name for one in rewards[len(arguments.reward) :]],
        "decoder": _tiny(arguments.tiny), "batch_size": arguments.batch_size, "deadline_s": arguments.deadline,
    }  # fmt: skip
    pipeline = load_pipeline(arguments.model, **_loading(arguments))
    if arguments.prompts is None:
        result = search(pipeline, prompts[0], rewards, **options)
        result.save(arguments.out)
        _picture(result, Path(arguments.out))
        for key, value in result.summary().items():
            print(f"{key:>14}: {value}")
        print(f"{arguments.out}: image.png, record.json, candidates.parquet, gallery.png")
        return 0 if result.complete else 130
    names = ("model", "reward", "report", "adapters", "method", "budget", "candidates", "combine", "tiny", "seed",
             "steps", "size", "guidance", "deadline")  # fmt: skip
    identity = {name: getattr(arguments, name) for name in names}
    identity |= {"schedule": schedule.to_dict() if schedule else None, "cost": cost.to_dict() if cost else None}
    frame = search_many(
        pipeline, prompts, rewards, arguments.out, identity=identity, shard=_shard(arguments.shard),
        progress=progress_bar("prompts", quiet=arguments.quiet), **options,
    )  # fmt: skip
    print(frame.drop(columns="prompt").round(4).to_string(index=False))
    print(f"{arguments.out}: results.csv, results.parquet, one folder a prompt")
    return 0


def _shard(given: str | None) -> tuple[int, int]:
    from ttsnap_lib._plan import parse_shard

    return parse_shard(given)


def _picture(result: Any, folder: Path) -> None:
    from ttsnap_lib.paths import atomic_write
    from ttsnap_lib.plots_search import gallery

    figure = gallery(result.record)
    with atomic_write(folder / "gallery.png") as file:
        figure.savefig(file, format="png", dpi=110)


def _cost(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.measure import measure_costs
    from ttsnap_lib.pipelines import load_pipeline
    from ttsnap_lib.rewards import load_reward

    measured = measure_costs(
        load_pipeline(arguments.model, **_loading(arguments)), load_reward(arguments.reward), _settings(arguments),
        decoder=_tiny(arguments.tiny), batch_sizes=arguments.batch_sizes, repeats=arguments.repeats,
    )  # fmt: skip
    measured.save(arguments.out, arguments.unit)
    print(measured.by_batch.to_string(index=False))
    for model in (measured.tflops, measured.seconds):
        print(f"one Best-of-N candidate: {model.total(1):.6g} {model.unit}")
    print(f"{arguments.out}: cost model in {arguments.unit}; use it as --cost {arguments.out}")
    return 0
