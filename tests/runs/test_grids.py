"""Grids: what a YAML file asks to be run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ttsnap_lib.errors import ConfigError
from ttsnap_lib.runs.sweep import axis_values, load_grid, parse_grid

TINY = str(Path(__file__).parents[1] / "notebooks" / "tiny.ipynb")


def points(**content) -> list[tuple]:
    spec = parse_grid({"notebook": TINY, **content})
    return [(run["x"], run["scale"], run["label"]) for run in spec.runs]


def test_the_first_axis_is_slowest_and_the_rest_keeps_its_default():
    assert points(grid={"x": [1, 2], "scale": [3, 4]}) == [
        (1.0, 3, "a"), (1.0, 4, "a"), (2.0, 3, "a"), (2.0, 4, "a"),
    ]  # fmt: skip
    assert points(parameters={"label": "c"}) == [(2.0, 1, "c")]


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ({"start": 400, "stop": 1000, "step": 200}, [400, 600, 800, 1000]),
        ({"start": 3, "stop": 1, "step": -1}, [3, 2, 1]),
        ({"start": 0, "stop": 0.3, "step": 0.1}, [0.0, 0.1, 0.2, 0.3]),
        ({"start": 0, "stop": 0.35, "step": 0.1}, [0.0, 0.1, 0.2, 0.3]),
        ({"linspace": [0, 1, 5]}, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"logspace": [1e-4, 1e-2, 3]}, [1e-4, 1e-3, 1e-2]),
        ([1, "a", None], [1, "a", None]),
    ],
)
def test_axes(axis, values):
    assert axis_values("grid.x", axis) == ({}, values)


def test_conditions_leave_a_parameter_at_its_default_where_they_do_not_hold():
    grid = {"label": ["a", "b"], "x": {"when": {"label": "b"}, "values": [5, 6]}}
    assert points(grid=grid) == [(2.0, 1, "a"), (5.0, 1, "b"), (6.0, 1, "b")]
    grid = {"x": [1, 2, 3], "scale": {"when": {"x": [2, 3]}, "start": 8, "stop": 9, "step": 1}}
    assert points(grid=grid) == [(1.0, 1, "a"), (2.0, 8, "a"), (2.0, 9, "a"), (3.0, 8, "a"), (3.0, 9, "a")]
    chain = {
        "scale": [1, 2],
        "x": {"when": {"scale": 2}, "values": [7, 8]},
        "label": {"when": {"x": 8}, "values": ["z"]},
    }
    assert points(grid=chain) == [(2.0, 1, "a"), (7.0, 2, "a"), (8.0, 2, "z")]


def test_cases_cross_the_grid_and_rules_leave_points_out():
    cases = {"small": {"scale": 1}, "large": {"scale": 10, "label": "big"}}
    spec = parse_grid({"notebook": TINY, "grid": {"x": [1, 2]}, "cases": cases, "exclude": [{"case": "large", "x": 2}]})
    assert spec.cases == ("small", "small", "large")
    assert [(run["x"], run["scale"], run["label"]) for run in spec.runs] == [
        (1.0, 1, "a"), (2.0, 1, "a"), (1.0, 10, "big"),
    ]  # fmt: skip


def test_the_same_parameters_are_run_once():
    assert points(grid={"x": [1, 1.0, 2]}) == [(1.0, 1, "a"), (2.0, 1, "a")]
    assert points(grid={"scale": [1, 2], "x": {"when": {"scale": 2}, "values": [2.0]}}) == [
        (2.0, 1, "a"),
        (2.0, 2, "a"),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"gird": {}}, "Did you mean 'grid'"),
        ({"grid": {"y": [1]}}, "unknown key"),
        ({"grid": {"x": 1}}, "Put a value that does not vary under parameters"),
        ({"grid": {"x": []}}, "a list of values"),
        ({"grid": {"x": ["one"]}}, "expected float"),
        ({"grid": {"x": {"start": 1, "stop": 2}}}, "step as well"),
        ({"grid": {"x": {"start": 1, "stop": 2, "step": 0}}}, "Change its sign"),
        ({"grid": {"x": {"start": 1, "stop": 2, "step": -1}}}, "Change its sign"),
        ({"grid": {"x": {"start": 1, "stop": 2, "step": 1, "by": 1}}}, "unknown key"),
        ({"grid": {"x": {"start": 0, "stop": 1e9, "step": 1e-3}}}, "number of values"),
        ({"grid": {"x": {"logspace": [0, 1, 3]}}}, "logspace"),
        ({"grid": {"x": {"linspace": [0, 1]}}}, "[first, last, count]"),
        ({"grid": {"x": {"values": [1], "when": {"labl": "a"}}}}, "Did you mean 'label'"),
        ({"grid": {"x": {"values": [1], "wen": {}}}}, "Did you mean 'when'"),
        ({"grid": {"x": {"values": [1], "when": "label"}}}, "a mapping"),
        ({"grid": {"x": [1]}, "parameters": {"x": 2}}, "Keep one of the two"),
        ({"grid": {"x": [1]}, "cases": {"a": {"x": 2}}}, "Keep one of the two"),
        ({"parameters": {"scale": 1.5}}, "expected int"),
        ({"cases": {"a": {"scal": 1}}}, "Did you mean 'scale'"),
        ({"cases": {"a": 1}}, "a name and a mapping"),
        ({"exclude": {"x": 1}}, "a list of mappings"),
        ({"exclude": [{"case": "a"}]}, "unknown key"),
        ({"exclude": [{"x": 2.0}]}, "leave a run"),
        ({"grid": [1]}, "a mapping"),
        ({"name": "../up"}, "plain name"),
        ({"metric": 3}, "expected text"),
        ({"notebook": 3}, "name or path"),
        ({"notebook": "no_such"}, "notebook"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(content, said):
    with pytest.raises(ConfigError) as caught:
        parse_grid({"notebook": TINY, **content})
    assert said in str(caught.value)


def test_a_grid_file_finds_its_notebook_beside_it(tmp_path):
    (tmp_path / "mine.ipynb").write_text(Path(TINY).read_text())
    (tmp_path / "budgets.yaml").write_text("notebook: mine.ipynb\ngrid:\n  x: [1, 2]\n")
    spec = load_grid(tmp_path / "budgets.yaml")
    assert (spec.name, spec.notebook, len(spec.runs)) == ("budgets", tmp_path / "mine.ipynb", 2)
    (tmp_path / "bad.yaml").write_text("notebook: mine.ipynb\ngrid:\n  x: [1]\n  x: [2]\n")
    with pytest.raises(ConfigError, match="twice"):
        load_grid(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("just text")
    with pytest.raises(ConfigError, match="a mapping"):
        load_grid(tmp_path / "bad.yaml")
