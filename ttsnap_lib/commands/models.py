"""Pictures and tensors: ``ttsnap generate``, ``verify``, ``score``; tensors from files, and the authors' YAML both ways."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ttsnap_lib.commands.options import (
    add_model_arguments,
    add_negtome_argument,
    add_prompts_argument,
    add_reward_arguments,
    add_settings_arguments,
    given_rewards,
    loading,
    negtome,
    old_spelling,
    reward_device,
    say_loading,
    settings,
)

_SHOWN = 20  # findings of `ttsnap verify`, and scores that were skipped


def add(commands: Any) -> None:
    """Register the commands with argparse's subparsers."""
    _add_generate(commands)
    _add_verify(commands)
    _add_score(commands)
    _add_import_and_export(commands)


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="generate images with their x0 estimate at every step",
        description="Fill a trajectory folder. Run the same command again to go on where it stopped; raise --images "
        "or add prompts at the end to widen it. Under `accelerate launch`, or with --shard, several processes share "
        "the work and write the same bytes as one.",
    )
    add_prompts_argument(generate, default="pocket")
    generate.add_argument("--limit", type=int, metavar="N", help="take the first N prompts only")
    generate.add_argument("--out", metavar="FOLDER", help="the trajectory folder; may be left out with --score")
    generate.add_argument(
        "--score", metavar="TENSOR.zarr",
        help="score the images into a reward tensor; without --out while they are made, and none is kept",
    )  # fmt: skip
    generate.add_argument(
        "--draft", type=int, metavar="STEPS", help="with --score alone: score drafts of so few steps, nothing else"
    )
    add_reward_arguments(generate)
    _add_embeddings(generate)
    generate.add_argument("--images", type=int, default=8, metavar="N", help="images per prompt")
    add_settings_arguments(generate)
    generate.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    generate.add_argument("--max-sequence-length", type=int, metavar="N", help="text tokens of the T5 encoder")
    add_negtome_argument(generate)
    generate.add_argument(
        "--tiny", metavar="MODEL",
        help="AutoencoderTiny (or pocket-tiny) for the estimates before the last step, as a search with --tiny sees them",
    )  # fmt: skip
    generate.add_argument("--seed", type=int, default=0, help="base seed")
    generate.add_argument(
        "--batch-size", type=int, metavar="N", help="images per batch (default: the folder's, else 8)"
    )
    generate.add_argument("--format", choices=("png", "webp"), help="lossless both (default: the folder's, else png)")
    generate.add_argument("--shard", metavar="I/N", help="make every N-th batch, from the I-th: 0/4, 1/4, ...")
    _run_arguments(generate, "pocket-flux")
    generate.set_defaults(func=_generate)


def _add_embeddings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--embeddings", action="store_true",
        help="also keep what the first reward's image tower says of each picture, for sets of images: 2 bytes a feature "
        "(200 prompts x 200 images x 20 steps x 1024 features: 1.6 GB)",
    )  # fmt: skip


