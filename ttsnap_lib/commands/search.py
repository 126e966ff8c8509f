"""``ttsnap search`` and ``ttsnap cost``: the online run, and what it costs on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ttsnap_lib.commands.options import (
    add_model_arguments,
    add_negtome_argument,
    add_prompts_argument,
    add_settings_arguments,
    digits,
    loading,
    negtome,
    reward_device,
    say_loading,
    settings,
)

_LIBRARIES = "torch, diffusers, transformers"


def add(commands: Any) -> None:
    """Register the commands with argparse's subparsers."""
    search = commands.add_parser(
        "search",
        help="find the best image of many seeds within a budget, pruning on the way",
        description="One prompt, or every prompt of a file. Candidates are pruned at the steps of the schedule by the "
        "score of their x0 estimate; with --adapters by the noise-aware reward (TTSnap), else by the base one (TTSp).",
    )
    search.add_argument(
        "prompt", nargs="?", help="the prompt; or --prompts, which gives one folder a prompt, resumable"
    )
    add_prompts_argument(search)
    search.add_argument("--limit", type=int, metavar="N", help="take the first N prompts of the file only")
    search.add_argument(
        "--reward", action="append", metavar="NAME",
        help="reward model; may stand several times, and all select jointly (default: pocket-clip)",
    )  # fmt: skip
    search.add_argument(
        "--report", action="append", default=[], metavar="NAME",
        help="reward that is measured but never selects; also one number of a --reward that gives several",
    )  # fmt: skip
    search.add_argument("--adapters", metavar="FOLDER", help="noise-aware checkpoints of the first reward, or pocket")
    search.add_argument(
        "--schedule", metavar="FILE",
        help="YAML of `ttsnap optimize`, or '{steps: [2, 6], keep_ratios: [0.4, 0.5]}'; no pruning without one",
    )  # fmt: skip
    search.add_argument(
        "--method", choices=("best_of_n", "ttsp", "ttsnap"), help="default: as --schedule and --adapters suggest"
    )
    search.add_argument("--draft", type=int, metavar="STEPS", help="steps of a draft of every candidate; with --finish")
    search.add_argument("--finish", type=int, metavar="K", help="run the K best drafts in full, from the same seeds")
    search.add_argument("--budget", type=float, metavar="COMPUTE", help="per prompt, in the unit of --cost")
    search.add_argument("--candidates", type=int, metavar="N", help="seeds to try, instead of a budget")
    search.add_argument(
        "--cost", default="auto", metavar="PRESET_OR_FILE",
        help="a preset or a file of `ttsnap cost` (default: the preset of model, size and reward, where there is one)",
    )  # fmt: skip
    search.add_argument("--keep", type=int, default=1, metavar="K", help="images to return, the best ones (default: 1)")
    search.add_argument(
        "--diversity", type=float, default=0.0, metavar="W",
        help="what difference between the --keep images weighs against their reward, such as 0.5 (default: 0)",
    )  # fmt: skip
    search.add_argument("--deadline", type=float, metavar="SECONDS", help="stop then, with the best so far")
    search.add_argument(
        "--combine",
        default="rank_sum",
        choices=("rank_sum", "z_score", "weighted_sum"),
        help="how several rewards choose",
    )
    search.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one for each --reward, for --combine weighted_sum"
    )
    add_negtome_argument(search)
    search.add_argument("--tiny", metavar="MODEL", help="AutoencoderTiny that decodes at the checks (or pocket-tiny)")
    search.add_argument("--seed", type=int, default=0, help="base seed")
    search.add_argument("--batch-size", type=int, metavar="N", help="candidates at once (default: what fits)")
    search.add_argument("--together", type=int, metavar="N", help="prompts that share batches (default: 1)")
    search.add_argument("--shard", metavar="I/N", help="every N-th prompt of the file, from the I-th: 0/4, 1/4, ...")
    search.add_argument("-o", "--out", metavar="FOLDER", required=True, help="gets the image and the record")
    _run_arguments(search)
    search.set_defaults(func=_search)

    cost = commands.add_parser(
        "cost",
        help="measure FLOPs and seconds of a step, a decode and a check on this machine",
        description="Measure FLOPs and seconds of a step, a decode and a check, by batch size, and write a cost file that "
        "search, simulate and optimize read as --cost, and beside it a picture of the seconds.",
    )
    cost.add_argument(
        "--reward", action="append", metavar="NAME",
        help="reward model of a check; may stand several times (default: pocket-clip)",
    )  # fmt: skip
    cost.add_argument("--tiny", metavar="MODEL", help="AutoencoderTiny for the checks (or pocket-tiny)")
    cost.add_argument("--unit", default="TFLOPs", choices=("TFLOPs", "seconds"), help="of the cost model in the file")
    cost.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="N",
        help="at which seconds are measured (default: 1, 2, 4, ... to 16 on a CPU and 64 elsewhere, as memory allows)",
    )  # fmt: skip
    cost.add_argument("--repeats", type=int, default=3, help="runs per number; medians are taken")
    cost.add_argument("-o", "--out", metavar="FILE", help="JSON file to write")
    cost.add_argument("--list", action="store_true", help="show the presets, which need no measuring, and stop")
    _run_arguments(cost)
    cost.set_defaults(func=_cost)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings_arguments(parser)
    add_model_arguments(parser, "pocket-flux", threads="CPU threads (default: all)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on the terminal")


