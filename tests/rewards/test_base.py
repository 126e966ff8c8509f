"""What every reward does alike: images and prompts as a caller gives them, encoded prompts, functions as rewards."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from tests.worlds import PROMPTS, Looks, as_tensor, embedding, make_images
from ttsnap_lib.errors import RewardError
from ttsnap_lib.rewards import base
from ttsnap_lib.rewards.base import CallableReward, open_image
from ttsnap_lib.rewards.loading import load_reward


@pytest.fixture
def reward(clip_folder):
    return load_reward(clip_folder, device="cpu")


def test_prompts_and_images_in_every_form(reward, images, tmp_path):
    expected = reward.score(PROMPTS, images)
    assert expected.dtype == np.float32 and expected.shape == (7,)
    assert np.array_equal(reward.score(PROMPTS, as_tensor(images)), expected)
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    assert np.array_equal(reward.score(PROMPTS, paths), expected)
    assert np.array_equal(reward.score_pixels(PROMPTS, reward.preprocess(images)), expected)
    together = reward.score(PROMPTS[0], images)
    np.testing.assert_allclose(together, reward.score([PROMPTS[0]] * 7, images), rtol=1e-6)
    np.testing.assert_allclose(together[2], reward.score(PROMPTS[0], images[2])[0], rtol=1e-5)
    assert reward.score(PROMPTS[0], []).shape == (0,)


def test_each_distinct_prompt_is_encoded_once(reward, images, monkeypatch):
    seen: list[str] = []
    encode = reward.encode_text
    monkeypatch.setattr(reward, "encode_text", lambda prompts: (seen.extend(prompts), encode(prompts))[1])
    first = reward.score(PROMPTS, images, batch_size=2)
    reward.score(PROMPTS[::-1], images)
    assert sorted(seen) == sorted(set(PROMPTS))
    # An in-place update of the weights makes the kept encodings stale.
    with torch.no_grad():
        reward.module.text_projection.weight.mul_(-1)
    np.testing.assert_allclose(reward.score(PROMPTS, images), -first, rtol=1e-4)


def test_scoring_leaves_training_mode_as_it_was(reward, images):
    reward.module.train()
    reward.module.vision_model.eval()
    reward.score(PROMPTS, images)
    assert reward.module.training and not reward.module.vision_model.training


def test_a_function_that_takes_images_first_is_told_and_other_names_are_taken(images):
    def brightness(images, prompts):
        return [0.0] * len(images)

    with pytest.raises(RewardError, match=r"brightness\(images, prompts\).*Swap its arguments"):
        load_reward(brightness)
    wrapped = load_reward(lambda prompts, images: brightness(images, prompts), name="wrapped")
    assert wrapped.score("a", images).tolist() == [0.0] * len(images)
    assert load_reward(lambda a, b: [1.0] * len(b), name="other").score("a", images[:1]).tolist() == [1.0]


def test_bad_inputs(reward, images):
    with pytest.raises(RewardError, match="2 prompts, 7 images"):
        reward.score(PROMPTS[:2], images)
    with pytest.raises(RewardError, match=r"uint8"):
        reward.score(PROMPTS[0], torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(RewardError, match="PIL images"):
        reward.score(PROMPTS[0], [np.zeros((3, 3))])
    with torch.no_grad():
        reward.module.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(RewardError, match="not finite for image 0"):
        reward.score(PROMPTS, images)
    assert np.isnan(reward.score(PROMPTS, images, check=False)).all()


@pytest.mark.slow
def test_compiled_forward_agrees(clip_folder, reward, images):
    compiled = load_reward(clip_folder, device="cpu", compile=True)
    found = compiled.score("a red circle", images, batch_size=4)
    np.testing.assert_allclose(found, reward.score("a red circle", images), rtol=1e-4)


# Functions


def redness(prompts, images):
    """Return the mean of the red channel plus the prompt's length."""
    return [np.asarray(image)[..., 0].mean() + len(prompt) for prompt, image in zip(prompts, images, strict=True)]