def _run_arguments(parser: argparse.ArgumentParser, model: str | None) -> None:
    add_model_arguments(
        parser, model, threads="CPU threads of the model (default: the folder's, else all cores, 1 for small models)"
    )
    parser.add_argument(
        "--workers", type=int, default=4, metavar="N", help="threads that read, encode and write pictures"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on the terminal")


def _generate(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.checks import MAX_IMAGES, integer
    from ttsnap_lib.errors import ConfigError
    from ttsnap_lib.trajectories.prompts import read_prompts

    # What costs nothing to check comes before a model of many gigabytes is loaded.
    prompts = read_prompts(arguments.prompts, limit=arguments.limit, prompt_column=arguments.prompt_column)
    integer("--images", arguments.images, 1, MAX_IMAGES)
    if not arguments.out and not arguments.score:
        raise ConfigError("neither --out nor --score: say where the images go, or where their rewards go.")
    if arguments.format and not arguments.out:
        raise ConfigError(
            f"--format {arguments.format} without --out: no picture is kept. Leave it out, or give --out."
        )
    if arguments.draft is not None and (arguments.out or not arguments.score):
        raise ConfigError(
            "--draft keeps no pictures and no estimates, only scores. Give --score TENSOR.zarr and no --out."
        )
    about = (arguments.reward, arguments.reward_option, arguments.noise_aware, arguments.embeddings)
    if not arguments.score and any(about):
        raise ConfigError(
            "--reward, --reward-option, --noise-aware or --embeddings without --score. Add --score TENSOR.zarr, or run "
            "`ttsnap score` on the folder afterwards."
        )

    say_loading(arguments, "torch, diffusers, transformers")
    from ttsnap_lib.diffusion.pipelines import load_pipeline
    from ttsnap_lib.rewards.base import require_metadata
    from ttsnap_lib.style import progress_bar
    from ttsnap_lib.trajectories.generate import generate

    run = settings(
        arguments, max_sequence_length=arguments.max_sequence_length, negative_prompt=arguments.negative_prompt
    )
    merging = negtome(arguments)
    say_loading(arguments, arguments.model)
    pipeline = load_pipeline(arguments.model, **loading(arguments))
    common_reward = {"device": reward_device(arguments), "compile": arguments.compile is not None}
    rewards = given_rewards(arguments, **common_reward) if arguments.score else []
    require_metadata(rewards, prompts.metadata)
    common = {
        "images_per_prompt": arguments.images,
        "settings": run,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "shard": arguments.shard,
        "negtome": merging,
        "decoder": arguments.tiny,
        "cpu_threads": arguments.threads,
        "workers": arguments.workers,
        "source": arguments.prompts,
        "progress": progress_bar(quiet=arguments.quiet),
    }
    if not arguments.out:
        from ttsnap_lib.scoring.score import draft_scores, generate_scores

        given = (pipeline, prompts, arguments.score, rewards)
        common["embeddings"] = arguments.embeddings
        drafting = arguments.draft is not None
        print(draft_scores(*given, arguments.draft, **common) if drafting else generate_scores(*given, **common))
        return 0
    print(generate(pipeline, prompts, arguments.out, image_format=arguments.format, **common))
    if arguments.score:
        from ttsnap_lib.scoring.score import score

        bar = progress_bar("pictures", quiet=arguments.quiet)
        options = {"shard": arguments.shard, "embeddings": arguments.embeddings, "progress": bar}
        print(score(arguments.out, rewards, arguments.score, **options))
    return 0


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="check a trajectory folder, and mend it",
        description="Find missing, damaged, changed and foreign files. Exit status 1 when there are any. "
        "--repair makes missing and damaged pictures again, and nothing else; foreign files stay.",
    )
    verify.add_argument("folder", help="trajectory folder of `ttsnap generate`")
    verify.add_argument("--repair", action="store_true", help="make what is missing or damaged again")
    verify.add_argument("--tiny", metavar="MODEL", help="the decoder of a folder that `ttsnap generate --tiny` made")
    _run_arguments(verify, None)
    verify.set_defaults(func=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.style import progress_bar
    from ttsnap_lib.trajectories.read import verify

    bar = progress_bar("prompts", quiet=arguments.quiet)
    report = verify(arguments.folder, workers=arguments.workers, progress=bar)
    _show(report)
    if not arguments.repair or not (report.repairs() or report.count("leftover")):
        return 0 if report.ok else 1

    say_loading(arguments, "torch, diffusers, transformers", arguments.model or "the folder's model")
    from ttsnap_lib.trajectories.generate import pipeline_of, repair

    pipeline = pipeline_of(arguments.folder, arguments.model, **loading(arguments))
    after = repair(
        pipeline,
        arguments.folder,
        report=report,
        decoder=arguments.tiny,
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


def _add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        help="score a trajectory folder into a reward tensor",
        description="Score the pictures of a trajectory folder. The same command goes on where it stopped; other rewards, "
        "steps, or a noise-aware series are added to the tensor.",
    )
    score.add_argument("folder", type=Path, help="trajectory folder of `ttsnap generate`")
    add_reward_arguments(score)
    _add_embeddings(score)
    score.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the accelerator when there is one)")
    score.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16")
    score.add_argument("--compile", action="store_true", help="compile the reward with torch.compile")
    score.add_argument(
        "-o", "--out", type=Path, help="the tensor, a Zarr folder (default: beside FOLDER, as FOLDER.zarr)"
    )
    score.add_argument("--at-steps", type=int, nargs="+", metavar="STEP", help="steps to score (default: all)")
    old_spelling(score, "--steps", type=int, nargs="+", dest="at_steps")
    score.add_argument("--batch-size", type=int, default=32, help="pictures per forward pass")
    score.add_argument("--shard", metavar="I/N", help="score every N-th chunk of 25 prompts, from the I-th (from 0)")
    score.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="a damaged picture or a score that is not finite: stop, or leave NaN and list it",
    )
    score.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads that read and resize pictures ahead of the model (default: one for each core)",
    )
    score.add_argument("-q", "--quiet", action="store_true", help="no progress on the terminal")
    score.set_defaults(func=_score)


