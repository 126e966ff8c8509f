import re

import numpy as np
import pytest
from scipy.integrate import simpson
from scipy.stats import kendalltau, t

from tests.benchmarks import bench_coverage
from ttsnap_lib import best_of_n, relative_gain
from ttsnap_lib.errors import ConfigError, TensorError
from ttsnap_lib.simulation import metrics as m
from ttsnap_lib.tensors.tensor import synthetic_rewards


def test_tau_b_is_scipys_with_and_without_ties():
    rng = np.random.default_rng(0)
    final = rng.standard_normal((3, 30)).round(1)  # rounding makes ties
    scores = rng.standard_normal((3, 30, 4)).round(1)
    scores[0, :, 2] = 5.0  # constant: no tau
    tau = m.kendall_tau(scores, final)
    for p in range(3):
        for s in range(4):
            expected = kendalltau(scores[p, :, s], final[p]).statistic
            assert tau.per_prompt[p, s] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert tau.mean[2] == pytest.approx(np.nanmean(tau.per_prompt[:, 2]))
    assert (tau.low <= tau.mean + 1e-12).all() and (tau.mean <= tau.high + 1e-12).all()


@pytest.mark.parametrize("n_prompts", [6, 60])
def test_interval_covers_the_mean_about_as_often_as_it_says(n_prompts):
    rng = np.random.default_rng(1)
    worlds = rng.standard_normal((400, n_prompts))
    told = [m.Estimate.over_prompts(values, rng, resamples=400) for values in worlds]
    assert 367 <= sum(one.low <= 0 <= one.high for one in told) <= 393  # 95% of 400, three standard errors


def test_mean_interval_is_the_percentile_bootstrap_widened_around_the_mean():
    values = np.random.default_rng(2).gamma(1.0, size=(12, 3))  # skewed, and so are the bounds
    boot, mean = m.bootstrap_means(values, 5), values.mean(0)
    wider = t.ppf(0.95, 11) / 1.6448536 * np.sqrt(12 / 11)
    found = m.mean_interval(mean, boot, 12, level=0.9)
    assert (found - mean) == pytest.approx(wider * (np.quantile(boot, [0.05, 0.95], axis=0) - mean))
    # A prompt that drops out of a cell counts for it no more.
    values[3, 1] = np.nan
    told = m.Estimate.over_prompts(values, 5, level=0.9)
    alone = m.Estimate.over_prompts(np.delete(values, 3, 0)[:, 1], 5, level=0.9, resamples=20_000)
    assert told.low[1] == pytest.approx(alone.low, abs=0.05) and told.high[1] == pytest.approx(alone.high, abs=0.05)


def test_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(3).gamma(1.0, size=(9, 2))
    without = m.leave_one_out(values)
    assert without[4] == pytest.approx(np.delete(values, 4, 0).mean(0))
    expected = t.interval(0.95, 8, values.mean(0), values.std(0, ddof=1) / 3)
    assert m.jackknife_interval(values.mean(0), without) == pytest.approx(np.array(expected))
    assert np.isnan(m.jackknife_interval(1.0, m.leave_one_out(values[:1])[:, 0])).all()


def test_coverage_study_of_ten_prompts():
    """The study behind docs/numbers.md, in small: every quantity is told, and the widened bootstrap holds more often."""
    rows = bench_coverage.run(("flux",), worlds=60, tuned=4, sizes=(10,))
    assert [row.name.split(",")[0] for row in rows] == [*bench_coverage.QUANTITIES, "test interval"]
    for row in rows[:2]:
        percentile, widened = (float(part) / 100 for part in re.findall(r"([\d.]+)%", row.note)[:2])
        assert percentile <= widened == pytest.approx(row.value, abs=0.001) and row.value > 0.85


def test_bootstrap_is_paired_and_reproducible():
    values = np.random.default_rng(0).standard_normal((40, 2))
    values[:, 1] = values[:, 0] + 1
    boot = m.bootstrap_means(values, 3)
    assert np.allclose(boot[:, 1] - boot[:, 0], 1)
    assert np.array_equal(boot, m.bootstrap_means(values, 3))
    assert boot.std(0)[0] == pytest.approx(values[:, 0].std() / np.sqrt(40), rel=0.15)


