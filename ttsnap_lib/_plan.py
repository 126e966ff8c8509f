"""Which images go into which batch and shard, so that nothing done twice or in parts changes a byte; what they need."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ._image_writer import remove_leftovers
from ._images import RAW_SHARE
from ._layout import HIDDEN, prompt_name, scan_prompt
from .checks import integer
from .errors import ConfigError, DiskError, TrajectoryError
from .paths import lock, require_space

__all__ = [
    "Blocks",
    "Wanted",
    "blocks_for",
    "checked_folder",
    "environment_shard",
    "missing_rows",
    "others_at_work",
    "parse_shard",
    "require_disk",
    "shard_lock",
    "wanted_rows",
]

Wanted = dict[tuple[int, int], list[int]]
"""(prompt, image) to the steps to make."""


@dataclass(frozen=True)
class Blocks:
    """A fixed composition of batches: which rows a batch has depends on nothing but these two numbers.

    A batch takes `images` consecutive images of each of ``size // images`` consecutive prompts. Results of a model
    may differ in the last bit with the shape of a batch and with the place in it: here an image keeps both, whatever
    is missing. Rows past the last prompt or image are filled up and thrown away.

    Parameters
    ----------
    size : int
        Rows of every batch.
    images : int
        Images per prompt in a batch; divides `size`.
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

    Parameters
    ----------
    size : int, optional
        Rows per batch; as the folder was made when not given.
    made_with : mapping
        ``size``, and ``images`` when there is a folder.
    group : int
        So many images of a prompt must stay together.

    Raises
    ------
    ConfigError
        A size that the group does not divide.
    """
    size = made_with["size"] if size is None else integer("batch_size", size, 1, 65_536)
    if size % group:
        raise ConfigError(
            "batch_size",
            value=size,
            bound=f"a multiple of {group}, the size of a NegToMe group",
            remedy="Change the batch size or the group.",
        )
    if size == made_with["size"] and "images" in made_with:
        return Blocks(size, made_with["images"])
    options = [Blocks(size, images) for images in range(group, size + 1, group) if size % images == 0]
    # Of equals the one with the most images per prompt: fewer prompts to encode.
    return min(options, key=lambda blocks: (len(list(blocks.starts(n_prompts, n_images))), -blocks.images))


def checked_folder(folder: str | Path) -> Path:
    """Return `folder` as a path that is a folder or can become one."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise DiskError(
            f"{there} is not a folder",
            value=str(folder),
            bound="a folder, or a place for one",
            remedy="Choose another output folder.",
        )
    return folder


def require_disk(folder: Path, wanted: Mapping[tuple[int, int], Collection[int]], image_format: str, raw: int) -> None:
    """Refuse to start when the files of `wanted` cannot fit on the disk.

    A file is taken to need what the folder's files need on average, else what a photograph needs
    (:data:`ttsnap_lib._images.RAW_SHARE` of its `raw` bytes), in whole blocks of the disk.
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
            f"not enough room for more files in {folder}",
            value=f"{files + len(wanted)} files and folders",
            bound=f"at most the {disk.f_favail} that the disk can still name",
            remedy="Choose another disk, or ask for less.",
        )


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

    Raises
    ------
    TrajectoryError
        When a file among the images does not belong there: nothing is written beside it.
    """
    missing: Wanted = {}
    prompts: dict[int, list[int]] = {}
    for prompt, image in wanted:
        prompts.setdefault(prompt, []).append(image)
    for prompt, images in prompts.items():
        state = scan_prompt(folder / prompt_name(prompt), n_steps, image_format)
        if state.foreign:
            raise TrajectoryError(
                f"{state.foreign[0]} does not belong in a trajectory folder",
                value=f"{len(state.foreign)} foreign files in {prompt_name(prompt)}",
                bound="nothing but images",
                remedy="Move it away; `ttsnap verify` lists all of them.",
            )
        remove_leftovers(path for path, image in state.parts.items() if image in images)
        for image in images:
            if image not in state.whole:
                missing[prompt, image] = state.incomplete.get(image, wanted[prompt, image])
    return missing


def parse_shard(shard: object) -> tuple[int, int]:
    """Return (index, count) of ``(0, 2)`` or ``"0/2"``; None takes the place in an ``accelerate launch``.

    Raises
    ------
    ConfigError
        Anything else, or an index that is not below the count.
    """
    if shard is None:
        return environment_shard()
    if isinstance(shard, str) and re.fullmatch(r"\d+/\d+", shard):
        shard = tuple(int(part) for part in shard.split("/"))
    if not isinstance(shard, tuple | list) or len(shard) != 2:
        raise ConfigError("shard", value=shard, bound="index/count, such as 0/4", remedy="The first shard is 0.")
    count = integer("shard count", shard[1], 1)
    return integer("shard index", shard[0], 0, count - 1), count


def environment_shard() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) when it was started alone.

    ``accelerate launch`` and ``torchrun`` tell them by RANK and WORLD_SIZE. No process group is formed: the
    processes have nothing to say to each other, and one may die without the others.
    """
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return (int(rank), int(size)) if rank.isdigit() and size.isdigit() and int(rank) < int(size) else (0, 1)


@contextlib.contextmanager
def shard_lock(folder: Path, shard: tuple[int, int]) -> Iterator[contextlib.ExitStack]:
    """Hold a shard of `folder`, and during the block alone also the right to start on it.

    The returned stack keeps the shard when the block ends; closing it lets go.

    Raises
    ------
    DiskError
        When another process holds this shard, or is filling the folder in other shards.
    """
    locks = folder / HIDDEN / "locks"
    index, count = shard
    with lock(locks / "start.lock", wait=True):  # one at a time: two starting at once would trip over each other
        held = contextlib.ExitStack()
        try:
            held.enter_context(_named(lock(_shard_file(folder, index, count)), f"shard {index}/{count}", folder))
            for other in sorted(locks.glob("shard-*-of-*.lock")):
                if not other.name.endswith(f"-of-{count}.lock"):
                    with _named(lock(other), other.stem.replace("-", " "), folder):
                        pass
            yield held
        except BaseException:
            held.close()
            raise


def others_at_work(folder: Path, shard: tuple[int, int]) -> bool:
    """Tell whether another process holds another shard of `folder`, of the same number of shards."""
    index, count = shard
    for other in range(count):
        if other == index:
            continue
        try:
            with lock(_shard_file(folder, other, count)):
                pass
        except DiskError:
            return True
    return False


def _shard_file(folder: Path, index: int, count: int) -> Path:
    return folder / HIDDEN / "locks" / f"shard-{index}-of-{count}.lock"


@contextlib.contextmanager
def _named(inner: contextlib.AbstractContextManager, what: str, folder: Path) -> Iterator[None]:
    try:
        inner.__enter__()
    except DiskError as error:
        if not isinstance(error.__cause__, BlockingIOError):  # not locked, but not writable
            raise
        raise DiskError(
            f"another process is filling {folder}",
            value=what,
            bound="one process per shard, all with the same number of shards",
            remedy="Wait for it to end, or give each process a shard of its own (--shard 0/2, --shard 1/2).",
        ) from error
    try:
        yield
    finally:
        inner.__exit__(None, None, None)
