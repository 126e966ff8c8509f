"""The tidy table of a sweep and its figure."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from ttsnap_lib.errors import ConfigError
from ttsnap_lib.runs.sweep import collect, draw, main_metric, parse_grid

TINY = str(Path(__file__).parents[1] / "notebooks" / "tiny.ipynb")


def _collected(tmp_path: Path, results, **content):
    """Return the sweep and the table of runs whose results `results` gives as frames, by their parameters."""
    spec = parse_grid({"notebook": TINY, **content})
    folders = []
    for k, parameters in enumerate(spec.runs):
        folder = tmp_path / f"run{k}"
        folder.mkdir()
        results(parameters).to_parquet(folder / "results.parquet")
        folders.append((k, folder))
    return spec, collect(spec, folders)


def test_parameters_and_results_of_one_name_stay_apart_and_lists_are_text(tmp_path):
    spec, table = _collected(
        tmp_path,
        lambda p: pd.DataFrame({"label": ["ours", "theirs"], "value": [p["x"], -p["x"]]}),
        grid={"x": [1, 2]}, cases={"first": {"label": "c"}, "second": {"label": "d"}},
    )  # fmt: skip
    assert list(table.columns) == ["run", "case", "x", "scale", "label_parameter", "seed", "label", "value"]
    assert table["label_parameter"].tolist() == ["c"] * 4 + ["d"] * 4
    assert table["value"].tolist() == [1.0, -1.0, 2.0, -2.0] * 2
    assert main_metric(spec, table) == "value"


def test_the_figure_shows_the_metric_against_what_varies(tmp_path):
    spec, table = _collected(
        tmp_path,
        lambda p: pd.DataFrame({"value": [p["x"] * p["scale"]]}),
        grid={"x": {"logspace": [0.01, 100, 5]}, "scale": [1, 2, 3]},
    )
    figure = draw(spec, table)
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("x", "value", "log")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["1", "2", "3"]
    assert ax.lines[2].get_ydata().tolist() == pytest.approx([0.03, 0.3, 3, 30, 300])
    figure.savefig(tmp_path / "lines.png")

    (tmp_path / "bars").mkdir()
    spec, table = _collected(
        tmp_path / "bars", lambda p: pd.DataFrame({"value": [len(p["label"])]}), grid={"label": ["a", "bb", "ccc"]}
    )
    (ax,) = draw(spec, table).axes
    assert [patch.get_height() for patch in ax.patches] == [1, 2, 3]

    (tmp_path / "curves").mkdir()
    budgets = pd.DataFrame({
        "method": ["best_of_n", "best_of_n", "ttsnap", "ttsnap"], "reward": "image_reward", "budget": [100, 200] * 2,
        "mean": [1.0, 2.0, 1.5, 2.5], "low": [0.9, 1.9, 1.4, 2.4], "high": [1.1, 2.1, 1.6, 2.6],
    })  # fmt: skip
    spec, table = _collected(tmp_path / "curves", lambda p: budgets)
    (ax,) = draw(spec, table).axes
    assert "budget per prompt" in ax.get_xlabel() and len(ax.lines) == 2
    bad = parse_grid({"notebook": TINY, "metric": "valeu"})
    with pytest.raises(ConfigError, match="metric"):
        draw(bad, table)
