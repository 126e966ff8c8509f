"""Prompt sets: a JSON list, a text file, CSV, Parquet, or the packaged pocket prompts. The line index is the id."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ttsnap_lib.checks import integer, text
from ttsnap_lib.errors import PromptError
from ttsnap_lib.files import as_path

FORMATS = (".json", ".txt", ".csv", ".parquet")
"""File endings that :func:`read_prompts` knows."""


MAX_FILE_BYTES = 64 * 2**20
"""A prompt file above this is a mistake (a data set, a model), not a prompt set."""


MAX_CHARACTERS = 10_000
"""Longest prompt taken; text encoders read 77 to 512 tokens."""


_HEADER_WORDS = 3  # a CSV header of more words is a prompt: the file has no header line


_SHAPES = 'a JSON list of texts, .txt with one prompt a line, .csv or .parquet with a column "prompt", or "pocket"'


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
        A missing, empty, too large, wrongly encoded or unknown file; a prompt that is blank or no text, with its
        index.
    """
    if limit is not None:
        limit = integer("limit", limit, 1, error=PromptError)
    if isinstance(source, str | Path):
        name = str(as_path("prompts", source, error=PromptError))
        if name == "pocket" or name.startswith("pocket:"):
            found = _pocket(name)
        else:
            found = _file(Path(text("prompts", name, error=PromptError)))
    else:
        name = "prompts"
        if not isinstance(source, Iterable) or isinstance(source, bytes | dict):
            raise PromptError(f"prompts: got {source!r}, expected {_SHAPES}. Give a file or a list of texts.")
        found = list(source)
    return check_prompts(found[:limit], name)


def check_prompts(prompts: Sequence[Any], name: str = "prompts") -> list[str]:
    """Return `prompts` as a list of str, or raise a PromptError with the index of the first bad one.

    Raises
    ------
    PromptError
        A prompt that is no text, is blank or too long; or none at all.
    """
    prompts = list(prompts)
    if not prompts:
        raise PromptError(f"{name} holds no prompt: got {prompts!r}, expected at least one. Write one prompt a line.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise PromptError(
                f"{name}: prompt {index} is not text: got {prompt!r}, expected a string. Quote it, or take it out of "
                "the list."
            )
        if not prompt.strip():
            raise PromptError(
                f"{name}: prompt {index} is blank: got {prompt!r}, expected some text. Fill it in. Blank prompts are "
                "not skipped, because the position is the prompt's id."
            )
        if len(prompt) > MAX_CHARACTERS:
            raise PromptError(
                f"{name}: prompt {index} is too long: got {len(prompt)} characters, expected at most {MAX_CHARACTERS}. "
                "Check that the file has one prompt a line."
            )
        # Half a surrogate pair cannot be written to the manifest; NUL means that the file is no text.
        if "\0" in prompt or any("\ud800" <= character <= "\udfff" for character in prompt):
            raise PromptError(
                f"{name}: prompt {index} holds characters that are not text: got {prompt!r}, expected printable text. "
                "Save the prompts as UTF-8 text."
            )
    return prompts


def _pocket(name: str) -> list[str]:
    from ttsnap_lib.pocket.world import pocket_prompts  # late: only the pocket prompts need it

    parts = name.split(":")
    if len(parts) > 3 or (len(parts) == 3 and not parts[2].isdigit()):
        raise PromptError(
            f'prompts: got {name!r}, expected "pocket:<split>:<count>". Write for example "pocket:test:16".'
        )
    split = parts[1] if len(parts) > 1 and parts[1] else "evaluation"
    return list(pocket_prompts(split, int(parts[2]) if len(parts) == 3 else None))


