"""Fills a trajectory folder, or hands each batch to a callback: batches, seeds, shards, resume, repair.

>>> pipeline = load_pipeline("pocket-flux")
>>> report = generate(pipeline, "pocket:evaluation:8", "data_cache/trajectories", images_per_prompt=8)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ._batches import BatchMaker, Clock, OnBatch, hand_over_to, model_threads, threads_of_torch
from ._identity import decoder_digest, writer_of
from ._identity import identity as identity_of
from ._image_writer import ImageWriter, remove_leftovers
from ._images import IMAGE_FORMATS
from ._plan import blocks_for, checked_folder, missing_rows, parse_shard, require_disk, shard_lock, wanted_rows
from .checks import choice, integer
from .denoise import Denoiser, Settings
from .errors import ConfigError
from .negtome import NegToMe
from .pipelines import load_pipeline
from .prompts import read_prompts
from .trajectories import MANIFEST, MAX_IMAGES, Manifest, VerifyReport, extend, verify

__all__ = ["GenerateReport", "OnBatch", "generate", "pipeline_of", "repair"]

_DEFAULTS: dict[str, Any] = {"image_format": "png", "batch": {"size": 8}}


@dataclass
class GenerateReport:
    """What a call of :func:`generate` did."""

    made: int = 0
    """Images made now."""
    found: int = 0
    """Images of this shard that were there already."""
    elapsed_s: float = 0.0
    bytes_written: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the time of the main thread went: encode, denoise, decode, hand_over (waiting for the disk), finish."""

    @property
    def images_per_s(self) -> float:
        """Images made per second, all of it counted."""
        return self.made / self.elapsed_s if self.elapsed_s else 0.0

    def __str__(self) -> str:
        text = f"{self.made} images made, {self.found} found, in {self.elapsed_s:.1f} s"
        if not self.made:
            return text
        parts = ", ".join(f"{part} {seconds / self.elapsed_s:.0%}" for part, seconds in self.seconds.items())
        return f"{text}: {self.images_per_s:.2f} images/s, {self.bytes_written / 1e6:.1f} MB ({parts})"


