"""Fills a trajectory folder, or hands each batch to a callback: batches, seeds, shards, resume, repair.

>>> pipeline = load_pipeline("pocket-flux")
>>> report = generate(pipeline, "pocket:evaluation:8", "data_cache/trajectories", images_per_prompt=8)
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttsnap_lib.checks import FINITE_VAE, MAX_IMAGES, as_bytes, choice, integer
from ttsnap_lib.diffusion.denoise import Conditioning, Denoiser, Settings, image_generator
from ttsnap_lib.diffusion.negtome import NegToMe
from ttsnap_lib.diffusion.pipelines import load_decoder, load_pipeline, tell_outside
from ttsnap_lib.errors import ConfigError, DiskError, PipelineError, TrajectoryError
from ttsnap_lib.files import cores, parse_shard, require_space, shard_lock
from ttsnap_lib.provenance import Clock
from ttsnap_lib.trajectories.identity import decoder_digest, embeds_digests, identity_of, vae_scaling, writer_of
from ttsnap_lib.trajectories.layout import (
    IMAGE_FORMATS,
    MANIFEST,
    RAW_SHARE,
    Manifest,
    extend,
    prompt_name,
    scan_prompt,
)
from ttsnap_lib.trajectories.prompts import read_prompts
from ttsnap_lib.trajectories.read import VerifyReport, verify
from ttsnap_lib.trajectories.write import ImageWriter, remove_leftovers

OnBatch = Callable[[int, list[int], int, torch.Tensor], None]
"""``on_batch(prompt_index, image_indices, step, images)``: float32 (n, 3, height, width) in [0, 1] on the device."""
Wanted = dict[tuple[int, int], list[int]]
"""(prompt, image) to the steps to make."""

_DEFAULTS: dict[str, Any] = {"image_format": "png", "batch": {"size": 8}}
_SMALL_MODEL = 50_000_000  # weights


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
    settings: Settings | Mapping[str, Any] | None = None,
    steps: Collection[int] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    shard: tuple[int, int] | str | None = None,
    negtome: NegToMe | Mapping[str, Any] | None = None,
    decoder: Any = None,
    image_format: str | None = None,
    cpu_threads: int | None = None,
    workers: int = 4,
    only: Collection[tuple[int, int]] | Mapping[tuple[int, int], Collection[int]] | None = None,
    source: str | None = None,
    prompt_embeds: Mapping[str, Any] | None = None,
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
        See :func:`ttsnap_lib.load_pipeline`.
    prompts : str, Path or sequence of str
        Prompts, or what :func:`ttsnap_lib.trajectories.prompts.read_prompts` reads.
    folder : str or Path, optional
        The trajectory folder to fill.
    on_batch : callable, optional
        Called per batch, step and prompt; see :data:`OnBatch`. The tensor is the caller's to keep. A batch with
        pictures of NaN ends in an error before its last step is handed over.
    images_per_prompt : int
        The same for every prompt.
    settings : Settings or mapping, optional
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
    negtome : NegToMe or mapping, optional
        Negative Token Merging; couples the images of a group.
    decoder : AutoencoderTiny, folder, hub id or ``"pocket-tiny"``, optional
        Decodes the estimates; the last step is always decoded by the pipeline's own.
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
    prompt_embeds : mapping of str to tensor, optional
        The prompts as embeddings made elsewhere, for a pipeline without text encoders: arguments of the pipeline's call
        by name (``{"prompt_embeds": ..., "pooled_prompt_embeds": ...}`` for FLUX), each with one row per prompt; with
        guidance also those of the negative prompt.
    progress : callable, optional
        ``progress(done, total)`` in images of this shard; see :func:`ttsnap_lib.style.progress_bar`.

    Returns
    -------
    GenerateReport

    Raises
    ------
    PromptError, ConfigError, PipelineError
        Bad input, before any work; a PipelineError also for decoded pictures that hold NaN: they are not written.
    TrajectoryError
        A folder made with other settings (each difference is shown), or with a foreign file among its images.
    DiskError
        Not enough space, a disk that fills up or cannot be written, or another process on the same shard. What is
        whole stays.
    DeviceError
        Out of memory.
    """
    if folder is None and on_batch is None:
        raise ConfigError("folder and on_batch: got None, expected one of them. Say where the pictures go.")
    images_per_prompt = integer("images_per_prompt", images_per_prompt, 1, MAX_IMAGES)
    seed, workers = integer("seed", seed, 0), integer("workers", workers, 1, 256)
    index, count = parse_shard(shard)
    source = str(prompts) if source is None and isinstance(prompts, str | Path) else source
    prompts = read_prompts(prompts)
    folder = None if folder is None else Path(folder)
    # What is left open is as the folder was made.
    made_with = Manifest.read(folder).identity if folder is not None and (folder / MANIFEST).exists() else _DEFAULTS
    image_format = choice("image_format", image_format or made_with["image_format"], IMAGE_FORMATS)
    negtome = NegToMe.from_dict(negtome) if isinstance(negtome, Mapping) else negtome
    group = 1 if negtome is None else negtome.group_size
    blocks = blocks_for(batch_size, made_with.get("batch", _DEFAULTS["batch"]), len(prompts), images_per_prompt, group)
    denoiser = Denoiser(pipeline, settings)
    tell_outside(pipeline, prompts)
    decoder = load_decoder(decoder, denoiser.pipeline)
    n_steps = denoiser.settings.n_steps
    chosen = {integer("steps", step, 0, n_steps - 1) for step in (range(n_steps) if steps is None else steps)}
    given = None if prompt_embeds is None else denoiser.given(prompt_embeds, len(prompts))
    if given is None:
        denoiser.require_text()
    threads = model_threads(denoiser, cpu_threads, made_with.get("cpu_threads"))
    batches = list(blocks.starts(len(prompts), images_per_prompt))[index::count]
    wanted = wanted_rows(blocks, batches, len(prompts), images_per_prompt, n_steps, only)
    total, writer, clock = len(wanted), None, Clock()
    report = GenerateReport(seconds=clock.seconds)

    with ExitStack() as stack:
        if folder is not None:
            identity = identity_of(
                denoiser,
                timesteps=[float(f"{timestep:.7g}") for timestep in denoiser.timesteps],
                seed=seed,
                batch={"size": blocks.size, "images": blocks.images},
                negtome=None if negtome is None else negtome.resolved(pipeline).to_dict(),
                decoder=decoder_digest(decoder),
                vae=vae_scaling(pipeline.vae),
                image_format=image_format,
                cpu_threads=threads,
                **({} if given is None else {"prompt_embeds": embeds_digests(given)}),
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
        maker = BatchMaker(denoiser, prompts, blocks, seed, decoder, writer, on_batch, chosen, clock, given)
        if progress is not None:
            progress(report.found, total)
        for start in batches:
            rows = {row: wanted[row] for row in blocks.rows(start) if row in wanted}
            if not rows:
                continue
            maker.make(start, rows)
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
    """Make what `verify` finds missing or damaged (or has found: `report`), and nothing else; verify again.

    Foreign files are left where they are: they are not ours to delete. `options` are those of :func:`generate` that
    cannot be read from the manifest: ``decoder``, ``prompt_embeds``, ``workers``.
    """
    manifest = Manifest.read(folder)
    manifest.refuse_imported(folder)
    report = report if report is not None else verify(folder)
    with shard_lock(Path(folder), (0, 1)) as held, held:  # nobody is writing: what lies about is left over
        remove_leftovers(Path(folder) / finding.path for finding in report.findings if finding.kind == "leftover")
    repairs = report.repairs()
    if repairs:
        identity = manifest.identity
        known = {one.name: identity[one.name] for one in fields(Settings) if one.name in identity}
        generate(
            pipeline,
            manifest.prompts,
            folder,
            images_per_prompt=manifest.images_per_prompt,
            settings=Settings(**known),
            seed=identity["seed"],
            negtome=NegToMe.from_dict(identity["negtome"]) if identity["negtome"] else None,
            shard=(0, 1),
            only=repairs,
            progress=progress,
            **options,
        )
    return verify(folder)


def pipeline_of(folder: str | Path, model: str | None = None, **options: Any) -> Any:
    """Load the pipeline that `folder` was made with: model, revision, precision, scheduler and LoRA of its manifest.

    `model` says where the model is now, when its name in the manifest does not; `options` are those of `load_pipeline`,
    where None and ``dtype="auto"`` mean the manifest's.
    """
    import diffusers

    manifest = Manifest.read(folder)
    manifest.refuse_imported(folder)
    identity = manifest.identity
    if options.get("dtype", "auto") == "auto":
        options["dtype"] = identity["dtype"]
    if model is None and options.get("revision") is None:
        options["revision"] = identity["revision"]
    options["lora"] = options.get("lora") or identity.get("lora_from") or ()
    options["base"] = options.get("base") or (identity.get("base") if model is None else None)
    kind = getattr(diffusers, identity["scheduler"]["class"], None)
    if options.get("scheduler") is None and kind is not None:
        config = identity["scheduler"]["config"]
        infinite = {key: float(value) for key, value in config.items() if value in ("inf", "-inf")}
        options["scheduler"] = kind.from_config({**config, **infinite})
    return load_pipeline(model or identity["model"], **options)


# What there is to do


@dataclass(frozen=True)
class Blocks:
    """A fixed composition of batches: which rows a batch has depends on nothing but these two numbers.

    A batch takes `images` consecutive images of each of ``size // images`` consecutive prompts. Results of a model
    may differ in the last bit with the shape of a batch and with the place in it: here an image keeps both, whatever
    is missing. Rows past the last prompt or image are filled up and thrown away.
    """

    size: int
    images: int

    @property
    def prompts(self) -> int:
        """Prompts in a batch."""
        return self.size // self.images

    def starts(self, n_prompts: int, n_images: int) -> Iterator[tuple[int, int]]:
        """Yield the first prompt and the first image of each batch."""
        for prompt in range(0, n_prompts, self.prompts):
            for image in range(0, n_images, self.images):
                yield prompt, image

    def rows(self, start: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the (prompt, image) of every row of a batch; some may lie past the last prompt or image."""
        prompt, image = start
        return [(prompt + p, image + i) for p in range(self.prompts) for i in range(self.images)]


def blocks_for(size: int | None, made_with: Mapping[str, int], n_prompts: int, n_images: int, group: int = 1) -> Blocks:
    """Return the composition of batches of `size`: the one a folder was made with, else the least wasteful.

    `made_with` has ``size``, and ``images`` when there is a folder; `group` images of a prompt must stay together.
    """
    size = made_with["size"] if size is None else integer("batch_size", size, 1, 65_536)
    if size % group:
        raise ConfigError(
            f"batch_size: got {size}, expected a multiple of {group}. That is the size of a NegToMe group."
        )
    if size == made_with["size"] and "images" in made_with:
        return Blocks(size, made_with["images"])
    options = [Blocks(size, images) for images in range(group, size + 1, group) if size % images == 0]
    # Of equals the one with the most images per prompt: fewer prompts to encode.
    return min(options, key=lambda blocks: (len(list(blocks.starts(n_prompts, n_images))), -blocks.images))


def wanted_rows(
    blocks: Blocks,
    batches: Sequence[tuple[int, int]],
    n_prompts: int,
    n_images: int,
    n_steps: int,
    only: Collection[tuple[int, int]] | Mapping[tuple[int, int], Collection[int]] | None,
) -> Wanted:
    """Return the (prompt, image) that `batches` make, with the steps to keep."""
    rows = [row for start in batches for row in blocks.rows(start) if row[0] < n_prompts and row[1] < n_images]
    every = list(range(n_steps))  # one list for all rows: ten million images are no rarity
    if only is None:
        return dict.fromkeys(rows, every)
    for prompt, image in only:
        integer("only: prompt", prompt, 0, n_prompts - 1)
        integer("only: image", image, 0, n_images - 1)
    if isinstance(only, Mapping):
        return {row: list(only[row]) for row in rows if row in only}
    chosen = set(only)  # a list here would make the plan quadratic
    return {row: every for row in rows if row in chosen}


def missing_rows(folder: Path, wanted: Wanted, n_steps: int, image_format: str) -> Wanted:
    """Return what of `wanted` is not there yet; remove what a killed process left of it.

    A TrajectoryError when a file among the images does not belong there: nothing is written beside it.
    """
    missing: Wanted = {}
    prompts: dict[int, list[int]] = {}
    for prompt, image in wanted:
        prompts.setdefault(prompt, []).append(image)
    for prompt, images in prompts.items():
        state = scan_prompt(folder / prompt_name(prompt), n_steps, image_format)
        if state.foreign:
            raise TrajectoryError(
                f"{state.foreign[0]} does not belong in a trajectory folder: got {len(state.foreign)} such files in "
                f"{prompt_name(prompt)}, expected images alone. Move it away; `ttsnap verify` lists all of them."
            )
        remove_leftovers(path for path, image in state.parts.items() if image in images)
        for image in images:
            if image not in state.whole:
                missing[prompt, image] = state.incomplete.get(image, wanted[prompt, image])
    return missing


def require_disk(folder: Path, wanted: Mapping[tuple[int, int], Collection[int]], image_format: str, raw: int) -> None:
    """Refuse to start when the files of `wanted` cannot fit on the disk.

    A file is taken to need what the folder's files need on average, else :data:`RAW_SHARE` of its `raw` bytes, in whole
    blocks of the disk.
    """
    files = sum(len(steps) for steps in wanted.values())
    if not files:
        return
    sizes = [path.stat().st_size for path in itertools.islice(folder.glob(f"p*/id*/s*.{image_format}"), 100)]
    one = sum(sizes) / len(sizes) if sizes else RAW_SHARE[image_format] * raw
    disk = os.statvfs(folder)
    block = disk.f_frsize or 4096
    require_space(folder, files * math.ceil(one / block) * block, f"{files} images of about {one / 1e3:.1f} kB")
    if disk.f_files and files + len(wanted) > disk.f_favail:  # many small files can use up the file table first
        raise DiskError(
            f"not enough room in {folder} for {files + len(wanted)} files and folders: the disk can name "
            f"{disk.f_favail} more. Choose another disk, or ask for less."
        )


# Making a batch and handing it over


@dataclass
class BatchMaker:
    """Runs batches of fixed shape through a denoiser, and hands the pictures to the writer and the callback."""

    denoiser: Denoiser
    prompts: Sequence[str]
    blocks: Blocks
    seed: int
    decoder: Any
    writer: ImageWriter | None
    on_batch: OnBatch | None
    chosen: set[int]
    """Steps for the callback."""
    clock: Clock
    given: Conditioning | None = None
    """The prompts as embeddings, when they need not be encoded."""
    _encoded: tuple[int, Conditioning] | None = None
    _finite: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    """Steps for the callback, and which rows of the batch are finite there, on the device."""

    def make(self, start: tuple[int, int], wanted: Wanted) -> None:
        """Make the batch that begins at `start`, and of it what is `wanted`."""
        denoiser, clock, rows = self.denoiser, self.clock, self.blocks.rows(start)
        steps = set(self.chosen) if self.on_batch is not None else set()
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            if row in wanted:
                places.setdefault(row[0], []).append(place)
                if self.writer is not None:
                    self.writer.start(*row, wanted[row])
                    steps.update(wanted[row])
        self._finite.clear()
        # On the device before it is at work: a copy would wait for it.
        at = {prompt: torch.tensor(found, device=denoiser.device) for prompt, found in places.items()}
        with clock("encode"):
            conditioning = self._conditioning(start[0])
            candidates = denoiser.noise([image_generator(self.seed, *row) for row in rows])

        def decode(step: int, x0: torch.Tensor) -> None:
            with clock("decode"):
                images = denoiser.decode(x0, self.decoder)
            self._hand_over(rows, places, at, step, images)

        last = denoiser.settings.n_steps - 1
        early = sorted(steps - {last})
        # With offload, a decoder called between two steps would push the denoising model out and in again each time.
        kept: list[tuple[int, torch.Tensor]] = []
        late = bool(getattr(denoiser.pipeline, "_all_hooks", None))
        on_x0 = (lambda step, x0: kept.append((step, x0))) if late else decode
        with clock("denoise"):
            done = denoiser.run(candidates, conditioning, last, early, on_x0 if early else None)
        for step, x0 in kept:
            decode(step, x0)
        if last in steps:
            with clock("decode"):
                images = denoiser.final(done)
            self._hand_over(rows, places, at, last, images)

    def _conditioning(self, first_prompt: int) -> Conditioning:
        """Return one row per image; the prompts of a batch are encoded together, always as many."""
        if self._encoded is None or self._encoded[0] != first_prompt:
            n, count = self.blocks.prompts, len(self.prompts)
            numbers = [min(first_prompt + k, count - 1) for k in range(n)]
            if self.given is None:
                encoded = self.denoiser.encode([self.prompts[number] for number in numbers])
            else:
                encoded = self.denoiser.placed(self.given.take(numbers))
            self._encoded = first_prompt, encoded.repeat(self.blocks.images)
        return self._encoded[1]

    def _hand_over(
        self,
        rows: list[tuple[int, int]],
        places: dict[int, list[int]],
        at: dict[int, torch.Tensor],
        step: int,
        images: torch.Tensor,
    ) -> None:
        with self.clock("hand_over"):
            if self.writer is not None:
                pixels = host_pixels(images, [f"prompt {prompt}, image {image}, step {step}" for prompt, image in rows])
                for place in itertools.chain(*places.values()):
                    self.writer.put(*rows[place], step, partial(pixels, place))
            if self.on_batch is not None and step in self.chosen:
                self._finite.append((step, images.isfinite().flatten(1).all(1)))
                if step == max(self.chosen):
                    self._require_finite(places)
                for prompt, found in places.items():
                    self.on_batch(prompt, [rows[place][1] for place in found], step, images.index_select(0, at[prompt]))

    def _require_finite(self, places: dict[int, list[int]]) -> None:
        """Look at all steps of a batch at once, since every look waits for the device."""
        finite = torch.stack([rows for _, rows in self._finite]).cpu().numpy()
        for (step, _), rows in zip(self._finite, finite, strict=True):
            for prompt, found in places.items():
                if not rows[found].all():
                    raise not_finite(f"prompt {prompt}, step {step}")


def host_pixels(images: torch.Tensor, names: Sequence[str]) -> Callable[[int], np.ndarray]:
    """Start to copy images in [0, 1] to the host as bytes; return a function from row to uint8 (height, width, 3).

    The function waits for the copy, so that the thread that calls it does, and not the one that drives the model. It
    raises for a row, told by its name, that holds NaN.
    """
    device = as_bytes(images).contiguous(), images.isfinite().flatten(1).all(1)
    cuda = images.device.type == "cuda"
    pixels, finite = (
        torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(one, non_blocking=True) if cuda else one.cpu()
        for one in device
    )
    copied = torch.cuda.Event() if cuda else None
    if copied is not None:
        copied.record()

    def row_of(row: int) -> np.ndarray:
        if copied is not None:
            copied.synchronize()
        if not finite[row]:
            raise not_finite(names[row])
        return pixels[row].numpy()

    return row_of


def not_finite(name: str) -> PipelineError:
    """Return the error that says what pictures of NaN mean."""
    return PipelineError(f"decoded picture of {name}: got NaN, expected finite values. {FINITE_VAE}")


def model_threads(denoiser: Denoiser, given: int | None, made_with: int | None) -> int | None:
    """Return the threads of the model: None on an accelerator, where they decide nothing."""
    given = None if given is None else integer("cpu_threads", given, 1, 1024)
    if denoiser.device.type != "cpu":
        return None
    if given or made_with:
        return given or made_with
    # A small model gains little from a second thread and loses much where the cores are busy: threads wait for each
    # other at every operation. Several processes (shards) use the cores better.
    if sum(weight.numel() for weight in denoiser._adapter.component(denoiser.pipeline).parameters()) < _SMALL_MODEL:
        return 1
    return cores()


@contextlib.contextmanager
def threads_of_torch(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads on the CPU during the block; None leaves it alone."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