def _file(path: Path) -> list[Any]:
    if not path.exists():
        raise PromptError(f"prompt file does not exist: got {path}, expected {_SHAPES}. Check the spelling.")
    if not path.is_file():
        raise PromptError(f"prompt file is not a file: got {path}, expected {_SHAPES}. Name the file itself.")
    readers = {".json": _json, ".txt": _lines, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise PromptError(
            f"{path.name}: unknown prompt format: got {path.suffix!r}, expected one of {list(FORMATS)}. Convert the "
            "file, or rename it if its ending is wrong."
        )
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise PromptError(
                f"{path} is too large for a prompt set: got {size / 2**20:.0f} MiB, expected at most "
                f"{MAX_FILE_BYTES // 2**20} MiB. Check that it is the right file, or split it."
            )
        if size == 0:
            raise PromptError(f"{path} is empty: got '0 bytes', expected {_SHAPES}. Write the prompts into it.")
        return reader(path)
    except OSError as error:
        if isinstance(error, PromptError):
            raise
        raise PromptError(
            f"{path} cannot be read: got {error.strerror!r}, expected a readable file. Check its permissions."
        ) from error


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # a byte order mark is no part of the first prompt
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{path} is not UTF-8: got byte {error.object[error.start]:#04x} at position {error.start}, expected UTF-8 "
            "text. Save it again as UTF-8."
        ) from error


def _lines(path: Path) -> list[str]:
    # Split on line ends alone: str.splitlines would also split inside a prompt, at U+2028 or a form feed.
    lines = _text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _json(path: Path) -> list[Any]:
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"{path} is not JSON: got {str(error)[:120]!r}, expected a JSON list of texts. Mend the file."
        ) from error
    if not isinstance(content, list):
        raise PromptError(
            f'{path} holds no JSON list: got {content!r}, expected a JSON list of texts. Write ["...", "..."].'
        )
    return content


def _csv(path: Path) -> list[str]:
    try:
        rows = list(csv.reader(io.StringIO(_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise PromptError(f"{path} is not CSV: got {error}, expected comma-separated values. Mend the file.") from error
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()
    if not rows:
        return []
    header, body = [name.strip() for name in rows[0]], rows[1:]
    for index, row in enumerate(body):
        if len(row) != len(header):
            raise PromptError(
                f"{path}: row {index} has another number of columns than the header: got {row!r}, expected "
                f"{len(header)} columns. Put prompts with commas in double quotes."
            )
    if len(set(header)) != len(header):
        raise PromptError(f"{path} names a column twice: got {header!r}, expected distinct names. Rename one of them.")
    columns = {name: [row[position] for row in body] for position, name in enumerate(header)}
    textual = [name for name, values in columns.items() if not all(_is_number(value) for value in values)]
    column = _column(path, header, textual if body else header)
    if column.lower() != "prompt" and len(column.split()) > _HEADER_WORDS:
        raise PromptError(
            f"{path} has no header line: got {column!r}, expected a first line that names the columns. Put a line "
            '"prompt" on top, or save as .txt with one prompt a line.'
        )
    return columns[column]


def _parquet(path: Path) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            textual = [
                field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            ]
            column = _column(path, schema.names, textual)
            found: list[Any] = []
            read = 0
            # In parts: a few bytes of Parquet can stand for many gigabytes of repeated text.
            for batch in file.iter_batches(batch_size=1000, columns=[column]):
                texts = batch.column(0).to_pylist()
                found += texts
                read += sum(len(text) if isinstance(text, str) else 1 for text in texts) + len(texts)
                if read > MAX_FILE_BYTES:
                    raise PromptError(
                        f"{path} is too large for a prompt set: got more than {read / 2**20:.0f} MiB of text, "
                        f"expected at most {MAX_FILE_BYTES // 2**20} MiB. Check that it is the right file, or split "
                        "it."
                    )
            return found
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise PromptError(
            f"{path} is not Parquet: got {str(error)[:120]!r}, expected a Parquet table. Write the file again."
        ) from error


def _column(path: Path, names: Sequence[str], textual: Sequence[str]) -> str:
    if "prompt" in names:
        return "prompt"
    if len(textual) == 1:
        return textual[0]
    raise PromptError(
        f"{path} has {'no' if not textual else 'several'} text columns and none is named prompt: got {list(names)!r}, "
        'expected a column named "prompt", or a single text column. Rename the column of prompts to "prompt".'
    )


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return not value.strip()
    return True
