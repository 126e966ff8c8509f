"""Searches over many prompts: resumed, sharded, told in one table; and the command line."""

from __future__ import annotations

import dataclasses
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from tests import worlds
from tests.worlds import COST, N_STEPS, SCHEDULE, load_clip, settings
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.diffusion.denoise import Denoiser
from ttsnap_lib.diffusion.negtome import NegToMe
from ttsnap_lib.errors import BudgetError, ConfigError, DiskError, PipelineError, RewardError, SearchError
from ttsnap_lib.files import shard_lock
from ttsnap_lib.live import run
from ttsnap_lib.live.many import collect, compare, search_many
from ttsnap_lib.live.plots import headline
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


def _same(frame: pd.DataFrame, other: pd.DataFrame, *, atol: float = 0) -> None:
    """Hold two tables to each other; `atol` for scores around 1 of other batches (a picture is rounded to 256 levels)."""
    columns = ["prompt_index", "prompt", "winner", "seed", "clip", "complete"]
    pd.testing.assert_frame_equal(frame[columns], other[columns], rtol=0, atol=atol)


def test_prompts_as_embeddings(flux, clip, search_all, whole, tmp_path):
    """The winners of their texts, without text encoders; a prompt whose embeddings change is searched again."""
    given = settings(n_steps=N_STEPS)
    embeds = dict(Denoiser(flux, given).encode(PROMPTS).embeds)
    parts = {name: getattr(flux, name) for name in ("text_encoder", "text_encoder_2")}
    flux.register_modules(**dict.fromkeys(parts))
    try:
        with pytest.raises(PipelineError, match="has no text_encoder and text_encoder_2"):
            search_all(tmp_path / "none")
        assert not (tmp_path / "none").exists()
        for together in (1, 4):
            frame = search_all(tmp_path / str(together), prompt_embeds=embeds, together=together)
            _same(frame, whole[1], atol=1e-2)
        one = {name: value[2:3] for name, value in embeds.items()}
        alone = worlds.tiny_search(
            flux, clip, prompt=PROMPTS[2], prompt_index=2, candidates=3, schedule=SCHEDULE, prompt_embeds=one
        )
        assert alone.winner == whole[1]["winner"][2]
        assert alone.record.facts["prompt_embeds"] == SearchRecord.load(tmp_path / "1" / "p0002").facts["prompt_embeds"]
        embeds = {name: value[[0, 1, 3, 3]] for name, value in embeds.items()}
        before = {
            number: (tmp_path / "1" / f"p{number:04d}" / "summary.json").stat().st_mtime_ns for number in range(4)
        }
        search_all(tmp_path / "1", prompt_embeds=embeds)
        after = {number: (tmp_path / "1" / f"p{number:04d}" / "summary.json").stat().st_mtime_ns for number in range(4)}
        assert [number for number in range(4) if after[number] != before[number]] == [2]
    finally:
        flux.register_modules(**parts)


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


def test_metadata_reaches_the_reward_and_another_one_is_searched_again(search_all, tmp_path):
    seen = []

    def counted(prompts, images, metadata):
        seen.extend(row["count"] for row in metadata)
        return [float(np.asarray(image).mean()) for image in images]

    def given(*counts):
        return [{"prompt": text, "count": n} for text, n in zip(PROMPTS, counts, strict=False)]

    with pytest.raises(RewardError, match="counted reads the metadata"):
        search_all(tmp_path, reward=counted)
    search_all(tmp_path, given(1, 2), counted, together=2)
    assert set(seen) == {1, 2}
    seen.clear()
    search_all(tmp_path, given(1, 3), counted, together=2)
    assert set(seen) == {3}


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
    told = headline(table.reset_index(), "reward", 8)
    assert told.startswith("At the price of 8 images, TTSnap tries 9 seeds on 60 prompts and gains +0.5")
    with pytest.raises(ConfigError, match="baseline"):
        compare({"ttsnap": base}, "reward")


# Several prompts together


class Sizes(list):
    """The batch sizes that a module saw."""

    def __init__(self, module):
        super().__init__()
        self.handle = module.register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, module, args, kwargs):
        self.append(len(args[0] if args else next(iter(kwargs.values()))))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("name", ["flux", "sdxl", "sd3"])
