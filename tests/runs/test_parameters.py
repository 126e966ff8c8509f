"""Strict parameters: read, checked, brought to their declared type and hashed."""

from __future__ import annotations

import json
from pathlib import Path

import papermill
import pytest

from tests.conftest import ROOT
from ttsnap_lib.errors import ConfigError
from ttsnap_lib.runs.parameters import declared_parameters, from_text, parameter_hash, read_notebook, resolve, settle

TYPES = ROOT / "tests/notebooks/types.ipynb"


def notebook(source: str) -> dict:
    """Return a notebook whose parameters cell is `source`."""
    cell = {"cell_type": "code", "source": source, "metadata": {"tags": ["parameters"]}}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]}


def test_declared_parameters_are_read_with_type_default_and_comment():
    declared = declared_parameters(read_notebook(TYPES))
    assert list(declared) == [
        "count", "ratio", "name", "flag", "steps", "pair", "extra", "limit", "mode", "loose",
    ]  # fmt: skip
    assert declared["steps"].annotation == "list[int]"
    assert declared["steps"].default == [2, 6]
    assert declared["steps"].help == "a list of whole numbers"
    hard = 'url: str = "a#b = ü"  # has # and =\nlong: list[int] = [\n    1,  # one\n    2,\n]  # two lines\n'
    declared = declared_parameters(notebook(hard))
    assert declared["url"].default == "a#b = ü"
    assert declared["url"].help == "has # and ="
    assert declared["long"].default == [1, 2]


@pytest.mark.parametrize(
    "cell", ["import os", "a = 2 * 3", "a = b = 1", "a, b = 1, 2", "a: int", "def f(): pass", "a = (", "a = print(1)"]
)
def test_a_parameters_cell_of_anything_but_literals_is_refused(cell):
    with pytest.raises(ConfigError, match="line 2 of the cell tagged parameters"):
        declared_parameters(notebook(f"x: int = 1\n{cell}"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"coutn": 3}, "Did you mean 'count'"),
        ({7: 3}, "unknown key"),
        ({"count": 3.5}, "got 3.5, expected int"),
        ({"count": True}, "expected int"),
        ({"count": "3"}, "got '3', expected int"),
        ({"ratio": "0.5"}, "expected float"),
        ({"ratio": float("nan")}, "finite"),
        ({"ratio": 10**400}, "expected float"),
        ({"name": 5}, "expected str"),
        ({"name": None}, "expected str"),
        ({"name": "half \ud800"}, "expected str"),
        ({"flag": 1}, "expected bool"),
        ({"steps": 2}, "expected list"),
        ({"steps": [1, "b"]}, "expected list[int]"),
        ({"steps": "12"}, "expected list"),
        ({"pair": ["x", 1]}, "expected tuple[int, float]"),
        ({"extra": {"a": "x"}}, "expected dict[str, float]"),
        ({"extra": {1: 1.0}}, "mappings by text"),
        ({"limit": "none"}, "float | None"),
        ({"mode": 5}, "'str'"),
        ({"loose": "x"}, "expected int"),
        ({"loose": object()}, "expected int"),
    ],
)
def test_a_wrong_parameter_is_refused(given, said):
    with pytest.raises(ConfigError) as caught:
        resolve(declared_parameters(read_notebook(TYPES)), given)
    assert said in str(caught.value)


def test_values_are_brought_to_the_declared_type_so_that_equal_runs_have_equal_hashes():
    declared = declared_parameters(read_notebook(TYPES))
    given = {"count": 4.0, "ratio": 1, "pair": (1, 2), "limit": 3}
    resolved = resolve(declared, given)
    types = {"count": int, "ratio": float, "limit": float, "pair": list}
    assert all(type(resolved[name]) is kind for name, kind in types.items())
    assert json.dumps(resolved["pair"]) == "[1, 2.0]"
    same = {"limit": 3.0, "pair": [1, 2.0], "count": 4, "ratio": 1.0}
    assert parameter_hash(resolved) == parameter_hash(resolve(declared, same))
    assert parameter_hash(resolve(declared, {})) == parameter_hash(resolve(declared, {"ratio": 0.5}))
    assert parameter_hash({"b": [1, 0.5], "a": "ü"}) == "7684754051131c5f"  # names run folders: it must not change
    either = declared_parameters(notebook("x: int | float | None = 1"))
    assert [json.dumps(resolve(either, {"x": x})["x"]) for x in (2, 2.0, None)] == ["2", "2.0", "null"]


def test_values_of_the_command_line_follow_the_declared_type():
    declared = declared_parameters(read_notebook(TYPES))
    for name, text, value in [
        ("name", "5", "5"),
        ("count", "5", 5),
        ("ratio", "1e-3", 0.001),
        ("steps", "[2, 6, 11]", [2, 6, 11]),
        ("limit", "null", None),
        ("flag", "true", True),
        ("extra", "{a: 1}", {"a": 1}),
        ("count", "__import__('os')", "__import__('os')"),
    ]:
        assert from_text(text, declared[name]) == value


SHIPPED = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_papermill_sees_every_parameter_and_its_texts_are_read(path):
    declared = declared_parameters(read_notebook(path))
    seen = papermill.inspect_notebook(str(path))
    assert list(seen) == list(declared)
    assert {name: one["inferred_type_name"] for name, one in seen.items()} == {
        name: one.annotation.removesuffix(" | None") for name, one in declared.items()
    }
    source = next(cell["source"] for cell in read_notebook(path)["cells"] if "parameters" in cell["metadata"]["tags"])
    variables = {"In": ["", source, "# Parameters\nsteps = '[1, 2]'", "import numpy"], "other": "[1]"}
    variables |= {name: one.default for name, one in declared.items()}
    before = dict(variables)
    settle(variables, path.stem)
    assert variables == before  # defaults are of their types
    for name, one in declared.items():
        if one.annotation == "list":
            given = variables | {name: "[1, 2.5, three]"}
            settle(given, path.stem)
            assert given[name] == [1, 2.5, "three"]
        if one.annotation != "str" and one.annotation != "str | None":
            with pytest.raises(ConfigError, match=f"parameter {name} of {path.stem}: got 'many', expected"):
                settle(variables | {name: "many"}, path.stem)


def test_what_is_no_parameter_or_no_plain_value_is_left_as_it_is():
    cells = ["", "import numpy", "n: int = 1\nfolder: str = ''", "n = '3'", "folder = Path('x')", "x = 1"]
    variables = {"In": cells, "n": "3", "folder": Path("x"), "x": "5"}
    settle(variables)
    assert variables == {"In": cells, "n": 3, "folder": Path("x"), "x": "5"}
    for nothing in ({}, {"In": ["", "x = 1"], "x": "2"}):
        before = dict(nothing)
        settle(nothing)
        assert nothing == before
    with pytest.raises(ConfigError, match="parameter n of notebook: got 2.5, expected int"):
        settle(variables | {"n": 2.5})


def test_a_default_of_none_may_stay_none():
    declared = declared_parameters(notebook("n: int = None  # all when None"))
    assert declared["n"].annotation == "int | None"
    assert resolve(declared, {}) == {"n": None} and resolve(declared, {"n": 2}) == {"n": 2}
    assert from_text("None", declared["n"]) is None
