"""The online run on tiny pipelines of the real classes."""

from __future__ import annotations

import dataclasses
import json
import types
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.rewards.conftest import save_clip
from tests.rewards.test_steps import write_adapters
from tests.search_world import N_STEPS, PROMPT, SCHEDULE, make_clip, pruned_winner, run, settings
from ttsnap_lib import CostModel, Schedule, _search_run, search
from ttsnap_lib import search as search_module
from ttsnap_lib.denoise import Denoiser
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
from ttsnap_lib.measure import count_tflops, measure_costs
from ttsnap_lib.negtome import NegToMe
from ttsnap_lib.plots_search import LiveGallery, gallery, winners
from ttsnap_lib.rewards import load_reward
from ttsnap_lib.search_record import SearchRecord

COST = CostModel(step=1.0, verify=0.25, decode=0.5, preview_decode=0.125, per_prompt=0.0625, n_steps=N_STEPS)
FULL = dataclasses.replace(COST, preview_decode=None)  # without a tiny decoder


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("clips")
    return [save_clip(place / "one", seed=1), save_clip(place / "two", seed=2)]


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    """Noise-aware weights for step 1 and 3."""
    return write_adapters(folders[0], tmp_path_factory.mktemp("adapters"), steps=(3, 1))


@pytest.fixture(scope="module")
def clip(folders):
    return make_clip(folders[0])


@pytest.fixture(scope="module")
def pipelines():
    return {name: tiny.build(name) for name in ("flux", "sdxl")}


@pytest.fixture
def flux(pipelines):
    return pipelines["flux"]


@pytest.fixture(scope="module")
def whole(pipelines, clip):
    """Search undisturbed, to hold disturbed runs to."""
    return run(pipelines["flux"], clip, schedule=SCHEDULE, cost=COST)


# -- the winner, and what was paid for it ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_every_method_chooses_as_prune_does(name, dtype, folders, adapters):
    pipeline = tiny.build(name).to(dtype)
    aware = make_clip(folders[0], adapters=adapters)
    other = make_clip(folders[1], "other")
    for options in (
        {"reward": aware, "method": "best_of_n"},
        {"reward": aware, "method": "ttsp"},
        {"reward": aware},
        {"reward": [aware, other], "combine": "rank_sum"},
        {"reward": [aware, other], "combine": "z_score"},
        {"reward": [aware, other], "combine": "weighted_sum", "weights": {"clip": 1.0, "other": 0.5}},
        {"reward": [other, aware], "report": ["other"], "method": "ttsp"},
    ):
        result = run(pipeline, options.pop("reward"), name=name, schedule=SCHEDULE, cost=COST, **options)
        record, pruning = result.record, Schedule() if options.get("method") == "best_of_n" else SCHEDULE
        assert result.complete and result.winner == record.winner == pruned_winner(record)
        assert record.method == options.get("method", "ttsnap")
        assert result.cost == pytest.approx(FULL.total(8, pruning), rel=1e-12)
        assert aware.step is None
        assert (np.isfinite(record.scores).all(2).sum(0) == pruning.survivors(8)).all()


def test_costs_are_the_cost_models(flux, clip):
    assert run(flux, clip, schedule=SCHEDULE, cost=COST).cost == pytest.approx(FULL.total(8, SCHEDULE), rel=1e-12)
    small = run(flux, clip, schedule=SCHEDULE, cost=COST, decoder=tiny.tiny_decoder())
    assert small.cost == pytest.approx(COST.total(8, SCHEDULE), rel=1e-12)
    stages = [stage.total for stage in COST.stages(8, SCHEDULE)]
    assert [stage.cost for stage in small.record.stages] == pytest.approx(stages)
    assert [stage.preview for stage in small.record.stages] == [True, True, False]
    assert np.isnan(run(flux, clip).cost)


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_measured_compute_is_the_cost_models(name, pipelines, clip):
    decoder = tiny.tiny_decoder()
    costs = measure_costs(pipelines[name], clip, settings(name), decoder=decoder, batch_sizes=(2,), repeats=1).tflops
    clip.clear_cache()
    spent = count_tflops(lambda: run(pipelines[name], clip, name=name, schedule=SCHEDULE, decoder=decoder))
    assert spent == pytest.approx(costs.total(8, SCHEDULE), rel=0.02)


