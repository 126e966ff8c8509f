"""The device benchmark at tiny size: every part runs, one that fails is told, and the real models are the published ones."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from tests.benchmarks import bench_device
from tests.benchmarks.bench_presets import META, empty, flux

pytestmark = pytest.mark.usefixtures("one_thread")
BILLIONS = {
    "flux transformer": 11.90, "flux text_encoder": 0.123, "flux text_encoder_2": 4.76, "flux vae": 0.0838,
    "sdxl unet": 2.567, "sdxl text_encoder": 0.123, "sdxl text_encoder_2": 0.695, "sdxl vae": 0.0837,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _out(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    with torch.random.fork_rng(devices=[]):
        yield


def test_every_part_runs_and_is_kept(tmp_path):
    rows = bench_device.run(tiny=True)
    assert not [row for row in rows if not row.kept]
    lines = [json.loads(line) for line in (tmp_path / "device.jsonl").read_text().splitlines()]
    assert [(line["name"], line["value"]) for line in lines] == [(row.name, row.value) for row in rows]
    assert {line["tiny"] for line in lines} == {True} and {line["card"] for line in lines} == {bench_device.CARD}
    names = " ".join(row.name for row in rows)
    for part in ("stock pipeline", "eager: a step of a batch of 2", "search of 3", "compiled: a step of a batch of 2",
                 "scored from PNG files", "at once, finished", "fp8 weights", "weights in main memory"):  # fmt: skip
        assert part in names


def test_a_part_that_fails_is_told_and_the_others_go_on(monkeypatch):
    def broken(*given, **options):
        raise RuntimeError("no kernel for this card")

    monkeypatch.setattr(bench_device, "measure_costs", broken)
    monkeypatch.setattr(bench_device, "_against_stock", broken)
    monkeypatch.setattr(bench_device, "_scoring", broken)
    rows = bench_device.run(tiny=True)
    failed = {row.name: row.note for row in rows if not row.kept}
    assert set(failed) == {*(f"{name}{part}: failed" for name in ("sdxl", "flux") for part in ("", ", stock pipeline")),
                           "scoring: failed"}  # fmt: skip
    assert set(failed.values()) == {"RuntimeError: no kernel for this card"}
    assert rows[-1].name == "flux: searches with weights in main memory"


def test_real_models_are_the_published_ones(monkeypatch):
    monkeypatch.setattr(bench_device, "built", functools.partial(bench_device.built, device=META))
    pipelines = {name: bench_device._pipeline(bench_device.REAL, name) for name in bench_device.PARTS}
    models = {
        f"{name} {part}": getattr(pipelines[name], part) for name, made in bench_device.PARTS.items() for part in made
    }
    models["CLIP-H"] = bench_device.built(lambda: bench_device.clip_model(False))
    models["ImageReward"] = bench_device.built(lambda: bench_device.image_reward_model(False))
    found = {name: sum(value.numel() for value in model.parameters()) / 1e9 for name, model in models.items()}
    assert found == pytest.approx(BILLIONS | {"CLIP-H": 0.986, "ImageReward": 0.447}, rel=0.01)

    # Text of the published length, of a width that the denoising model takes.
    with torch.no_grad():
        text, pooled, _ = pipelines["flux"].encode_prompt(["a red ring"], None, device=META)
        assert text.shape == (1, 512, 4096) and pooled.shape == (1, 768)
        assert flux(pipelines["flux"].transformer, 512)[0].shape == (1, 1024, 64)
        text, _, pooled, _ = pipelines["sdxl"].encode_prompt(["a red ring"], None, device=META)
        more = {"text_embeds": pooled, "time_ids": empty(1, 6)}
        made = pipelines["sdxl"].unet(empty(1, 4, 64, 64), empty(1), text, added_cond_kwargs=more)[0]
    assert text.shape == (1, 77, 2048) and made.shape == (1, 4, 64, 64)
