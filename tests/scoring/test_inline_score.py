"""Scores while images are generated: the values of generating into a folder and scoring that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import worlds
from tests.worlds import save_clip, write_adapters
from ttsnap_lib import open_rewards
from ttsnap_lib.diffusion.denoise import Settings
from ttsnap_lib.errors import ConfigError, RewardError, TensorError
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.scoring.score import InlineScorer, generate_scores, score
from ttsnap_lib.trajectories.generate import generate

PROMPTS = ["a red circle", "the cat", "a blue square"]
OPTIONS = {
    "settings": Settings(n_steps=3, height=32, width=32),
    "images_per_prompt": 3,
    "batch_size": 4,
    "seed": 7,
    "cpu_threads": 1,
}


def redness(prompts, images):
    """Return the mean of the red channel."""
    return [np.asarray(image)[..., 0].mean() for image in images]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipeline():
    """Tiny SDXL pipeline."""
    return worlds.build("sdxl")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a tiny CLIP reward."""
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="module")
def scored_folder(pipeline, clip, tmp_path_factory):
    """Tensor scored from a folder, with a noise-aware series at step 1."""
    root = tmp_path_factory.mktemp("scored")
    generate(pipeline, PROMPTS, root / "set", **OPTIONS)
    series = write_adapters(clip, root / "run", steps=(1,))
    rewards = [load_reward(clip, device="cpu", adapters=series), redness]
    score(root / "set", rewards, root / "r.zarr")
    return root


def test_equals_scoring_the_folder(pipeline, clip, scored_folder, tmp_path):
    rewards = [load_reward(clip, device="cpu", adapters=scored_folder / "run"), redness]
    report = generate_scores(pipeline, PROMPTS, tmp_path / "r.zarr", rewards, **OPTIONS)
    assert report.pictures == 27 and report.scores == 27 * 2 + 9
    ours, theirs = open_rewards(tmp_path / "r.zarr"), open_rewards(scored_folder / "r.zarr")
    for variable in ("base", "noise_aware"):
        values, expected = ours[variable].values, theirs[variable].values
        np.testing.assert_allclose(values[0], expected[0], rtol=1e-4, atol=1e-4)  # batches differ
        assert np.array_equal(values[1], expected[1])  # the very same pixels
    assert np.array_equal(ours["noise_aware_source"].values, theirs["noise_aware_source"].values)
    assert set(ours["status"].values) == {"scored"}
    assert not list(tmp_path.rglob("*.png"))


def test_goes_on_by_whole_prompts(pipeline, tmp_path):
    out = tmp_path / "r.zarr"

    def stop(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_scores(pipeline, PROMPTS, out, redness, progress=stop, **OPTIONS)
    left = open_rewards(out)["status"].values.tolist()
    assert left.count("scored") in (1, 2) and "pending" in left
    again = generate_scores(pipeline, PROMPTS, out, redness, **OPTIONS)
    assert again.pictures == 9 * left.count("pending")
    quiet = tmp_path / "quiet.zarr"
    generate_scores(pipeline, PROMPTS, quiet, redness, **OPTIONS)
    assert np.array_equal(open_rewards(out)["base"].values, open_rewards(quiet)["base"].values)
    assert generate_scores(pipeline, PROMPTS, out, redness, **OPTIONS).pictures == 0


def test_some_steps_decode_no_others(pipeline, tmp_path):
    report = generate_scores(pipeline, PROMPTS, tmp_path / "r.zarr", redness, steps=[-1], **OPTIONS)
    assert report.pictures == 9 and open_rewards(tmp_path / "r.zarr")["step"].values.tolist() == [2]


def test_bad_use(pipeline, tmp_path):
    out = tmp_path / "r.zarr"
    with pytest.raises(ConfigError, match="score the folder"):
        generate_scores(pipeline, PROMPTS, out, redness, folder=tmp_path, **OPTIONS)
    bad = load_reward(lambda prompts, images: [float("nan")] * len(images), name="bad")
    with pytest.raises(RewardError, match="prompt 0, image 0, step 0"):
        generate_scores(pipeline, PROMPTS, out, bad, **OPTIONS)
    generate_scores(pipeline, PROMPTS, tmp_path / "s.zarr", redness, **OPTIONS)
    with pytest.raises(TensorError, match="other trajectories"):
        generate_scores(pipeline, PROMPTS, tmp_path / "s.zarr", redness, **{**OPTIONS, "seed": 8})


def test_shards_take_whole_chunks(tmp_path):
    prompts = [f"prompt {k}" for k in range(30)]
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for shard, expected in (("0/2", range(25)), ("1/2", range(25, 30))):
        with InlineScorer(tmp_path / "r.zarr", redness, prompts, 2, 1, shard=shard) as scorer:
            assert scorer.only == [(prompt, image) for prompt in expected for image in range(2)]
            for prompt in expected:
                scorer(prompt, [0, 1], 0, pixels)
            assert scorer.only == []
    assert set(open_rewards(tmp_path / "r.zarr")["status"].values) == {"scored"}
