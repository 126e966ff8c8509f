"""Prompt sets: JSON, JSON lines, text, CSV, TSV, Parquet, or the packaged pocket prompts. The position is the id."""

from __future__ import annotations

import csv
import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ttsnap_lib.checks import choice, integer, is_unicode, text
from ttsnap_lib.errors import PromptError, shown
from ttsnap_lib.files import as_path, failures_as, parse_json, read_bytes

FORMATS = (".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet")
"""File endings that :func:`read_prompts` knows."""

_COLUMNS = (("prompt",), ("prompts",), ("caption", "text"))  # without regard to case; the first that is there
_SHAPES = (
    'a list of texts or of mappings with a key "prompt" (.json, .jsonl), .txt with one prompt a line, .csv, .tsv or '
    '.parquet with a column "prompt", or "pocket"'
)
Pairs = list[tuple[Any, dict[Any, Any]]]  # prompts with their metadata
_HEADER_WORDS = 3  # a CSV header of more words is a prompt: the file has no header line


class PromptList(list[str]):
    """Prompts, with what else their file tells about each.

    Attributes
    ----------
    metadata : list of dict
        The other keys or columns of each prompt, such as GenEval's ``include``; empty where there is nothing else.
        Cells of CSV and TSV are texts, missing cells of a table None. Plain values, as JSON has them: a trajectory
        folder keeps them in its manifest.
    """

    def __init__(self, prompts: Iterable[str], metadata: Sequence[dict[str, Any]] | None = None) -> None:
        super().__init__(prompts)
        self.metadata = [{} for _ in self] if metadata is None else list(metadata)


def read_prompts(source: Any, *, limit: int | None = None, prompt_column: str | None = None) -> PromptList:
    """Read a prompt set; the position in the returned list is the prompt's index everywhere else.

    Parameters
    ----------
    source : str, Path, sequence or pandas.DataFrame
        A file: ``.json`` (a list) or ``.jsonl`` (one a line) of texts or of mappings, ``.txt`` with one prompt a line,
        ``.csv``, ``.tsv`` or ``.parquet``, tabs being told by the first line, whatever the ending;
        ``"pocket"``, ``"pocket:<split>"`` or ``"pocket:<split>:<count>"`` for the packaged prompts; or the prompts
        themselves, also as mappings or as a pandas frame.
    limit : int, optional
        Take the first `limit` prompts only.
    prompt_column : str, optional
        The column or key that holds the prompts. By default the one named ``prompt``, else ``prompts``, else
        ``caption`` or ``text``, in capitals or not; else the only column of texts.

    Returns
    -------
    PromptList
        A list of at least one str, none of them blank; its ``metadata`` holds the other columns of each.

    Raises
    ------
    PromptError
        A file that cannot be read; a prompt that is blank or no text, with its index.
    """
    if limit is not None:
        limit = integer("limit", limit, 1, error=PromptError)
    column = None if prompt_column is None else text("prompt_column", prompt_column, error=PromptError)
    name = "prompts"
    if isinstance(source, str | Path):
        name = str(as_path("prompts", source, error=PromptError))
        pairs = _pocket(name) if name.partition(":")[0] == "pocket" else _file(Path(name), column)
    elif isinstance(source, PromptList):
        pairs = list(zip(source, source.metadata, strict=True))
    elif hasattr(source, "columns"):  # a pandas frame; as an iterable it is the names of its columns
        pairs = _table(name, list(source.columns), source.to_numpy(object), column)
    elif isinstance(source, Iterable) and not isinstance(source, bytes | Mapping):
        pairs = _entries(name, list(source), column)
    else:
        raise PromptError(f"prompts: got {shown(source)}, expected {_SHAPES}. Give a file or a list of texts.")
    pairs = pairs[:limit]
    return PromptList(check_prompts([prompt for prompt, _ in pairs], name), [_plain(more) for _, more in pairs])


