"""What a reader takes from a simulation: tables of methods and schedules, and the commands that tune and run one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .costs import CostModel
from .plots import METHOD_LABELS, reward_label
from .results import Curves
from .schedule import Schedule
from .tensors import noise_aware_steps

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from .transfer import Transfer

__all__ = [
    "by_budget",
    "flatness_table",
    "optimize_command",
    "pruning_method",
    "search_command",
    "transfer_table",
    "unbroken",
]

# The models of the published tensors, by the short name that those carry.
_PUBLISHED = {"flux": "black-forest-labs/FLUX.1-dev", "sdxl": "SG161222/RealVisXL_V4.0"}


def by_budget(curves: Curves, unit: str) -> pd.DataFrame:
    """Return a table to read: a row per reward and budget, a group of columns per method.

    Parameters
    ----------
    curves : Curves
    unit : str
        Of the budgets.

    Returns
    -------
    DataFrame
        Of text. ``N`` is the number of candidates; ``over Best-of-N`` the paired gain in reward with its interval;
        ``Best-of-N needs`` the budget at which Best-of-N reaches the same mean reward, linear between its budgets and
        empty outside them.
    """
    import pandas as pd

    frame = curves.frame()
    base = {reward: rows["mean"] for reward, rows in frame[frame["method"] == "best_of_n"].groupby("reward")}
    needs = [
        np.interp(mean, np.maximum.accumulate(base[reward]), curves.budgets, left=np.nan, right=np.nan)
        for reward, mean in zip(frame["reward"], frame["mean"], strict=True)
    ]
    gains = zip(frame["gain"], frame["gain_low"], frame["gain_high"], strict=True)
    table = pd.DataFrame({
        "reward": frame["reward"].map(reward_label),
        f"budget ({unit})": frame["budget"].map("{:.4g}".format),
        "method": frame["method"].map(METHOD_LABELS),
        "N": frame["n"],
        "mean reward": frame["mean"].map("{:.3f}".format),
        "over Best-of-N": [_interval(*given, "+.3f") for given in gains],
        f"Best-of-N needs ({unit})": ["" if np.isnan(value) else f"{value:.4g}" for value in needs],
    })  # fmt: skip
    keys = list(table.columns[:2])
    wide = table.pivot(index=keys, columns="method").swaplevel(axis=1)
    order = [(METHOD_LABELS[method], column) for method in curves.methods for column in table.columns[3:]]
    baseline = METHOD_LABELS["best_of_n"]
    wide = wide[[at for at in order if at[0] != baseline or at[1] in ("N", "mean reward")]]
    return wide.reindex(list(dict.fromkeys(zip(table[keys[0]], table[keys[1]], strict=True)))).rename_axis(
        columns=[None, None]
    )


def flatness_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return what :func:`~ttsnap_lib.transfer.flatness` tells as text: a row per schedule, the chosen one first."""
    import pandas as pd

    return pd.DataFrame({
        "schedule": table["schedule"].map(str),
        "gain over Best-of-N (%)": _with_interval(table["gain"], table["low"], table["high"]),
        "points behind the first": _with_interval(table["behind"], table["behind_low"], table["behind_high"], ".2f"),
        "as good": table["within"].map({True: "yes", False: ""}),
    })  # fmt: skip


def transfer_table(found: Transfer) -> pd.DataFrame:
    """Return gains of schedules where they were not tuned, as text; rows: tuned on, columns: used on.

    Parameters
    ----------
    found : Transfer

    Returns
    -------
    DataFrame
        ``gain`` over Best-of-N in percent, and points ``behind`` the schedule that was tuned there, both with intervals.
    """
    import pandas as pd

    columns = {}
    for name in found.gain.columns:
        columns[name, "gain"] = _with_interval(found.gain[name], found.low[name], found.high[name])
        columns[name, "behind"] = _with_interval(found.behind[name], found.behind_low[name], found.behind_high[name])
    return pd.DataFrame(columns)


def _with_interval(value: pd.Series, low: pd.Series, high: pd.Series, form: str = ".1f") -> pd.Series:
    text = [_interval(*given, form) for given in zip(value, low, high, strict=True)]
    return value.astype(object).where(value.isna(), text).where(value.notna(), "cannot run")


