from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ttsnap_lib.errors import PromptError
from ttsnap_lib.trajectories import prompts
from ttsnap_lib.trajectories.prompts import read_prompts

TEXTS = ["a red fox", 'two "quoted" words, and a comma', "ein Bär am Fluß", "line\u2028separator stays inside"]


@pytest.fixture(params=["json", "txt", "csv", "csv_single", "parquet", "parquet_single"])
def prompt_file(request, tmp_path):
    kind = request.param.split("_")[0]
    column = "caption" if request.param.endswith("single") else "prompt"
    path = tmp_path / f"set.{kind}"
    if kind == "json":
        path.write_text(json.dumps(TEXTS), encoding="utf-8")
    elif kind == "txt":
        path.write_bytes("\r\n".join([*TEXTS, "", ""]).encode("utf-8-sig"))
    elif kind == "csv":
        rows = "".join('7,"{}"\n'.format(text.replace('"', '""')) for text in TEXTS)
        path.write_text(f"id,{column}\n{rows}\n", encoding="utf-8")
    else:
        pq.write_table(pa.table({"id": [1, 2, 3, 4], column: TEXTS}), path)
    return path


def test_every_format_gives_the_same_prompts_in_order(prompt_file):
    assert read_prompts(prompt_file) == TEXTS
    assert read_prompts(str(prompt_file), limit=2) == TEXTS[:2]


def test_a_list_is_taken_as_it_is():
    assert read_prompts(TEXTS) == TEXTS
    assert read_prompts(tuple(TEXTS), limit=1) == TEXTS[:1]


def test_prompt_column_wins_over_other_text_columns(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("author,prompt\nme,a cat\nyou,a dog\n")
    assert read_prompts(path) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.json", b"", "empty"),
        ("empty_list.json", b"[]", "no prompt"),
        ("blank_lines.txt", b"\n\n  \n", "no prompt"),
        ("number.json", b'["a cat", 7]', "prompt 1 is not text"),
        ("null.json", b'["a cat", null]', "prompt 1 is not text"),
        ("blank.json", b'["a cat", " "]', "prompt 1 is blank"),
        ("gap.txt", b"a cat\n\na dog\n", "prompt 1 is blank"),
        ("mapping.json", b'{"a": "cat"}', "no JSON list"),
        ("broken.json", b'["a cat"', "not JSON"),
        ("deep.json", b"[" * 100_000, "not JSON"),
        ("surrogate.json", b'["\\ud800"]', "not text"),
        ("latin.txt", "ein Bär".encode("latin-1"), "not UTF-8"),
        ("binary.txt", b"a\0b", "not text"),
        ("utf16.txt", "a cat".encode("utf-16"), "not UTF-8"),
        ("prompts.yaml", b"- a cat", "unknown prompt format"),
        ("ragged.csv", b"prompt,n\na cat,1\na dog, brown,2\n", "another number of columns"),
        ("headless.csv", b"a cat sits on a mat\na dog runs in a park\n", "no header line"),
        ("header_only.csv", b"prompt\n", "no prompt"),
        ("two_texts.csv", b"a,b\nx,y\n", "several text columns"),
        ("twice.csv", b"prompt,prompt\nx,y\n", "names a column twice"),
        ("numbers.csv", b"a,b\n1,2\n", "no text columns"),
        ("quote.csv", b'prompt\n"a cat\n', "not CSV"),
        ("broken.parquet", b"PAR1 no", "not Parquet"),
        ("long.txt", b"x" * 10_001, "too long"),
    ],
)
def test_bad_files_are_refused_with_the_reason(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptError, match=says):
        read_prompts(path)


def test_parquet_null_names_its_index(tmp_path):
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table({"prompt": ["a cat", None]}), path)
    with pytest.raises(PromptError, match="prompt 1 is not text"):
        read_prompts(path)


def test_missing_folder_and_oversized(tmp_path, monkeypatch):
    with pytest.raises(PromptError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(PromptError, match="not a file"):
        read_prompts(tmp_path / "folder.txt")
    (tmp_path / "big.txt").write_text("a cat\n")
    monkeypatch.setattr(prompts, "MAX_FILE_BYTES", 4)
    with pytest.raises(PromptError, match="too large"):
        read_prompts(tmp_path / "big.txt")


@pytest.mark.parametrize("source", [None, 3, b"a cat", {"a": 1}, [], ["a cat", 1]])
def test_bad_arguments(source):
    with pytest.raises(PromptError):
        read_prompts(source)


def test_limit_must_be_positive():
    with pytest.raises(PromptError, match="limit"):
        read_prompts(TEXTS, limit=0)


def test_published_validation_prompts(reference):
    found = read_prompts(reference / "prompts" / "validation.json")
    assert len(found) >= 200