def test_prompts_together_share_batches_and_win_as_alone(pipelines, clip, adapters, folders, name, tmp_path):
    pipeline = pipelines[name] if name in pipelines else worlds.build(name)
    given = {"settings": settings(n_steps=N_STEPS), "schedule": SCHEDULE, "candidates": 8, "batch_size": 8}
    given |= {"cost": COST}
    reward = [load_clip(folders[0], adapters=adapters), load_clip(folders[1], "other")]
    alone = search_many(pipeline, PROMPTS, reward, tmp_path / "alone", **given)
    with Sizes(getattr(pipeline, "transformer", None) or pipeline.unet) as sizes:
        shared = search_many(pipeline, PROMPTS, reward, tmp_path / "shared", together=4, **given)
    double = 1 if name == "flux" else 2  # with guidance a batch is twice its candidates
    assert sizes == [8 * double] * (4 * 2 + 2 * 2 + 1)  # 4 prompts of 8, 4 and 2 candidates in batches of 8
    _same(shared, alone, atol=1e-2)
    for number in range(len(PROMPTS)):
        one, other = (SearchRecord.load(tmp_path / place / f"p{number:04d}") for place in ("alone", "shared"))
        np.testing.assert_allclose(other.scores, one.scores, atol=1e-2)
        assert one.together == [] and other.together == [0, 1, 2, 3]
        counted = ["candidates", "forwards", "decodes", "scores", "cost", "variant"]
        assert other.stage_frame()[counted].equals(one.stage_frame()[counted])


def test_prompts_together_cost_what_the_batches_that_they_share_cost(search_all):
    cost = CostModel(step={1: 1.0, 8: 0.4}, verify={1: 0.3, 8: 0.1}, decode=0.2, n_steps=N_STEPS, unit="seconds")
    # A candidate pays its share of the batch that it ran in: those of a fuller one pay less, together they pay all.
    for together in (1, 4):
        spent = search_all(None, cost=cost, batch_size=None, together=together)["cost"].mean()
        assert spent == pytest.approx(dataclasses.replace(cost, prompts_together=together).total(3, SCHEDULE))
    assert spent < cost.total(3, SCHEDULE)


def test_seconds_of_prompts_together_add_up(search_all):
    begin = time.perf_counter()
    frame = search_all(None, together=4)
    whole = time.perf_counter() - begin
    assert 0.8 * whole < frame["elapsed_s"].sum() < whole
    assert frame["elapsed_s"].max() < 2 * frame["elapsed_s"].min()  # each did the same


@pytest.mark.parametrize("together", [2, 3])
def test_an_interrupted_group_keeps_all_its_prompts_and_goes_on(whole, search_all, tmp_path, together):
    seen = []

    def stop(record):
        seen.append((record.prompt_index, len(record.stages)))
        if seen[-1] == (1, 3):  # its last check, after that of prompt 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_all(tmp_path, together=together, on_check=stop)
    assert pd.read_csv(tmp_path / "results.csv")["prompt_index"].tolist() == [0]
    records = [SearchRecord.load(tmp_path / f"p{k:04d}") for k in range(together)]
    assert [record.stopped for record in records] == ["", *["interrupt"] * (together - 1)]
    done = (tmp_path / "p0000" / "image.png").stat().st_mtime_ns
    _same(search_all(tmp_path, together=together), whole[1], atol=1e-2)
    assert (tmp_path / "p0000" / "image.png").stat().st_mtime_ns == done
    assert SearchRecord.load(tmp_path / "p0001").together == [1, 2, 3][:together]


def test_a_deadline_is_shared_by_prompts_together(search_all, flux):
    handle = flux.transformer.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            begin = time.perf_counter()
            with pytest.raises(SearchError, match="3 of 4 prompts failed.*before its first step"):
                search_all(None, together=4, deadline_s=0.1, batch_size=1, candidates=40)
            assert 0.4 < time.perf_counter() - begin < 2
            with pytest.raises(BudgetError, match="deadline_s"):
                search_all(None, together=4, deadline_s=1e-9)
    finally:
        handle.remove()


def test_a_prompt_that_fails_does_not_cost_those_it_runs_with(search_all, tmp_path):
    def fussy(prompts, images):
        values = worlds.brightness(prompts, images)
        return [float("nan") if prompt == PROMPTS[1] else value for prompt, value in zip(prompts, values, strict=True)]

    sound = search_all(None, reward=worlds.brightness)
    told = pytest.warns(UserWarning, match=r"fussy failed at step 1 for the candidates \[0, 1, 2\] of prompt 1, which")
    with told, pytest.raises(SearchError, match=r"1 of 4 prompts failed: \[1\]"):
        search_all(tmp_path, reward=fussy, together=4)
    frame = collect(tmp_path)
    assert frame["prompt_index"].tolist() == [0, 2, 3]
    assert frame["winner"].tolist() == sound["winner"][[0, 2, 3]].tolist()


