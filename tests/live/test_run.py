"""The live search on tiny pipelines of the real classes: its winner, its price, what disturbs it and what it refuses."""

from __future__ import annotations

import time
import types
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests import worlds
from tests.worlds import (
    COST,
    FULL,
    N_STEPS,
    PROMPT,
    SCHEDULE,
    Looks,
    brightness,
    load_clip,
    pruned_winner,
    settings,
    tiny_search,
)
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.diffusion.denoise import Denoiser
from ttsnap_lib.diffusion.negtome import NegToMe
from ttsnap_lib.errors import (
    BudgetError,
    ConfigError,
    CostError,
    DeviceError,
    PipelineError,
    RewardError,
    ScheduleError,
    SearchError,
)
from ttsnap_lib.live import run
from ttsnap_lib.live.measure import count_tflops, measure_costs
from ttsnap_lib.live.record import SearchRecord
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.tensors.spread import SpreadWarning

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_every_method_chooses_as_prune_does(name, dtype, folders, adapters):
    pipeline = worlds.build(name).to(dtype)
    aware = load_clip(folders[0], adapters=adapters)
    other = load_clip(folders[1], "other")
    for options in (
        {"reward": aware, "method": "best_of_n"},
        {"reward": aware, "method": "ttsp"},
        {"reward": aware},
        {"reward": [aware, other], "combine": "rank_sum"},
        {"reward": [aware, other], "combine": "z_score"},
        {"reward": [aware, other], "combine": "weighted_sum", "weights": {"clip": 1.0, "other": 0.5}},
        {"reward": [other, aware], "report": ["other"], "method": "ttsp"},
    ):
        result = tiny_search(pipeline, options.pop("reward"), schedule=SCHEDULE, cost=COST, **options)
        record, pruning = result.record, Schedule() if options.get("method") == "best_of_n" else SCHEDULE
        assert result.complete and result.winner == record.winner == pruned_winner(record)
        assert record.method == options.get("method", "ttsnap")
        assert result.cost == pytest.approx(FULL.total(8, pruning), rel=1e-12)
        assert aware.step is None
        assert (np.isfinite(record.scores).all(2).sum(0) == pruning.survivors(8)).all()


def test_costs_are_the_cost_models(flux, clip):
    small = tiny_search(flux, clip, schedule=SCHEDULE, cost=COST, decoder=worlds.tiny_decoder())
    assert small.cost == pytest.approx(COST.total(8, SCHEDULE), rel=1e-12)
    stages = [stage.total for stage in COST.stages(8, SCHEDULE)]
    assert [stage.cost for stage in small.record.stages] == pytest.approx(stages)
    assert [stage.preview for stage in small.record.stages] == [True, True, False]
    assert np.isnan(tiny_search(flux, clip).cost)


@pytest.mark.parametrize(
    ("size", "ran"), [(3, [3, 3, 3, 3, 2, 2, 3, 3, 1, 1, 2]), (None, [4, 4, 4, 4, 4, 4, 2]), (8, [8, 8, 4, 4, 2])]
)
def test_seconds_by_batch_are_those_of_the_batches_that_ran(flux, clip, size, ran):
    seconds = {
        "step": {1: 1.0, 2: 0.8, 4: 0.5, 8: 0.4},
        "verify": {1: 0.3, 4: 0.1, 8: 0.05},
        "decode": {2: 0.7, 8: 0.3},
    }
    measured = CostModel(**seconds, n_steps=N_STEPS, unit="seconds", batch_size=4)
    budget = replace(measured, batch_size=size or 4).total(8, SCHEDULE)
    with Hook(flux.transformer, lambda sizes: None) as hook:
        result = tiny_search(flux, clip, schedule=SCHEDULE, cost=measured, batch_size=size, budget=budget)
    record = result.record
    assert len(record.seeds) == 8 and hook.sizes == ran and result.cost == pytest.approx(budget)
    priced = CostModel.from_dict(record.cost_model)
    assert priced.batch_size == (size or 4)
    assert [one.cost for one in record.stages] == pytest.approx([one.total for one in priced.stages(8, SCHEDULE)])
    # Of a record from before batches were noted, as if they had been full.
    for stage in record.stages:
        stage.forwards_by_batch = stage.checks_by_batch = {}
    assert record.price(priced) == pytest.approx(
        sum(
            priced.each("step", size or 4) * one.forwards
            + (priced.each("decode", size or 4) + priced.each("verify", size or 4)) * one.decodes
            for one in record.stages
        )
    )


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_measured_compute_is_the_cost_models(name, pipelines, clip):
    decoder = worlds.tiny_decoder()
    costs = measure_costs(
        pipelines[name], clip, settings(n_steps=N_STEPS), decoder=decoder, batch_sizes=(2,), repeats=1
    ).tflops
    clip.clear_cache()
    spent = count_tflops(lambda: tiny_search(pipelines[name], clip, schedule=SCHEDULE, decoder=decoder))
    assert spent == pytest.approx(costs.total(8, SCHEDULE), rel=0.02)


