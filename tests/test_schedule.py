"""Schedules, and choosing among candidates: stage by stage the same rule as `prune`."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ttsnap_lib import PUBLISHED_SCHEDULE, Schedule, prune
from ttsnap_lib.errors import ScheduleError
from ttsnap_lib.schedule import kept
from ttsnap_lib.sets import choose_set

# Few values: ties at every stage.
VALUES = st.sampled_from([-1.5, -1.0, 0.0, 0.25, 0.5, 2.0])
FLOATS = st.floats(-30, 30, width=32)


def test_empty_is_best_of_n():
    assert Schedule().survivors(7) == (7,)
    assert len(Schedule()) == 0
    assert str(Schedule()) == "no pruning"


def test_survivors_use_pythons_round_and_never_reach_zero():
    assert Schedule((1,), (0.5,)).survivors(5) == (5, 2)  # 2.5 rounds to even
    assert Schedule((1,), (0.5,)).survivors(7) == (7, 4)  # 3.5 too
    assert Schedule((1, 2), (0.01, 0.01)).survivors(3) == (3, 1, 1)
    assert PUBLISHED_SCHEDULE.survivors(50) == (50, 20, 8, 4)


def test_round_trips(tmp_path: Path):
    schedule = Schedule([2, 6], [0.4, 1])
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert Schedule.from_yaml(schedule.to_yaml()) == schedule
    path = tmp_path / "s.yaml"
    path.write_text(schedule.to_yaml())
    assert Schedule.from_yaml(path) == schedule
    assert hash(schedule) == hash(Schedule((2, 6), (0.4, 1.0)))


@pytest.mark.parametrize(
    ("steps", "ratios", "value"),
    [
        ((2, 2), (0.5, 0.5), "(2, 2)"),
        (("2",), (0.5,), "'2'"),
        ("2", (0.5,), "'2'"),
        ((2,), (0.0,), "0.0"),
        ((2,), ("half",), "'half'"),
        ((2, 4), (0.5,), "(0.5,)"),
    ],
)
def test_bad_schedules_name_the_value(steps, ratios, value):
    with pytest.raises(ScheduleError, match="expected") as caught:
        Schedule(steps, ratios)
    assert value in str(caught.value)


def test_steps_at_or_past_the_last():
    Schedule((18,), (0.5,)).check(20)
    for step in (19, 20, 99):
        with pytest.raises(ScheduleError, match="at most 18"):
            Schedule((step,), (0.5,)).check(20)


@pytest.mark.parametrize("content", [["steps"], {"stepz": [1]}, "3", {"steps": [1], "keep_ratios": [0.5], "x": 1}])
def test_bad_yaml(content):
    import yaml

    with pytest.raises(ScheduleError):
        Schedule.from_yaml(yaml.safe_dump(content))
    with pytest.raises(ScheduleError, match="cannot be read"):
        Schedule.from_yaml("steps: [1")
    with pytest.raises(ScheduleError, match="cannot be read"):
        Schedule.from_yaml(Path("nowhere.yaml"))


def choose(scores, keep, combine="rank_sum", weights=None):
    """Return who stays, ascending."""
    return np.sort(choose_set(scores, keep, combine=combine, weights=weights))


@settings(max_examples=150)
@given(data=st.data())
def test_stage_by_stage_equals_prune(data):
    n, rewards = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    scores = data.draw(arrays(np.float32, (n, 3, rewards), elements=VALUES))
    ratios = data.draw(st.tuples(*[st.sampled_from([0.1, 0.3, 0.5, 0.75, 1.0])] * 2))
    combine = data.draw(st.sampled_from(["rank_sum", "z_score", "weighted_sum"]))
    # Weights that are powers of two: every product and sum is exact.
    weights = np.array([1.0, 0.5, -2.0][:rewards]) if combine == "weighted_sum" else None
    alive = np.arange(n)
    for k, ratio in enumerate(ratios):
        alive = alive[choose(scores[alive, k], kept(len(alive), ratio), combine, weights)]
    winner = alive[choose(scores[alive, 2], 1, combine, weights)[0]]
    expected = prune(scores[None], np.arange(n)[None], Schedule((0, 1), ratios), combine=combine, weights=weights)
    assert winner == expected[0, 0]


def test_ties_go_to_the_first_and_the_order_stays():
    assert choose(np.array([[1.0], [2.0], [2.0], [2.0]]), 2).tolist() == [1, 2]
    assert choose(np.array([[3.0], [1.0], [2.0]]), 2).tolist() == [0, 2]


@settings(max_examples=150)
@given(high=st.tuples(FLOATS, FLOATS), low=st.tuples(FLOATS, FLOATS), weight=st.sampled_from([1.0, 0.5, 3.0]))
def test_two_candidates_on_which_two_rewards_disagree_are_a_tie(high, low, weight):
    """Their z-scores are +1 and -1 each, so that the sums are equal but for rounding: the lower index wins."""
    scores = np.array([[max(high), min(low)], [min(high), max(low)]], np.float32) * np.float32([1, weight])
    disagree = scores[0, 0] > scores[1, 0] and scores[0, 1] < scores[1, 1]
    for order in ([0, 1], [1, 0]):
        given_scores = scores[order]
        if disagree:
            assert choose(given_scores, 1, "z_score").tolist() == [0]
        winner = prune(given_scores[None, :, None], np.array([[1, 0]]), Schedule(), combine="z_score")
        assert winner.tolist() == [choose(given_scores, 1, "z_score").tolist()]


def test_mirrored_candidates_are_a_tie_at_every_stage():
    rng = np.random.default_rng(0)
    column = rng.normal(20, 1, (200, 6, 3)).astype(np.float32)
    scores = np.stack([column, column[:, ::-1] * np.float32(0.5)], axis=-1)  # image k and image 5 - k are equal
    for prompt in scores:
        stays = choose(prompt[:, 0], 3, "z_score")
        assert all(mirror not in stays or k in stays for k, mirror in ((0, 5), (1, 4), (2, 3)))
    winners = prune(scores, np.array([[5, 3, 1, 0, 2, 4]]), Schedule(), combine="z_score")
    assert winners.max() <= 2


def test_a_constant_reward_has_no_vote_in_z_scores():
    scores = np.array([[0.0, 7.0], [2.0, 7.0], [1.0, 7.0]])
    assert choose(scores, 1, "z_score").tolist() == [1]


@pytest.mark.parametrize("combine", ["rank_sum", "z_score"])
def test_two_rewards_that_disagree(combine):
    # The middle candidate is second for both; the extremes are first and last.
    scores = np.array([[10.0, 0.0], [9.0, 9.0], [0.0, 10.0]])
    assert choose(scores, 1, combine).tolist() == [1 if combine == "z_score" else 0]
