"""Prompt sets: a JSON list, a text file, CSV, Parquet, or the packaged pocket prompts. The line index is the id."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap_lib.checks import choice, integer, text
from ttsnap_lib.errors import PromptError, shown
from ttsnap_lib.files import failures_as, read_bytes, read_json

if TYPE_CHECKING:
    import pandas as pd

FORMATS = (".json", ".txt", ".csv", ".parquet")
"""File endings that :func:`read_prompts` knows."""

_SHAPES = 'a JSON list of texts, .txt with one prompt a line, .csv or .parquet with a column "prompt", or "pocket"'
_HEADER_WORDS = 3  # a CSV header of more words is a prompt: the file has no header line


def read_prompts(source: str | Path | Sequence[str], *, limit: int | None = None) -> list[str]:
    """Read a prompt set; the position in the returned list is the prompt's index everywhere else.

    Parameters
    ----------
    source : str, Path or sequence of str
        A file (``.json`` list, ``.txt`` one a line, ``.csv`` or ``.parquet`` with a column named ``prompt`` or a
        single text column); ``"pocket"``, ``"pocket:<split>"`` or ``"pocket:<split>:<count>"`` for the packaged
        prompts; or the prompts themselves.
    limit : int, optional
        Take the first `limit` prompts only.

    Returns
    -------
    list of str
        At least one prompt, none of them blank.

    Raises
    ------
    PromptError
        A file that cannot be read; a prompt that is blank or no text, with its index.
    """
    if limit is not None:
        limit = integer("limit", limit, 1, error=PromptError)
    if isinstance(source, str | Path):
        name = text("prompts", str(source), error=PromptError)
        found = _pocket(name) if name.partition(":")[0] == "pocket" else _file(Path(name))
        return check_prompts(found[:limit], name)
    if not isinstance(source, Iterable) or isinstance(source, bytes | dict):
        raise PromptError(f"prompts: got {shown(source)}, expected {_SHAPES}. Give a file or a list of texts.")
    return check_prompts(list(source)[:limit])


def check_prompts(prompts: Sequence[Any], name: str = "prompts") -> list[str]:
    """Return `prompts` as a list of str, or raise a PromptError with the index of the first bad one."""
    prompts = list(prompts)
    if not prompts:
        raise PromptError(f"{name} holds no prompt: got nothing, expected at least one. Write one prompt a line.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise PromptError(
                f"{name}: prompt {index}: got {shown(prompt)}, expected text that is not blank. Fill it in. It is not "
                "skipped, because the position is the prompt's id."
            )
    return prompts


def _pocket(name: str) -> list[str]:
    from ttsnap_lib.pocket.world import pocket_prompts

    _, split, count = (*name.split(":", 2), "", "")[:3]
    if count and not count.isdigit():
        raise PromptError(f'prompts: got {name!r}, expected "pocket:<split>:<count>", such as "pocket:test:16".')
    return list(pocket_prompts(split or "evaluation", int(count) if count else None))


def _file(path: Path) -> list[Any]:
    remedy = f"Expected is {_SHAPES}."
    ending = choice("ending of the prompt file", path.suffix.lower(), FORMATS, error=PromptError)
    if ending == ".json":
        return read_json(path, "prompt file", error=PromptError, remedy=remedy, kind=list)
    content = read_bytes(path, "prompt file", error=PromptError, remedy=remedy)
    remedy = "Save it as UTF-8; in CSV, put prompts with commas in double quotes."
    with failures_as(PromptError, f"prompt file {path} cannot be read as {ending[1:]}. {remedy}"):
        if ending == ".txt":
            # Split on line ends alone: str.splitlines would also split inside a prompt, at U+2028 or a form feed.
            lines = re.split("\r\n|\r|\n", content.decode("utf-8-sig"))
            while lines and not lines[-1].strip():
                lines.pop()
            return lines
        import pandas as pd

        if ending == ".parquet":
            return _column(path, pd.read_parquet(io.BytesIO(content)))
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # prompts with commas that are not quoted
            # A prompt may be "None" or "12"; an empty cell is none.
            kinds = {"dtype": {"prompt": str}, "keep_default_na": False, "na_values": [""], "index_col": False}
            return _column(path, pd.read_csv(io.BytesIO(content), **kinds))


def _column(path: Path, frame: pd.DataFrame) -> list[Any]:
    """Return the column "prompt", or the only one of texts."""
    names = ["prompt"] if "prompt" in frame else [n for n in frame if any(isinstance(cell, str) for cell in frame[n])]
    if len(names) != 1 or len(str(names[0]).split()) > _HEADER_WORDS:
        raise PromptError(
            f"{path}: got columns {shown(list(frame.columns))}, expected one named prompt, or a single one of texts "
            "below its name. Name the column of prompts in the first line."
        )
    return frame[names[0]].tolist()
