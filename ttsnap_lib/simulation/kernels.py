"""Compiled inner loops of pruning and of Kendall's tau. Importing this loads numba.

:func:`single_reward` and :func:`multi_reward` walk survivor by survivor through a bitset of ranks or images.
:func:`prefix_sums` serves the optimiser, which scores many schedules on the same subsets: there a set of candidates is a
bitset over the *positions* of a subset, so that what a budget begins with is a prefix. For every stage the bitsets of
the best 1, 2, 3 ... of the subset are built once, for all budgets. The best c of a set are then its intersection with
the smallest of those that leaves c: a binary search over counts of bits, without a branch that depends on the data.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ttsnap_lib.schedule import Z_GRID

RANK_SUM, Z_SCORE = 0, 1


@intrinsic
def trailing_zeros(typingctx, word):
    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@intrinsic
def count_ones(typingctx, word):
    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@njit(nogil=True, cache=True)
def single_reward(first, moves, last, valid, subsets, counts, values, winners, sums, fault):
    """Prune by one reward, for every prompt, iteration and budget.

    - first: int32 (prompt, position), rank at the first stage of the image that each position of a subset stands for
    - moves: int32 (prompt, stage, rank), rank at stage k + 1 of the image that has the given rank at stage k; the last
      stage is the final choice
    - last: int32 (prompt, rank), image of each rank at the final choice
    - valid: int32 (prompt, stage + 1), images with a value at each stage; a rank at or past it means NaN
    - subsets: int64 (iteration, n), distinct positions; budgets take prefixes
    - counts: int64 (budget, stage + 1), candidates at work in each stage, first column ascending
    - values: float64 (prompt, image, reward), final rewards that are summed for the winners
    - winners: int32 (budget or 0, iteration, prompt), filled when not empty
    - sums: float64 (budget, prompt, reward), over iterations of the winner's values; added to
    - fault: int64 (2,), prompt and stage of the first NaN that was read; the prompt stays -1 when there is none
    """
    n_prompts, pool = first.shape
    n_stages = moves.shape[1]
    n_words = (pool + 63) // 64
    one = np.uint64(1)
    entry = np.zeros(n_words, np.uint64)
    here = np.zeros(n_words, np.uint64)
    there = np.zeros(n_words, np.uint64)
    for p in range(n_prompts):
        for i in range(subsets.shape[0]):
            entry[:] = np.uint64(0)
            filled = 0
            for b in range(counts.shape[0]):
                for j in range(filled, counts[b, 0]):
                    rank = first[p, subsets[i, j]]
                    if rank >= valid[p, 0]:
                        fault[0], fault[1] = p, 0
                        return
                    entry[rank >> 6] |= one << np.uint64(rank & 63)
                filled = counts[b, 0]
                best = pool
                if n_stages == 0:
                    best = _lowest(entry)
                else:
                    here[:] = entry
                    for k in range(n_stages):
                        left = counts[b, k + 1]
                        is_last = k == n_stages - 1
                        limit = valid[p, k + 1]
                        if not is_last:
                            there[:] = np.uint64(0)
                        for w in range(n_words):
                            word = here[w]
                            base = w << 6
                            while word != 0 and left > 0:
                                position = base + np.int64(trailing_zeros(word))
                                rank = moves[p, k, position]
                                if rank >= limit:
                                    fault[0], fault[1] = p, k + 1
                                    return
                                if is_last:
                                    best = min(best, rank)
                                else:
                                    there[rank >> 6] |= one << np.uint64(rank & 63)
                                word &= word - one
                                left -= 1
                            if left == 0:
                                break
                        here, there = there, here
                image = last[p, best]
                if winners.shape[0]:
                    winners[b, i, p] = image
                for r in range(values.shape[2]):
                    sums[b, p, r] += values[p, image, r]


@njit(nogil=True, cache=True)
def _lowest(bits):
    for w in range(bits.shape[0]):
        if bits[w] != 0:
            return (w << 6) + np.int64(trailing_zeros(bits[w]))
    return -1


@njit(nogil=True, cache=True)
def multi_reward(mode, ranks, scores, valid, labels, subsets, counts, values, winners, sums, fault):
    """Prune by several rewards jointly: sum of within-set ranks, or mean of within-set z-scores.

    - mode: ``RANK_SUM`` or ``Z_SCORE``
    - ranks: int32 (prompt, stage + 1, reward, image), within the pool; within a set only their order counts
    - scores: float64 (prompt, stage + 1, reward, image), the rewards themselves, read for z-scores
    - valid: int32 (prompt, stage + 1, reward), images with a value
    - labels: int32 (prompt, position), image that each position of a subset stands for

    The others are those of :func:`single_reward`.
    """
    n_prompts, n_levels, n_rewards, pool = ranks.shape
    n_words = (pool + 63) // 64
    one = np.uint64(1)
    entry = np.zeros(n_words, np.uint64)
    bits = np.zeros(n_words, np.uint64)
    below = np.zeros(n_words, np.int64)
    chosen = np.zeros(pool, np.int64)
    rank_sum = np.zeros(pool, np.int64)
    z_sum = np.zeros(pool, np.float64)
    histogram = np.zeros(n_rewards * pool + 1, np.int64)
    for p in range(n_prompts):
        for i in range(subsets.shape[0]):
            entry[:] = np.uint64(0)
            filled = 0
            for b in range(counts.shape[0]):
                for j in range(filled, counts[b, 0]):
                    image = labels[p, subsets[i, j]]
                    entry[image >> 6] |= one << np.uint64(image & 63)
                filled = counts[b, 0]
                n = 0  # candidates in the order of their index, so that the first of equals is the lowest index
                for w in range(n_words):
                    word = entry[w]
                    while word != 0:
                        chosen[n] = (w << 6) + np.int64(trailing_zeros(word))
                        word &= word - one
                        n += 1
                for k in range(n_levels):
                    for r in range(n_rewards):
                        for j in range(n):
                            if ranks[p, k, r, chosen[j]] >= valid[p, k, r]:
                                fault[0], fault[1] = p, k
                                return
                    keep = counts[b, k + 1] if k < n_levels - 1 else 1
                    if mode == RANK_SUM:
                        for j in range(n):
                            rank_sum[j] = 0
                        for r in range(n_rewards):
                            bits[:] = np.uint64(0)
                            for j in range(n):
                                rank = ranks[p, k, r, chosen[j]]
                                bits[rank >> 6] |= one << np.uint64(rank & 63)
                            total = 0
                            for w in range(n_words):
                                below[w] = total
                                total += np.int64(count_ones(bits[w]))
                            for j in range(n):
                                rank = ranks[p, k, r, chosen[j]]
                                mask = (one << np.uint64(rank & 63)) - one
                                rank_sum[j] += below[rank >> 6] + np.int64(count_ones(bits[rank >> 6] & mask))
                        n = _keep_lowest(rank_sum, chosen, n, keep, histogram)
                    else:
                        for j in range(n):
                            z_sum[j] = 0.0
                        for r in range(n_rewards):
                            mean = 0.0
                            for j in range(n):
                                mean += scores[p, k, r, chosen[j]]
                            mean /= n
                            variance = 0.0
                            for j in range(n):
                                variance += (scores[p, k, r, chosen[j]] - mean) ** 2
                            variance /= n
                            if variance > 0.0:  # a reward that says nothing about this set has no vote
                                scale = 1.0 / np.sqrt(variance)
                                for j in range(n):
                                    z_sum[j] -= (scores[p, k, r, chosen[j]] - mean) * scale
                        order = np.argsort(np.rint(z_sum[:n] * Z_GRID), kind="mergesort")[:keep]
                        order.sort()
                        for j in range(order.shape[0]):
                            chosen[j] = chosen[order[j]]
                        n = order.shape[0]
                image = chosen[0]
                if winners.shape[0]:
                    winners[b, i, p] = image
                for r in range(values.shape[2]):
                    sums[b, p, r] += values[p, image, r]


@njit(nogil=True, cache=True)
def _keep_lowest(keys, chosen, n, keep, histogram):
    """Keep, in place and in order, the `keep` candidates with the lowest keys; of equal keys the first ones."""
    top = 0
    for j in range(n):
        top = max(top, keys[j])
    histogram[: top + 1] = 0
    for j in range(n):
        histogram[keys[j]] += 1
    threshold, before = 0, 0
    while before + histogram[threshold] < keep:
        before += histogram[threshold]
        threshold += 1
    ties = keep - before
    m = 0
    for j in range(n):
        if keys[j] < threshold or (keys[j] == threshold and ties > 0):
            if keys[j] == threshold:
                ties -= 1
            chosen[m] = chosen[j]
            m += 1
    return m


@njit(nogil=True, cache=True)
def tau_b(scores, final, out):
    """Fill `out` (prompt, step) with Kendall's tau-b between each step's scores and the final ones, over images.

    `scores` are float64 (prompt, image, step), `final` (prompt, image). NaN where one is constant or a value is NaN.
    """
    n_prompts, pool, n_steps = scores.shape
    x = np.empty(pool)
    for p in range(n_prompts):
        y = final[p]
        for s in range(n_steps):
            bad = False
            for j in range(pool):
                x[j] = scores[p, j, s]
                bad |= np.isnan(x[j]) | np.isnan(y[j])
            balance, untied_x, untied_y = 0, 0, 0
            for a in range(pool):
                xa, ya = x[a], y[a]
                for c in range(a):
                    sx = np.int64(xa > x[c]) - np.int64(xa < x[c])
                    sy = np.int64(ya > y[c]) - np.int64(ya < y[c])
                    balance += sx * sy
                    untied_x += sx * sx
                    untied_y += sy * sy
            if bad or untied_x == 0 or untied_y == 0:
                out[p, s] = np.nan
            else:
                out[p, s] = balance / np.sqrt(np.float64(untied_x)) / np.sqrt(np.float64(untied_y))


@njit(nogil=True, cache=True)
def ordered_positions(rank, labels, subsets, out):
    """Fill `out` with the first positions of every subset by rank, best first.

    - rank: int32 (prompt, image), within the pool
    - labels: int32 (prompt, position), image that each entry of a subset stands for
    - subsets: int64 (iteration, n)
    - out: uint8 or uint16 (prompt, iteration, width), width at most n
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

    - orders: uint8 or uint16 (table, prompt, iteration, width), those of :func:`ordered_positions`
    - path: int64 (stage + 1,), which table each stage chooses by, the final choice last
    - labels, subsets: as there
    - prompts, iterations: (int, int), first, and one past the last
    - counts: int64 (budget, stage + 1), candidates at work in each stage; none above width
    - values: float64 (prompt, image, reward)
    - sums: float64 (budget, prompt, reward), its first prompt is ``prompts[0]``
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