def test_a_budget_buys_what_the_cost_model_says(flux, clip):
    budget = COST.total(6, SCHEDULE)
    assert len(tiny_search(flux, clip, schedule=SCHEDULE, cost=COST, budget=budget).record.seeds) == 6
    assert len(tiny_search(flux, clip, schedule=SCHEDULE, cost=COST, budget=budget * 0.999).record.seeds) == 5


def test_batches_do_not_change_the_result(flux, clip, whole):
    for size in (1, 8, None):
        again = tiny_search(flux, clip, schedule=SCHEDULE, batch_size=size)
        np.testing.assert_allclose(again.record.scores, whole.record.scores, atol=2e-3)  # of scores around 1
        assert again.winner == whole.winner


def test_noise_aware_weights_are_those_of_the_step(flux, folders, adapters):
    reward = load_clip(folders[0], adapters=adapters)
    record = tiny_search(flux, reward, schedule=Schedule((1, 2), (0.5, 0.5))).record
    assert [stage.variant for stage in record.stages] == ["noise_aware", "base", "base"]  # step 2 has no adapter
    for k, step in enumerate((1, None, None)):
        seen = [c for c in range(8) if (c, record.checks[k]) in record.previews]
        pictures = [Image.fromarray(record.previews[c, record.checks[k]]) for c in seen]
        expected = reward.use_step(step).score(PROMPT, pictures)
        np.testing.assert_allclose(record.scores[seen, k, 0], expected, atol=2e-3)
    reward.use_step(None)


def test_the_image_is_the_winners_and_the_reward_may_be_a_function(flux):
    result = tiny_search(flux, brightness, schedule=SCHEDULE)
    assert np.asarray(result.image).mean() == pytest.approx(max(result.scores.values()), abs=1e-3)
    assert (np.asarray(result.image) == result.record.previews[result.winner, N_STEPS - 1]).all()


def test_a_reported_reward_never_selects(flux, clip, whole):
    bad = load_reward(lambda prompts, images: [float("nan")] * len(images), name="bad")
    with pytest.warns(UserWarning, match="have no score of it"):
        result = tiny_search(flux, [clip, bad], schedule=SCHEDULE, report="bad")
    assert result.winner == whole.winner and result.complete
    assert result.summary()["bad"] is None and result.scores["clip"] == pytest.approx(whole.scores["clip"])


def test_numbers_of_one_reward_select_jointly_or_are_reported(flux):
    def seen(prompts, images, metadata):
        means = [np.asarray(image).mean(axis=(0, 1)) for image in images]
        return [[red, green, row["count"]] for (red, green, _), row in zip(means, metadata, strict=True)]

    seen.outputs = ("red", "green", "count")
    options = {"schedule": SCHEDULE, "metadata": {"count": 4}, "report": "seen.count"}
    found = tiny_search(flux, seen, **options)
    assert found.record.rewards == ["seen.red", "seen.green", "seen.count"] and found.scores["seen.count"] == 4
    assert found.winner == pruned_winner(found.record)
    weighted = tiny_search(flux, seen, combine="weighted_sum", weights={"seen.red": 0.0, "seen.green": 1.0}, **options)
    last = weighted.record.scores[:, -1, 1]
    assert weighted.scores["seen.green"] == np.nanmax(last)
    looks = tiny_search(flux, [Looks(), seen], schedule=SCHEDULE, metadata={"count": 4}, report=["seen", "looks.sigma"])
    assert looks.record.report == ["seen.red", "seen.green", "seen.count", "looks.sigma"]
    assert looks.winner == pruned_winner(looks.record)
    with pytest.raises(RewardError, match="seen reads the metadata"):
        tiny_search(flux, seen)


