"""Drafts of all candidates, full runs of the best: chosen as two searches after each other would, at the price told."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from tests.live.test_run import Hook
from tests.worlds import COST, FULL, N_STEPS, PROMPT, SCHEDULE, settings, tiny_search
from ttsnap_lib import open_rewards, simulate
from ttsnap_lib.diffusion.denoise import Denoiser
from ttsnap_lib.diffusion.negtome import NegToMe
from ttsnap_lib.diffusion.schedulers import spaced_for_drafts
from ttsnap_lib.errors import BudgetError, ConfigError, TensorError
from ttsnap_lib.live.many import search_many
from ttsnap_lib.live.plots import gallery
from ttsnap_lib.live.record import DRAFTED, SearchRecord
from ttsnap_lib.schedule import Draft
from ttsnap_lib.scoring.score import draft_scores, generate_scores
from ttsnap_lib.simulation.draft import Drafts
from ttsnap_lib.tensors.spread import SpreadWarning

pytestmark = pytest.mark.usefixtures("one_thread")

DRAFT = {"draft": 2, "finish": 3}


def test_the_best_drafts_run_in_full_from_the_same_seeds(flux, clip, tmp_path):
    drafts = tiny_search(flux, clip, settings=settings(n_steps=2)).record.scores[:, 0, 0]
    full = tiny_search(flux, clip).record.scores[:, 0, 0]
    told, calls = [], []
    result = tiny_search(
        flux, clip, cost=COST, budget=COST.total(8, Draft(2, 3)), on_check=lambda record: told.append(record.checks),
        progress=lambda *news: calls.append(news), **DRAFT,
    )  # fmt: skip
    record, best = result.record, np.sort(np.argsort(-drafts)[:3])
    # Other batches round the last bits otherwise; scores are around 1.
    np.testing.assert_allclose(record.draft.scores[:, 0, 0], drafts, atol=2e-3)
    assert np.flatnonzero(~np.isnan(record.scores[:, 0, 0])).tolist() == best.tolist()
    np.testing.assert_allclose(record.scores[best, 0, 0], full[best], atol=2e-3)
    assert result.winner == best[np.argmax(full[best])] and result.complete and record.method == "draft"
    assert [at == DRAFTED for at in record.pruned_at] == [k not in best for k in range(8)]
    assert len(record.seeds) == 8 and told == [[1], [N_STEPS - 1]]
    # Text once, every step, decode and score of both, and nothing else.
    assert result.cost == pytest.approx(0.0625 + 8 * (2 + 0.75) + 3 * (N_STEPS + 0.75), rel=1e-12)
    assert calls[-1] == (8 * 2 + 3 * N_STEPS,) * 2 and calls == sorted(calls)
    assert len({total for _, total in calls}) == 1
    assert {"draft_steps": 2, "finished": 3}.items() <= result.summary().items()
    loaded = SearchRecord.load(result.save(tmp_path))
    assert loaded.draft.settings["n_steps"] == 2 and loaded.price(FULL) == pytest.approx(result.cost)
    np.testing.assert_array_equal(loaded.frame()["clip_draft"], record.draft.scores[:, 0, 0])
    assert len(gallery(record).axes) == 2 * 8


def test_what_cuts_it_short_leaves_the_best_so_far(flux, clip):
    whole = tiny_search(flux, clip, cost=COST, **DRAFT)
    for moment in (2, 6, 7, 11):  # three batches of two drafted steps, then one batch of five

        def act(sizes, moment=moment):
            if len(sizes) == moment:
                raise KeyboardInterrupt

        with Hook(flux.transformer, act), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = tiny_search(flux, clip, cost=COST, **DRAFT)
        record = result.record
        assert record.stopped == "interrupt" and not result.complete and 0 < result.cost < whole.cost
        assert record.method == "draft" and result.summary()["finished"] == 0
        if moment > 2:
            assert result.winner == np.nanargmax(record.draft.scores[:, 0, 0])
            assert result.scores["clip"] == np.nanmax(record.draft.scores[:, 0, 0])
            np.testing.assert_array_equal(np.asarray(result.image), record.draft.previews[result.winner, 1])


def test_prompts_of_a_file_share_batches_and_resume(flux, clip, tmp_path):
    def call(folder, **options):
        given = {"settings": settings(n_steps=N_STEPS), "candidates": 4, **DRAFT, **options}
        return search_many(flux, ["a red circle", "the cat"], clip, folder, **given)

    alone, together = call(tmp_path / "alone"), call(tmp_path / "together", together=2)
    # A single full run has no scores to be compared with: no warning of scores that are all equal.
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpreadWarning)
        assert call(None, finish=1, draft=2)["finished"].tolist() == [1, 1]
    assert alone["winner"].tolist() == together["winner"].tolist() and alone["draft_steps"].tolist() == [2, 2]
    with Hook(flux.transformer, lambda sizes: None) as hook:
        call(tmp_path / "alone")
    assert not hook.sizes  # all is there


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"finish": 3}, ConfigError, "both or none"),
        ({"draft": 2}, ConfigError, "both or none"),
        ({"draft": N_STEPS, "finish": 1}, ConfigError, f"got {N_STEPS}"),
        ({"draft": 2, "finish": 0}, ConfigError, "draft.finish: got 0"),
        ({"draft": 2, "finish": 9}, BudgetError, "candidates: got 8, expected at least 9"),
        ({**DRAFT, "schedule": SCHEDULE}, ConfigError, "schedule step 1"),
        ({**DRAFT, "method": "ttsnap"}, ConfigError, "method ttsnap"),
        ({**DRAFT, "negtome": NegToMe(2)}, ConfigError, "NegToMe"),
        ({**DRAFT, "budget": FULL.total(3), "cost": COST}, BudgetError, "3 drafts and as many full runs"),
    ],
)
def test_what_does_not_fit_is_told_before_a_model_is_touched(clip, options, error, says):
    with pytest.raises(error, match=says):
        tiny_search(object(), clip, **options)


def test_the_simulation_of_a_recorded_pool_foretells_the_search(pipelines, clip, tmp_path):
    """On SDXL, whose own spacing begins a run of few steps at less noise than there is in the beginning."""
    sdxl = pipelines["sdxl"]

    def record(name, function, *draft, **options):
        given = {"images_per_prompt": 8, "settings": settings(n_steps=N_STEPS), "cpu_threads": 1, **options}
        function(sdxl, [PROMPT], tmp_path / name, clip, *draft, **given)
        return open_rewards(tmp_path / name)

    full, drafts = record("full.zarr", generate_scores), record("drafts.zarr", draft_scores, 2)
    told = simulate(full, Drafts(drafts, 3), budget=COST.total(8, Draft(2, 3)), cost=FULL, iterations=1)
    live = tiny_search(sdxl, clip, **DRAFT)
    assert told.n == 8 and told.winners.item() == live.winner
    np.testing.assert_allclose(live.record.draft.scores[:, 0, 0], drafts["base"].values[0, 0, :, 0], atol=2e-3)
    with pytest.raises(TensorError, match="got seed 1, expected 0"):
        simulate(full, Drafts(record("others.zarr", draft_scores, 2, seed=1), 3), n=8)
    few = settings(n_steps=2)
    with spaced_for_drafts(sdxl):
        noisier = Denoiser(sdxl, few).sigmas[0]
    assert noisier > Denoiser(sdxl, few).sigmas[0] and sdxl.scheduler.config.timestep_spacing == "leading"
