"""The pocket presets are what `ttsnap cost` counts on the shipped models."""

import pytest

from ttsnap_lib import CostModel


@pytest.mark.parametrize("model", ["pocket-flux", "pocket-sdxl"])
def test_pocket_presets_are_measured(model):
    from diffusers import AutoencoderTiny

    from ttsnap_lib.diffusion.pipelines import load_pipeline
    from ttsnap_lib.live.measure import measure_costs
    from ttsnap_lib.pocket import pocket_folder
    from ttsnap_lib.rewards.loading import load_reward

    tiny = AutoencoderTiny.from_pretrained(pocket_folder("pocket-tiny"))
    measured = measure_costs(
        load_pipeline(model), load_reward("pocket-clip"), decoder=tiny, batch_sizes=[1], repeats=1
    ).tflops
    preset = CostModel.preset(f"{model}-tiny+pocket-clip")
    for name in ("step", "decode", "verify", "preview_decode", "per_prompt"):
        # FLOP counts are exact; the presets are written with five digits, the text with its own length.
        assert getattr(preset, name) == pytest.approx(1000 * getattr(measured, name), rel=1e-3), name
