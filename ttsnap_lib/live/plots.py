"""Pictures of an online run: rows of estimates at each check, pruned ones crossed, the winner framed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.sets import mean_distance
from ttsnap_lib.style import COLORS, METHOD_LABELS, axes_or_new, method_style, reward_label, tidy

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ttsnap_lib.live.record import SearchRecord, SearchResult

_CROSS = "#c03030"  # on any picture
_PARTS = {"step": "step", "decode": "decode", "preview_decode": "decode, tiny", "verify": "score"}


def gallery(record: SearchRecord, *, columns: int = 16) -> Figure:
    """Draw the candidates at each check, the `columns` best first: of a run in this process, pictures are not saved."""
    import matplotlib.pyplot as plt

    selecting = next(r for r, name in enumerate(record.rewards) if name not in record.report)
    parts = [record] if record.draft is None else [record.draft, record]
    reached = [
        (part, k) for part in parts for k, step in enumerate(part.checks) if any(at == step for _, at in part.previews)
    ]
    columns = min(columns, len(record.seeds))
    figure, axes = plt.subplots(
        max(1, len(reached)), columns, squeeze=False, layout="constrained",
        figsize=(0.8 * columns + 1.6, 1.14 * max(1, len(reached)) + 0.4),
    )  # fmt: skip
    for ax in axes.ravel():
        ax.set_axis_off()
    for row, (part, k) in enumerate(reached):
        step = part.checks[k]
        scores = part.scores[:, k, selecting]
        order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable").tolist()
        shown = [candidate for candidate in order if (candidate, step) in part.previews]
        is_final = part is record and k == len(record.checks) - 1
        if is_final and record.chosen:  # not beyond the columns, however low its reward
            shown = [*record.chosen, *(candidate for candidate in shown if candidate not in record.chosen)]
        for place, candidate in enumerate(shown[:columns]):
            ax = axes[row, place]
            failed = np.isnan(scores[candidate])
            dropped = failed or part.pruned_at[candidate] == step
            lost = dropped or (is_final and candidate not in record.set)
            ax.imshow(part.previews[candidate, step], interpolation="nearest")
            label = "failed" if failed else f"{scores[candidate]:.2f}"
            ax.set_title(f"#{candidate}  {label}", fontsize=7, pad=2, color="0.45" if lost else "black")
            if dropped or candidate in record.set:
                ax.set_axis_on()
                ax.set(xticks=[], yticks=[])
                for spine in ax.spines.values():
                    spine.set(color=_CROSS if dropped else COLORS[1], linewidth=1 if dropped else 3)
            if dropped:
                height, width = part.previews[candidate, step].shape[:2]
                ax.plot((-0.5, width - 0.5), (-0.5, height - 0.5), color=_CROSS, linewidth=1)
        what = "clean image" if is_final else f"step {step}" if part is record else f"draft of {step + 1} steps"
        more = f"\nbest {columns} shown" if len(shown) > columns else ""
        axes[row, 0].annotate(f"{what}\n{len(shown)} scored{more}", (-0.12, 0.5), xycoords="axes fraction", ha="right",
                              va="center", fontsize=8)  # fmt: skip
    figure.suptitle(_headline(record, selecting), fontsize=9)
    return figure


def _headline(record: SearchRecord, selecting: int) -> str:
    prompt = record.prompt if len(record.prompt) <= 70 else record.prompt[:67] + "..."
    line = f"{METHOD_LABELS.get(record.method, record.method)}: {prompt}"
    seen = np.flatnonzero(~np.isnan(record.scores[record.winner, :, selecting]))
    if record.winner < 0 or not len(seen):
        return line
    best = record.scores[record.winner, seen[-1], selecting]
    what = "winner" if seen[-1] == len(record.checks) - 1 else "best so far"
    line = f"{line}\n{what}: candidate {record.winner}, {record.rewards[selecting]} {best:.3f}"
    if record.chosen:
        mean = np.nanmean(record.scores[record.chosen, seen[-1], selecting])
        line += f"; set of {len(record.chosen)}: mean {mean:.3f}"
        if len(record.distances) > 1:
            line += f", mean distance {mean_distance(np.array(record.distances)):.3f}"
    return line


class LiveGallery:
    """Draws the gallery in the notebook anew after each stage: pass one as ``on_check`` of a search."""

    def __init__(self, columns: int = 16) -> None:
        self.columns = columns
        self.figure: Figure | None = None  # the last drawing
        self._handle: Any = None

    def __call__(self, record: SearchRecord) -> None:
        """Draw `record`; the first time a new output appears, later it is replaced."""
        import matplotlib.pyplot as plt
        from IPython.display import display

        self.figure = gallery(record, columns=self.columns)
        plt.close(self.figure)  # or the notebook would show it a second time at the end of the cell
        if self._handle is None:
            self._handle = display(self.figure, display_id=True)
        else:
            self._handle.update(self.figure)


def winners(results: Mapping[str, SearchResult]) -> Figure:
    """Draw the chosen images side by side, each with its method, score and candidates."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), squeeze=False, figsize=(2.2 * len(results), 2.8), layout="constrained"
    )  # fmt: skip
    for ax, (method, result) in zip(axes[0], results.items(), strict=True):
        ax.imshow(result.image, interpolation="nearest")
        name, score = next((name, value) for name, value in result.scores.items() if name not in result.record.report)
        count = len(result.record.seeds)
        ax.set_title(f"{METHOD_LABELS.get(method, method)}\n{name} {score:.3f}, {count} candidates", fontsize=8)
        ax.set_axis_off()
    return figure