def _interval(value: float, low: float, high: float, form: str) -> str:
    known = not np.isnan(low)  # of a single prompt it is not
    return f"{value:{form}} [{low:{form}}, {high:{form}}]" if known else f"{value:{form}} [unknown]"


def unbroken(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of text whose cells a notebook keeps on one line, however narrow the column."""
    return table.map(lambda cell: cell.replace(" ", "\N{NO-BREAK SPACE}") if isinstance(cell, str) else cell)


def pruning_method(dataset: xr.Dataset, methods: Sequence[str], report: Sequence[str] = ()) -> str:
    """Return the one of `methods` to tune a schedule for: TTSnap, else TTSp, else Best-of-N, which has none.

    On a tensor without a step at which every reward that selects is noise-aware, TTSnap is TTSp, and so is the answer.
    Rewards of `report` do not select.
    """
    if "ttsnap" not in methods:
        return "ttsp" if "ttsp" in methods else "best_of_n"
    finetuned = [set(steps) for name, steps in noise_aware_steps(dataset).items() if name not in report]
    shared = set.intersection(*finetuned) if finetuned else set()
    return "ttsnap" if shared - {int(dataset["step"][-1])} else "ttsp"


def optimize_command(
    tensor: str,
    cost: str,
    multiples: Sequence[float],
    rewards: Sequence[str] = (),
    report: Sequence[str] = (),
    method: str = "ttsnap",
) -> str:
    """Return the ``ttsnap optimize`` line for a tensor, its costs and a range of budgets.

    Parameters
    ----------
    tensor, cost : str
        As the notebooks take them.
    multiples : sequence of float
        Budgets in finished images of Best-of-N; all of them are tuned for.
    rewards, report : sequence of str
        Rewards that select, and rewards that are only measured; all of the tensor select when both are empty.
    method : str
        ``ttsp`` to tune for pruning by the base reward.
    """
    words = ["ttsnap", "optimize", tensor, "--cost", cost, "--budgets", ",".join(f"{m:g}" for m in multiples)]
    for option, names in (("--reward", rewards), ("--report", report)):
        for name in names:
            words += [option, name]
    words += ["--method", method] if method == "ttsp" else []
    return shlex.join([*words, "--out", "schedule.yaml"])


def search_command(
    model: str,
    rewards: Sequence[str],
    cost: str,
    candidates: int,
    schedule: Schedule | None = None,
    method: str = "ttsnap",
    prompt: str = "your prompt",
) -> str:
    """Return the ``ttsnap search`` line that runs a simulated schedule for real.

    Parameters
    ----------
    model : str
        What made the tensor (its attribute ``model``). A pocket model gets its shipped adapters and tiny decoder, a
        published tensor its model on the hub.
    rewards : sequence of str
        Rewards that select, the first one noise-aware under ``ttsnap``.
    cost : str
        Cost preset or file.
    candidates : int
        Seeds to try.
    schedule : Schedule, optional
        Written into the line itself; none for Best-of-N.
    method : str
        ``best_of_n``, ``ttsp`` or ``ttsnap``. Where TTSnap's checkpoints are not shipped, ``NOISE_AWARE`` stands for their
        folder.
    prompt : str
    """
    model = "MODEL" if model.startswith("synthetic") else model  # of no diffusion model
    is_pocket = model.startswith("pocket-")
    words = ["ttsnap", "search", prompt, "--model", _PUBLISHED.get(model, model), "--reward", *rewards]
    size = re.search(r"-(512|1024)\b", cost)
    if size and not is_pocket:
        words += ["--size", size[1]]
    if method != "best_of_n" and schedule is not None and schedule.steps:
        words += ["--schedule", f"{{steps: {list(schedule.steps)}, keep_ratios: {list(schedule.keep_ratios)}}}"]
        if method == "ttsnap":
            words += ["--adapters", "pocket" if is_pocket else "NOISE_AWARE"]
        if CostModel.load(cost).preview_decode is not None:
            kind = "sdxl" if "sdxl" in cost else "f1"
            words += ["--tiny", "pocket-tiny" if is_pocket else f"madebyollin/tae{kind}"]
    return shlex.join([*words, "--candidates", str(candidates), "--cost", cost, "--out", "best"])