def test_functions_of_pictures(images):
    reward = load_reward(redness, device="cpu")
    assert reward.name == "redness"
    expected = np.array(redness(PROMPTS, images), np.float32)
    for given in (images, as_tensor(images)):
        for batch_size in (1, 3, 32):
            assert np.array_equal(reward.score(PROMPTS, given, batch_size=batch_size), expected)
    named = load_reward("tests.rewards.test_base:redness", name="red")
    assert named.name == "red" and np.array_equal(named.score(PROMPTS, images), expected)


def test_functions_of_tensors(images):
    reward = load_reward(lambda prompts, x: x.mean((1, 2, 3)), name="mean", takes="tensor", device="cpu")
    np.testing.assert_allclose(reward.score("x", images), as_tensor(images).mean((1, 2, 3)).numpy(), rtol=1e-6)
    with pytest.raises(RewardError, match="differ in size"):
        reward.score("x", [*images, Image.new("RGB", (5, 5))])
    assert reward.score("x", [images[0], Image.new("RGB", (5, 5))], batch_size=1).shape == (2,)


def test_a_function_may_change_what_it_is_given(images):
    """Pixels normalised in place would be scored so by the next reward, and be the final image of a search."""

    def normalised(prompts, pixels):
        prompts.clear()
        return pixels.sub_(0.5).div_(0.5).mean((1, 2, 3))

    def blackened(prompts, pictures):
        for picture in pictures:
            picture.paste((0, 0, 0), (0, 0, picture.width, picture.height))
        prompts.append("x")
        return range(len(pictures))

    same = images[:1] * 3
    pixels, before = as_tensor(same), [np.array(image) for image in same]
    kept = pixels.clone()
    assert CallableReward(normalised, takes="tensor").score("a", pixels) == pytest.approx(
        2 * kept.mean((1, 2, 3)).numpy() - 1, abs=1e-6
    )
    CallableReward(blackened).score("a", same)
    assert torch.equal(pixels, kept)
    assert all(np.array_equal(one, image) for one, image in zip(before, same, strict=True))


def test_a_masked_score_is_missing(images):
    reward = CallableReward(lambda prompts, given: np.ma.masked_array([1.0, 2.0], [False, True]))
    with pytest.raises(RewardError, match="not finite for image 1"):
        reward.score("a", images[:2])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, images: torch.zeros(len(images), 2), "wrong shape"),
        (lambda prompts, images: ["high"] * len(images), "not numbers"),
        (lambda prompts, images: [float("inf")] * len(images), "not finite"),
    ],
)
def test_bad_functions(function, message, images):
    with pytest.raises(RewardError, match=message):
        load_reward(function, name="bad").score("x", images)