def test_memory_that_runs_out_with_prompts_together_halves_the_batch(whole, search_all, flux):
    seen = []

    def limited(module, args, kwargs):
        seen.append(len(args[0] if args else next(iter(kwargs.values()))))
        if seen[-1] > 4:
            raise torch.OutOfMemoryError("injected")

    handle = flux.transformer.register_forward_pre_hook(limited, with_kwargs=True)
    try:
        with pytest.warns(UserWarning, match="denoising 8 candidates; going on with 4"):
            frame = search_all(None, together=4, batch_size=8)
    finally:
        handle.remove()
    assert seen.count(8) == 1 and set(seen[1:]) == {4}  # 12, 4 and 4 candidates, once learnt for all stages
    _same(frame, whole[1], atol=1e-2)


def test_latents_of_many_prompts_rest_in_main_memory(whole, search_all, monkeypatch):
    monkeypatch.setattr(run, "_ON_DEVICE_BYTES", 0)
    _same(search_all(None, together=3), whole[1], atol=1e-2)


def test_seconds_by_batch_know_what_runs_together(search_all, flux, tmp_path):
    costs = CostModel(step={1: 1.0, 8: 0.25}, verify={1: 0.5, 8: 0.1}, n_steps=N_STEPS, unit="seconds")
    few, many = (dataclasses.replace(costs, prompts_together=n).candidates(8.0, SCHEDULE) for n in (1, 4))
    assert few < many
    for together, n in ((1, few), (4, many)):
        folder = tmp_path / str(together)
        frame = search_all(folder, together=together, candidates=None, budget=8.0, cost=costs)
        assert frame["candidates"].tolist() == [n] * 4
        told = dataclasses.replace(costs, prompts_together=together).total(n, SCHEDULE)
        assert frame["cost"].sum() == pytest.approx(4 * told) and frame["cost"].mean() < 8.0
        assert SearchRecord.load(folder / "p0003").cost_model["prompts_together"] == together
    with pytest.raises(SearchError, match=r"other settings: .*candidates"):
        search_all(tmp_path / "1", together=4, candidates=None, budget=8.0, cost=costs)
    with Sizes(flux.transformer) as sizes:
        search_all(None, PROMPTS[:1], candidates=12, cost=costs)
    assert sizes[0] == 8  # the largest batch that was measured, not the 16 of a CPU


def test_negtome_runs_one_prompt_at_a_time(search_all):
    with pytest.raises(ConfigError, match="together with NegToMe: got 2 prompts"):
        search_all(None, together=2, candidates=4, negtome=NegToMe(group_size=2))
    with pytest.raises(ConfigError, match="together"):
        search_all(None, together=0)


def test_without_a_folder_only_the_table_stays(whole, search_all):
    _same(search_all(None), whole[1], atol=1e-2)


def test_pictures_of_a_comparison(whole):
    import matplotlib.pyplot as plt

    from ttsnap_lib.live.plots import per_prompt

    frame = whole[1]
    ax = per_prompt({"best_of_n": frame, "ttsnap": frame.iloc[1:].assign(clip=frame["clip"] + 1)}, "clip")
    drawn = {line.get_label(): line.get_xdata() for line in ax.get_lines()}
    order = [*range(1, len(frame)), 0]  # all gain 1, but the first prompt has no TTSnap
    np.testing.assert_allclose(drawn["Best-of-N"], frame["clip"].iloc[order])
    np.testing.assert_allclose(drawn["TTSnap"][:-1], frame["clip"][1:] + 1)
    assert np.isnan(drawn["TTSnap"][-1]) and ax.texts[0].get_text() == "+1.000" and ax.texts[-1].get_text() == ""
    assert ax.get_yticklabels()[0].get_text() == f"{frame['prompt'][1]}  1"
    plt.close(ax.figure)
    many = pd.DataFrame({"prompt_index": range(40), "prompt": "a ring", "clip": 0.0})
    ax = per_prompt({"best_of_n": many, "ttsnap": many.assign(clip=np.arange(40.0))}, "clip", most=10)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        f"a ring  {k}" for k in (39, 38, 37, 36, 35, 4, 3, 2, 1, 0)
    ]
    assert "30 prompts between them" in [text.get_text() for text in ax.texts]
    plt.close(ax.figure)