def test_rewards_that_say_nothing_or_outvote_the_others_are_told(flux, clip):
    dull = load_reward(lambda prompts, images: [1.0] * len(images), name="dull")
    with pytest.warns(SpreadWarning, match=r"say nothing there: dull in 1 of 1 prompts") as told:
        tiny_search(flux, [clip, dull], schedule=SCHEDULE)
    assert len(told) == 1
    with pytest.warns(SpreadWarning, match=r"weighted_sum adds up rewards of different scale.*brightness decides"):
        tiny_search(flux, [clip, brightness], combine="weighted_sum", weights=[1.0, 100.0])


def test_negtome_is_off_by_default_and_pruning_waits_for_its_end(flux, clip, whole):
    negtome = NegToMe(group_size=2, start=1000, end=900)
    window = negtome.active_steps(flux, Denoiser(flux, settings(n_steps=N_STEPS)).timesteps)
    assert window and window[-1] <= SCHEDULE.steps[0]
    result = tiny_search(flux, clip, schedule=SCHEDULE, negtome=negtome, batch_size=4)
    assert result.winner == pruned_winner(result.record)
    firsts = np.arange(0, 8, 2)  # the first of each group is left alone
    np.testing.assert_allclose(result.record.scores[firsts, 0], whole.record.scores[firsts, 0], atol=2e-3)
    assert np.abs(result.record.scores[firsts + 1, 0] - whole.record.scores[firsts + 1, 0]).max() > 0.01
    assert tiny_search(flux, clip, schedule=SCHEDULE).winner == whole.winner  # nothing stays installed
    long = NegToMe(group_size=2, start=1000, end=0)
    with pytest.raises(ScheduleError, match="window of NegToMe"):
        tiny_search(flux, clip, schedule=SCHEDULE, negtome=long, batch_size=4)
    with pytest.raises(BudgetError, match="group_size"):
        tiny_search(flux, clip, candidates=7, negtome=negtome)
    with pytest.raises(ConfigError, match="batch_size with NegToMe"):
        tiny_search(flux, clip, candidates=8, negtome=negtome, batch_size=3)
    dear = CostModel(
        step={1: 1.0, 2: 0.9, 3: 0.2}, verify=0, n_steps=N_STEPS, unit="seconds"
    )  # a group of 2 costs more than 3
    with pytest.raises(BudgetError, match="one group of 2"):
        tiny_search(flux, clip, negtome=negtome, budget=dear.total(3), cost=dear, batch_size=None)
    with pytest.raises(BudgetError, match="one group of 2"):
        tiny_search(flux, clip, budget=COST.total(1) * 1.5, cost=COST, negtome=negtome)


# Disturbed: scoring fails, memory or time runs out, Ctrl-C


def fails_on(picture: np.ndarray, how: str):
    """Return a reward (mean brightness) that fails for one picture."""

    def fussy(prompts, images):
        hit = [np.array_equal(np.asarray(image), picture) for image in images]
        if how == "raises" and any(hit):
            raise ValueError("cannot read this picture")
        return [float("nan") if bad else value for bad, value in zip(hit, brightness(prompts, images), strict=True)]

    return fussy


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("check", [0, 2])
def test_a_candidate_whose_scoring_fails_drops_out(flux, how, check):
    sound = tiny_search(flux, fails_on(np.zeros(0), how), schedule=SCHEDULE)
    step, best = sound.record.checks[check], sound.winner
    with pytest.warns(UserWarning, match=rf"candidates \[{best}\], which drop out"):
        result = tiny_search(flux, fails_on(sound.record.previews[best, step], how), schedule=SCHEDULE)
    record = result.record
    assert result.complete and result.winner != best and record.pruned_at[best] == -2
    assert np.isnan(record.scores[best, check]).all()
    others = np.delete(np.arange(8), best)
    np.testing.assert_array_equal(record.scores[others, 0], sound.record.scores[others, 0])


def test_a_reward_that_fails_for_all_says_why(flux):
    def broken(prompts, images):
        raise RuntimeError("no such layer")

    with pytest.warns(UserWarning, match="no such layer"), pytest.raises(SearchError, match="step 1"):
        tiny_search(flux, broken, schedule=SCHEDULE)


def test_a_vae_that_overflows_in_fp16_is_told():
    pipe = worlds.build("sdxl")
    pipe.vae.register_to_config(force_upcast=False)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight *= 1e5
    pipe.vae.half()
    with pytest.warns(UserWarning, match="VAE in fp32"), pytest.raises(SearchError, match="step 1"):
        tiny_search(pipe, brightness, schedule=SCHEDULE)


