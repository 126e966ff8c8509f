from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest

from tests.trajectories.test_read import IDENTITY, N_STEPS, PROMPTS, SIZE, fill, picture
from ttsnap_lib.errors import TrajectoryError
from ttsnap_lib.trajectories import plots as plots_images
from ttsnap_lib.trajectories.layout import extend
from ttsnap_lib.trajectories.read import folder_diversity, pairwise_distances

mpl.use("Agg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("sheet") / "set")


def test_distances_are_what_they_say():
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    half = np.where(np.arange(2)[:, None, None] == 0, black, white)
    distances = pairwise_distances(np.stack([black, white, half]))
    np.testing.assert_allclose(distances, [1, np.sqrt(0.5), np.sqrt(0.5)])  # pairs (0, 1), (0, 2), (1, 2)
    cosine = pairwise_distances(np.stack([black, white, half]), lambda images: np.array([[1, 0], [0, 2], [3, 0]]))
    np.testing.assert_allclose(cosine, [1, 0, 1], atol=1e-12)


def test_diversity_of_a_folder(folder):
    frame = folder_diversity({"plain": folder, "again": folder}, step=1, prompts=[1])
    assert frame["setting"].tolist() == ["plain", "again"]
    expected = pairwise_distances(np.stack([picture(1, image, 1) for image in range(3)])).mean()
    assert frame["distance"].tolist() == [expected, expected]
    assert frame["images"].tolist() == [3, 3]


def test_diversity_needs_two_images(tmp_path):
    extend(tmp_path, IDENTITY, PROMPTS, 1)
    with pytest.raises(TrajectoryError, match="two or more"):
        folder_diversity({"plain": tmp_path})


def test_contact_sheet_shows_steps_across_and_seeds_down(folder):
    ax = plots_images.contact_sheet(folder, 1, images=[2, 0], steps=[0, -1])
    sheet = ax.images[0].get_array()
    height, width = SIZE
    np.testing.assert_array_equal(sheet[:height, :width], picture(1, 2, 0))
    np.testing.assert_array_equal(sheet[-height:, -width:], picture(1, 0, N_STEPS - 1))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "3"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["2", "0"]
    assert "a dog" in ax.get_title(loc="left")


def test_bars_show_the_means(folder):
    frame = folder_diversity({"plain": folder, "last": folder})
    ax = plots_images.diversity_bars(frame)
    means = frame.groupby("setting", sort=False)["distance"].mean()
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], means)
    other = plots_images.diversity_bars(frame, ax=ax)
    assert other is ax
