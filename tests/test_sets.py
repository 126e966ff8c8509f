"""Sets instead of one winner: what is chosen, in which order, and how good greedy choices are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttsnap_lib import Schedule, prune
from ttsnap_lib.errors import BudgetError, ConfigError
from ttsnap_lib.sets import check_set, choose_set, mean_distance, pairwise_distances

COMBINE = [("rank_sum", None), ("z_score", None), ("weighted_sum", np.array([1.0, 0.5]))]


def _pool(rng, n=9, rewards=2, leading=()):
    scores = rng.normal(size=(*leading, n, rewards)).round(1)  # with ties
    return scores, pairwise_distances(rng.normal(size=(*leading, n, 3)))


def test_distances_are_one_minus_the_cosine():
    a, b, c = np.eye(3)[:2].tolist() + [[3.0, 4.0, 0.0]]
    found = pairwise_distances([a, b, c])
    np.testing.assert_allclose(found, [[0, 1, 0.4], [1, 0, 0.2], [0.4, 0.2, 0]], atol=1e-12)
    assert mean_distance(found) == pytest.approx((1 + 0.4 + 0.2) / 3) and np.isnan(mean_distance(found[:1, :1]))


@pytest.mark.parametrize(("combine", "weights"), COMBINE)
def test_without_diversity_it_is_the_best_scores_and_the_winner_always_comes_first(combine, weights):
    rng = np.random.default_rng(0)
    for _ in range(40):
        scores, distances = _pool(rng)
        winner = prune(scores[None, :, None], np.arange(9)[None], Schedule(), combine=combine, weights=weights)
        ordered = choose_set(scores, 9, combine=combine, weights=weights)
        for keep in (1, 4, 9):
            plain = choose_set(scores, keep, combine=combine, weights=weights)
            assert np.array_equal(plain, ordered[:keep])
            diverse = choose_set(scores, keep, 0.7, distances, combine, weights)
            assert len(set(diverse.tolist())) == keep
            assert diverse[0] == plain[0] == winner[0, 0]


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 5), st.floats(0.01, 3))
def test_each_is_the_one_that_adds_most_and_sets_of_candidates_do_not_mix(seed, keep, diversity):
    scores, distances = _pool(np.random.default_rng(seed), rewards=1, leading=(3,))
    together = choose_set(scores, keep, diversity, distances)
    for number in range(3):
        z = (scores[number, :, 0] - scores[number].mean()) / scores[number].std()
        unit = distances[number] / distances[number][np.triu_indices(9, 1)].mean()
        chosen = [int(np.argmax(z))]
        while len(chosen) < keep:
            gain = [z[k] + 2 * diversity * unit[k, chosen].mean() if k not in chosen else -np.inf for k in range(9)]
            chosen.append(int(np.argmax(gain)))
        assert together[number].tolist() == chosen
        assert choose_set(scores[number], keep, diversity, distances[number]).tolist() == chosen


def test_greedy_sets_come_near_the_best_and_grow_apart_with_the_weight():
    rng = np.random.default_rng(1)
    worth, best, apart = np.zeros(3), np.zeros(3), np.zeros(3)
    for _ in range(50):
        scores, distances = _pool(rng, rewards=1)
        z, unit = (scores[:, 0] - scores.mean()) / scores.std(), distances / mean_distance(distances)
        for w, diversity in enumerate((0.25, 1.0, 4.0)):

            def value(chosen, diversity=diversity, z=z, unit=unit):
                chosen = list(chosen)
                return z[chosen].mean() + diversity * mean_distance(unit[np.ix_(chosen, chosen)])

            found = choose_set(scores, 4, diversity, distances)
            worth[w] += value(found)
            best[w] += max(value(chosen) for chosen in itertools.combinations(range(9), 4))
            apart[w] += mean_distance(distances[np.ix_(found, found)])
    assert (worth > 0.9 * best).all() and (np.diff(apart) > 0).all()


def test_candidates_that_are_all_alike_are_told_by_their_scores():
    scores, same = np.array([[1.0], [3.0], [2.0], [3.0]]), np.zeros((4, 4))
    assert choose_set(scores, 3, 1.0, same).tolist() == [1, 3, 2]
    assert choose_set(np.ones((4, 1)), 3, 1.0, same).tolist() == [0, 1, 2]


def test_bad_input():
    pruning = Schedule((1,), (0.5,))
    assert check_set(4, 0.5, 8, pruning) == (4, 0.5)
    for keep, n, schedule, told in (
        (5, 4, Schedule(), "keep: got 5, expected at most 4 candidates, as many as are started"),
        (5, 8, pruning, r"got 5, expected at most 4 candidates, those.*step 1 keep 0.5\) leaves of 8\. .*prune less"),
        (0, 8, pruning, "keep: got 0"),
    ):
        with pytest.raises(BudgetError, match=told):
            check_set(keep, 0.0, n, schedule)
    with pytest.raises(ConfigError, match="diversity: got 0.5 with keep=1"):
        check_set(1, 0.5, 8, pruning)
    with pytest.raises(ConfigError, match="diversity: got -1"):
        check_set(2, -1, 8, pruning)
    with pytest.raises(ConfigError, match="without distances"):
        choose_set(np.zeros((3, 1)), 2, 1.0)