def check_prompts(prompts: Sequence[Any], name: str = "prompts") -> list[str]:
    """Return `prompts` as a list of str, or raise a PromptError with the index of the first bad one."""
    prompts = list(prompts)
    if not prompts:
        raise PromptError(f"{name} holds no prompt: got nothing, expected at least one. Write one prompt a line.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip() or not is_unicode(prompt):
            raise PromptError(
                f"{name}: prompt {index}: got {shown(prompt)}, expected text that is not blank, in Unicode. Fill it in. "
                "It is not skipped, because the position is the prompt's id."
            )
    return [str(prompt) for prompt in prompts]  # numpy has texts of its own, which YAML cannot write


def _pocket(name: str) -> Pairs:
    from ttsnap_lib.pocket.world import pocket_prompts

    _, split, count = (*name.split(":", 2), "", "")[:3]
    if count and not count.isdigit():
        raise PromptError(f'prompts: got {name!r}, expected "pocket:<split>:<count>", such as "pocket:test:16".')
    return [(prompt, {}) for prompt in pocket_prompts(split or "evaluation", int(count) if count else None)]


def _file(path: Path, column: str | None) -> Pairs:
    remedy = f"Expected is {_SHAPES}."
    ending = choice("ending of the prompt file", path.suffix.lower(), FORMATS, error=PromptError)
    content = read_bytes(path, "prompt file", error=PromptError, remedy=remedy)
    if ending == ".json":
        found = parse_json(content, f"prompt file {path}", error=PromptError, remedy=remedy, kind=list)
        return _entries(path, found, column)
    remedy = "Save it as UTF-8; in CSV, put prompts with commas in double quotes."
    with failures_as(PromptError, f"prompt file {path} cannot be read as {ending[1:]}. {remedy}"):
        if ending == ".parquet":
            import pandas as pd

            frame = pd.read_parquet(io.BytesIO(content))
            return _table(path, list(frame.columns), frame.to_numpy(object), column)
        words = content.decode("utf-8-sig")
        # Split on line ends alone: str.splitlines would also split inside a prompt, at U+2028 or a form feed.
        lines = re.split("\r\n|\r|\n", words)
        while lines and not lines[-1].strip():
            lines.pop()
        if ending == ".jsonl":
            found = [
                parse_json(line, f"{path}: line {k}", error=PromptError, remedy=remedy, kind=None)
                for k, line in enumerate(lines, start=1)
                if line.strip()
            ]
            return _entries(path, found, column)
        header = lines[0] if lines else ""
        # A prompt may hold a tab; a table has as many of them in every line.
        if ending == ".txt" and ("\t" not in header or len({line.count("\t") for line in lines}) > 1):
            return [(line, {}) for line in lines]
        separator = "\t" if "\t" in header else ";" if ";" in header and "," not in header else ","
        columns, *rows = _rows(words, separator) or [[]]
        pairs = _table(path, columns, rows, column)
    if column is None and not _named(columns, None):
        warnings.warn(
            f"{path}: the first line, {shown(columns)}, is taken for names of columns and not for a prompt. If it is one, "
            "put a line with the word prompt above it, or save the file as .txt with one prompt a line.",
            stacklevel=2,
        )
    return pairs


def _rows(words: str, separator: str) -> list[list[str]]:
    """Return the cells of a CSV file; between tabs, a quotation mark may also be just that."""
    try:
        rows = list(csv.reader(io.StringIO(words, newline=""), delimiter=separator, strict=True))
    except csv.Error:
        if separator != "\t":
            raise
        rows = list(csv.reader(io.StringIO(words, newline=""), delimiter=separator, quoting=csv.QUOTE_NONE))
    rows = [row for row in rows if row]
    for number, row in enumerate(rows):
        if len(row) > len(rows[0]):
            raise ValueError(f"row {number}: {len(row)} cells below {len(rows[0])} names")
    return rows


def _table(name: object, columns: list[Any], rows: Iterable[Sequence[Any]], column: str | None) -> Pairs:
    rows = list(rows)
    found = _named(columns, column)
    if not found and column is None:  # the only column of texts
        cells = [[row[k] for row in rows if k < len(row)] for k in range(len(columns))]
        found = [key for key, column_cells in zip(columns, cells, strict=True) if any(map(_is_text, column_cells))]
    if len(found) != 1 or (column is None and len(str(found[0]).split()) > _HEADER_WORDS):
        raise PromptError(
            f"{name}: got columns {shown(columns)}, expected one named {column or 'prompt'}, or a single one of texts "
            "below its name. Name the column of prompts in the first line, or say which one it is with prompt_column "
            "(--prompt-column)."
        )
    return [_split(dict(zip(columns, row, strict=False)), found[0]) for row in rows]


def _entries(name: object, found: list[Any], column: str | None) -> Pairs:
    """Return the pairs of a list of texts, of mappings, or of both."""
    pairs: Pairs = []
    for index, entry in enumerate(found):
        keys = _named(entry, column) if isinstance(entry, Mapping) else []
        if isinstance(entry, Mapping) and len(keys) != 1:
            raise PromptError(
                f"{name}: prompt {index}: got keys {shown(list(entry))}, expected one named {column or 'prompt'}. Name "
                "the key of prompts so, or say which one it is with prompt_column (--prompt-column)."
            )
        pairs.append(_split(dict(entry), keys[0]) if keys else (entry, {}))
    return pairs


def _named(columns: Iterable[Any], column: str | None) -> list[Any]:
    """Return the columns that hold the prompts by their name: `column`, or else the usual names."""
    columns = list(columns)
    if column is not None:
        return [key for key in columns if key == column]
    return next(
        (found for names in _COLUMNS if (found := [key for key in columns if str(key).strip().lower() in names])), []
    )


def _split(row: dict[Any, Any], key: Any) -> tuple[Any, dict[Any, Any]]:
    """Return the prompt of a row, and the rest of the row."""
    return row.pop(key, None), row


def _plain(value: Any) -> Any:
    """Return metadata as JSON has it: lists instead of arrays, None for what is missing, other things as their text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _is_text(cell: Any) -> bool:
    """Tell whether a cell is text, and no number."""
    if not isinstance(cell, str) or not cell.strip():
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False
