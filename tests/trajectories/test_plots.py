"""Contact sheets and bars show what they say."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest

from tests.worlds import FOLDER_STEPS, PICTURE, fill, picture, prompts_of
from ttsnap_lib.trajectories import plots
from ttsnap_lib.trajectories.read import folder_diversity

mpl.use("Agg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("sheet") / "set", n_prompts=2)


def test_contact_sheet_shows_steps_across_and_seeds_down(folder):
    ax = plots.contact_sheet(folder, 1, images=[2, 0], steps=[0, -1])
    sheet = ax.images[0].get_array()
    height, width = PICTURE
    np.testing.assert_array_equal(sheet[:height, :width], picture(1, 2, 0))
    np.testing.assert_array_equal(sheet[-height:, -width:], picture(1, 0, FOLDER_STEPS - 1))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "3"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["2", "0"]
    assert prompts_of(2)[1] in ax.get_title(loc="left")


def test_bars_show_the_means(folder):
    frame = folder_diversity({"plain": folder, "last": folder})
    ax = plots.diversity_bars(frame)
    means = frame.groupby("setting", sort=False)["distance"].mean()
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], means)
    assert plots.diversity_bars(frame, ax=ax) is ax
