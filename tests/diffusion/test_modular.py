"""Pipelines that diffusers offers as modular blocks alone; their numbers are in the table of test_families."""

from __future__ import annotations

import diffusers
import pytest
import torch

from tests import worlds
from tests.families import FAMILIES
from tests.worlds import RELATIVE, generators, in_parts, same_to, settings
from ttsnap_lib.diffusion.denoise import Denoiser
from ttsnap_lib.diffusion.modular import faced
from ttsnap_lib.diffusion.pipelines import load_pipeline
from ttsnap_lib.errors import ConfigError, DeviceError, PipelineError

if not hasattr(diffusers, "Flux3ModularPipeline"):
    pytest.skip("this diffusers has no FLUX.3", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_prompts_of_several_lengths_share_a_batch():
    """FLUX.3 looks at the padding of a window of 80 tokens and its multiples: each prompt keeps its own window."""
    denoiser = Denoiser(FAMILIES["flux3-distilled"].build(), settings())
    texts = ["a red ring", "red ring " * 60, "blue square left"]
    conditioning = denoiser.encode(texts)
    assert [len(one) for one in conditioning.embeds["prompt_embeds"]] == [80, 160, 80]
    together = in_parts(denoiser, (2, 5), conditioning)[0]
    for row in range(3):
        noise = denoiser.noise([generators()[row]])
        alone = denoiser.run(noise, conditioning.take([row]), 5)
        same_to(together.latents[[row]], alone.latents, RELATIVE)


def test_the_distilled_model_takes_no_guidance():
    with pytest.raises(ConfigError, match=r"guidance: got 4.0.*distilled to do without"):
        Denoiser(FAMILIES["flux3-distilled"].build(), settings(guidance=4.0))


def test_a_guider_that_remembers_is_refused():
    modular = FAMILIES["anima"].build().modular
    modular.update_components(guider=diffusers.AdaptiveProjectedGuidance())
    with pytest.raises(PipelineError, match="guider: got AdaptiveProjectedGuidance, expected ClassifierFreeGuidance"):
        faced(modular)


def test_folders_of_modular_pipelines(tmp_path):
    folder = tmp_path / "anima"
    FAMILIES["anima"].build().save_pretrained(str(folder))
    moved = folder.rename(tmp_path / "moved")  # the index names the place where it was written
    pipeline = load_pipeline(moved, device="cpu", scheduler="flow-euler")
    assert Denoiser(pipeline).settings.guidance == 4.0 and pipeline.ttsnap_source["model"] == str(moved)
    with pytest.raises(DeviceError, match="offload"):
        load_pipeline(moved, device="cpu", offload="model")
    (moved / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(PipelineError, match="transformer.*cannot be loaded"):
        load_pipeline(moved, device="cpu")
    other = tmp_path / "other"
    diffusers.ZImageModularPipeline().save_pretrained(str(other))
    with pytest.raises(PipelineError, match="a ZImageModularPipeline is not supported"):
        load_pipeline(other, device="cpu")


def test_the_modular_object_itself_is_taken_and_stays_as_it_is():
    modular = FAMILIES["anima"].build().modular
    scheduler, guidance = modular.scheduler, modular.guider.guidance_scale
    candidates = in_parts(Denoiser(modular, settings(guidance=2.0)), (2, 5))[0]
    assert torch.isfinite(candidates.latents).all() and len(candidates) == len(worlds.CAPTIONS)
    assert modular.scheduler is scheduler and modular.guider.guidance_scale == guidance