def test_a_budget_buys_what_the_cost_model_says(flux, clip):
    budget = COST.total(6, SCHEDULE)
    assert len(run(flux, clip, schedule=SCHEDULE, cost=COST, budget=budget).record.seeds) == 6
    assert len(run(flux, clip, schedule=SCHEDULE, cost=COST, budget=budget * 0.999).record.seeds) == 5


def test_batches_do_not_change_the_result(flux, clip, whole):
    for size in (1, 8, None):
        again = run(flux, clip, schedule=SCHEDULE, batch_size=size)
        np.testing.assert_allclose(again.record.scores, whole.record.scores, atol=2e-3)  # of scores around 1
        assert again.winner == whole.winner


def test_a_candidate_can_be_made_again_alone(flux, whole, tmp_path):
    record = SearchRecord.load(whole.save(tmp_path))
    alone = search_module.regenerate(flux, record, record.winner)
    difference = np.abs(np.asarray(alone, int) - np.asarray(whole.image, int))
    assert difference.max() <= 1  # of 255
    loser = search_module.regenerate(flux, record, (record.winner + 1) % 8)
    assert np.abs(np.asarray(loser, int) - np.asarray(whole.image, int)).max() > 10
    with pytest.raises(ConfigError, match="candidate"):
        search_module.regenerate(flux, record, 8)


def test_noise_aware_weights_are_those_of_the_step(flux, folders, adapters):
    reward = make_clip(folders[0], adapters=adapters)
    record = run(flux, reward, schedule=Schedule((1, 2), (0.5, 0.5))).record
    assert [stage.variant for stage in record.stages] == ["noise_aware", "base", "base"]  # step 2 has no adapter
    for k, step in enumerate((1, None, None)):
        seen = [c for c in range(8) if (c, record.checks[k]) in record.previews]
        pictures = [Image.fromarray(record.previews[c, record.checks[k]]) for c in seen]
        expected = reward.use_step(step).score(PROMPT, pictures)
        np.testing.assert_allclose(record.scores[seen, k, 0], expected, atol=2e-3)
    reward.use_step(None)


def test_the_image_is_the_winners_and_the_reward_may_be_a_function(flux):
    result = run(flux, lambda prompts, images: [float(np.asarray(image).mean()) for image in images], schedule=SCHEDULE)
    assert np.asarray(result.image).mean() == pytest.approx(max(result.scores.values()), abs=1e-3)
    assert (np.asarray(result.image) == result.record.previews[result.winner, N_STEPS - 1]).all()


def test_a_reported_reward_never_selects(flux, clip, whole):
    bad = load_reward(lambda prompts, images: [float("nan")] * len(images), name="bad")
    with pytest.warns(UserWarning, match="have no score of it"):
        result = run(flux, [clip, bad], schedule=SCHEDULE, report="bad")
    assert result.winner == whole.winner and result.complete
    assert result.summary()["bad"] is None and result.scores["clip"] == pytest.approx(whole.scores["clip"])


# -- faults ---------------------------------------------------------------------------------------------------------


def _fails_on(picture: np.ndarray, how: str):
    """Return a reward (mean brightness) that fails for one picture."""

    def brightness(prompts, images):
        hit = [np.array_equal(np.asarray(image), picture) for image in images]
        if how == "raises" and any(hit):
            raise ValueError("cannot read this picture")
        return [
            float("nan") if bad else float(np.asarray(image).mean()) for bad, image in zip(hit, images, strict=True)
        ]

    return brightness


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("check", [0, 2])
def test_a_candidate_whose_scoring_fails_drops_out(flux, how, check):
    sound = run(flux, _fails_on(np.zeros(0), how), schedule=SCHEDULE)
    step, best = sound.record.checks[check], sound.winner
    with pytest.warns(UserWarning, match=rf"candidates \[{best}\], which drop out"):
        result = run(flux, _fails_on(sound.record.previews[best, step], how), schedule=SCHEDULE)
    record = result.record
    assert result.complete and result.winner != best and record.pruned_at[best] == -2
    assert np.isnan(record.scores[best, check]).all()
    others = np.delete(np.arange(8), best)
    np.testing.assert_array_equal(record.scores[others, 0], sound.record.scores[others, 0])


def test_a_reward_that_fails_for_all_says_why(flux):
    def broken(prompts, images):
        raise RuntimeError("no such layer")

    with pytest.warns(UserWarning, match="no such layer"), pytest.raises(SearchError, match="step 1"):
        run(flux, broken, schedule=SCHEDULE)


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


