"""What a sweep gave: one tidy table over all runs, and a figure of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .grids import GridSpec

__all__ = ["collect", "draw", "main_metric"]

_SWEEP_COLUMNS = {"method", "reward", "budget", "mean", "low", "high"}
_USUAL_METRICS = ("mean", "reward", "value", "score", "gain", "test_gain", "tau", "loss")


def collect(spec: GridSpec, runs: Sequence[tuple[int, Path]]) -> pd.DataFrame:
    """Return the tables of `runs` (index in the sweep, run folder) under each other, parameters as first columns.

    Rows stand in the sweep's order, so the same runs give the same table, to the byte. A parameter whose name the
    results use too is called ``<name>_parameter``. A run without the table gives one row of its parameters.
    """
    import pandas as pd

    frames: list[tuple[int, pd.DataFrame | None]] = []
    for index, folder in runs:
        path = folder / f"{spec.table}.parquet"
        frames.append((index, pd.read_parquet(path) if path.exists() else None))
    taken = {column for _, frame in frames if frame is not None for column in frame.columns}
    parts = []
    for (index, frame), (_, folder) in zip(frames, runs, strict=True):
        rows = 1 if frame is None else len(frame)
        own: dict[str, Any] = {"run": folder.name}
        if any(spec.cases):
            own["case"] = spec.cases[index]
        own |= spec.runs[index]
        columns = {
            (f"{name}_parameter" if name in taken else name): [_cell(value)] * rows for name, value in own.items()
        }
        left = pd.DataFrame(columns, index=range(rows))
        parts.append(left if frame is None else left.join(frame.reset_index(drop=True)))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"run": []})
    for name in table.columns:  # one type a column, or Parquet refuses it
        kinds = {type(value) for value in table[name] if value is not None} if table[name].dtype == object else set()
        if len(kinds) > 1:
            table[name] = [None if value is None else str(value) for value in table[name]]
    return table


def _cell(value: Any) -> Any:
    """Return a parameter as a table's cell: lists and mappings as JSON text."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | dict) else value


def main_metric(spec: GridSpec, table: pd.DataFrame) -> str | None:
    """Return the column to draw: the one the sweep names, else a usual one, else the last number of the results."""
    if spec.metric:
        if spec.metric not in table.columns:
            raise ConfigError(
                "sweep: metric", value=spec.metric, bound=f"one of {list(table.columns)}", remedy="Name a column."
            )
        return spec.metric
    own = {"run", "case", *spec.runs[0]}
    numbers = [
        name for name in table.select_dtypes("number").columns
        if name not in own and not name.endswith("_parameter")
    ]  # fmt: skip
    return next((name for name in _USUAL_METRICS if name in numbers), numbers[-1] if numbers else None)


def draw(spec: GridSpec, table: pd.DataFrame) -> Figure | None:
    """Return a figure of the main metric against what the sweep varies; None when there is nothing to draw.

    A table of :func:`ttsnap_lib.sweep`'s columns with one row for each method and budget is drawn as reward against
    budget. Otherwise the numeric axis with the most values runs along x, and the next two axes give color and line
    style; what else varies is averaged over, and a band or bar shows its whole spread.
    """
    import seaborn as sns
    from matplotlib.figure import Figure

    metric = main_metric(spec, table)
    if metric is None or table.empty:
        return None
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    ax = figure.add_subplot()
    axes = [name if name in table.columns else f"{name}_parameter" for name in spec.axes]
    axes = [name for name in axes if name in table.columns and table[name].nunique() > 1]
    if set(table.columns) >= _SWEEP_COLUMNS and table.groupby(["method", "budget"]).size().max() == 1:
        from .plots import reward_against_budget

        reward_against_budget(table, ax=ax)
        return figure
    if any(spec.cases):
        axes.append("case")
    axes += [
        name for name in ("method", "reward", "budget")
        if name in table.columns and name not in axes and table[name].nunique() > 1
    ]  # fmt: skip
    numeric = [name for name in axes if table[name].dtype.kind in "if"]
    numeric.sort(key=lambda name: -table[name].nunique())
    along = numeric[0] if numeric else axes[0] if axes else "run"
    rest = [name for name in axes if name != along][:2]
    colors = {}
    if rest:
        colors = {"hue": table[rest[0]].astype(str)}
        colors["palette"] = sns.color_palette("colorblind", colors["hue"].nunique())
    band = ("pi", 100)  # the whole spread; nothing random, so the same table gives the same picture
    if numeric:
        style = {"style": table[rest[1]].astype(str)} if len(rest) > 1 else {}
        sns.lineplot(x=table[along], y=table[metric], ax=ax, errorbar=band, marker="o", **colors, **style)
        values = sorted(table[along].unique())
        if len(values) > 3 and values[0] > 0 and _even_in_log(values):
            ax.set_xscale("log")
    else:
        sns.barplot(x=table[along].astype(str), y=table[metric], ax=ax, errorbar=band, **colors)
        if table[along].nunique() > 4:
            ax.tick_params(axis="x", labelrotation=45)
    ax.set(xlabel=along, ylabel=metric, title=spec.name)
    if rest and ax.get_legend() is not None:
        sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), frameon=False, title=", ".join(rest))
    sns.despine(ax=ax)
    return figure


def _even_in_log(values: Sequence[float]) -> bool:
    ratios = [b / a for a, b in itertools.pairwise(values)]
    return min(ratios) > 1.2 and max(ratios) / min(ratios) < 1.05
