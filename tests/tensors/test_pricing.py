"""The cost preset that belongs to a tensor."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from ttsnap_lib import CostModel, open_rewards
from ttsnap_lib.costs import preset_for
from ttsnap_lib.errors import CostError
from ttsnap_lib.tensors.pricing import cost_for, fitting
from ttsnap_lib.tensors.tensor import make_rewards, synthetic_rewards


def tensor(n_steps=20, reward="pickscore", **attributes):
    return make_rewards(np.zeros((1, 2, 3, n_steps)), rewards=[reward], attributes=attributes)


@pytest.mark.parametrize(
    ("model", "reward", "size", "preset"),
    [
        ("pocket-flux", "pocket-clip", None, "pocket-flux+pocket-clip"),
        ("pocket-sdxl", "pocket-clip", 32, "pocket-sdxl+pocket-clip"),
        ("black-forest-labs/FLUX.1-dev", "pickscore", 1024, "flux-1024+pickscore"),
        ("/models/FLUX.1-schnell", "hpsv2.1", 512, "flux-512+hpsv2"),
        ("SG161222/RealVisXL_V4.0", "image_reward", 512, "sdxl-512+image_reward"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "hpsv2", 1024, "sdxl-1024+hpsv2"),
    ],
)
def test_a_model_a_size_and_a_reward_have_a_preset(model, reward, size, preset):
    assert preset_for(model, reward, size) == preset


@pytest.mark.parametrize(
    ("model", "reward", "size", "choices"),
    [
        ("stabilityai/sdxl-turbo", "pickscore", 512, "flux-512+pickscore, flux-1024+pickscore, sdxl-512+pickscore"),
        ("black-forest-labs/FLUX.1-dev", "pickscore", None, "(flux-512+pickscore, flux-1024+pickscore)"),
        ("flux", "pickscore", 768, "(flux-512+pickscore, flux-1024+pickscore)"),
        ("flux", "mine", 512, "(flux-512+image_reward, flux-1024+image_reward)"),
        ("", "mine", None, "pocket-flux+pocket-clip"),
        ("PixArt-alpha/PixArt-XL-2-512x512", "hpsv2", 512, "sdxl-512+hpsv2"),
    ],
)
def test_where_nothing_is_known_the_choices_are_named(model, reward, size, choices):
    with pytest.raises(CostError) as error:
        preset_for(model, reward, size)
    assert choices in str(error.value) and "-tiny" not in str(error.value)


@pytest.mark.filterwarnings("ignore:The cost flux-1024")
def test_the_cost_of_a_tensor_has_its_steps():
    name, cost = cost_for(tensor(28, model="flux", source="published"))
    assert name == "flux-512+pickscore"
    assert cost == CostModel.preset(name, n_steps=28)
    assert cost_for(tensor(28, model="flux", source="published"), "flux-1024+hpsv2")[1].n_steps == 28
    assert cost_for(synthetic_rewards(2, 3, 5, rewards=("a",)))[0] == "flux-512+image_reward"
    for shipped in ("pocket-flux", "pocket-sdxl"):
        assert cost_for(open_rewards(shipped))[0] == f"{shipped}+pocket-clip"


def test_checks_seen_through_a_tiny_decoder_are_charged_by_it():
    seen = tensor(model="black-forest-labs/FLUX.1-dev", size=512, decoder="AutoencoderTiny 0123")
    assert cost_for(seen)[0] == "flux-512-tiny+pickscore"
    other = tensor(model="black-forest-labs/FLUX.2-dev", size=512, decoder="AutoencoderTiny 0123")  # no tiny preset
    with pytest.raises(CostError, match=r"a tiny decoder at the checks. Name one \(flux2-dev-512\+pickscore, "):
        cost_for(other)
    assert cost_for(other, "flux2-dev-512+pickscore")[0] == "flux2-dev-512+pickscore"


def test_a_file_keeps_its_steps(tmp_path):
    file = CostModel(step=1, verify=1, n_steps=7).save(tmp_path / "cost.json")
    assert cost_for(tensor(28), file) == (str(file), CostModel.load(file))


def test_another_preset_is_told():
    dataset = tensor(model="FLUX.1-dev", size=512)
    others = (
        "flux-1024+pickscore",
        "sdxl-512+pickscore",
        "flux-512+image_reward",
        "pocket-flux+pocket-clip",
        "h100-sdxl-512",
        "h100-sdxl-512-compiled",
    )
    for other in others:
        with pytest.warns(UserWarning, match=r"flux-512\+pickscore; cost 'auto' takes it"):
            cost_for(dataset, other)
    with warnings.catch_warnings(action="error"):
        for fits in ("flux-512-tiny+pickscore", "flux-512+hpsv2", "published"):  # the two rewards have the same tower
            cost_for(dataset, fits)
        for seconds in ("h100-flux-512", "h100-flux-512-compiled"):
            assert cost_for(dataset, seconds)[1].unit == "seconds"
        cost_for(tensor(), "sdxl-512+pickscore")  # nothing is known of it
    with pytest.warns(UserWarning, match="not that of this tensor"):  # measured with a CLIP-H
        cost_for(tensor(model="FLUX.1-dev", size=512, reward="image_reward"), "h100-flux-512")


def test_the_presets_that_fit_a_tensor_begin_with_its_own():
    found = fitting(tensor(model="FLUX.1-dev", size=512))
    assert found == ["flux-512+pickscore", "flux-512-tiny+pickscore", "h100-flux-512", "h100-flux-512-compiled"]
    assert fitting(open_rewards("pocket-sdxl")) == ["pocket-sdxl+pocket-clip", "pocket-sdxl-tiny+pocket-clip"]
    assert fitting(tensor(model="mine", size=512)) == []