def image_sets(results: Mapping[str, SearchResult]) -> Figure:
    """Draw the set of each method in a row, the winner first; each image with its reward, each row with its means."""
    import matplotlib.pyplot as plt

    columns = max(len(result.images) for result in results.values())
    figure, axes = plt.subplots(
        len(results), columns, squeeze=False, figsize=(1.5 * columns + 1.2, 1.9 * len(results)), layout="constrained"
    )
    for ax in axes.ravel():
        ax.set_axis_off()
    for row, (method, result) in zip(axes, results.items(), strict=True):
        name, table = next(one for one in result.record.rewards if one not in result.record.report), result.set_frame()
        for ax, image, candidate, reward in zip(row, result.images, table["candidate"], table[name], strict=False):
            ax.imshow(image, interpolation="nearest")
            ax.set_title(f"#{candidate}  {reward:.2f}", fontsize=8)
        told = f"{METHOD_LABELS.get(method, method)}\nmean {name} {table[name].mean():.3f}"
        if result.record.distances:
            told += f"\nmean distance {table['distance'].mean():.3f}"
        row[0].annotate(told, (-0.1, 0.5), xycoords="axes fraction", ha="right", va="center", fontsize=8)
    return figure


def headline(table: pd.DataFrame, reward: str, images: float) -> str:
    """Return in words what the last method of :func:`ttsnap_lib.live.many.compare` gains at the price of `images`."""
    row = table.iloc[-1]
    value, low, high = row["difference"], row["low"], row["high"]
    told = (
        f"At the price of {images:.3g} images, {METHOD_LABELS[row['method']]} tries {row['candidates']:.0f} seeds on "
        f"{row['prompts']} prompts and {'gains' if value >= 0 else 'loses'} {value:+.3f} [{low:+.3f}, {high:+.3f}] "
        f"{reward_label(reward)} against Best-of-N."
    )
    return told if low > 0 or high < 0 else f"{told} That may be chance; more prompts tell more."


def batch_curve(by_batch: pd.DataFrame) -> Figure:
    """Plot the milliseconds of a candidate by batch size on the left, those of its whole batch on the right.

    `by_batch` is that of a :class:`ttsnap_lib.live.measure.Measurement`. Larger batches pay as far as the left lines fall;
    where the right ones are flat, one more candidate costs nothing.
    """
    import matplotlib.pyplot as plt

    figure, (each, whole) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    for (part, rows), color, marker in zip(by_batch.groupby("part", sort=False), COLORS, "os^D", strict=False):
        size = rows["batch_size"]
        for ax, factor in ((each, 1e3), (whole, 1e3 * size)):
            ax.fill_between(size, rows["low"] * factor, rows["high"] * factor, color=color, alpha=0.18, linewidth=0)
            ax.plot(size, rows["seconds"] * factor, label=_PARTS[str(part)], color=color, marker=marker, markersize=4)
    for ax, what in ((each, "a candidate"), (whole, "the whole batch")):
        sizes = sorted(set(by_batch["batch_size"]))
        ax.set(xscale="log", yscale="log", xlabel="candidates in a batch", ylabel=f"ms for {what}")
        ax.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        ax.minorticks_off()
        tidy(ax)
    each.legend(frameon=False, fontsize=8)
    return figure


def per_prompt(frames: Mapping[str, pd.DataFrame], reward: str, *, most: int = 24, ax: Axes | None = None) -> Axes:
    """Plot the reward of each prompt's chosen image by method, a row a prompt, with its text and its gain, sorted by the gain.

    `frames` maps a method to the table of :func:`ttsnap_lib.live.many.search_many`; the gain is that of the last method over
    the first. Of more than `most` prompts those that gain most and those that lose most are drawn.
    """
    import textwrap

    values = {method: frame.set_index("prompt_index")[reward].astype(float) for method, frame in frames.items()}
    texts: dict[Any, str] = {}
    for frame in frames.values():
        texts |= dict(zip(frame["prompt_index"], frame["prompt"], strict=True))
    table = np.array([series.reindex(list(texts)).to_numpy() for series in values.values()])
    gain = table[-1] - table[0]
    order = np.argsort(-gain, kind="stable")  # what a method lacks comes last
    shown = order if len(order) <= most else np.r_[order[: most - most // 2], order[len(order) - most // 2 :]]
    rows, left_out = np.arange(len(shown), dtype=float), len(order) - len(shown)
    if left_out:
        rows[most - most // 2 :] += 1  # room for a line of words
    ax = axes_or_new(ax, (8.2, 1.0 + 0.24 * (rows[-1] + 1)))
    ax.hlines(
        rows, np.nanmin(table[:, shown], axis=0), np.nanmax(table[:, shown], axis=0), color="0.8", linewidth=2, zorder=1
    )
    for method, row in zip(values, table, strict=True):
        style = method_style(method) | {"linestyle": "none"}
        ax.plot(row[shown], rows, label=METHOD_LABELS.get(method, method), markersize=5, zorder=2, **style)
    for y, one in zip(rows, gain[shown], strict=True):
        told = "" if np.isnan(one) else f"{one:+.3f}"
        ax.annotate(told, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=8,
                    color=method_style(list(values)[-1] if one > 0 else "best_of_n")["color"])  # fmt: skip
    if left_out:
        ax.annotate(f"{left_out} prompts between them", (0.5, most - most // 2), xycoords=("axes fraction", "data"),
                    ha="center", va="center", fontsize=8, color="0.45")  # fmt: skip
    numbers = list(texts)
    names = [f"{textwrap.shorten(texts[numbers[k]], 64, placeholder=' ...')}  {numbers[k]}" for k in shown]
    ax.set_yticks(rows, names, fontsize=8)
    ax.set_ylim(rows[-1] + 0.6, -0.6)
    ax.set_xlabel(f"{reward_label(reward)} of the chosen image (right: the gain)")
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, ncols=len(values), loc="lower left", bbox_to_anchor=(0, 1))
    return tidy(ax, "x")
