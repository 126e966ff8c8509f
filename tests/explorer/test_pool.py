"""The explorer's numbers and pictures, without widgets."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest

from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.errors import BudgetError, ConfigError, TTSnapError
from ttsnap_lib.explorer.pool import Pool
from ttsnap_lib.explorer.result import State, available_mark, compute
from ttsnap_lib.explorer.view import PANELS, Panels, draw
from ttsnap_lib.simulation.metrics import kendall_tau
from ttsnap_lib.simulation.simulate import curves
from ttsnap_lib.tensors.tensor import synthetic_rewards

COST = CostModel.preset("flux-512+image_reward")
ONE = COST.total(1)
BUDGETS = tuple(multiple * ONE for multiple in (2, 4, 8, 12))
EARLY, LATER = Schedule((2, 6, 11), (0.4, 0.4, 0.5)), Schedule((4, 9), (0.5, 0.3))


@pytest.fixture(scope="module")
def dataset():
    return synthetic_rewards(24, 60, 20, rewards=("a", "b"))


@pytest.fixture(scope="module")
def pool(dataset):
    return Pool(dataset, iterations=40, seed=3)


def state(**changes) -> State:
    given = {"rewards": ("a",), "shown": "a", "cost": COST, "budgets": BUDGETS, "budget": 8 * ONE}
    return State(**{**given, **changes})


@pytest.mark.parametrize("method", ["ttsp", "ttsnap"])
@pytest.mark.parametrize(
    ("rewards", "combine"), [(("a",), "rank_sum"), (("a", "b"), "rank_sum"), (("a", "b"), "z_score")]
)
def test_all_blocks_give_the_numbers_of_the_simulation(dataset, pool, method, rewards, combine):
    result = compute(state(method=method, rewards=rewards, combine=combine, schedule=LATER, shown="b"), pool)
    report = [name for name in ("a", "b") if name not in rewards]
    expected = curves(dataset, [method], BUDGETS, COST, LATER, iterations=40, rng=3, report=report, combine=combine)
    assert result.complete
    np.testing.assert_allclose(result.current.per_prompt, expected.per_prompt[1, :, 1], atol=1e-12)
    np.testing.assert_array_equal(result.current.n, expected.n[1])
    np.testing.assert_allclose(result.current.spent, expected.spent[1])
    if len(rewards) > 1:  # Best-of-N by several rewards is simulated too, on the same subsets
        np.testing.assert_allclose(result.best_of_n.per_prompt, expected.per_prompt[0, :, 1], atol=1e-12)


def test_best_of_n_by_one_reward_is_exact_and_also_told_for_another_reward(dataset, pool):
    result = compute(state(shown="b"), pool)
    expected = curves(dataset, ["best_of_n"], BUDGETS, COST, iterations=4000, report=["b"])
    assert np.abs(result.best_of_n.per_prompt - expected.per_prompt[0, :, 1]).max() < 0.1  # 4000 draws of spread 0.6


def test_changes_are_paired_and_vanish_for_the_pinned_schedule_itself(pool):
    same = compute(state(), pool, 1)
    assert (same.over_pinned.value, same.over_pinned.low, same.over_pinned.high) == (0, 0, 0)
    assert not np.any(same.change.value) and same.gain_change.value == 0
    other = compute(state(schedule=LATER), pool)
    at, pinned = other.at["current"], other.at["pinned"]
    assert other.over_pinned.value == pytest.approx(at.mean[0] - pinned.mean[0], abs=1e-12)
    paired = other.over_pinned.high - other.over_pinned.low
    apart = np.hypot(at.high[0] - at.low[0], pinned.high[0] - pinned.low[0])
    assert paired < 0.7 * apart
    assert other.gain_change.value == pytest.approx(other.gain.value - other.pinned_gain.value)
    assert other.gain.low < other.gain.value < other.gain.high


def test_relative_gain_is_that_of_the_simulation(dataset, pool):
    result = compute(state(rewards=("a", "b"), schedule=LATER), pool)
    gains = curves(dataset, ["ttsnap"], BUDGETS, COST, LATER, iterations=40, rng=3).relative_gains()
    expected = gains[gains["reward"] == "a"].iloc[0]
    assert result.gain.value == pytest.approx(expected["relative_gain"], abs=1e-9)
    # Other resamples: the bounds agree within a quarter of the interval's width.
    width = expected["high"] - expected["low"]
    assert abs(result.gain.low - expected["low"]) < width / 4 and abs(result.gain.high - expected["high"]) < width / 4


def test_tau_and_stages(dataset, pool):
    result = compute(state(shown="b", schedule=LATER), pool, 1)
    scores = dataset["noise_aware"].sel(reward="b").transpose("prompt", "image", "step").values
    np.testing.assert_allclose(result.tau[1].mean, kendall_tau(scores, scores[:, :, -1]).mean)
    n = COST.candidates(8 * ONE, LATER)
    assert [stage.candidates for stage in result.stages] == list(LATER.survivors(n))
    assert sum(stage.total for stage in result.stages) == pytest.approx(result.at["current"].spent[0])


def test_blocks_grow_and_are_not_done_twice(pool):
    wanted = state(schedule=Schedule((5,), (0.25,)))
    block = 7
    marks = pool.marks(block)
    assert marks == [1, 2, 4, 6] and pool.iterations_at(block, 6) == 40
    assert available_mark(wanted, pool) == 1
    full = compute(wanted, pool)
    assert pool.iterations_at(pool.block(1, 4), available_mark(wanted, pool)) == full.iterations == 40


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"budget": 0.5 * ONE}, BudgetError, "Raise the budget"),
        ({"budget": 12 * ONE, "schedule": Schedule((0,), (0.05,))}, BudgetError, "at most 60, the images in the pool"),
        ({"rewards": ()}, ConfigError, "Choose a reward"),
        ({"shown": "c"}, ConfigError, "'c'"),
        ({"cost": CostModel(step=1, verify=1, n_steps=30)}, TTSnapError, "n_steps"),
    ],
)
def test_a_bad_state_is_told(pool, changes, error, words):
    with pytest.raises(error, match=words):
        compute(state(**changes), pool, 1)


def test_budgets_that_cannot_run_are_left_out_and_told(pool):
    result = compute(state(schedule=Schedule((0,), (0.05,)), budget=2 * ONE), pool, 1)
    assert len(result.current.n) < len(BUDGETS) == len(result.best_of_n.n)
    assert any("left out" in note for note in result.notes)


def test_copied_steps_are_told(dataset):
    copied = dataset.copy(deep=True)
    copied["noise_aware_source"].values[0, 4] = "copied_from_base"
    notes = compute(state(schedule=LATER), Pool(copied, iterations=4), 1).notes
    assert any("step 4" in note and "copy" in note for note in notes)


def test_published_accounting_and_empty_schedules(pool):
    published = CostModel.preset("published")
    wanted = state(cost=published, budgets=(400.0, 800.0, 1600.0), budget=800.0)
    result = compute(wanted, pool, 1)
    assert result.at["best_of_n"].n[0] == published.candidates(800.0)
    assert result.at["current"].n[0] == published.candidates(800.0, wanted.schedule)
    empty = compute(state(schedule=Schedule()), pool, 1)
    np.testing.assert_array_equal(empty.current.per_prompt, empty.best_of_n.per_prompt)
    assert empty.gain.value == 0


def pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_updating_in_place_gives_the_picture_of_a_full_drawing(pool):
    """Bit for bit, after every move: panels are drawn one by one, and nothing of the move before may stay."""
    moved, never_full = Panels(), Panels()
    seen = []
    for schedule, budget in ((EARLY, 4), (LATER, 4), (LATER, 8), (Schedule((3, 4, 5, 9), (0.7,) * 4), 6), (EARLY, 4)):
        result = compute(state(schedule=schedule, budget=budget * ONE), pool, 1)
        moved.update(result)
        never_full.update(result)
        seen.append(pixels(moved.png()))
        np.testing.assert_array_equal(seen[-1], pixels(never_full.png()))  # nothing adds up over moves
        canvas = moved.canvas
        canvas._background, canvas.touched, canvas.stale = None, set(PANELS), set(PANELS)
        np.testing.assert_array_equal(seen[-1], pixels(moved.png()))
    assert all(np.abs(one - other).max() > 100 for one, other in itertools.pairwise(seen))


def test_panels_that_show_the_same_are_not_drawn_again(pool):
    moved = Panels()
    for keep in (0.4, 0.41):
        moved.update(compute(state(schedule=Schedule((2, 6), (keep, 0.4))), pool, 1))
        touched = set(moved.canvas.touched)
        moved.png()
    assert "reward" in touched and "tau" not in touched  # the steps are where they were


def test_draw_fills_the_given_axes_and_saves_what_moves(pool, tmp_path):
    axes = draw(compute(state(schedule=LATER), pool, 1))
    assert tuple(axes) == PANELS
    figure = axes["reward"].figure
    labels = [text.get_text() for text in axes["reward"].get_legend().get_texts()]
    assert labels == ["this schedule (TTSnap)", "pinned TTSnap", "Best-of-N"]
    assert any("keep ratio (alpha) 0.5" in text.get_text() for text in axes["funnel"].texts)
    figure.savefig(tmp_path / "with.png", dpi=60)
    for line in axes["reward"].lines:
        line.set_visible(False)
    figure.savefig(tmp_path / "without.png", dpi=60)
    shown, hidden = (pixels((tmp_path / name).read_bytes()) for name in ("with.png", "without.png"))
    assert np.abs(shown - hidden).max() > 100  # animated artists are in a saved figure
