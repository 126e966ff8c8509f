"""Hours and disk of a pool on a real model, from the cost presets."""

from __future__ import annotations

import pytest

from ttsnap_lib import CostModel
from ttsnap_lib.trajectories.estimate import on_a_gpu


def test_a_pool_on_a_gpu_follows_the_presets():
    table, twice = on_a_gpu(10, 20), on_a_gpu(20, 20)
    cost = CostModel.preset("flux-512+image_reward")
    tflops = 10 * 20 * 20 * (cost.step + cost.decode + cost.verify)
    row = table.loc["FLUX.1-dev, 512 px"]
    assert row["hours, A100"] == pytest.approx(tflops / (312 * 0.4) / 3600)
    assert row["GB as PNG"] == pytest.approx(10 * 20 * 20 * 512**2 * 3 * 0.56 / 1e9)
    assert row["GB of the tensor alone"] == pytest.approx(10 * 20 * 20 * 8 / 1e9)
    assert (twice / table).to_numpy() == pytest.approx(2)
    assert (table["GB as WebP"] < table["GB as PNG"]).all()