def _search(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.checks import MAX_STEPS, integer, text
    from ttsnap_lib.errors import ConfigError
    from ttsnap_lib.files import shard_lock
    from ttsnap_lib.live.plan import as_draft, planned
    from ttsnap_lib.schedule import Schedule
    from ttsnap_lib.sets import check_set
    from ttsnap_lib.style import progress_bar

    # What costs nothing to check comes before any library or model is loaded.
    if (arguments.prompt is None) == (arguments.prompts is None):
        raise ConfigError("prompt: give exactly one of a prompt and --prompts FILE.")
    if arguments.prompts is None and arguments.together is not None:
        raise ConfigError(f"--together {arguments.together} is for several prompts. Give --prompts FILE.")
    together = 1 if arguments.together is None else arguments.together
    given = arguments.schedule
    integer("--steps", arguments.steps, 1, MAX_STEPS)
    plan = {
        "schedule": Schedule.from_yaml(given if given.lstrip().startswith("{") else Path(given)) if given else None,
        "budget": arguments.budget, "candidates": arguments.candidates, "cost": _price(arguments),
        "method": arguments.method, "batch_size": arguments.batch_size,
    }  # fmt: skip
    group = 1 if arguments.negtome is None else integer("--negtome", arguments.negtome, 1)
    drafting = as_draft(arguments.draft, arguments.finish)
    pruning, _, n = planned(**plan, n_steps=arguments.steps, group=group, together=together, draft=drafting)
    check_set(arguments.keep, arguments.diversity, n if drafting is None else drafting.finish, pruning)
    if arguments.prompts is not None:
        from ttsnap_lib.trajectories.prompts import read_prompts

        prompts = read_prompts(arguments.prompts, limit=arguments.limit, prompt_column=arguments.prompt_column)
    else:
        text("prompt", arguments.prompt)

    say_loading(arguments, _LIBRARIES)
    from ttsnap_lib.diffusion.pipelines import load_decoder
    from ttsnap_lib.live.run import search
    from ttsnap_lib.rewards.loading import find_adapters

    plan |= {"settings": settings(arguments), "negtome": negtome(arguments)}
    adapters, names = find_adapters(arguments.adapters, arguments.model), arguments.reward or ["pocket-clip"]
    rewards = _rewards(arguments, names, adapters)
    # A number of a reward that is there, such as judge.colour, or another reward.
    known = {name for one in rewards for name in (one.name, *one.names)}
    others = _rewards(arguments, [name for name in arguments.report if name not in known])
    report = [*(name for name in arguments.report if name in known), *(one.name for one in others)]
    rewards += others
    pipeline = _pipeline(arguments)
    if arguments.tiny:
        say_loading(arguments, arguments.tiny)
    options: dict[str, Any] = {
        **plan, "seed": arguments.seed, "combine": arguments.combine, "weights": arguments.weights,
        "report": report, "deadline_s": arguments.deadline,
        "decoder": load_decoder(arguments.tiny, pipeline), "keep": arguments.keep, "diversity": arguments.diversity,
        "draft": arguments.draft, "finish": arguments.finish,
    }  # fmt: skip
    if arguments.prompts is not None:
        from ttsnap_lib.live.many import search_many

        bar = progress_bar("prompts", quiet=arguments.quiet)
        options |= {"together": together, "shard": arguments.shard, "progress": bar}
        frame = search_many(pipeline, prompts, rewards, arguments.out, **options)
        print(frame.drop(columns="prompt").to_string(index=False, float_format=digits))
        print(f"{arguments.out}: results.csv, results.parquet, one folder a prompt")
        return 0
    with shard_lock(Path(arguments.out), (0, 1)) as held:
        pass
    with held:
        bar = progress_bar("candidate steps", quiet=arguments.quiet)
        result = search(pipeline, arguments.prompt, rewards, progress=bar, **options)
        result.save(arguments.out)
        _picture(result, Path(arguments.out))
    if plan["cost"] is not None:
        images = result.cost / plan["cost"].total(1)
        print(f"{len(result.record.seeds)} seeds tried, at the price of {images:.3g} finished images")
    for key, value in result.summary().items():
        if value not in (None, ""):  # no cost model, not cut short
            print(f"{key:>14}: {digits(value) if isinstance(value, float) else value}")
    large = " (image_large.png: the same, enlarged)" if (Path(arguments.out) / "image_large.png").exists() else ""
    if result.record.chosen:
        print(result.set_frame().to_string(index=False, float_format=digits))
        large += f", image_0.png to image_{len(result.images) - 1}.png"
    print(f"{arguments.out}: image.png{large}, record.json, candidates.parquet, gallery.png")
    return 130 if result.record.stopped == "interrupt" else 0


def _price(arguments: argparse.Namespace) -> Any:
    """Return the cost model; None where there is no preset and no budget needs one."""
    from ttsnap_lib.costs import AUTO, priced
    from ttsnap_lib.errors import CostError

    needed = arguments.budget is not None
    if arguments.cost == AUTO and arguments.prompts is not None and not needed:
        return None  # the cost is in the identity of a folder, and those made before have none
    height, width = arguments.size or (None, None)
    reward, size = (arguments.reward or ["pocket-clip"])[0], height if height == width else None
    try:
        return priced(
            arguments.cost, arguments.steps, arguments.model, reward, size, tiny=bool(arguments.tiny)
        )[1]  # fmt: skip
    except CostError:
        if needed or arguments.cost != AUTO:
            raise
        return None


def _rewards(arguments: argparse.Namespace, names: list[str], adapters: Any = None) -> list[Any]:
    """Load the rewards, the first one with `adapters`."""
    from ttsnap_lib.rewards.loading import load_reward

    rewards: list[Any] = []
    for name in names:
        say_loading(arguments, name)
        common: dict[str, Any] = {"device": reward_device(arguments), "compile": arguments.compile is not None}
        rewards.append(load_reward(name, adapters=None if rewards else adapters, **common))
    return rewards


def _pipeline(arguments: argparse.Namespace) -> Any:
    from ttsnap_lib.checks import integer
    from ttsnap_lib.diffusion.pipelines import load_pipeline

    if arguments.threads is not None:
        import torch

        torch.set_num_threads(integer("--threads", arguments.threads, 1))
    say_loading(arguments, arguments.model)
    return load_pipeline(arguments.model, **loading(arguments))


def _picture(result: Any, folder: Path) -> None:
    import matplotlib.pyplot as plt

    from ttsnap_lib.files import atomic_write
    from ttsnap_lib.live.plots import gallery

    figure = gallery(result.record)
    with atomic_write(folder / "gallery.png") as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def _cost(arguments: argparse.Namespace) -> int:
    if arguments.list:
        return _list_costs()
    if arguments.out is None:
        from ttsnap_lib.errors import ConfigError

        raise ConfigError(
            "--out: got none, expected the file to write. Give --out cost.json, or --list for the presets."
        )
    say_loading(arguments, _LIBRARIES)
    from ttsnap_lib.files import atomic_write
    from ttsnap_lib.live.measure import measure_costs
    from ttsnap_lib.live.plots import batch_curve

    rewards = _rewards(arguments, arguments.reward or ["pocket-clip"])
    measured = measure_costs(
        _pipeline(arguments), rewards, settings(arguments), decoder=arguments.tiny,
        batch_sizes=arguments.batch_sizes, repeats=arguments.repeats,
    )  # fmt: skip
    measured.save(arguments.out, arguments.unit)
    curve = Path(arguments.out).with_suffix(".png")
    figure = batch_curve(measured.by_batch)
    with atomic_write(curve) as file:
        figure.savefig(file, format="png", dpi=110)
    print(measured.by_batch.to_string(index=False, float_format=digits))
    for model in (measured.tflops, measured.seconds):
        size = model.batch_size
        many = "" if size is None else f", {model.total(size) / size:.6g} each of {size} together"
        print(f"one Best-of-N candidate: {model.total(1):.6g} {model.unit}{many}")
    print(
        f"{arguments.out}: cost model in {arguments.unit}; use it as --cost {arguments.out}. {curve}: seconds by batch size"
    )
    return 0


def _list_costs() -> int:
    from ttsnap_lib.costs import PRESETS

    print(f"{'preset':<28} {'step':>9} {'decode':>9} {'at checks':>9} {'score':>9} {'one image':>9}")
    for name, cost in PRESETS.items():
        size = cost.batch_size or 1
        parts = ("step", "decode", "decode" if cost.preview_decode is None else "preview_decode", "verify")
        numbers = (*(cost.each(part, size) for part in parts), cost.total(size) / size)
        batches = f", in batches of {size}" if size > 1 else ""
        print(f"{name:<28} {' '.join(f'{digits(number):>9}' for number in numbers)} {cost.unit}{batches}")
    print("Of one candidate, 20 denoising steps; sources: the documentation of CostModel.preset.")
    return 0