def _memory_for(limit: int):
    def act(sizes):
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("injected")

    return act


def test_out_of_memory_while_denoising_halves_the_batch(flux, clip, whole):
    with Hook(flux.transformer, _memory_for(2)) as hook, pytest.warns(UserWarning, match="going on with"):
        result = run(flux, clip, schedule=SCHEDULE, batch_size=8, cost=COST)
    assert result.winner == whole.winner and result.complete
    assert hook.sizes[:2] == [8, 4] and set(hook.sizes[2:]) == {2}  # tried twice, and never again
    np.testing.assert_allclose(result.record.scores, whole.record.scores, atol=2e-3)
    assert sum(stage.forwards for stage in result.record.stages) == 8 * 2 + 4 * 2 + 2


def test_memory_that_runs_out_later_costs_no_finished_work(flux, clip, whole):
    def act(sizes):
        if len(sizes) == 4 and sizes[-1] == 3:  # the second step of the second batch
            raise torch.OutOfMemoryError("injected")

    with Hook(flux.transformer, act) as hook, pytest.warns(UserWarning, match="denoising 3 candidates"):
        result = run(flux, clip, schedule=SCHEDULE)
    assert result.winner == whole.winner
    assert hook.sizes[:5] == [3, 3, 3, 3, 1]  # the first batch is not run again


def test_out_of_memory_while_decoding_keeps_what_is_denoised(flux, clip, whole):
    told = pytest.warns(UserWarning, match="decoding and scoring 8 candidates")
    with told, Hook(flux.transformer, lambda sizes: None) as steps, Hook(flux.vae.decoder, _memory_for(2)):
        result = run(flux, clip, schedule=SCHEDULE, batch_size=8)
    assert steps.sizes == [8, 8, 4, 4, 2] and result.winner == whole.winner


def test_out_of_memory_with_one_candidate_is_told(flux, clip):
    with Hook(flux.transformer, _memory_for(0)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DeviceError, match="out of memory with 1 images"):
            run(flux, clip, schedule=SCHEDULE)
    assert run(flux, clip, candidates=1).complete  # the pipeline is usable


@pytest.mark.parametrize("where", ["transformer", "vae", "reward"])
def test_control_c_at_any_moment_gives_the_best_so_far(flux, clip, whole, where, tmp_path):
    module = {"transformer": flux.transformer, "vae": flux.vae.decoder, "reward": clip.module.vision_model}[where]
    with Hook(module, lambda sizes: None) as counted:
        run(flux, clip, schedule=SCHEDULE)
    for moment in range(1, len(counted.sizes) + 1):

        def act(sizes, moment=moment):
            if len(sizes) == moment:
                raise KeyboardInterrupt

        with Hook(module, act), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if where == "transformer" and moment == 1:  # nothing to show yet
                with pytest.raises(KeyboardInterrupt):
                    run(flux, clip, schedule=SCHEDULE)
                continue
            result = run(flux, clip, schedule=SCHEDULE, cost=COST)
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
    assert run(flux, clip, schedule=SCHEDULE).winner == whole.winner  # pipeline and reward are as before


def test_control_c_in_the_display_counts_too(flux, clip):
    def press(record):
        raise KeyboardInterrupt

    result = run(flux, clip, schedule=SCHEDULE, on_check=press)
    assert result.winner == np.nanargmax(result.record.scores[:, 0, 0]) and not result.complete


