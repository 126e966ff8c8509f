"""Searches over a prompt file: one folder a prompt, resumable, sharded, one table at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import integer
from .errors import ConfigError, SearchError
from .paths import lock, write_json
from .search import search

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["collect", "search_many"]


def search_many(
    pipeline: Any,
    prompts: Sequence[str],
    reward: Any,
    folder: str | Path,
    *,
    identity: dict[str, Any],
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Search every prompt and return one row each; prompts that are done already are not searched again.

    Parameters
    ----------
    pipeline, reward, options
        As in :func:`ttsnap_lib.search`; load the models before, they are used for all prompts.
    prompts : list of str
    folder : path
        Gets ``p0000/image.png``, ``record.json`` and ``candidates.parquet`` per prompt.
    identity : dict
        What decides the results (model, reward, schedule, budget, seed, ...), as plain JSON content. A folder made
        with another one is refused.
    shard : (int, int)
        Which of how many processes this is; prompts are dealt out in turn.
    progress : callable, optional
        Called with (prompts done, prompts of this shard).

    Raises
    ------
    SearchError
        The folder holds results of other settings.
    """
    index, of = integer("shard", shard[0], 0, shard[1] - 1), integer("shards", shard[1], 1)
    folder = Path(folder)
    _check_identity(folder, identity)
    mine = range(index, len(prompts), of)
    with lock(folder / f".shard-{index}-of-{of}.lock"):
        for done, number in enumerate(mine):
            target = folder / f"p{number:04d}"
            digest = hashlib.sha256(prompts[number].encode()).hexdigest()
            if not _finished(target, digest):
                result = search(pipeline, prompts[number], reward, prompt_index=number, **options)
                result.save(target)
                write_json(target / "summary.json", {**result.summary(), "prompt_sha256": digest})
                if not result.complete:
                    raise KeyboardInterrupt
            if progress is not None:
                progress(done + 1, len(mine))
    return collect(folder)


def collect(folder: str | Path) -> pd.DataFrame:
    """Return the results found in `folder`, one row per prompt, and write them as ``results.csv`` and Parquet."""
    import io

    import pandas as pd

    from .paths import atomic_write

    rows = [json.loads(path.read_text("utf-8")) for path in sorted(Path(folder).glob("p*/summary.json"))]
    frame = pd.DataFrame(rows).drop(columns="prompt_sha256", errors="ignore")
    if len(frame):
        frame = frame.sort_values("prompt_index", ignore_index=True)
        buffer = io.BytesIO()
        frame.to_parquet(buffer)
        for name, content in (
            ("results.csv", frame.to_csv(index=False).encode()),
            ("results.parquet", buffer.getvalue()),
        ):
            with atomic_write(Path(folder) / name) as file:
                file.write(content)
    return frame


def _finished(target: Path, digest: str) -> bool:
    try:
        summary = json.loads((target / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(summary.get("complete")) and summary.get("prompt_sha256") == digest


def _check_identity(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / "search.json"
    plain = json.loads(json.dumps(identity))
    if not path.exists():
        write_json(path, plain)
        return
    try:
        before = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise SearchError(
            "search.json cannot be read", value=str(path), bound="JSON", remedy="Choose another output folder."
        ) from error
    if before != plain:
        keys = [key for key in {**before, **plain} if before.get(key) != plain.get(key)]
        raise SearchError(
            f"{folder} holds results of other settings ({', '.join(keys)})",
            value={key: plain.get(key) for key in keys},
            bound=str({key: before.get(key) for key in keys}),
            remedy="Choose another output folder, or the same settings.",
        )


def check_one_source(prompt: str | None, prompts: str | None) -> None:
    """Refuse a command that names both a prompt and a prompt file, or neither."""
    if (prompt is None) == (prompts is None):
        raise ConfigError(
            "prompt", value={"prompt": prompt, "prompts": prompts}, bound="one prompt, or --prompts FILE",
            remedy="Give exactly one of them.",
        )  # fmt: skip
