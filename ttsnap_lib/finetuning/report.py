"""How a run came out: measures on held-out prompts, tables, the comparison with the base, figures, live ones too."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.errors import CheckpointError, CurriculumError
from ttsnap_lib.files import atomic_write, failures_as
from ttsnap_lib.finetuning.data import Images, score_step
from ttsnap_lib.rewards.base import Reward
from ttsnap_lib.rewards.checkpoints import read_curriculum
from ttsnap_lib.simulation.metrics import Estimate, kendall_tau, top_select
from ttsnap_lib.style import axes_or_new, tidy
from ttsnap_lib.tensors.tensor import COPIED, FINETUNED, make_rewards

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ttsnap_lib.costs import CostModel
    from ttsnap_lib.simulation.simulate import Curves


TABLES = ("metrics.csv", "metrics.parquet", "losses.csv", "losses.parquet")
"""The tables of a run folder."""

_MEASURES = ("tau", "mse", "top_accuracy", "top_gap")
_COLUMNS = [
    *("step", "updates", "kept_update", "elapsed_s", "first_loss", "last_loss"),
    *(f"{when}_{name}" for when in ("base", "before", "after") for name in _MEASURES),
]


@dataclass(frozen=True)
class Validation:
    """Means over prompts."""

    tau: float
    """Kendall's tau-b with the target, over the images of a prompt."""
    mse: float
    top_accuracy: float
    """How often the best image is among the top share by the reward; the released ratios, averaged."""
    top_gap: float
    """By how much the best kept target falls short, in units of the reward."""

    def row(self, prefix: str) -> dict[str, float]:
        """Return the values under names such as ``before_tau``."""
        return {f"{prefix}_{name}": float(value) for name, value in vars(self).items()}


def measures(scores: np.ndarray, targets: np.ndarray) -> Validation:
    """Return the measures of scores (prompt, image) against targets (prompt, image)."""
    deep = scores[:, :, None]
    accuracy, gap = top_select(deep, targets, resamples=1)
    return Validation(
        tau=float(kendall_tau(deep, targets, resamples=1).mean[0]),
        mse=float(np.square(scores.astype(np.float64) - targets).mean()),
        top_accuracy=float(accuracy.mean[0]),
        top_gap=float(gap.mean[0]),
    )


def metrics_table(folder: str | Path) -> pd.DataFrame:
    """Return one row per finished step of a run folder, in the order of training.

    Columns ``base_*`` are the base model at the step, ``before_*`` the weights that the step started with, ``after_*``
    the weights it ended with; each with ``tau``, ``mse``, ``top_accuracy`` and ``top_gap`` on the validation prompts.
    """
    import pandas as pd

    return _frame(pd.DataFrame(read_curriculum(folder).get("metrics", [])))


def _frame(frame: pd.DataFrame) -> pd.DataFrame:
    # JSON keeps its keys sorted, and has null where a measure is undefined.
    frame = frame[[name for name in _COLUMNS if name in frame]]
    return frame.astype({name: float for name in frame if name.endswith(_MEASURES)})


def losses_table(folder: str | Path) -> pd.DataFrame:
    """Return the loss of every update of a run folder."""
    import pandas as pd

    path = Path(folder) / "losses.csv"
    with failures_as(CheckpointError, f"losses cannot be read: got {path}. Finish at least one step of a run."):
        return pd.read_csv(path)


def write_tables(folder: Path, rows: list[dict[str, Any]], losses: list[dict[str, Any]]) -> None:
    """Write ``metrics`` and ``losses`` as CSV and Parquet."""
    import pandas as pd

    for name, frame in (("metrics", _frame(pd.DataFrame(rows))), ("losses", pd.DataFrame(losses))):
        with atomic_write(folder / f"{name}.csv", "w") as file:
            frame.to_csv(file, index=False, lineterminator="\n")
        with atomic_write(folder / f"{name}.parquet") as file:
            frame.to_parquet(file, index=False)