def generate(
    pipeline: Any,
    prompts: str | Path | Sequence[str],
    folder: str | Path | None = None,
    *,
    on_batch: OnBatch | None = None,
    images_per_prompt: int = 8,
    settings: Settings | None = None,
    steps: Collection[int] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    shard: tuple[int, int] | str | None = None,
    negtome: NegToMe | None = None,
    decoder: Any = None,
    image_format: str | None = None,
    cpu_threads: int | None = None,
    workers: int = 4,
    only: Collection[tuple[int, int]] | Mapping[tuple[int, int], Collection[int]] | None = None,
    source: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GenerateReport:
    """Generate images with their x0 estimate at every step.

    With `folder`, the pictures are written as ``p0000/id000/s00.png``; an image appears only when it is whole, and
    the same call goes on where an earlier one stopped, or adds prompts and images. With `on_batch`, they are handed
    over as they come, on the device, and nothing need be written.

    Every image depends on the settings, the seed, its prompt, the prompt's index and its own index alone. On one
    type of machine it has the same bytes however the work was split, stopped or widened.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        See :func:`ttsnap_lib.pipelines.load_pipeline`.
    prompts : str, Path or sequence of str
        Prompts, or what :func:`ttsnap_lib.prompts.read_prompts` reads.
    folder : str or Path, optional
        The trajectory folder to fill.
    on_batch : callable, optional
        Called per batch, step and prompt; see :data:`OnBatch`. The tensor is the caller's to keep.
    images_per_prompt : int
        The same for every prompt.
    settings : Settings, optional
        Steps, size, guidance.
    steps : collection of int, optional
        Steps to decode and hand to `on_batch`; all of them when not given. A folder takes every step.
    seed : int
        Base seed; each image draws from ``SeedSequence([seed, prompt, image])``.
    batch_size : int, optional
        Rows per batch; the last batch is filled up, so that the shape never changes. What the folder was made with,
        else 8.
    shard : (int, int) or str, optional
        Index and count, such as ``(0, 4)`` or ``"0/4"``: make every fourth batch. By default the place in an
        ``accelerate launch``, else everything.
    negtome : NegToMe, optional
        Negative Token Merging; couples the images of a group.
    decoder : optional
        A small autoencoder for the estimates; the last step is always decoded by the pipeline's own.
    image_format : {"png", "webp"}, optional
        Both lossless; what the folder was made with, else PNG.
    cpu_threads : int, optional
        Threads of the model on the CPU. Part of what decides the bytes, so it does not come from the environment:
        what the folder was made with, else the number of cores at hand (1 for a model below 50 million weights).
    workers : int
        Threads that encode and write pictures.
    only : collection or mapping of (int, int), optional
        Make these (prompt, image) alone. A mapping to steps makes these steps again, even where they are there.
    source : str, optional
        Where the prompts come from, for the manifest's provenance; the file when `prompts` is one.
    progress : callable, optional
        ``progress(done, total)`` in images of this shard; see :func:`ttsnap_lib.progress.progress_bar`.

    Returns
    -------
    GenerateReport

    Raises
    ------
    PromptError, ConfigError, PipelineError
        Bad input, before any work.
    TrajectoryError
        A folder made with other settings (each difference is shown), or with a foreign file among its images.
    DiskError
        Not enough space, a disk that fills up or cannot be written, or another process on the same shard. What is
        whole stays.
    DeviceError
        Out of memory.
    """
    if folder is None and on_batch is None:
        raise ConfigError(
            "generate without folder and on_batch", value=None, bound="one of them", remedy="Say where the pictures go."
        )
    images_per_prompt = integer("images_per_prompt", images_per_prompt, 1, MAX_IMAGES)
    seed, workers = integer("seed", seed, 0), integer("workers", workers, 1, 256)
    index, count = parse_shard(shard)
    source = str(prompts) if source is None and isinstance(prompts, str | Path) else source
    prompts = read_prompts(prompts)
    folder = None if folder is None else checked_folder(folder)
    # What is left open is as the folder was made.
    made_with = Manifest.read(folder).identity if folder is not None and (folder / MANIFEST).exists() else _DEFAULTS
    image_format = choice("image_format", image_format or made_with["image_format"], IMAGE_FORMATS)
    group = 1 if negtome is None else negtome.group_size
    blocks = blocks_for(batch_size, made_with.get("batch", _DEFAULTS["batch"]), len(prompts), images_per_prompt, group)
    denoiser = Denoiser(pipeline, settings)
    n_steps = denoiser.settings.n_steps
    chosen = {integer("steps", step, 0, n_steps - 1) for step in (range(n_steps) if steps is None else steps)}
    threads = model_threads(denoiser, cpu_threads, made_with.get("cpu_threads"))
    batches = list(blocks.starts(len(prompts), images_per_prompt))[index::count]
    wanted = wanted_rows(blocks, batches, len(prompts), images_per_prompt, n_steps, only)
    total, writer, report, clock = len(wanted), None, GenerateReport(), Clock()
    report.seconds = clock.seconds

    with ExitStack() as stack:
        if folder is not None:
            identity = identity_of(
                denoiser,
                seed=seed,
                batch={"size": blocks.size, "images": blocks.images},
                negtome=None if negtome is None else negtome.resolved(pipeline).to_dict(),
                decoder=decoder_digest(decoder),
                image_format=image_format,
                cpu_threads=threads,
            )
            with shard_lock(folder, (index, count)) as held:
                extend(folder, identity, prompts, images_per_prompt, writer_of(denoiser, source))
            stack.enter_context(held)
            if not isinstance(only, Mapping):
                wanted = missing_rows(folder, wanted, n_steps, image_format)
            require_disk(folder, wanted, image_format, math.prod(denoiser.settings.size) * 3)
            writer = stack.enter_context(ImageWriter(folder, image_format, f"shard-{index}-of-{count}", workers))
        report.found = total - len(wanted)
        stack.enter_context(threads_of_torch(threads))
        if negtome is not None:
            stack.enter_context(negtome.install(pipeline))
        begin = time.perf_counter()
        maker = BatchMaker(denoiser, prompts, blocks, seed, decoder, clock)
        if progress is not None:
            progress(report.found, total)
        for start in batches:
            rows = {row: wanted[row] for row in blocks.rows(start) if row in wanted}
            if not rows:
                continue
            needed = {step for steps_ in rows.values() for step in steps_} if writer else chosen
            hand_over = hand_over_to(blocks.rows(start), rows, chosen, writer, on_batch, clock)
            maker.make(start, needed | chosen if on_batch else needed, hand_over)
            report.made += len(rows)
            if progress is not None:
                progress(report.found + report.made, total)
        if writer is not None:
            with clock("finish"):
                writer.close()
            report.bytes_written = writer.bytes_written
        report.elapsed_s = time.perf_counter() - begin
    return report


def repair(
    pipeline: Any,
    folder: str | Path,
    *,
    report: VerifyReport | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> VerifyReport:
    """Make what :func:`ttsnap_lib.trajectories.verify` finds missing or damaged, and nothing else; verify again.

    Foreign files are left where they are: they are not ours to delete.

    Parameters
    ----------
    pipeline : diffusers pipeline
        The one the folder was made with.
    folder : str or Path
    report : VerifyReport, optional
        What was found before; verified now when not given.
    options
        What cannot be read from the manifest: ``decoder``, ``workers``.
    progress : callable, optional
        ``progress(done, total)`` in images.

    Returns
    -------
    VerifyReport
        What is still wrong.
    """
    manifest = Manifest.read(folder)
    report = report if report is not None else verify(folder)
    with shard_lock(Path(folder), (0, 1)) as held, held:  # nobody is writing: what lies about is left over
        remove_leftovers(Path(folder) / finding.path for finding in report.findings if finding.kind == "leftover")
    repairs = report.repairs()
    if repairs:
        known = {name.name: manifest.identity[name.name] for name in fields(Settings) if name.name in manifest.identity}
        generate(
            pipeline,
            manifest.prompts,
            folder,
            images_per_prompt=manifest.images_per_prompt,
            settings=Settings(**known),
            seed=manifest.identity["seed"],
            negtome=NegToMe.from_dict(manifest.identity["negtome"]) if manifest.identity["negtome"] else None,
            shard=(0, 1),
            only=repairs,
            progress=progress,
            **options,
        )
    return verify(folder)


def pipeline_of(folder: str | Path, model: str | None = None, **options: Any) -> Any:
    """Load the pipeline that `folder` was made with: model, revision, precision and scheduler of its manifest.

    Parameters
    ----------
    folder : str or Path
        A trajectory folder.
    model : str, optional
        Where the model is now, when its name in the manifest does not say.
    options
        Of :func:`ttsnap_lib.pipelines.load_pipeline`; those that are None or ``dtype="auto"`` come from the manifest.

    Returns
    -------
    diffusers pipeline
    """
    import diffusers

    identity = Manifest.read(folder).identity
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    if options.get("dtype", "auto") == "auto":
        options["dtype"] = names.get(identity["dtype"], "auto")
    if model is None and options.get("revision") is None:
        options["revision"] = identity["revision"]
    kind = getattr(diffusers, identity["scheduler"]["class"], None)
    if options.get("scheduler") is None and kind is not None:
        options["scheduler"] = kind.from_config(identity["scheduler"]["config"])
    return load_pipeline(model or identity["model"], **options)