@pytest.mark.parametrize("allowed", [1, 3, 5, 9, 12])
def test_a_deadline_is_passed_by_one_step_at_most(flux, clip, whole, allowed, monkeypatch):
    """The clock ticks once per denoising step of a batch; three batches make the first stage."""
    clock = {"now": 0.0}
    fake = types.SimpleNamespace(monotonic=lambda: clock["now"], perf_counter=lambda: clock["now"])
    monkeypatch.setattr(_search_run, "time", fake)
    monkeypatch.setitem(search_module.__dict__, "time", fake)

    def tick(sizes):
        clock["now"] += 1

    with Hook(flux.transformer, tick) as hook, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(flux, clip, schedule=SCHEDULE, deadline_s=allowed - 0.5, cost=COST)
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
        run(flux, clip, schedule=SCHEDULE, deadline_s=1e-9)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"budget": 0.5, "cost": COST}, BudgetError, "the cost of one candidate"),
        ({"budget": -1.0, "cost": COST}, ConfigError, "budget"),
        ({"budget": float("nan"), "cost": COST}, ConfigError, "budget"),
        ({"budget": 9.0}, CostError, "ttsnap cost"),
        ({"budget": 9.0, "candidates": 3, "cost": COST}, BudgetError, "exactly one"),
        ({"budget": None}, BudgetError, "exactly one"),
        ({"candidates": 0}, BudgetError, "candidates"),
        ({"candidates": 2.5}, BudgetError, "candidates"),
        ({"cost": CostModel(step=1, verify=1)}, CostError, "n_steps"),
        ({"cost": "no-such-file.json"}, CostError, "cannot be read"),
        ({"cost": 3.0}, CostError, "a CostModel"),
        ({"schedule": Schedule((N_STEPS - 1,), (0.5,))}, ScheduleError, "Prune before the last step"),
        ({"schedule": [1, 2]}, ScheduleError, "a Schedule"),
        ({"method": "beam"}, ConfigError, "best_of_n"),
        ({"method": "ttsnap", "schedule": SCHEDULE}, ConfigError, "noise-aware"),
        ({"prompt": " "}, ConfigError, "prompt"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"deadline_s": 0}, ConfigError, "deadline_s"),
        ({"combine": "median"}, ConfigError, "rank_sum"),
        ({"weights": [1.0]}, ConfigError, "weighted_sum"),
        ({"report": ["clip"]}, ConfigError, "Leave one reward"),
        ({"reward": []}, ConfigError, "distinct names"),
        ({"reward": "no/such/folder"}, RewardError, "no/such/folder"),
    ],
)
def test_bad_input_is_told_before_a_model_is_touched(clip, options, error, says):
    options = dict(options)
    reward = options.pop("reward", clip)
    with pytest.raises(error, match=says):
        run(object(), reward, **options)  # object(): whoever touched the pipeline would raise a PipelineError


def test_two_rewards_of_one_name_and_a_foreign_decoder(flux, clip):
    with pytest.raises(ConfigError, match="distinct names"):
        run(flux, [clip, clip])
    with pytest.raises(PipelineError, match="cannot be loaded"):
        run(flux, clip, decoder="/no/such/folder")
    with pytest.raises(PipelineError, match="latent channels"):
        run(flux, clip, decoder="pocket-tiny")


def test_an_unreadable_cost_file(clip, tmp_path):
    path = tmp_path / "cost.json"
    path.write_text('{"cost": {"step": 1.0}}')
    with pytest.raises(CostError, match="without verify"):
        run(object(), clip, cost=str(path))


# -- NegToMe --------------------------------------------------------------------------------------------------------


def test_negtome_is_off_by_default_and_pruning_waits_for_its_end(flux, clip, whole):
    negtome = NegToMe(group_size=2, start=1000, end=900)
    window = negtome.active_steps(flux, Denoiser(flux, settings()).timesteps)
    assert window and window[-1] <= SCHEDULE.steps[0]
    result = run(flux, clip, schedule=SCHEDULE, negtome=negtome, batch_size=4)
    assert result.winner == pruned_winner(result.record)
    firsts = np.arange(0, 8, 2)  # the first of each group is left alone
    np.testing.assert_allclose(result.record.scores[firsts, 0], whole.record.scores[firsts, 0], atol=2e-3)
    assert np.abs(result.record.scores[firsts + 1, 0] - whole.record.scores[firsts + 1, 0]).max() > 0.01
    assert run(flux, clip, schedule=SCHEDULE).winner == whole.winner  # nothing stays installed
    long = NegToMe(group_size=2, start=1000, end=0)
    with pytest.raises(ScheduleError, match="window of NegToMe"):
        run(flux, clip, schedule=SCHEDULE, negtome=long, batch_size=4)
    with pytest.raises(BudgetError, match="group_size"):
        run(flux, clip, candidates=7, negtome=negtome)
    with pytest.raises(ConfigError, match="batch_size with NegToMe"):
        run(flux, clip, candidates=8, negtome=negtome, batch_size=3)
    with pytest.raises(BudgetError, match="one group of 2"):
        run(flux, clip, budget=COST.total(1) * 1.5, cost=COST, negtome=negtome)


# -- what is left behind --------------------------------------------------------------------------------------------


