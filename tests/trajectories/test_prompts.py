from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from ttsnap_lib.errors import PromptError
from ttsnap_lib.trajectories.prompts import read_prompts

CASES = ROOT / "tests/cases/prompts"
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


PARTI = [
    "lantern",
    "17",
    "an otter in a raincoat, boots, and gloves. It waits at a bus stop.",
    'a door with the words "Back soon" painted on it',
    "Inês with a cello",
]
LAMP = ["A violet tractor on a beach.", "A lamp made of paper. A lamp folded from one sheet."]


@pytest.mark.parametrize(
    ("name", "prompts", "key", "values"),
    [
        ("parti.tsv", PARTI, "Note", ["Concept words", "", "", "", ""]),
        ("parti.csv", ["lantern", "an otter in a raincoat, boots, and gloves."], "Category", ["Abstract", "Animals"]),
        ("parti_simple_renamed.csv", ["a lantern", "a boat"], "Category", ["Abstract", "Vehicles"]),
        ("drawbench.csv", LAMP, "Category", ["Colors", "Conflicting"]),
        ("geneval.jsonl", ["a photo of a kite", "a photo of two kites"], "tag", ["single_object", "counting"]),
        ("ir_benchmark.json", ["a concept art of a boat, retro", "a cute owl"], "id", ["000001-0001", "000002-0002"]),
    ],
)
def test_published_prompt_sets_are_read_with_what_stands_beside_a_prompt(name, prompts, key, values):
    found = read_prompts(CASES / name)
    assert found == prompts
    assert [more[key] for more in found.metadata] == values
    first = read_prompts(found, limit=1)
    assert (first, first.metadata) == (prompts[:1], found.metadata[:1])


def test_the_column_of_prompts_can_be_named(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("prompt,Better\nx,17\ny,a dog\n")
    assert read_prompts(path, prompt_column="Better") == ["17", "a dog"]
    assert read_prompts([{"prompt": "x", "Better": "a dog"}], prompt_column="Better").metadata == [{"prompt": "x"}]
    with pytest.raises(PromptError, match=r"expected one named better.*--prompt-column"):
        read_prompts(path, prompt_column="better")
    with pytest.raises(PromptError, match=r"prompt 1: got keys \['id'\], expected one named prompt"):
        read_prompts([{"prompt": "x"}, {"id": 1}])


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("table.txt", b"prompt\tn\na cat\t1\na dog\t2\n", ["a cat", "a dog"]),
        ("plain.txt", b"a\tcat\na dog\n", ["a\tcat", "a dog"]),  # a tab in one line is no table
        ("quoted.tsv", b'prompt\tn\n"a ""big""\tcat"\t1\n', ['a "big"\tcat']),
        ("speech.tsv", b'prompt\tn\n"Hello" says a cat\t1\n', ['"Hello" says a cat']),
        ("excel.csv", b"Text;n\na cat, red;1\n", ["a cat, red"]),
        ("lines.jsonl", b'"a cat"\n\n{"Caption": "a dog"}\n', ["a cat", "a dog"]),
    ],
)
def test_what_separates_the_columns_is_told_by_the_first_line(tmp_path, name, content, prompts):
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == prompts


def test_a_csv_without_a_header_is_told(tmp_path):
    """Its first prompt cannot be told from the name of a column."""
    (tmp_path / "set.csv").write_text("a cat\na dog\n")
    with pytest.warns(UserWarning, match=r"first line, \['a cat'\], is taken for names"):
        assert read_prompts(tmp_path / "set.csv") == ["a dog"]


def test_texts_of_numpy_are_plain_texts():
    assert [type(prompt) for prompt in read_prompts(np.array(["a", "b"]))] == [str, str]


def test_dictionary_encoded_parquet_and_a_frame(tmp_path):
    table = pa.table({"Prompts": pa.array(["a", "b", "a"]).dictionary_encode(), "url": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "set.parquet")
    for source in (tmp_path / "set.parquet", pd.read_parquet(tmp_path / "set.parquet")):
        found = read_prompts(source)
        assert found == ["a", "b", "a"] and found.metadata[2] == {"url": "z"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"\n\n  \n", "no prompt"),
        ("empty_list.json", b"[]", "no prompt"),
        ("header_only.csv", b"prompt\n", "no prompt"),
        ("number.json", b'["a cat", 7]', "prompt 1: got 7, expected text"),
        ("gap.txt", b"a cat\n\na dog\n", "prompt 1: got '', expected text"),
        ("gap.csv", b"prompt,n\na cat,1\n,2\n", "prompt 1"),
        ("mapping.json", b'{"a": "cat"}', "list"),
        ("broken.json", b'["a cat"', "JSON"),
        ("latin.txt", "ein Bär".encode("latin-1"), "utf-8"),
        ("prompts.yaml", b"- a cat", "ending of the prompt file"),
        ("commas.csv", b"prompt\na dog, brown\n", "commas in double quotes"),
        ("more_commas.csv", b"prompt,n\na cat,1\na dog, brown,2\n", "commas in double quotes"),
        ("quote.csv", b'prompt\n"a cat\n', "cannot be read as csv"),
        ("headless.csv", b"a cat sits on a mat\na dog runs in a park\n", "in the first line"),
        ("two_texts.csv", b"a,b\nx,y\n", "expected one named prompt"),
        ("twice.csv", b"caption,text\nx,y\n", "--prompt-column"),
        ("line.jsonl", b'"a cat"\n{"prompt": \n', "line 2 is not whole JSON"),
        ("half.json", b'["half \\ud800"]', "in Unicode"),
        ("numbers.csv", b"a,b\n1,2\n", "expected one named prompt"),
        ("broken.parquet", b"PAR1 no", "cannot be read as parquet"),
    ],
)
def test_bad_files_are_refused_with_the_reason(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptError, match=says):
        read_prompts(path)


def test_a_null_in_parquet_names_its_index_and_a_missing_file_its_name(tmp_path):
    pq.write_table(pa.table({"prompt": ["a cat", None]}), tmp_path / "set.parquet")
    with pytest.raises(PromptError, match="prompt 1"):
        read_prompts(tmp_path / "set.parquet")
    with pytest.raises(PromptError, match=r"none\.txt cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_texts_that_look_like_something_else_stay_texts(tmp_path):
    (tmp_path / "set.csv").write_text("prompt,n\nNone,1\n1984,2\nnan,3\n")
    assert read_prompts(tmp_path / "set.csv") == ["None", "1984", "nan"]


@pytest.mark.parametrize("source", [None, 3, b"a cat", {"a": 1}, [], ["a cat", 1], "pocket:test:x", "pocket:trian"])
def test_bad_arguments(source):
    with pytest.raises(PromptError):
        read_prompts(source)


def test_limit_must_be_positive():
    with pytest.raises(PromptError, match="limit"):
        read_prompts(TEXTS, limit=0)


def test_published_validation_prompts(reference):
    found = read_prompts(reference / "prompts" / "validation.json")
    assert len(found) >= 200