def _score(arguments: argparse.Namespace) -> int:
    say_loading(arguments, "torch, transformers")
    from ttsnap_lib.scoring.score import score
    from ttsnap_lib.style import progress_bar
    from ttsnap_lib.trajectories.read import Trajectories

    Trajectories(arguments.folder)  # a wrong folder is told before a model is loaded
    out = arguments.out or arguments.folder.absolute().with_name(arguments.folder.absolute().name + ".zarr")
    report = score(
        arguments.folder,
        given_rewards(arguments, device=arguments.device, dtype=arguments.dtype, compile=arguments.compile),
        out,
        steps=arguments.at_steps,
        batch_size=arguments.batch_size,
        shard=arguments.shard,
        on_error=arguments.on_error,
        embeddings=arguments.embeddings,
        workers=arguments.workers,
        progress=progress_bar("pictures", quiet=arguments.quiet),
    )
    print(report)
    for skipped in report.skipped[:_SHOWN]:
        print(
            f"skipped: {skipped.reward} ({skipped.variant}), prompt {skipped.prompt}, image {skipped.image}, "
            f"step {skipped.step}: {skipped.reason}",
            file=sys.stderr,
        )
    if len(report.skipped) > _SHOWN:
        print(f"... {len(report.skipped) - _SHOWN} more in {report.path}.skipped.json", file=sys.stderr)
    _say_next(out, missing=bool(report.skipped))
    return 0


def _add_import_and_export(commands: Any) -> None:
    own = commands.add_parser(
        "import",
        help="make a reward tensor of scores of your own",
        description="Read scores of your own into a reward tensor: a NumPy array (prompt, image, step) as .npy, or .npz "
        "with the arrays reward and noise_aware; or a table (.csv, .tsv, .parquet) with the columns prompt (index or "
        "text), image, step, reward, and noise_aware where there is one.",
    )
    own.add_argument("scores", type=Path, metavar="FILE", help=".npy, .npz, .csv, .tsv or .parquet")
    own.add_argument("--reward", default="reward", metavar="NAME", help="what the reward is called")
    own.add_argument("--model", metavar="NAME", help="the diffusion model, for titles and commands")
    own.add_argument(
        "--at-steps", type=int, nargs="+", metavar="STEP", help="denoising steps of an array (default: 0, 1, 2, ...)"
    )
    old_spelling(own, "--steps", type=int, nargs="+", dest="at_steps")
    add_prompts_argument(own)
    own.add_argument("-o", "--out", type=Path, required=True, metavar="TENSOR.zarr", help="Zarr folder to write")
    own.add_argument("--overwrite", action="store_true", help="replace an existing tensor")
    own.set_defaults(func=_import)

    parser = commands.add_parser(
        "import-published",
        help="import published YAML reward values into a reward tensor",
        description="Import published reward values (folders such as flux_imr_val_base) to the last bit.",
    )
    parser.add_argument("values", type=Path, help="folder that holds the published folders")
    parser.add_argument("--model", required=True, help="flux, sdxl, ...")
    parser.add_argument(
        "--reward", action="append", metavar="NAME", help="image_reward, pickscore, hpsv2 (default: all that are there)"
    )
    old_spelling(parser, "--rewards", nargs="+", dest="reward")
    add_prompts_argument(parser)
    parser.add_argument("--distinct", action="store_true", help="drop repeated trajectories")
    parser.add_argument(
        "-o", "--out", type=Path, help="Zarr folder to write (default: data_cache/published/<model>.zarr)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tensor")
    parser.set_defaults(func=_import_published)

    pictures = commands.add_parser(
        "import-trajectories",
        help="make a trajectory folder of pictures of the released code",
        description="Write the manifest of a folder p????/id???/s??.png that the released code made; score, finetune and "
        "verify then work on it. Prompts may begin at another number than 0.",
    )
    pictures.add_argument("folder", type=Path, help="holds p0000/id000/s00.png and so on; gets the manifest")
    pictures.add_argument("--model", required=True, help="what made the pictures, such as black-forest-labs/FLUX.1-dev")
    add_prompts_argument(pictures)
    pictures.add_argument("-q", "--quiet", action="store_true", help="no progress on the terminal")
    pictures.set_defaults(func=_import_trajectories)

    export = commands.add_parser(
        "export",
        help="write a reward tensor in the authors' YAML layouts",
        description="Write reward values per step (published) or the clean images' rewards (ground-truth), exactly.",
    )
    export.add_argument("tensor", type=Path, help="Zarr folder")
    export.add_argument("-o", "--out", type=Path, required=True, help="folder (published) or file (ground-truth)")
    export.add_argument("--layout", choices=("published", "ground-truth"), default="published", help="as above")
    export.add_argument(
        "--model", help="first part of the published folder names, such as flux (default: the tensor's)"
    )
    export.add_argument("--reward", action="append", metavar="NAME", help="rewards to export (default: all)")
    export.set_defaults(func=_export)


