"""Compiled models: what they give, what is padded and told, and what happens where torch cannot compile."""

from __future__ import annotations

import functools

import pytest
import torch

from tests import families, worlds
from tests.worlds import N_STEPS, SCHEDULE, brightness, settings, tiny_search
from ttsnap_lib import load_pipeline
from ttsnap_lib.diffusion.compiling import compile_pipeline
from ttsnap_lib.diffusion.denoise import Denoiser, image_generator
from ttsnap_lib.diffusion.negtome import NegToMe
from ttsnap_lib.diffusion.pipelines import load_decoder
from ttsnap_lib.errors import ConfigError
from ttsnap_lib.trajectories.identity import identity_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def backend(monkeypatch):
    """Let torch.compile trace the models as always, and hand them to a backend that is quicker than the C++ compiler."""

    def use(name):
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=name))

    yield use
    torch._dynamo.reset()


def _sizes(monkeypatch) -> list[int]:
    sizes, call = [], Denoiser._call
    monkeypatch.setattr(
        Denoiser, "_call", lambda self, embeds, latents: (sizes.append(len(latents)), call(self, embeds, latents))
    )
    return sizes


@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_a_compiled_search_is_the_plain_one(how, backend, monkeypatch):
    plain = tiny_search(worlds.flux(), brightness, schedule=SCHEDULE, candidates=3, decoder=worlds.tiny_decoder())
    backend("eager")
    pipeline = worlds.flux()
    compile_pipeline(pipeline, how)
    decoder = load_decoder(worlds.tiny_decoder(), pipeline)
    assert all(one.decoder._compiled_call_impl is not None for one in (pipeline.vae, decoder))
    sizes = _sizes(monkeypatch)
    found = tiny_search(pipeline, brightness, schedule=SCHEDULE, candidates=3, decoder=decoder)
    assert found.winner == plain.winner
    torch.testing.assert_close(
        torch.from_numpy(found.record.scores), torch.from_numpy(plain.record.scores), atol=1e-2, rtol=0, equal_nan=True
    )  # pictures of 256 levels
    blank, *ran = sizes
    assert blank == 1 and ran == ([4, 2, 1] if how == "whole" else [3, 2, 1])
    told = "whole, batches padded to 1, 2, 4, 8, ..." if how == "whole" else "blocks"
    assert found.record.facts["compile"] == told and "compile" not in plain.record.facts
    assert [stage.forwards for stage in found.record.stages] == [stage.forwards for stage in plain.record.stages]
    assert identity_of(Denoiser(pipeline, settings(n_steps=N_STEPS)))["compile"] == how
    assert "compile" not in identity_of(Denoiser(worlds.flux(), settings(n_steps=N_STEPS)))


@pytest.mark.slow
def test_a_whole_model_that_gives_a_list_is_compiled_too(backend):
    backend("eager")
    found = []
    for compiled in (False, True):
        pipeline = families.z_image()
        if compiled:
            compile_pipeline(pipeline, "whole")
        denoiser = Denoiser(pipeline, settings(n_steps=2, guidance=0.0, max_sequence_length=64))
        found.append(denoiser.run(denoiser.noise([image_generator(0, 0, 0)]), denoiser.encode(["a cat"]), 1).latents)
    torch.testing.assert_close(*found)


def test_what_cannot_be_compiled_runs_as_it_is(backend):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    plain = tiny_search(worlds.flux(), brightness, candidates=3)
    backend(broken)
    pipeline = worlds.flux()
    compile_pipeline(pipeline, "blocks")
    with pytest.warns(UserWarning, match=r"runs without being compiled: RuntimeError: no C\+\+ compiler") as told:
        found = tiny_search(pipeline, brightness, candidates=3)
    assert [str(one.message).split()[0] for one in told] == ["FluxTransformer2DModel", "Decoder"]  # once each
    assert (found.record.scores == plain.record.scores).all()
    assert found.record.facts["compile"] == "blocks, which failed"


def test_a_reward_that_cannot_be_compiled_scores_as_it_is(backend, clip_folder, images):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    plain = worlds.load_clip(clip_folder)
    backend(broken)
    with pytest.warns(UserWarning, match="reward clip runs without being compiled"):
        found = worlds.load_clip(clip_folder, compile=True).score("a cat", images)
    assert (found == plain.score("a cat", images)).all()


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="compile"):
        load_pipeline("pocket-flux", compile="all")
    with pytest.raises(ConfigError, match="SD3Transformer2DModel has no repeated blocks. Use 'whole'"):
        load_pipeline(worlds.save("sd3", tmp_path / "sd3"), compile="blocks")
    pipeline = worlds.flux()
    compile_pipeline(pipeline, "blocks")
    with pytest.raises(ConfigError, match="NegToMe works between the layers"):
        tiny_search(pipeline, brightness, candidates=4, batch_size=4, negtome=NegToMe(group_size=2))


@pytest.mark.slow
def test_the_c_compiler_gives_the_same(tmp_path):
    pipeline = load_pipeline(worlds.save("flux", tmp_path / "flux"), device="cpu", compile="blocks")
    plain = tiny_search(worlds.flux(), brightness, schedule=SCHEDULE)
    found = tiny_search(pipeline, brightness, schedule=SCHEDULE)
    assert found.record.facts["compile"] == "blocks" and found.winner == plain.winner
