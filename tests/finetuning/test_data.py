"""Pictures to train on, and their targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import worlds
from tests.conftest import ROOT
from tests.worlds import make_bank, save_clip
from ttsnap_lib.diffusion.denoise import Settings
from ttsnap_lib.errors import CurriculumError, TrajectoryError
from ttsnap_lib.finetuning.data import (
    ImageBank,
    PromptSubset,
    ground_truth_targets,
    model_pixels,
    open_images,
    own_targets,
    score_step,
)
from ttsnap_lib.finetuning.train import finetune
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.trajectories.generate import generate

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("curriculum") / "tiny-clip")


@pytest.fixture(scope="module")
def reward(clip):
    return load_reward(clip, device="cpu")


@pytest.fixture(scope="module")
def bank():
    return make_bank()


def test_a_generated_bank_is_the_folder_and_comes_back(tmp_path):
    pipeline, prompts = worlds.flux(), ["a cat", "a dog"]
    settings = Settings(n_steps=3, height=32, width=32, max_sequence_length=8)
    options = {"images_per_prompt": 2, "settings": settings, "seed": 3, "batch_size": 4, "cpu_threads": 1}
    generate(pipeline, prompts, tmp_path / "folder", **options)
    read = open_images(tmp_path / "folder")
    assert read.digest() == open_images(tmp_path / "folder").digest()
    rows = np.array([[0, 0], [1, 1], [1, 0]]).T
    made = ImageBank.generated(pipeline, prompts, 2, steps=[1], seed=3, batch_size=4, settings=settings)
    assert made.steps == [1, 2] and made.n_steps == 3
    np.testing.assert_allclose(made.read(*rows, 1).astype(int), read.read(*rows, 1), atol=1)
    again = open_images(made.save(tmp_path / "bank"))
    np.testing.assert_array_equal(again.read(*rows, -1), made.read(*rows, -1))
    assert again.digest() == made.digest() != ImageBank(made.pixels[[1, 0]], prompts, [1, 2]).digest()
    assert ImageBank(made.pixels[:, :, 1:], prompts, [2]).digest() == made.digest()  # its clean pictures tell a bank


def test_a_pocket_bank_of_more_steps_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    more = open_images("pocket-flux:train:2x2", steps=[0, 3, 5])
    made = sorted(tmp_path.rglob("bank.json"))
    again = open_images("pocket-flux:train:2x2", steps=[3])
    assert sorted(tmp_path.rglob("bank.json")) == made
    assert again.steps == more.steps == [0, 3, 5, 19]
    assert open_images("pocket-flux:train:2x2", steps=[4]).steps == [4, 19]


def test_bad_pictures(tmp_path, bank):
    with pytest.raises(CurriculumError, match="pocket-flux:train:1000x8"):
        open_images(tmp_path / "nothing")
    with pytest.raises(TrajectoryError, match="uint8"):
        ImageBank(bank.pixels.astype(float), bank.prompts)
    with pytest.raises(TrajectoryError, match="step 9 has no images"):
        bank.read(np.zeros(1, int), np.zeros(1, int), 9)
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "bank.json").write_text("{}")
    with pytest.raises(TrajectoryError, match="cannot be read"):
        open_images(tmp_path / "bank")
    pipeline = worlds.flux()
    settings = Settings(n_steps=2, height=32, width=32, max_sequence_length=8)
    generate(pipeline, ["a cat"], tmp_path / "folder", images_per_prompt=2, settings=settings, cpu_threads=1)
    (tmp_path / "folder" / "p0000" / "id001" / "s01.png").unlink()
    with pytest.raises(TrajectoryError, match="id001/s01.png is missing"):
        open_images(tmp_path / "folder")


def test_subsets(bank):
    part = PromptSubset(bank, 2, 5)
    np.testing.assert_array_equal(part.read(np.array([0, 2]), np.array([1, 3]), 1), bank.pixels[[2, 4], [1, 3], 1])
    assert part.prompts == bank.prompts[2:5] and part.digest() != bank.digest()


@pytest.mark.parametrize("size", [32, 40])
def test_pixels_are_the_rewards_own(reward, size):
    from PIL import Image

    pictures = np.random.default_rng(0).integers(0, 256, (5, size, size, 3), dtype=np.uint8)
    expected = reward.preprocess([Image.fromarray(picture) for picture in pictures])
    assert torch.equal(model_pixels(reward, pictures), expected)


def test_later_scores_do_not_depend_on_where_the_targets_came_from(clip, bank, tmp_path, monkeypatch):
    """A process that scores its share of the prompts encodes other texts at once than the targets did."""
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    scores = []
    for _ in ("computed", "read"):
        fresh = load_reward(clip, device="cpu")
        own_targets(fresh, bank)
        scores.append(score_step(fresh, bank, 0, shard=(0, 2)))
    np.testing.assert_array_equal(*scores)


def test_own_targets_are_the_clean_scores_and_are_kept(clip, reward, bank, monkeypatch):
    from PIL import Image

    targets = own_targets(reward, bank)
    for prompt in (0, 3):
        images = [Image.fromarray(picture) for picture in bank.pixels[prompt, :, -1]]
        np.testing.assert_allclose(targets[prompt], reward.score(bank.prompts[prompt], images), rtol=1e-5)
    monkeypatch.setattr(type(reward), "score_pixels", lambda *a: pytest.fail("scored again"))
    np.testing.assert_array_equal(own_targets(load_reward(clip, device="cpu"), bank), targets)
    with pytest.raises(pytest.fail.Exception):
        own_targets(reward, make_bank(seed=8))


def test_shards_make_up_the_whole(reward, bank):
    parts = [score_step(reward, bank, 1, shard=(k, 4)) for k in range(4)]
    np.testing.assert_allclose(sum(parts), score_step(reward, bank, 1), rtol=1e-5)


def write_truth(path, targets):
    lines = []
    for prompt, row in enumerate(targets):
        lines += [f"p{prompt:04d}:", *(f"  id{image:03d}: {float(value)!r}" for image, value in enumerate(row))]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_ground_truth_files(reward, bank, tmp_path):
    own = own_targets(reward, bank)
    path = write_truth(tmp_path / "truth.yaml", own)
    np.testing.assert_array_equal(ground_truth_targets(path, bank, reward), own)
    with pytest.raises(CurriculumError, match="another set"):
        ground_truth_targets(path, make_bank(7), reward)
    with pytest.raises(CurriculumError, match="another set"):
        ground_truth_targets(path, make_bank(6, 5), reward)
    shuffled = write_truth(tmp_path / "other.yaml", own[::-1])
    with pytest.raises(CurriculumError, match="correlation of .* with the base reward"):
        ground_truth_targets(shuffled, bank, reward)
    np.testing.assert_array_equal(ground_truth_targets(shuffled, bank), own[::-1])


def test_ground_truth_of_more_prompts_gives_the_first_that_are_needed():
    targets = ground_truth_targets(ROOT / "tests" / "cases" / "gt_more_prompts.yaml", make_bank(3, 3))
    assert targets.shape == (3, 3)
    assert targets[[0, 1], [0, 2]].tolist() == [np.float32(19.4598388671875), np.float32(19.81725311279297)]


def test_check_targets_is_a_setting(clip, bank, reward, tmp_path):
    from tests.worlds import small_config
    from ttsnap_lib.finetuning.train import finetune

    path = write_truth(tmp_path / "other.yaml", own_targets(reward, bank)[::-1])
    with pytest.raises(CurriculumError, match="correlation"):
        finetune(bank, tmp_path / "run", small_config(clip), targets=path, device="cpu")
    config = small_config(clip, check_targets=False, max_updates_per_step=1)
    finetune(bank, tmp_path / "run", config, targets=path, device="cpu")
    with pytest.raises(CurriculumError, match="one per image"):
        finetune(bank, tmp_path / "next", config, targets=np.zeros((2, 2)), device="cpu")


def test_the_published_ground_truth_is_read(reference):
    path = reference / "ground_truth" / "imr_gt_flux_val_i88.yaml"
    from ttsnap_lib.tensors.published import import_ground_truth

    found = import_ground_truth(path)
    images = make_bank(1, 1)
    images.prompts, images.n_images = ["a"] * found.sizes["prompt"], found.sizes["image"]
    np.testing.assert_array_equal(ground_truth_targets(path, images), found.values)


def test_pictures_that_are_nowhere_are_told_before_a_reward_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("ttsnap_lib.rewards.loading.load_reward", lambda *given, **options: pytest.fail("fetched"))
    for options in ({}, {"validation": "elsewhere"}):
        with pytest.raises(CurriculumError, match="got (nowhere|elsewhere)"):
            finetune("pocket-sdxl:train:2x8" if options else "nowhere", tmp_path / "run", **options)
