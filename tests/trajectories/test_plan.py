"""The list of work that a generation starts from."""

import itertools
import time

from ttsnap_lib.trajectories.generate import Blocks, wanted_rows


def plan(n_prompts, n_images, only, n_steps=3):
    blocks = Blocks(8, 8)
    batches = list(blocks.starts(n_prompts, n_images))
    return wanted_rows(blocks, batches, n_prompts, n_images, n_steps, only)


def test_only_selects_rows_and_a_mapping_their_steps():
    assert plan(2, 3, None) == {row: [0, 1, 2] for row in itertools.product(range(2), range(3))}
    assert plan(2, 3, [(1, 2), (0, 0)]) == {(0, 0): [0, 1, 2], (1, 2): [0, 1, 2]}
    assert plan(2, 3, {(1, 2): [2]}) == {(1, 2): [2]}


def test_a_long_list_is_planned_in_linear_time():
    # A search through the list for each row took 10 s for 25,000 rows; a set takes well under a second for 200,000.
    only = list(itertools.product(range(200), range(1000)))
    begin = time.perf_counter()
    assert len(plan(200, 1000, only)) == 200_000
    assert time.perf_counter() - begin < 30
