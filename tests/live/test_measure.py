"""Measured costs: what is counted, what is timed, what the file holds."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from tests import worlds
from tests.worlds import N_STEPS, settings
from ttsnap_lib import CostModel
from ttsnap_lib.diffusion.denoise import Denoiser, image_generator
from ttsnap_lib.errors import ConfigError, DeviceError
from ttsnap_lib.live.measure import count_tflops, measure_costs
from ttsnap_lib.live.plots import batch_curve

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def measured(clip):
    decoder = worlds.tiny_decoder()
    return measure_costs(worlds.flux(), clip, settings(n_steps=N_STEPS), decoder=decoder, batch_sizes=(4, 1), repeats=2)


def test_counting():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert count_tflops(lambda: a @ b) * 1e12 == 2 * 3 * 5 * 7
    q = torch.ones(1, 2, 6, 8)  # fused attention counts as its two products
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_tflops(lambda: attend(q, q, q)) * 1e12 == 2 * (2 * 2 * 6 * 6 * 8)


def test_parts_are_those_of_the_models(measured):
    pipeline = worlds.flux()
    denoiser = Denoiser(pipeline, settings(n_steps=N_STEPS))
    text, start = denoiser.encode(["a cat"]), denoiser.noise([image_generator(0, 0, 0)])
    costs = measured.tflops
    whole = count_tflops(lambda: denoiser.run(start, text, N_STEPS - 1))
    assert costs.step * N_STEPS == pytest.approx(whole, rel=1e-9)
    assert costs.decode == pytest.approx(count_tflops(lambda: denoiser.decode(start.latents)), rel=1e-9)
    assert 0 < costs.preview_decode < costs.decode
    assert costs.per_prompt > 0 and costs.verify > 0 and costs.n_steps == N_STEPS


def test_guidance_doubles_a_step(clip):
    free, guided = (
        measure_costs(worlds.sdxl(), clip, settings(guidance=guidance), batch_sizes=(1,), repeats=1)
        for guidance in (1.0, 5.0)
    )
    assert guided.tflops.step == pytest.approx(2 * free.tflops.step, rel=1e-6)
    assert guided.tflops.decode == free.tflops.decode


def test_several_rewards_add_up(measured, clip):
    two = [clip, lambda prompts, images: [0.0] * len(images)]
    both = measure_costs(worlds.flux(), two, settings(n_steps=N_STEPS), batch_sizes=(1,), repeats=1)
    assert both.tflops.verify == pytest.approx(measured.tflops.verify)  # a plain function has no products
    assert both.facts["rewards"] == ["clip", "<lambda>"] and both.tflops.preview_decode is None


def test_seconds_are_a_table_by_batch(measured):
    frame = measured.by_batch
    assert frame["batch_size"].unique().tolist() == [1, 4]
    assert set(frame["part"]) == {"step", "decode", "preview_decode", "verify"}
    for part, rows in frame.groupby("part"):
        assert getattr(measured.seconds, part) == tuple(zip(rows["batch_size"], rows["seconds"], strict=True))
    assert measured.seconds.batch_size == 4
    assert (frame["low"] <= frame["seconds"]).all() and (frame["seconds"] <= frame["high"]).all()
    assert measured.seconds.unit == "seconds" and measured.cost("seconds") is measured.seconds


def test_one_batch_size_gives_numbers(clip):
    one = measure_costs(worlds.flux(), clip, settings(n_steps=N_STEPS), batch_sizes=[2], repeats=1)
    assert one.seconds.batch_size is None and [one.seconds.step] == one.by_batch["seconds"].tolist()[:1]


@pytest.mark.parametrize(("memory", "sizes"), [(16, [1, 2, 4, 8, 16]), (5, [1, 2, 4]), (0, None)])
def test_batches_are_doubled_as_far_as_memory_reaches(clip, memory, sizes):
    def allocate(module, args, kwargs):
        if len(kwargs["hidden_states"]) > memory:
            raise torch.OutOfMemoryError("injected")

    pipeline = worlds.flux()
    pipeline.transformer.register_forward_pre_hook(allocate, with_kwargs=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if sizes is None:
            with pytest.raises(DeviceError, match="out of memory with 1 images"):
                measure_costs(pipeline, clip, settings(n_steps=N_STEPS), repeats=1)
            return
        found = measure_costs(pipeline, clip, settings(n_steps=N_STEPS), repeats=1)
    assert [size for size, _ in found.seconds.step] == [size for size, _ in found.seconds.decode] == sizes
    ends = [str(one.message) for one in told if "measured up to" in str(one.message)]
    assert len(ends) == (memory < 16) and all(text.startswith("measured up to batch size 4: ") for text in ends)


def test_the_curve_shows_a_candidate_and_its_batch(measured):
    each, whole = batch_curve(measured.by_batch).axes
    for part, one, many in zip(measured.by_batch["part"].unique(), each.lines, whole.lines, strict=True):
        rows = measured.by_batch[measured.by_batch["part"] == part]
        np.testing.assert_allclose(one.get_xydata(), np.c_[rows["batch_size"], 1e3 * rows["seconds"]])
        np.testing.assert_allclose(many.get_ydata(), one.get_ydata() * rows["batch_size"])
    assert [text.get_text() for text in each.get_legend().get_texts()] == ["step", "decode", "score", "decode, tiny"]


@pytest.mark.parametrize("unit", ["TFLOPs", "seconds"])
def test_the_file_is_a_cost_model(measured, unit, tmp_path):
    path = measured.save(tmp_path / "cost.json", unit)
    assert CostModel.load(path) == measured.cost(unit)


def test_bad_input(clip):
    with pytest.raises(ConfigError, match="batch_sizes"):
        measure_costs(None, clip, batch_sizes=())
    with pytest.raises(ConfigError, match="repeats"):
        measure_costs(None, clip, repeats=0)