@pytest.mark.parametrize(
    "give",
    [
        lambda n: [torch.tensor(k / 2, dtype=torch.bfloat16, requires_grad=True) for k in range(n)],
        lambda n: [torch.tensor([k / 2], dtype=torch.float16) for k in range(n)],
        lambda n: torch.arange(n, dtype=torch.bfloat16)[:, None] / 2,
        lambda n: np.arange(n)[:, None] / 2,
        lambda n: tuple(np.float64(k / 2) for k in range(n)),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_a_function_may_return_its_scores_in_any_of_the_usual_ways(give, n):
    images = [Image.new("RGB", (4, 4))] * n
    got = CallableReward(lambda prompts, images: give(len(images)), "mine").score("a", images)
    assert got.dtype == np.float32 and got.tolist() == [k / 2 for k in range(n)]


def test_a_reward_may_read_no_prompt_and_give_several_numbers(images):
    looks = Looks()
    scores = looks.score("not read", images, batch_size=3)
    assert looks.names == ("looks.mean", "looks.sigma") and scores.shape == (7, 2)
    np.testing.assert_allclose(scores, looks.score_pixels("", looks.preprocess(images)), rtol=1e-5)
    assert looks.score("", []).shape == (0, 2)
    looks.outputs = ("one", "two", "three")
    with pytest.raises(RewardError, match=r"got \(7, 2\), expected \(7, 3\). Return the numbers .* per image"):
        looks.score("", images)


def test_a_function_may_read_metadata_and_give_several_numbers(images):
    def counted(prompts, images, metadata):
        found = [[row["count"], len(prompt)] for prompt, row in zip(prompts, metadata, strict=True)]
        metadata[0]["count"] = 100  # its own copy
        return found

    counted.outputs = ["count", "length"]
    reward, given = load_reward(counted), [{"count": k} for k in range(7)]
    assert reward.names == ("counted.count", "counted.length")
    for _ in range(2):
        found = reward.score(PROMPTS, images, metadata=given, batch_size=3)
        assert found.tolist() == [[k, len(prompt)] for k, prompt in enumerate(PROMPTS)]
    assert reward.score("a", images[:2], metadata={"count": 5}).tolist() == [[5, 1], [5, 1]]
    with pytest.raises(RewardError, match=r"counted reads the metadata of prompts: got none, .*Pass metadata="):
        reward.score(PROMPTS, images)
    with pytest.raises(RewardError, match="got 2 of them for 7 images"):
        reward.score(PROMPTS, images, metadata=given[:2])
    with pytest.raises(RewardError, match=r"outputs of reward counted: got \('a', 'a'\), expected distinct names"):
        load_reward(counted, outputs=("a", "a"))


def test_files_are_opened_by_several_threads_ahead_of_the_model_and_score_the_same(reward, tmp_path, monkeypatch):
    images = make_images(6, 48, 40)
    paths = [tmp_path / f"{k}.png" for k in range(6)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    expected = reward.score("a red ring", images, batch_size=2)
    together = threading.Barrier(3, timeout=30)  # breaks when fewer than three are opened at a time

    def opened(path):
        together.wait()
        return open_image(path)

    monkeypatch.setattr(base, "cores", lambda: 3)
    monkeypatch.setattr(base, "open_image", opened)
    assert np.array_equal(reward.score("a red ring", paths, batch_size=2), expected)


def test_one_image_that_pillow_has_not_loaded_yet_may_stand_in_a_list_often(reward, tmp_path):
    make_images(1, 300, 300)[0].save(tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as lazy:
        scores = reward.score("a red ring", [lazy] * 16)
    assert np.array_equal(scores, reward.score("a red ring", [tmp_path / "one.png"] * 16))


# Embeddings


def test_embeddings_come_from_the_pass_that_scores(reward, images):
    plain = reward.score(PROMPTS, images, batch_size=3)
    passes = []
    handle = reward.module.vision_model.register_forward_hook(lambda *_: passes.append(1))
    with reward.embeddings() as found:
        assert np.array_equal(reward.score(PROMPTS, images, batch_size=3), plain)
    handle.remove()
    assert len(passes) == len(found) == 3
    reward.score(PROMPTS, images)
    assert len(found) == 3  # gathered inside the block alone
    with torch.no_grad():
        own = embedding(reward.module.get_image_features(pixel_values=reward.preprocess(images)))
    torch.testing.assert_close(torch.cat(found), torch.nn.functional.normalize(own, dim=-1), rtol=1e-5, atol=1e-5)


def test_a_reward_without_an_image_tower_gives_no_embeddings(reward):
    class Own(type(reward)):
        """Scores in a way of its own, so what the towers say is not what is scored."""

        def forward(self, pixels, text):
            return pixels.mean((1, 2, 3))

    assert reward.embeds and not Own.embeds.fget(Own.__new__(Own))
    with pytest.raises(RewardError, match="reward redness gives no embeddings"), load_reward(redness).embeddings():
        pass
