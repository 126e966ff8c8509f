"""Draws the figures of the README and the documentation again, from data.

``python docs/figures/make.py [NAME ...] [--values FOLDER]``: each notebook's figure comes from a headless run of the notebook, which
is not run twice (``--force`` does); ``published`` needs the folder of the published reward values.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NOTEBOOKS: dict[str, tuple[str, ...]] = {
    "start_here": ("contact_sheet",),
    "simulate": ("reward_against_budget", "tau_per_step"),
    "explore": ("explore",),
    "generate": ("contact_sheet",),
    "score": ("reward_histograms",),
    "finetune": ("tau_by_step",),
    "search": ("gallery_pruned",),
}
"""Notebook -> the figures of its run, with its own default parameters, that the documentation shows."""
WIDEST_PX = 1200


def main(arguments: list[str] | None = None) -> int:
    """Draw the figures that are named, or all that can be drawn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"published, {', '.join(NOTEBOOKS)} (default: all)")
    parser.add_argument("--values", type=Path, metavar="FOLDER", help="published reward values, for `published`")
    parser.add_argument("--force", action="store_true", help="run the notebooks again")
    given = parser.parse_args(arguments)
    known = ["published", *NOTEBOOKS]
    for name in given.names:
        if name not in known:
            parser.error(f"{name!r} is no figure; known: {', '.join(known)}")
    for name in given.names or known:
        if name != "published":
            draw_notebook(name, force=given.force)
        elif given.values is not None:
            draw_published(given.values)
        else:
            print("published: skipped; it needs the published values: --values FOLDER", file=sys.stderr)
            if given.names:
                return 1
    return 0


def draw_notebook(name: str, *, force: bool = False) -> list[Path]:
    """Run a notebook headless and keep its figures as ``<notebook>-<figure>.png``."""
    from PIL import Image

    from ttsnap_lib.runs.run import run

    result = run(name, force=force, progress=True)
    kept = []
    for figure in NOTEBOOKS[name]:
        with Image.open(result.figures[figure]) as picture:
            kept.append(keep(picture, f"{name}-{figure}"))
    return kept


def draw_published(values: Path) -> Path:
    """Draw the README's figure: published FLUX.1-dev rewards, exact costs at 512 px, each reward selecting alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel, import_published
    from ttsnap_lib.simulation import plots, simulate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pools that repeat themselves
        dataset = import_published(values, "flux", ["image_reward", "pickscore"])
    figure, axes = plt.subplots(2, 2, figsize=(10.8, 5.6), layout="constrained", sharex="col", height_ratios=(3, 2))
    for k, reward in enumerate(("image_reward", "pickscore")):
        cost = CostModel.preset(f"flux-512+{reward}")
        result = simulate.curves(
            dataset.sel(reward=[reward]), ["best_of_n", "ttsp", "ttsnap"], [k * cost.total(1) for k in range(2, 21)],
            cost, PUBLISHED_SCHEDULE, iterations=200, rng=0,
        )  # fmt: skip
        plots.reward_panels(result, cost, axes=axes[:, [k]])
        print(plots.headline(result, cost))
        print(f"published, {reward}:\n{result.relative_gains().round(1).to_string(index=False)}")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    with Image.open(buffer) as picture:
        return keep(picture, "reward_against_budget")


def keep(picture: Any, name: str) -> Path:
    """Write a picture, made smaller where it is wide, in 256 colours: a figure needs no more."""
    from PIL import Image

    if picture.width > WIDEST_PX:
        picture = picture.resize(
            (WIDEST_PX, round(picture.height * WIDEST_PX / picture.width)), Image.Resampling.LANCZOS
        )
    path = HERE / f"{name}.png"
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(HERE.parents[1])}: {path.stat().st_size / 1e3:.0f} kB")
    return path


if __name__ == "__main__":
    sys.exit(main())
