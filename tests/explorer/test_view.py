"""The explorer's picture and numbers as text, without widgets."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from tests.explorer.test_result import LATER, ONE, dataset, pool, state  # noqa: F401 - fixtures
from ttsnap_lib import Schedule
from ttsnap_lib.explorer.pool import Pool
from ttsnap_lib.explorer.result import compute
from ttsnap_lib.explorer.view import Panels, draw, numbers_html

EARLY = Schedule((2, 6, 11), (0.4, 0.4, 0.5))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_moving_gives_the_picture_of_a_full_drawing(pool):  # noqa: F811
    """Bit for bit, after every move: nothing of the move before may stay."""
    moved = Panels()
    seen = []
    for schedule, budget in ((EARLY, 4), (LATER, 4), (LATER, 8), (Schedule((3, 4, 5, 9), (0.7,) * 4), 6), (EARLY, 4)):
        result = compute(state(schedule=schedule, budget=budget * ONE), pool, 10)
        moved.update(result)
        seen.append(pixels(moved.png()))
        moved._background = None  # with the same limits, all anew
        np.testing.assert_array_equal(seen[-1], pixels(moved.png()))
    assert all(np.abs(one - other).max() > 100 for one, other in itertools.pairwise(seen))


def test_a_saved_figure_shows_what_moves(pool, tmp_path):  # noqa: F811
    figure = draw(compute(state(schedule=LATER), pool, 10))
    above, funnel = figure.axes[0], figure.axes[-1]
    labels = [text.get_text() for text in above.get_legend().get_texts()]
    assert labels == ["this schedule (TTSnap)", "A (TTSnap)"]
    assert any("keep ratio (alpha) 0.5" in text.get_text() for text in funnel.texts)
    figure.savefig(tmp_path / "with.png", dpi=60)
    for line in above.lines:
        line.set_visible(False)
    figure.savefig(tmp_path / "without.png", dpi=60)
    shown, hidden = (pixels((tmp_path / name).read_bytes()) for name in ("with.png", "without.png"))
    assert np.abs(shown - hidden).max() > 100  # animated artists are in a saved figure


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "best_of_n"},
        {"pins": (("A", "ttsnap", Schedule((0,), (0.05,))),)},
        {"pins": ()},
        {"pins": (("A", "ttsp", LATER), ("B", "best_of_n", LATER), ("C", "ttsnap", EARLY))},
    ],
)
def test_every_state_can_be_drawn(dataset, pool, changes):  # noqa: F811
    one = Pool(dataset.isel(prompt=[0]), iterations=4)
    for tensor in (pool, one):
        result = compute(state(budget=12 * ONE, **changes), tensor)
        panels = Panels()
        panels.update(result)
        assert pixels(panels.png()).std() > 10
        assert ("unknown" in numbers_html(result)) == (tensor is one)