def _import(arguments: argparse.Namespace) -> int:
    import numpy as np

    from ttsnap_lib.tensors.tensor import import_rewards, noise_aware_steps

    _refuse_taken(arguments.out, arguments.overwrite)
    dataset = import_rewards(
        arguments.scores,
        name=arguments.reward,
        steps=arguments.at_steps,
        prompts=_given_texts(arguments),
        model=arguments.model,
    )
    gaps = int(np.isnan(dataset["base"].values).sum())
    _save(dataset, arguments.out, arguments.overwrite)
    print(f"steps {dataset['step'].values.tolist()}, noise-aware at {noise_aware_steps(dataset)[arguments.reward]}")
    if gaps:
        print(f"{gaps} of {dataset['base'].size} scores are missing")
    _say_next(arguments.out, missing=gaps > 0)
    return 0


def _say_next(out: Path, *, missing: bool = False) -> None:
    """Say how a tensor that was just written is simulated."""
    from ttsnap_lib.errors import CostError
    from ttsnap_lib.tensors.pricing import tensor_preset
    from ttsnap_lib.tensors.tensor import open_rewards

    dataset = open_rewards(out)
    needed = ""
    try:
        tensor_preset(dataset)
    except CostError:
        needed = " -p cost COST"
    print(f"next: ttsnap run simulate -p tensor {out}{needed}{' -p missing drop' if missing else ''}")
    if needed:
        print(f"(COST: a preset or a file of `ttsnap cost`, of {int(dataset['step'][-1]) + 1} steps)")
    if dataset.sizes["image"] < 40:
        print("(few images a prompt allow small budgets only: -p multiples '[1.5, 2]')")


def _refuse_taken(out: Path, overwrite: bool) -> None:
    """Refuse to write over a tensor, before the work."""
    from ttsnap_lib.errors import TensorError

    if out.exists() and not overwrite:
        raise TensorError(f"output: got {out}, expected a new path. Pass --overwrite or another --out.")


def _given_texts(arguments: argparse.Namespace) -> list[str] | None:
    from ttsnap_lib.trajectories.prompts import read_prompts

    if arguments.prompts is None:
        return None
    return read_prompts(arguments.prompts, prompt_column=arguments.prompt_column)


def _save(dataset: Any, out: Path, overwrite: bool) -> None:
    """Write a tensor and say its sizes."""
    from ttsnap_lib.tensors.tensor import save_rewards

    save_rewards(dataset, out, overwrite=overwrite)
    print(f"{out}: {' x '.join(f'{size} {dim}s' for dim, size in dataset['base'].sizes.items())}")


def _import_published(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.files import data_cache
    from ttsnap_lib.style import progress_bar
    from ttsnap_lib.tensors.published import import_published

    out = arguments.out or data_cache() / "published" / f"{arguments.model}.zarr"
    _refuse_taken(out, arguments.overwrite)
    dataset = import_published(
        arguments.values,
        arguments.model,
        arguments.reward,
        arguments.distinct,
        prompts=_given_texts(arguments),
        progress=progress_bar("files"),
    )
    _save(dataset, out, arguments.overwrite)
    _say_next(out)
    return 0


def _import_trajectories(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.errors import ConfigError
    from ttsnap_lib.style import progress_bar
    from ttsnap_lib.trajectories.released import import_trajectories

    prompts = _given_texts(arguments)
    if prompts is None:
        raise ConfigError("--prompts: got none, expected the texts of the pictures. Name their file: --prompts FILE.")
    bar = progress_bar("prompts", quiet=arguments.quiet)
    found = import_trajectories(arguments.folder, prompts, arguments.model, progress=bar)
    print(
        f"{arguments.folder}: {len(found.prompts)} prompts x {found.images_per_prompt} images x {found.n_steps} steps"
    )
    print(f"the first, {found.prompt_folder(0)}, is {found.prompts[0]!r}")
    print(f"next: ttsnap score {arguments.folder} --reward REWARD --out TENSOR.zarr")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.errors import ConfigError
    from ttsnap_lib.tensors.published import export_ground_truth, export_published
    from ttsnap_lib.tensors.tensor import open_rewards

    dataset = open_rewards(arguments.tensor)
    rewards = arguments.reward
    if arguments.layout == "ground-truth":
        if rewards and len(rewards) > 1:
            raise ConfigError(f"--reward: got {rewards!r}, expected one. Export one file per reward.")
        print(export_ground_truth(dataset, arguments.out, reward=rewards[0] if rewards else None))
        return 0
    model = arguments.model or str(dataset.attrs.get("model", "")).rpartition("/")[2] or "model"
    files = export_published(dataset, arguments.out, model, rewards=rewards)
    names = rewards or map(str, dataset["reward"].values)  # only the published ones are found without
    print(f"{arguments.out}: {len(files)} files")
    print(
        f"next: ttsnap import-published {arguments.out} --model {model} {' '.join(f'--reward {name}' for name in names)}"
    )
    return 0
