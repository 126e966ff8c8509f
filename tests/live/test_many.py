"""Searches over many prompts: resumed, sharded, told in one table; and the command line."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

from tests.worlds import N_STEPS, SCHEDULE, settings
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.errors import ConfigError, DiskError, SearchError
from ttsnap_lib.files import shard_lock
from ttsnap_lib.live.many import collect, compare, search_many
from ttsnap_lib.live.record import SearchRecord
from ttsnap_lib.rewards.loading import load_reward

PROMPTS = ["a red circle", "the cat", "a blue square above a green circle", "circle"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def search_all(flux, clip):
    def call(folder, prompts=PROMPTS, reward=clip, **options):
        given = {"candidates": 3, "settings": settings(n_steps=N_STEPS), "schedule": SCHEDULE} | options
        return search_many(flux, prompts, reward, folder, **given)

    return call


@pytest.fixture(scope="module")
def whole(search_all, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, search_all(folder)


def _same(frame: pd.DataFrame, other: pd.DataFrame) -> None:
    columns = ["prompt_index", "prompt", "winner", "seed", "clip", "complete"]
    pd.testing.assert_frame_equal(frame[columns], other[columns])


def test_one_folder_a_prompt_and_a_table(whole):
    folder, frame = whole
    assert frame["prompt"].tolist() == PROMPTS and frame["complete"].all()
    for number in range(len(PROMPTS)):
        record = SearchRecord.load(folder / f"p{number:04d}")
        assert record.prompt_index == number and record.seeds[record.winner] == frame["seed"][number]
    assert len(set(frame["seed"])) == len(PROMPTS)  # each prompt has seeds of its own
    _same(pd.read_csv(folder / "results.csv"), frame)
    _same(pd.read_parquet(folder / "results.parquet"), frame)


def test_an_interrupted_run_goes_on(whole, search_all, tmp_path):
    seen = []

    def stop_in_the_third(record):
        seen.append(record.prompt_index)
        if record.prompt_index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_all(tmp_path, on_check=stop_in_the_third)
    assert seen == [0, 0, 0, 1, 1, 1, 2]
    assert pd.read_csv(tmp_path / "results.csv")["prompt_index"].tolist() == [0, 1]
    assert SearchRecord.load(tmp_path / "p0002").stopped == "interrupt"  # the best so far is there to look at
    done = (tmp_path / "p0000" / "image.png").stat().st_mtime_ns
    states = []
    frame = search_all(
        tmp_path, on_check=lambda record: seen.append(record.prompt_index), progress=lambda *s: states.append(s)
    )
    assert seen[7:] == [2, 2, 2, 3, 3, 3] and states == [(k, 4) for k in (1, 2, 3, 4)]
    assert (tmp_path / "p0000" / "image.png").stat().st_mtime_ns == done
    _same(frame, whole[1])
    assert (tmp_path / "p0002" / "image.png").is_file()


@pytest.mark.parametrize("by", ["argument", "launcher"])
def test_shards_give_the_same_table(whole, search_all, tmp_path, monkeypatch, by):
    for rank in (1, 0):
        if by == "launcher":  # as accelerate launch tells it
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "2")
        frame = search_all(tmp_path, shard=(rank, 2) if by == "argument" else None)
        assert frame["prompt_index"].tolist() == ([1, 3] if rank else [0, 1, 2, 3])
    _same(frame, whole[1])


def test_other_settings_are_refused_and_other_prompts_searched_again(search_all, clip, tmp_path):
    search_all(tmp_path, PROMPTS[:2])
    for change in (
        {"candidates": 4},
        {"seed": 1},
        {"schedule": Schedule((1,), (0.5,))},
        {"cost": CostModel(1, 1, n_steps=5)},
    ):
        with pytest.raises(SearchError, match=f"other settings: .*{next(iter(change))}"):
            search_all(tmp_path, **change)
    with pytest.raises(SearchError, match="rewards"):
        search_all(tmp_path, reward=load_reward(lambda p, images: [0.0] * len(images), name="clip"))
    search_all(tmp_path, PROMPTS[:2], batch_size=1)  # this decides no result
    changed = search_all(tmp_path, [PROMPTS[0], "a green cat"])
    assert changed["prompt"].tolist() == [PROMPTS[0], "a green cat"]
    (tmp_path / "search.json").write_text("nothing")
    with pytest.raises(SearchError, match="search.json"):
        search_all(tmp_path)


def test_a_prompt_that_fails_does_not_stop_the_others(search_all, tmp_path):
    def fussy(prompts, images):
        if prompts[0] == PROMPTS[1]:
            raise ValueError("not this one")
        return [float(np.asarray(image).mean()) for image in images]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SearchError, match="1 of 4 prompts failed"):
            search_all(tmp_path, reward=fussy)
    assert collect(tmp_path)["prompt_index"].tolist() == [0, 2, 3]


def test_a_deadline_ends_each_prompt_not_the_run(search_all, tmp_path, flux):
    import time

    handle = flux.transformer.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frame = search_all(tmp_path, PROMPTS[:2], deadline_s=0.1, batch_size=1, candidates=40)
    finally:
        handle.remove()
    assert frame["stopped"].tolist() == ["deadline"] * 2 and not frame["complete"].any()


def test_a_shard_is_one_process_at_a_time(search_all, tmp_path):
    with shard_lock(tmp_path, (0, 1)) as held:
        pass
    with held, pytest.raises(DiskError, match="another process"):
        search_all(tmp_path)
    with pytest.raises(ConfigError, match="shard"):
        search_all(tmp_path, shard=(2, 2))


def test_compare_is_paired():
    rng = np.random.default_rng(0)
    prompts = np.arange(60)
    base = pd.DataFrame({"prompt_index": prompts, "reward": rng.normal(0, 5, 60), "candidates": 4, "cost": 1.0,
                         "elapsed_s": 2.0})  # fmt: skip
    better = base.assign(reward=base["reward"] + 0.5 + rng.normal(0, 0.1, 60), candidates=9)
    table = compare({"best_of_n": base, "ttsnap": better.sample(frac=1, random_state=0)}, "reward").set_index("method")
    assert table.loc["best_of_n", "difference"] == 0 == table.loc["best_of_n", "high"]
    row = table.loc["ttsnap"]
    assert row["low"] < 0.5 < row["high"] and row["high"] - row["low"] < 0.1  # the prompts' spread of 5 cancels
    assert row["candidates"] == 9 and row["prompts"] == 60
    with pytest.raises(ConfigError, match="baseline"):
        compare({"ttsnap": base}, "reward")


def test_without_a_folder_only_the_table_stays(whole, search_all):
    _same(search_all(None), whole[1])


def test_pictures_of_a_comparison(whole):
    import matplotlib.pyplot as plt

    from ttsnap_lib.live.plots import per_prompt

    frame = whole[1]
    ax = per_prompt({"best_of_n": frame, "ttsnap": frame.iloc[1:].assign(clip=frame["clip"] + 1)}, "clip")
    drawn = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    np.testing.assert_allclose(drawn["Best-of-N"], frame["clip"])
    np.testing.assert_allclose(drawn["TTSnap"][1:], frame["clip"][1:] + 1)
    assert np.isnan(drawn["TTSnap"][0])
    plt.close(ax.figure)
