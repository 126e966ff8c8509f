import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.errors import ConfigError
from ttsnap_lib.simulation import metrics, plots
from ttsnap_lib.simulation.simulate import curves
from ttsnap_lib.tensors.tensor import synthetic_rewards

COST = CostModel(step=3, verify=0.5, decode=1, n_steps=8)
SCHEDULE = Schedule((1, 4), (0.5, 0.4))


@pytest.fixture(scope="module")
def result():
    dataset = synthetic_rewards(12, 40, 8, rewards=("image_reward", "pickscore"))
    return curves(dataset, ["best_of_n", "ttsp", "ttsnap"], [80, 120, 200], COST, SCHEDULE)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_reward_against_budget(result, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *a: pytest.fail("a plot must not show itself"))
    frame = result.frame()
    ax = plots.reward_against_budget(frame, "pickscore")
    assert ax.get_xlabel() == "budget per prompt (TFLOPs)" and "PickScore" in ax.get_ylabel()
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == ["Best-of-N", "TTSp", "TTSnap"]
    rows = frame[(frame["method"] == "ttsnap") & (frame["reward"] == "pickscore")]
    assert np.array_equal(lines["TTSnap"].get_ydata(), rows["mean"])
    assert len({line.get_marker() for line in lines.values()}) == 3  # told apart without colour too
    _, given = plt.subplots()
    assert plots.reward_against_budget(frame, "pickscore", ax=given) is given
    with pytest.raises(ConfigError, match="Name the reward"):
        plots.reward_against_budget(frame)
    assert len(plots.reward_panels(frame).axes) == 2


def test_gain_bars(result):
    gains = result.relative_gains()
    ax = plots.gain_bars(gains)
    heights = [bar.get_height() for container in ax.containers if hasattr(container, "patches") for bar in container]
    assert sorted(heights) == pytest.approx(sorted(gains["relative_gain"]))
    assert not plots.gain_bars(gains[:0]).containers  # Best-of-N alone


def test_tau_per_step():
    dataset = synthetic_rewards(5, 20, 8)
    final = dataset["base"].values[0, :, :, -1]
    both = [metrics.kendall_tau(dataset[name].values[0], final) for name in ("base", "noise_aware")]
    ax = plots.tau_per_step(*both, steps=np.arange(8))
    assert [line.get_label() for line in ax.get_lines()] == ["base reward", "noise-aware reward"]
    assert np.array_equal(ax.get_lines()[1].get_ydata(), both[1].mean)
    assert len(plots.tau_per_step(both[0]).get_lines()) == 1


def test_survivor_funnel():
    ax = plots.survivor_funnel(COST, SCHEDULE, 20)
    assert [bar.get_width() for bar in ax.patches] == [20, 10, 4]
    texts = " ".join(text.get_text() for text in ax.texts)
    assert "keep ratio (alpha) 0.5" in texts and "choose one" in texts
    assert f"{COST.total(20, SCHEDULE):.4g}" in ax.get_title(loc="left")
