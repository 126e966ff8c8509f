"""Pictures of an online run: rows of estimates at each check, pruned ones dimmed, the winner framed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .search_record import SearchRecord

__all__ = ["gallery"]


def gallery(record: SearchRecord, *, columns: int = 16, tile_in: float = 0.8) -> Figure:
    """Draw the candidates at each check, best score first.

    Parameters
    ----------
    record : SearchRecord
        Of a run in this process (pictures are not saved with a record).
    columns : int
        Candidates shown per check; the others are counted in the row's label.
    tile_in : float
        Side of a picture in inches.
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    frame_color = sns.color_palette("colorblind")[1]
    reached = [k for k, step in enumerate(record.checks) if any(at == step for _, at in record.previews)]
    figure, axes = plt.subplots(
        max(1, len(reached)), columns, figsize=(tile_in * columns + 1.6, (tile_in + 0.34) * max(1, len(reached))),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for ax in axes.ravel():
        ax.set_axis_off()
    for row, k in enumerate(reached):
        step = record.checks[k]
        scores = record.scores[:, k, 0]
        shown = [
            c for c in np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable") if (c, step) in record.previews
        ]
        is_final = k == len(record.checks) - 1
        for place, candidate in enumerate(shown[:columns]):
            ax = axes[row, place]
            dropped = record.pruned_at[candidate] == step or (is_final and candidate != record.winner)
            ax.imshow(record.previews[candidate, step], alpha=0.3 if dropped else 1.0, interpolation="nearest")
            ax.set_title(f"{scores[candidate]:.2f}", fontsize=7, pad=2, color="0.55" if dropped else "black")
            if candidate == record.winner:
                ax.set_axis_on()
                ax.set(xticks=[], yticks=[])
                for spine in ax.spines.values():
                    spine.set(color=frame_color, linewidth=3)
        more = f"\n+{len(shown) - columns} more" if len(shown) > columns else ""
        what = "clean image" if is_final else f"step {step}"
        axes[row, 0].annotate(f"{what}\n{len(shown)} scored{more}", (-0.12, 0.5), xycoords="axes fraction", ha="right",
                              va="center", fontsize=8)  # fmt: skip
    return figure
