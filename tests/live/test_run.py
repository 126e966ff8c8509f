"""The winner of the online run on tiny pipelines of the real classes, and what was paid for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests import worlds
from tests.worlds import COST, FULL, N_STEPS, PROMPT, SCHEDULE, load_clip, pruned_winner, settings, tiny_search
from ttsnap_lib import Schedule
from ttsnap_lib.diffusion.denoise import Denoiser
from ttsnap_lib.diffusion.negtome import NegToMe
from ttsnap_lib.errors import BudgetError, ConfigError, ScheduleError
from ttsnap_lib.live import run as search_module
from ttsnap_lib.live.measure import count_tflops, measure_costs
from ttsnap_lib.live.record import SearchRecord
from ttsnap_lib.rewards.loading import load_reward

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
    assert tiny_search(flux, clip, schedule=SCHEDULE, cost=COST).cost == pytest.approx(
        FULL.total(8, SCHEDULE), rel=1e-12
    )
    small = tiny_search(flux, clip, schedule=SCHEDULE, cost=COST, decoder=worlds.tiny_decoder())
    assert small.cost == pytest.approx(COST.total(8, SCHEDULE), rel=1e-12)
    stages = [stage.total for stage in COST.stages(8, SCHEDULE)]
    assert [stage.cost for stage in small.record.stages] == pytest.approx(stages)
    assert [stage.preview for stage in small.record.stages] == [True, True, False]
    assert np.isnan(tiny_search(flux, clip).cost)


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
    result = tiny_search(
        flux, lambda prompts, images: [float(np.asarray(image).mean()) for image in images], schedule=SCHEDULE
    )
    assert np.asarray(result.image).mean() == pytest.approx(max(result.scores.values()), abs=1e-3)
    assert (np.asarray(result.image) == result.record.previews[result.winner, N_STEPS - 1]).all()


def test_a_reported_reward_never_selects(flux, clip, whole):
    bad = load_reward(lambda prompts, images: [float("nan")] * len(images), name="bad")
    with pytest.warns(UserWarning, match="have no score of it"):
        result = tiny_search(flux, [clip, bad], schedule=SCHEDULE, report="bad")
    assert result.winner == whole.winner and result.complete
    assert result.summary()["bad"] is None and result.scores["clip"] == pytest.approx(whole.scores["clip"])


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
    with pytest.raises(BudgetError, match="one group of 2"):
        tiny_search(flux, clip, budget=COST.total(1) * 1.5, cost=COST, negtome=negtome)
