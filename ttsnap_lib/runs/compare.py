"""The runs of a sweep side by side: the relative gain of each, and how far it trails the best, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap_lib.runs.run import write_figure, write_table
from ttsnap_lib.simulation.metrics import against_best

if TYPE_CHECKING:
    import pandas as pd

_DRAWN = 40  # rows of the figure, the best ones
_SAME = ("tensor", "values")  # parameters that say which prompts a run is on


def compare_runs(runs: Sequence[dict[str, Any]], labels: Sequence[str]) -> pd.DataFrame | None:
    """Return a row a run, the best first; None where there are fewer than two, or their prompts are not the same.

    `runs` hold the ``folder``, the ``run_hash`` and the ``parameters`` of finished runs. Each has told its gains in the tables
    ``relative_gains`` and ``gains_without``, as ``simulate.ipynb`` does; of several methods the last counts (TTSnap after
    TTSp), of several rewards the first. The columns are label, run, method, reward and those of :func:`against_best`.
    """
    import pandas as pd

    if len(runs) < 2 or len({str([run["parameters"].get(name) for name in _SAME]) for run in runs}) > 1:
        return None
    rows, gains, without = [], [], []
    for run, label in zip(runs, labels, strict=True):
        paths = [Path(run["folder"]) / f"{name}.parquet" for name in ("relative_gains", "gains_without")]
        if not all(path.exists() for path in paths):
            return None
        told, others = (pd.read_parquet(path) for path in paths)
        if told.empty:
            return None
        method, reward = told["method"].iloc[-1], told["reward"].iloc[0]
        mine = (
            frame[(frame["method"] == method) & (frame["reward"] == reward)]["relative_gain"]
            for frame in (told, others)
        )
        rows.append((label, run["run_hash"], method, reward))
        gains.append(float(next(mine).iloc[0]))
        without.append(next(mine).to_numpy())
    if len({len(one) for one in without}) > 1:
        return None
    table = against_best(gains, without)
    names = pd.DataFrame(rows, columns=["label", "run", "method", "reward"])
    return names.join(table, how="right").reset_index(drop=True)


def write_comparison(table: pd.DataFrame, folder: Path) -> None:
    """Write ``compared.csv``, as Parquet too, and the forest plot ``compared.png`` into `folder`."""
    import matplotlib.pyplot as plt

    from ttsnap_lib.simulation.plots import forest

    write_table(table, folder / "compared.csv")
    shown = table.head(_DRAWN)
    figure = forest(shown, shown["label"].tolist())
    if len(table) > _DRAWN:
        figure.suptitle(f"the best {_DRAWN} of {len(table)} runs", fontsize=9)
    write_figure(figure, folder / "compared.png")
    plt.close(figure)


def comparison_text(table: pd.DataFrame) -> pd.DataFrame:
    """Return the comparison as text, a row a run."""
    from ttsnap_lib.simulation.plots import flatness_table

    return flatness_table(table.assign(schedule=table["label"])).rename(columns={"schedule": "run"})