def test_relative_gain_is_simpsons_area_above_the_first_point():
    budgets = np.array([1.0, 2, 4, 5])
    base, better = np.array([1.0, 2, 2.5, 3]), np.array([1.5, 2.5, 3, 3.2])
    expected = 100 * (simpson(better - 1, x=budgets) / simpson(base - 1, x=budgets) - 1)
    assert relative_gain(budgets, better, base) == pytest.approx(expected)
    assert isinstance(relative_gain(budgets, better, base), float)
    assert relative_gain(budgets, base, base) == 0
    stacked = np.stack([better - 0.3, better + 0.3])
    assert relative_gain(budgets, stacked, base) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("budgets", "rewards", "baseline", "match"),
    [
        ([1, 2], [1, 2], [1, 1], "more than 0"),
        ([1], [1], [1], "two or more"),
        ([1, 2], [1, 2, 3], [1, 2], "rewards"),
        ([1, 2], [1, 2], 3.0, "baseline"),
        ([1, 2], [1, np.nan], [1, 2], "with NaN"),
    ],
)
def test_relative_gain_refuses(budgets, rewards, baseline, match):
    with pytest.raises(ConfigError, match=match):
        relative_gain(budgets, rewards, baseline)


def test_top_select_by_hand():
    final = np.array([[0.0, 3, 2, 1]])
    scores = np.array([[0.0, 1, 3, 2]])[:, :, None]
    accuracy, gap = m.top_select(scores, final, 0.5)  # keeps images 2 and 3
    assert accuracy.mean[0] == 0 and gap.mean[0] == 1
    accuracy, gap = m.top_select(scores, final, 0.75)  # image 1 as well
    assert accuracy.mean[0] == 1 and gap.mean[0] == 0
    accuracy, _ = m.top_select(scores, final, (0.5, 0.75))
    assert accuracy.mean[0] == 0.5
    accuracy, gap = m.top_select(final[:, :, None], final)
    assert accuracy.mean[0] == 1 and gap.mean[0] == 0


def test_perfect_verifier_and_compute_saved():
    final = synthetic_rewards(20, 50, 3)["base"].values[0, :, :, -1]
    assert m.perfect_verifier(final, 7).mean == pytest.approx(best_of_n(final, 7).mean())
    mean = np.array([best_of_n(final, 8).mean(), best_of_n(final, 2).mean(), 99.0])
    saved = m.compute_saved(np.array([40.0, 40.0, 40.0]), mean, final, candidate_cost=10.0)
    assert saved[:2] == pytest.approx([0.5, -1.0])
    assert np.isnan(saved[2])


def test_bad_shapes():
    for scores, final in ((np.zeros((2, 3)), np.zeros((2, 3))), (np.zeros((2, 3, 4)), np.zeros((2, 4)))):
        with pytest.raises(TensorError, match="shapes"):
            m.top_select(scores, final)
    with pytest.raises(ConfigError, match="ratio"):
        m.top_select(np.zeros((2, 3, 4)), np.zeros((2, 3)), 0.0)


def test_published_tau_table(pools):
    dataset = pools["flux"].sel(reward=["image_reward"]).isel(prompt=slice(None, None, 4))
    final = dataset["base"].values[0, :, :, -1]
    base = m.kendall_tau(dataset["base"].values[0], final).mean[[2, 4, 6, 8, 11, 14]]
    aware = m.kendall_tau(dataset["noise_aware"].values[0], final).mean[[2, 4, 6, 8, 11, 14]]
    assert base == pytest.approx([0.09, 0.27, 0.44, 0.56, 0.70, 0.80], abs=0.0051)  # the table has two digits
    assert aware == pytest.approx([0.25, 0.45, 0.59, 0.66, 0.73, 0.80], abs=0.0051)


def test_one_prompt_has_no_interval():
    assert np.isnan(m.bootstrap_means(np.ones((1, 3)), resamples=10)).all()
    told = m.Estimate.over_prompts(np.ones((1, 3)))
    assert told.mean.tolist() == [1, 1, 1] and np.isnan(told.low).all() and np.isnan(told.high).all()