def compare_at_steps(
    reward: Reward,
    images: Images,
    targets: np.ndarray,
    *,
    steps: Sequence[int] | None = None,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Compare the noise-aware weights with the base, on prompts that neither training nor choice of settings saw.

    Parameters
    ----------
    reward : Reward
        With a series attached.
    images : Images
        The fresh pictures.
    targets : (prompt, image)
        Base rewards of the clean images.
    steps : sequence of int, optional
        All of the series when not given.

    Returns
    -------
    table : DataFrame
        A row per step: ``base_tau``, ``noise_aware_tau``, ``gain``, and 95% intervals over prompts (``gain`` paired).
    gains : ndarray (prompt, step)
        Gain in tau of every prompt.
    """
    import pandas as pd

    steps = list(reward.adapter_steps if steps is None else steps)
    if not steps:
        raise CurriculumError(
            f"reward {reward.name} has no noise-aware weights to compare. Attach a run folder of ttsnap finetune."
        )
    base: list[np.ndarray] = []
    aware: list[np.ndarray] = []
    for step in steps:
        for scores, weights in ((base, None), (aware, step)):
            with reward.at(weights):
                scores.append(score_step(reward, images, step))
    found = [kendall_tau(np.stack(scores, -1), targets, resamples=1).per_prompt for scores in (base, aware)]
    gains = found[1] - found[0]
    rows: dict[str, Any] = {"step": steps}
    for name, values in (("base_tau", found[0]), ("noise_aware_tau", found[1]), ("gain", gains)):
        told = Estimate.over_prompts(np.nan_to_num(values, nan=0.0), 0)
        rows |= {name: told.mean, f"{name}_low": told.low, f"{name}_high": told.high}
    return pd.DataFrame(rows), gains


def loss_curves(losses: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the loss of every update, one stretch per step, a light dot each and a smoothed line; return the axes."""
    from matplotlib.ticker import LogFormatter

    ax = axes_or_new(ax, (5.2, 3.2))
    offset = 0
    for k, (step, rows) in enumerate(losses.groupby("step", sort=False)):
        x = offset + rows["update"].to_numpy()
        ax.plot(x, rows["loss"], ".", color=f"C{k % 2}", markersize=2, alpha=0.35)
        ax.plot(x, rows["loss"].ewm(halflife=max(1, len(rows) / 12)).mean(), color=f"C{k % 2}", linewidth=1.4)
        ax.annotate(str(step), (x.mean(), 1.0), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8)
        offset = x[-1] + 1
    ax.set(xlabel="update (numbers above: denoising step)", ylabel="loss")
    if (losses["loss"] > 0).all():
        ax.set_yscale("log")
        # Plain numbers: a loss seldom spans a power of ten.
        ax.yaxis.set_major_formatter(LogFormatter())
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    return tidy(ax)


def tau_by_step(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the validation tau of each step: the base, what it started with, what it ended with; return the axes."""
    ax = axes_or_new(ax, (5.2, 3.2))
    table = table.sort_values("step")
    styles = {"base": ("0.45", "s", "--"), "before": ("C1", "^", ":"), "after": ("C0", "o", "-")}
    labels = {"base": "base reward", "before": "before this step", "after": "noise-aware"}
    for name, (color, marker, line) in styles.items():
        if f"{name}_tau" in table:
            ax.plot(table["step"], table[f"{name}_tau"], color=color, marker=marker, linestyle=line, markersize=4,
                    linewidth=1.5, label=labels[name])  # fmt: skip
    ax.set(xlabel="denoising step", ylabel="Kendall tau with the clean reward")
    ax.locator_params(axis="x", integer=True)
    ax.legend(frameon=False, loc="lower right")
    return tidy(ax)


def verdict(comparison: pd.DataFrame) -> str:
    """Return in a sentence what a comparison of :func:`compare_at_steps` says."""
    rows = comparison.sort_values("step")
    better, worse = rows[rows["gain_low"] > 0], rows[rows["gain_high"] < 0]
    told = "; ".join(
        f"step {row.step}: {row.gain:+.3f} [{row.gain_low:+.3f}, {row.gain_high:+.3f}]" for row in rows.itertuples()
    )
    said = f"The noise-aware reward ranks held-out images better than the base reward at {len(better)} of {len(rows)} steps"
    said += f", worse at {len(worse)}" if len(worse) else ""
    return f"{said} (difference in Kendall tau; where the interval includes 0 it may be chance): {told}."


def recorded(reward: Reward, images: Images, targets: np.ndarray, steps: Sequence[int]) -> xr.Dataset:
    """Return the reward tensor of pictures at `steps` and of the clean images, for a simulation.

    Steps of which the series of `reward` has no weights are copies of the base reward, as in any tensor. `targets`
    (prompt, image) are the base rewards of the clean images.
    """
    steps = sorted(steps)
    base: list[np.ndarray] = []
    aware: list[np.ndarray] = []
    for step in steps:
        with reward.at(None):
            base.append(score_step(reward, images, step))
        aware.append(base[-1])
        if step in reward.adapter_steps:
            with reward.at(step):
                aware[-1] = score_step(reward, images, step)
    sources = [FINETUNED if step in reward.adapter_steps else COPIED for step in steps]
    return make_rewards(
        np.stack([*base, targets], -1)[None],
        np.stack([*aware, targets], -1)[None],
        rewards=[reward.name],
        prompt_text=images.prompts,
        steps=[*steps, images.n_steps - 1],
        noise_aware_source=np.array([[*sources, COPIED]]),
    )


def gain_by_step(comparisons: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """Draw the gain in tau on fresh prompts with its interval, of :func:`compare_at_steps`, by name; return the axes."""
    ax = axes_or_new(ax, (5.2, 3.0))
    tables = {name: table.sort_values("step") for name, table in comparisons.items()}
    _bands(ax, {name: [table[c] for c in ("step", "gain", "gain_low", "gain_high")] for name, table in tables.items()})
    ax.set(xlabel="denoising step", ylabel="gain in Kendall tau")
    ax.locator_params(axis="x", integer=True)
    return tidy(ax)


def gain_by_budget(curves: Mapping[str, Curves], cost: CostModel, *, ax: Axes | None = None) -> Axes:
    """Draw what series of weights, by name, gain over Best-of-N at equal budget, and the base reward; return the axes."""
    ax = axes_or_new(ax, (5.2, 3.2))
    frames = {name: (one.frame(), "ttsnap") for name, one in curves.items()}  # in the colours of gain_by_step
    frames["base reward (TTSp)"] = (next(iter(frames.values()))[0], "ttsp")  # the same for all
    lines: dict[str, Any] = {}
    for name, (frame, method) in frames.items():
        rows = frame[frame["method"] == method]
        lines[name] = [rows["budget"] / cost.total(1), *(rows[c] for c in ("gain", "gain_low", "gain_high"))]
    _bands(ax, lines)
    ax.set(xlabel="budget per prompt, in finished images", ylabel="gain over Best-of-N")
    return tidy(ax)


def _bands(ax: Axes, lines: Mapping[str, Sequence[Any]]) -> None:
    ax.axhline(0, color="0.25", linewidth=0.8)
    for k, (name, (x, middle, low, high)) in enumerate(lines.items()):
        ax.fill_between(x, low, high, color=f"C{k}", alpha=0.15, linewidth=0)
        ax.plot(x, middle, color=f"C{k}", marker="os^D"[k % 4], markersize=4, linewidth=1.5, label=name)
    if len(lines) > 1:
        ax.legend(frameon=False, fontsize=9)


class LiveCurves:
    """Draws loss and validation tau in the notebook while :func:`finetune` runs; pass it as `listener`.

    A drawing costs a tenth of a second or two, so `every_s` seconds are the least between two of them.
    """

    def __init__(self, every_s: float = 4.0) -> None:
        self.every_s, self._drawn = every_s, time.monotonic()
        self.losses: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self._handle: Any = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Take an event of the run."""
        if event["event"] == "update":
            self.losses.append(event)
        elif event["event"] == "step":
            self.rows.append(event)
        # The end of a step is always drawn, or the last one would be missing from the picture that stays.
        due = event["event"] == "step" or time.monotonic() - self._drawn > self.every_s
        if self.losses and due:
            self._show()
            self._drawn = time.monotonic()

    def figure(self) -> Figure:
        """Return the figure of what has happened so far."""
        import matplotlib.pyplot as plt
        import pandas as pd

        figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.2), layout="constrained")
        if self.losses:
            loss_curves(pd.DataFrame(self.losses), ax=axes[0])
        if self.rows:
            tau_by_step(pd.DataFrame(self.rows), ax=axes[1])
        return figure

    def _show(self) -> None:
        import matplotlib.pyplot as plt
        from IPython.display import display

        figure = self.figure()
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)
        plt.close(figure)
