"""Summaries and figures of reward tensors."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from scipy.stats import spearmanr

from tests.worlds import fill
from ttsnap_lib.errors import ConfigError, TensorError
from ttsnap_lib.scoring import report as plots_scores
from ttsnap_lib.scoring.report import best_and_worst, rank_correlation, step_summary
from ttsnap_lib.style import reward_label
from ttsnap_lib.tensors.tensor import make_rewards

matplotlib.use("Agg")


@pytest.fixture
def dataset():
    """Two rewards, three prompts, six images, four steps; ties and a missing value."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(2, 3, 6, 4)).astype(np.float32)
    base[0, 0, :, 0] = base[0, 0, :, 0].round()
    base[1, 2, 4, 1] = np.nan
    source = np.full((2, 4), "copied_from_base")
    source[0, 1] = "finetuned"
    return make_rewards(base, base + 1, rewards=["pickscore", "oracle"], noise_aware_source=source)


def test_rank_correlation_is_spearman_within_prompts(dataset):
    frame = rank_correlation(dataset)
    assert frame.shape == (8, 8) and frame.index.names == ["reward", "step"]
    assert np.allclose(np.diag(frame), 1) and np.allclose(frame, frame.T)
    base = dataset["base"].values
    for one, other in (((0, 0), (0, 3)), ((0, 2), (1, 0)), ((1, 1), (0, 3))):
        values = [spearmanr(base[one[0], p, :, one[1]], base[other[0], p, :, other[1]]).statistic for p in range(3)]
        expected = np.nanmean(values)  # the prompt with the missing value does not count
        names = [(str(dataset["reward"].values[reward]), step) for reward, step in (one, other)]
        assert frame.loc[names[0], names[1]] == pytest.approx(expected, abs=1e-12)
    assert list(rank_correlation(dataset, every=3).index.get_level_values("step")) == [0, 3, 0, 3]
    with pytest.raises(TensorError, match="images per prompt"):
        rank_correlation(dataset.isel(image=[0]))


def test_summary(dataset):
    frame = step_summary(dataset).set_index(["reward", "variant", "step"])
    block = dataset["base"].sel(reward="pickscore", step=2).values
    row = frame.loc[("pickscore", "base", 2)]
    assert row["mean"] == pytest.approx(block.mean()) and row["median"] == pytest.approx(np.median(block))
    assert row["sd_within_prompt"] == pytest.approx(block.std(axis=1).mean())
    assert frame.loc[("oracle", "base", 1), "missing"] == 1


def test_best_and_worst(dataset):
    frame = best_and_worst(dataset, 1, reward="oracle", n=2)
    values = dataset["base"].sel(reward="oracle", prompt=1).isel(step=-1).values
    assert frame["image"].tolist() == [*np.argsort(-values)[:2], *np.argsort(values)[:2]]
    assert len(best_and_worst(dataset, 1, n=99)) == 12
    with pytest.raises(ConfigError):
        best_and_worst(dataset, 1, reward="x")


def test_figures_show_what_they_say(dataset, tmp_path):
    both = plots_scores.reward_histograms(dataset, bins=40)
    assert len(both.axes) == 4 * 2
    assert [ax.get_xlabel().split(",")[0] for ax in both.axes[-2:]] == [
        reward_label(str(r)) for r in dataset["reward"].values
    ]
    # What differs between prompts alone is not seen: shifted as a whole, a prompt has the same histogram.
    wide = {name: dataset[name].astype(float) for name in ("base", "noise_aware")}
    shifted = {name: values + 100 * dataset["prompt"] for name, values in wide.items()}
    both, shifted = (plots_scores.reward_histograms(dataset.assign(values), bins=40) for values in (wide, shifted))
    heights = [[patch.get_height() for ax in figure.axes for patch in ax.patches[:40]] for figure in (both, shifted)]
    assert heights[0] == heights[1]
    figure = plots_scores.reward_histograms(dataset.isel(reward=[0]), bins=40)
    assert [ax.get_ylabel() for ax in figure.axes] == [f"step {k}" for k in range(4)]
    drawn = [sum(patch.get_height() for patch in ax.patches[:40]) for ax in figure.axes]
    assert drawn == [18] * 4  # every image counted once
    assert [len(ax.patches) for ax in figure.axes] == [40, 41, 40, 40]  # the noise-aware outline at step 1 alone
    ax = plots_scores.correlation_heatmap(rank_correlation(dataset))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2", "3"] * 2
    folder = fill(tmp_path / "set", n_prompts=2, n_images=6)
    figure = plots_scores.extreme_images(folder, best_and_worst(dataset, 1, n=3), 1)
    shown = [ax for ax in figure.axes if ax.images]
    assert len(shown) == 6
    best = best_and_worst(dataset, 1, n=3).iloc[0]
    assert shown[0].get_title().startswith(f"image {best['image']}: ") and len(shown[0].get_title()) > len(
        "image 0: 0."
    )
