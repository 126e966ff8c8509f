"""Tables of a run, and the comparison of a series with its base on fresh prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.errors import CurriculumError
from ttsnap_lib.metrics import bootstrap_means, kendall_tau
from ttsnap_lib.paths import atomic_write
from ttsnap_lib.rewards.base import Reward

from .images import Images
from .targets import score_step

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare_at_steps", "gain_where_useful", "metrics_table", "write_tables"]

_MEASURES = ("tau", "mse", "top_accuracy", "top_gap")
_COLUMNS = [
    *("step", "updates", "kept_update", "early_stop", "elapsed_s", "first_loss", "last_loss"),
    *(f"{when}_{name}" for when in ("base", "before", "after") for name in _MEASURES),
]


def metrics_table(folder: str | Path) -> pd.DataFrame:
    """Return one row per finished step of a run folder, in the order of training.

    Columns ``base_*`` are the base model at the step, ``before_*`` the weights that the step started with, ``after_*``
    the weights it ended with; each with ``tau``, ``mse``, ``top_accuracy`` and ``top_gap`` on the validation prompts.
    """
    import pandas as pd

    from ttsnap_lib.rewards.steps import read_curriculum

    return _frame(pd.DataFrame(read_curriculum(folder).get("metrics", [])))


def write_tables(folder: Path, rows: list[dict[str, Any]], losses: list[dict[str, Any]]) -> None:
    """Write ``metrics`` and ``losses`` as CSV and Parquet."""
    import pandas as pd

    for name, content in (("metrics", rows), ("losses", losses)):
        frame = pd.DataFrame(content)
        frame = _frame(frame) if name == "metrics" else frame
        with atomic_write(folder / f"{name}.csv", "w") as file:
            frame.to_csv(file, index=False, lineterminator="\n")
        with atomic_write(folder / f"{name}.parquet") as file:
            frame.to_parquet(file, index=False)


def _frame(frame: pd.DataFrame) -> pd.DataFrame:
    # JSON keeps its keys sorted, and has null where a measure is undefined.
    frame = frame[[name for name in _COLUMNS if name in frame]]
    return frame.astype({name: float for name in frame if name.endswith(_MEASURES)})


def compare_at_steps(
    reward: Reward,
    images: Images,
    targets: np.ndarray,
    *,
    steps: Sequence[int] | None = None,
    rng: np.random.Generator | int = 0,
    resamples: int = 2000,
    progress: Callable[[int, int], None] | None = None,
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
    rng, resamples
        Of the bootstrap over prompts.
    progress : callable, optional
        ``progress(done, total)`` per step.

    Returns
    -------
    table : DataFrame
        A row per step: ``base_tau``, ``noise_aware_tau``, ``gain``, and 95% intervals over prompts (``gain`` paired).
    gains : ndarray (prompt, step)
        Gain in tau of every prompt, for :func:`gain_where_useful`.

    Raises
    ------
    CurriculumError
        A reward without a series, or no steps.
    """
    import pandas as pd

    steps = list(reward.adapter_steps if steps is None else steps)
    if not steps:
        raise CurriculumError(
            f"reward {reward.name} has no noise-aware weights to compare",
            value=steps,
            bound="one step or more",
            remedy="Attach a run folder of ttsnap finetune, or name steps.",
        )
    base, aware = [], []
    for done, step in enumerate(steps, 1):
        base.append(score_step(reward.use_step(None), images, step))
        aware.append(score_step(reward.use_step(step), images, step))
        if progress is not None:
            progress(done, len(steps))
    reward.use_step(None)
    found = [kendall_tau(np.stack(scores, -1), targets, resamples=1).per_prompt for scores in (base, aware)]
    gains = found[1] - found[0]
    rows: dict[str, Any] = {"step": steps}
    for name, values in (("base_tau", found[0]), ("noise_aware_tau", found[1]), ("gain", gains)):
        kept = np.nan_to_num(values, nan=0.0)
        low, high = np.quantile(bootstrap_means(kept, rng, resamples), [0.025, 0.975], axis=0)
        rows |= {name: kept.mean(0), f"{name}_low": low, f"{name}_high": high}
    return pd.DataFrame(rows), gains


def gain_where_useful(
    table: pd.DataFrame, gains: np.ndarray, low: float = 0.1, high: float = 0.5, *, rng: int = 0, resamples: int = 2000
) -> dict[str, Any]:
    """Return the mean gain, with its interval over prompts, over the steps where the base tau is in [low, high].

    These are the steps at which pruning pays: the base reward knows something, and not yet enough.

    Parameters
    ----------
    table, gains
        As :func:`compare_at_steps` returns them.
    low, high : float
        Of the base tau.
    rng, resamples
        Of the bootstrap over prompts.

    Returns
    -------
    dict
        ``steps``, ``gain``, ``low``, ``high`` and ``worst_step_gain``.
    """
    chosen = table["base_tau"].between(low, high).to_numpy()
    per_prompt = np.nan_to_num(gains[:, chosen], nan=0.0).mean(1)
    bounds = np.quantile(bootstrap_means(per_prompt, rng, resamples), [0.025, 0.975])
    return {
        "steps": table["step"][chosen].tolist(),
        "gain": float(per_prompt.mean()),
        "low": float(bounds[0]),
        "high": float(bounds[1]),
        "worst_step_gain": float(table["gain"][chosen].min()) if chosen.any() else float("nan"),
    }
