"""Online runs whose scoring fails, that run out of memory or time, or are interrupted."""

from __future__ import annotations

import types
import warnings

import numpy as np
import pytest
import torch

from tests.worlds import COST, SCHEDULE, tiny_search
from ttsnap_lib.errors import BudgetError, DeviceError, SearchError
from ttsnap_lib.live import run as _search_run
from ttsnap_lib.live import run as search_module
from ttsnap_lib.live.record import SearchRecord

pytestmark = pytest.mark.usefixtures("one_thread")


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
    sound = tiny_search(flux, _fails_on(np.zeros(0), how), schedule=SCHEDULE)
    step, best = sound.record.checks[check], sound.winner
    with pytest.warns(UserWarning, match=rf"candidates \[{best}\], which drop out"):
        result = tiny_search(flux, _fails_on(sound.record.previews[best, step], how), schedule=SCHEDULE)
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
        result = tiny_search(flux, clip, schedule=SCHEDULE, batch_size=8, cost=COST)
    assert result.winner == whole.winner and result.complete
    assert hook.sizes[:2] == [8, 4] and set(hook.sizes[2:]) == {2}  # tried twice, and never again
    np.testing.assert_allclose(result.record.scores, whole.record.scores, atol=2e-3)
    assert sum(stage.forwards for stage in result.record.stages) == 8 * 2 + 4 * 2 + 2


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
    with told, Hook(flux.transformer, lambda sizes: None) as steps, Hook(flux.vae.decoder, _memory_for(2)):
        result = tiny_search(flux, clip, schedule=SCHEDULE, batch_size=8)
    assert steps.sizes == [8, 8, 4, 4, 2] and result.winner == whole.winner


def test_out_of_memory_with_one_candidate_is_told(flux, clip):
    with Hook(flux.transformer, _memory_for(0)), warnings.catch_warnings():
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
    monkeypatch.setattr(_search_run, "time", fake)
    monkeypatch.setitem(search_module.__dict__, "time", fake)

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
