"""Compiled inner loops of the optimiser: many schedules on the same subsets. Importing this loads numba.

What :mod:`ttsnap_lib._kernels` walks survivor by survivor is here a search in bitsets. A set of candidates is a bitset
over the *positions* of a subset, so that what a budget begins with is a prefix. For every stage the bitsets of the best
1, 2, 3 ... of the subset are built once, for all budgets. The best c of a set are then its intersection with the
smallest of those that leaves c: a binary search over counts of bits, without a branch that depends on the data.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ._kernels import count_ones, trailing_zeros

__all__ = ["ordered_positions", "prefix_sums"]


@njit(nogil=True, cache=True)
def ordered_positions(rank, labels, subsets, out):
    """Order the first positions of every subset by rank.

    Parameters
    ----------
    rank : int32 (prompt, image)
        Rank of each image within the pool.
    labels : int32 (prompt, position)
        Image that each entry of a subset stands for.
    subsets : int64 (iteration, n)
    out : uint8 or uint16 (prompt, iteration, width)
        Filled with positions, best first; width is at most n.
    """
    n_prompts, n_iterations, width = out.shape
    n_words = (rank.shape[1] + 63) // 64
    one = np.uint64(1)
    bits = np.zeros(n_words, np.uint64)
    position = np.zeros(rank.shape[1], np.int64)
    for p in range(n_prompts):
        for i in range(n_iterations):
            bits[:] = np.uint64(0)
            for j in range(width):
                r = rank[p, labels[p, subsets[i, j]]]
                bits[r >> 6] |= one << np.uint64(r & 63)
                position[r] = j
            k = 0
            for w in range(n_words):
                word = bits[w]
                while word != 0:
                    out[p, i, k] = position[(w << 6) + np.int64(trailing_zeros(word))]
                    word &= word - one
                    k += 1


@njit(nogil=True, cache=True)
def prefix_sums(orders, path, labels, subsets, prompts, iterations, counts, values, sums):
    """Prune by one reward, for every prompt, iteration and budget; add the winners' values to `sums`.

    Parameters
    ----------
    orders : uint8 or uint16 (table, prompt, iteration, width)
        Those of :func:`ordered_positions`.
    path : int64 (stage + 1,)
        Which table each stage chooses by, the final choice last.
    labels, subsets
        As there.
    prompts, iterations : (int, int)
        First, and one past the last.
    counts : int64 (budget, stage + 1)
        Candidates at work in each stage; none above width.
    values : float64 (prompt, image, reward)
    sums : float64 (budget, prompt, reward)
        Its first prompt is ``prompts[0]``.
    """
    n_levels = len(path)
    n_budgets = counts.shape[0]
    width = orders.shape[3]
    half = 1
    while half * 2 < width:
        half *= 2
    n_words = (width + 63) // 64
    one = np.uint64(1)
    begin = np.zeros((n_budgets, n_words), np.uint64)
    for b in range(n_budgets):
        for j in range(counts[b, 0]):
            begin[b, j >> 6] |= one << np.uint64(j & 63)
    best = np.zeros((2 * half + 1, n_words), np.uint64)
    here = np.zeros((n_budgets, n_words), np.uint64)
    found = np.zeros(n_budgets, np.uint64)
    keep = np.ones((n_levels, n_budgets), np.int64)
    for k in range(n_levels - 1):
        keep[k] = counts[:, k + 1]
    for p in range(prompts[0], prompts[1]):
        for i in range(iterations[0], iterations[1]):
            here[:] = begin
            for k in range(n_levels):
                order = orders[path[k], p, i]
                _best_sets(order, best)
                if n_words == 1:
                    _find_one(here[:, 0], best[:, 0], keep[k], half, found)
                else:
                    _find(here, best, keep[k], half, found)
                if k < n_levels - 1:
                    for b in range(n_budgets):
                        for w in range(n_words):
                            here[b, w] &= best[found[b] + one, w]
            for b in range(n_budgets):
                image = labels[p, subsets[i, order[found[b]]]]
                for c in range(values.shape[2]):
                    sums[b, p - prompts[0], c] += values[p, image, c]


@njit(nogil=True, cache=True)
def _best_sets(order, best):
    """Fill `best`, (rank, word), with the sets of the best 0, 1, 2 ... positions; beyond the width with all."""
    one = np.uint64(1)
    width = order.shape[0]
    for w in range(best.shape[1]):
        word = np.uint64(0)
        if best.shape[1] == 1:
            for r in range(width):
                word |= one << np.uint64(order[r])
                best[r + 1, w] = word
        else:
            for r in range(width):
                word |= np.uint64(order[r] >> 6 == w) << np.uint64(order[r] & 63)
                best[r + 1, w] = word
        for r in range(width + 1, best.shape[0]):
            best[r, w] = word


@njit(nogil=True, cache=True)
def _find_one(here, best, keep, half, found):
    """Find, for sets of one word, the highest rank that leaves fewer than `keep` of every set."""
    found[:] = np.uint64(0)
    step = np.uint64(half)
    while step:
        for b in range(here.shape[0]):
            r = found[b] + step
            count = np.int64(count_ones(here[b] & best[r]))
            found[b] = r if count < keep[b] else found[b]
        step >>= np.uint64(1)


@njit(nogil=True, cache=True)
def _find(here, best, keep, half, found):
    """Do what :func:`_find_one` does for sets of several words."""
    found[:] = np.uint64(0)
    step = np.uint64(half)
    while step:
        for b in range(here.shape[0]):
            r = found[b] + step
            count = 0
            for w in range(here.shape[1]):
                count += np.int64(count_ones(here[b, w] & best[r, w]))
            found[b] = r if count < keep[b] else found[b]
        step >>= np.uint64(1)