def test_the_record_tells_all_and_comes_back(whole, tmp_path):
    assert whole.save(tmp_path / "run") == tmp_path / "run"
    loaded = SearchRecord.load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.scores, whole.record.scores)
    assert loaded.to_dict() == whole.record.to_dict()
    assert [loaded.pruned_at.count(step) for step in (1, 3, -1)] == [4, 2, 2]
    frame = pd.read_parquet(tmp_path / "run" / "candidates.parquet")
    assert frame["seed"].tolist() == whole.record.seeds and frame["winner"].sum() == 1
    assert frame.loc[whole.winner, f"clip_s{N_STEPS - 1:02d}"] == np.float32(whole.scores["clip"])
    stages = whole.record.stage_frame()
    assert stages["candidates"].tolist() == [8, 4, 2] and stages["forwards"].tolist() == [16, 8, 2]
    assert (stages["elapsed_s"] >= stages[["denoise_s", "decode_s", "score_s"]].sum(axis=1) - 1e-6).all()
    content = json.loads((tmp_path / "run" / "record.json").read_text())
    assert content["cost"] == pytest.approx(whole.cost) and content["complete"] is True


def test_the_picture_carries_its_origin(whole, tmp_path):
    whole.save(tmp_path)
    with Image.open(tmp_path / "image.png") as picture:
        notes = {key.removeprefix("ttsnap:"): value for key, value in picture.text.items()}
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(whole.image))
    assert notes["prompt"] == PROMPT and int(notes["seed"]) == whole.record.seeds[whole.winner]
    assert json.loads(notes["schedule"]) == SCHEDULE.to_dict() and json.loads(notes["rewards"]) == ["clip"]
    assert float(notes["clip"]) == pytest.approx(whole.scores["clip"])


def test_a_record_that_cannot_be_read(tmp_path):
    with pytest.raises(SearchError, match="No such file"):
        SearchRecord.load(tmp_path)
    (tmp_path / "record.json").write_text('{"prompt": 1}')
    with pytest.raises(SearchError, match="cannot be read"):
        SearchRecord.load(tmp_path)
    (tmp_path / "record.json").write_text('{"colour": 1}')
    with pytest.raises(SearchError, match="unknown key"):
        SearchRecord.load(tmp_path)


def test_the_gallery_dims_the_pruned_and_frames_the_winner(whole):
    import matplotlib.pyplot as plt

    figure = gallery(whole.record, columns=6)
    shown = [[ax for ax in figure.axes[row * 6 : row * 6 + 6] if ax.images] for row in range(3)]
    assert [len(row) for row in shown] == [6, 4, 2]
    for row, kept in zip(shown, (4, 2, 1), strict=True):  # best first: the first ones stay
        assert [ax.images[0].get_alpha() for ax in row] == [1.0] * kept + [0.3] * (len(row) - kept)
        framed = [k for k, ax in enumerate(row) if ax.spines["left"].get_linewidth() == 3]
        assert len(framed) == 1 and framed[0] < kept
    assert "winner: candidate" in figure.get_suptitle()
    plt.close(figure)


def test_winners_stand_side_by_side(whole):
    import matplotlib.pyplot as plt

    figure = winners({"ttsp": whole, "best_of_n": whole})
    (name, score), *_ = whole.scores.items()
    for ax, method in zip(figure.axes, ("TTSp", "Best-of-N"), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), np.asarray(whole.image))
        assert ax.get_title() == f"{method}\n{name} {score:.3f}, {len(whole.record.seeds)} candidates"
    plt.close(figure)


def test_the_display_and_the_progress_follow_the_run(flux, clip, capsys):
    live, seen, checked = LiveGallery(columns=4), [], []

    def on_check(record):
        checked.append((len(record.stages), record.winner))
        live(record)

    result = run(flux, clip, schedule=SCHEDULE, on_check=on_check, progress=lambda *state: seen.append(state))
    assert [stages for stages, _ in checked] == [1, 2, 3] and checked[-1][1] == result.winner
    assert "winner" in live.figure.get_suptitle()
    total = 8 * 2 + 4 * 2 + 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1] == (total, total)
    assert all(done < total for done, _ in seen[:-1])  # it ends when everything is scored


def test_the_module_is_the_function(flux, clip):
    assert search(flux, PROMPT, clip, candidates=1, settings=settings()).complete