class Hook:
    """Counts the calls of a module and does something at them."""

    def __init__(self, module, act):
        self.sizes: list[int] = []
        self.act = act
        self.handle = module.register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, module, args, kwargs):
        self.sizes.append(len(args[0] if args else next(iter(kwargs.values()))))
        self.act(self.sizes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


def memory_for(limit: int):
    def act(sizes):
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("injected")

    return act


def test_out_of_memory_while_denoising_halves_the_batch(flux, clip, whole):
    with Hook(flux.transformer, memory_for(2)) as hook, pytest.warns(UserWarning, match="going on with"):
        result = tiny_search(flux, clip, schedule=SCHEDULE, batch_size=8, cost=COST)
    assert result.winner == whole.winner and result.complete
    assert hook.sizes[:2] == [8, 4] and set(hook.sizes[2:]) == {2}  # tried twice, and never again
    np.testing.assert_allclose(result.record.scores, whole.record.scores, atol=2e-3)
    assert [stage.forwards_by_batch for stage in result.record.stages] == [{2: 8 * 2}, {2: 4 * 2}, {2: 2}]


def test_memory_that_runs_out_later_costs_no_finished_work(flux, clip, whole):
    def act(sizes):
        if len(sizes) == 4 and sizes[-1] == 3:  # the second step of the second batch
            raise torch.OutOfMemoryError("injected")

    with Hook(flux.transformer, act) as hook, pytest.warns(UserWarning, match="denoising 3 candidates"):
        result = tiny_search(flux, clip, schedule=SCHEDULE)
    assert result.winner == whole.winner
    assert hook.sizes[:5] == [3, 3, 3, 3, 1]  # the first batch is not run again


def test_out_of_memory_while_decoding_keeps_what_is_denoised(flux, clip, whole):
    told = pytest.warns(UserWarning, match="decoding and scoring 8 candidates")
    with told, Hook(flux.transformer, lambda sizes: None) as steps, Hook(flux.vae.decoder, memory_for(2)):
        result = tiny_search(flux, clip, schedule=SCHEDULE, batch_size=8)
    assert steps.sizes == [8, 8, 4, 4, 2] and result.winner == whole.winner


def test_out_of_memory_with_one_candidate_is_told(flux, clip):
    with Hook(flux.transformer, memory_for(0)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DeviceError, match="out of memory with 1 images"):
            tiny_search(flux, clip, schedule=SCHEDULE)
    assert tiny_search(flux, clip, candidates=1).complete  # the pipeline is usable


@pytest.mark.parametrize("where", ["transformer", "vae", "reward"])
def test_control_c_at_any_moment_gives_the_best_so_far(flux, clip, whole, where, tmp_path):
    module = {"transformer": flux.transformer, "vae": flux.vae.decoder, "reward": clip.module.vision_model}[where]
    with Hook(module, lambda sizes: None) as counted:
        tiny_search(flux, clip, schedule=SCHEDULE)
    for moment in range(1, len(counted.sizes) + 1):

        def act(sizes, moment=moment):
            if len(sizes) == moment:
                raise KeyboardInterrupt

        with Hook(module, act), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if where == "transformer" and moment == 1:  # nothing to show yet
                with pytest.raises(KeyboardInterrupt):
                    tiny_search(flux, clip, schedule=SCHEDULE)
                continue
            result = tiny_search(flux, clip, schedule=SCHEDULE, cost=COST)
        record = result.record
        assert not result.complete and record.stopped == "interrupt"
        done = ~np.isnan(record.scores[:, :, 0])
        if done.any():  # the best of the furthest check that anyone reached
            furthest = int(np.flatnonzero(done.any(0))[-1])
            assert result.winner == np.nanargmax(record.scores[:, furthest, 0])
            np.testing.assert_allclose(record.scores[done], whole.record.scores[done], atol=2e-3)
            shown = record.previews[result.winner, record.checks[furthest]]
            np.testing.assert_array_equal(np.asarray(result.image), shown)
        assert 0 < result.cost < whole.cost
    loaded = SearchRecord.load(result.save(tmp_path))
    assert loaded.stopped == "interrupt" and (tmp_path / "image.png").is_file()
    assert tiny_search(flux, clip, schedule=SCHEDULE).winner == whole.winner  # pipeline and reward are as before


def test_control_c_in_the_display_counts_too(flux, clip):
    def press(record):
        raise KeyboardInterrupt

    result = tiny_search(flux, clip, schedule=SCHEDULE, on_check=press)
    assert result.winner == np.nanargmax(result.record.scores[:, 0, 0]) and not result.complete


@pytest.mark.parametrize("allowed", [1, 3, 5, 9, 12])
def test_a_deadline_is_passed_by_one_step_at_most(flux, clip, whole, allowed, monkeypatch):
    """The clock ticks once per denoising step of a batch; three batches make the first stage."""
    clock = {"now": 0.0}
    fake = types.SimpleNamespace(monotonic=lambda: clock["now"], perf_counter=lambda: clock["now"])
    monkeypatch.setattr(run, "time", fake)

    def tick(sizes):
        clock["now"] += 1

    with Hook(flux.transformer, tick) as hook, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = tiny_search(flux, clip, schedule=SCHEDULE, deadline_s=allowed - 0.5, cost=COST)
    if allowed == 12:
        assert result.complete and result.winner == whole.winner and len(hook.sizes) == 11
        return
    assert not result.complete and result.record.stopped == "deadline" and len(hook.sizes) == allowed
    done = ~np.isnan(result.record.scores[:, :, 0])
    if done.any():
        furthest = int(np.flatnonzero(done.any(0))[-1])
        assert result.winner == np.nanargmax(result.record.scores[:, furthest, 0])
    else:
        assert np.isnan(result.scores["clip"]) and result.summary()["clip"] is None


def test_a_deadline_before_the_first_step_is_told(flux, clip):
    with pytest.raises(BudgetError, match="deadline_s"):
        tiny_search(flux, clip, schedule=SCHEDULE, deadline_s=1e-9)


# Refused, before a model is touched


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"budget": 0.5, "cost": COST}, BudgetError, "the cost of one candidate"),
        ({"budget": float("nan"), "cost": COST}, ConfigError, "budget"),
        ({"budget": 9.0}, CostError, "ttsnap cost"),
        ({"cost": CostModel(step=1, verify=1)}, CostError, "n_steps"),
        ({"cost": "no-such-file.json"}, CostError, "cannot be read"),
        ({"schedule": Schedule((N_STEPS - 1,), (0.5,))}, ScheduleError, "Prune before the last step"),
        ({"method": "beam"}, ConfigError, "best_of_n"),
        ({"method": "ttsnap", "schedule": SCHEDULE}, ConfigError, "noise-aware"),
        ({"prompt": " "}, ConfigError, "prompt"),
        ({"weights": [1.0]}, ConfigError, "weighted_sum"),
        ({"report": ["clip"]}, ConfigError, "Leave one reward"),
        ({"reward": "no/such/folder"}, RewardError, "no/such/folder"),
    ],
)
def test_bad_input_is_told_before_a_model_is_touched(clip, options, error, says):
    options = dict(options)
    reward = options.pop("reward", clip)
    with pytest.raises(error, match=says):
        tiny_search(object(), reward, **options)  # object(): whoever touched the pipeline would raise a PipelineError


def test_two_rewards_of_one_name_and_a_foreign_decoder(flux, clip):
    with pytest.raises(ConfigError, match="distinct names"):
        tiny_search(flux, [clip, clip])
    with pytest.raises(PipelineError, match="tiny decoder: got /no/such/folder"):
        tiny_search(flux, clip, decoder="/no/such/folder")
    with pytest.raises(PipelineError, match="latent channels"):
        tiny_search(flux, clip, decoder="pocket-tiny")


def test_the_time_of_a_search_is_not_that_of_its_displays(flux, clip):
    begin = time.perf_counter()
    result = tiny_search(
        flux, clip, schedule=SCHEDULE, on_check=lambda record: time.sleep(0.3), progress=lambda *done: time.sleep(0.1)
    )
    batches = [-(-stage.candidates // 3) * (stage.last_step - stage.first_step + 1) for stage in result.record.stages]
    shown = 0.3 * len(batches) + 0.1 * sum(batches)
    assert result.record.elapsed_s < time.perf_counter() - begin - shown
    assert sum(stage.elapsed_s for stage in result.record.stages) < result.record.elapsed_s
    assert all(stage.denoise_s < stage.elapsed_s for stage in result.record.stages)
