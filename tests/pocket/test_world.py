"""The picture world: captions, splits, the renderer, and the oracle that judges its pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from ttsnap_lib.errors import PromptError, RewardError
from ttsnap_lib.pocket import pocket_folder
from ttsnap_lib.pocket import world as prompt_module
from ttsnap_lib.pocket.oracle import judge, oracle_score
from ttsnap_lib.pocket.world import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Thing,
    caption,
    hard_negative,
    mislabeled,
    outside,
    parse_caption,
    pocket_prompts,
    random_scene,
    render,
)


def all_scenes() -> Iterator[Scene]:
    """Yield every scene of the world in a fixed order: those of one thing, then those of two."""
    things = [Thing(*parts) for parts in itertools.product(SIZES, COLORS, SHAPES)]
    for background, thing in itertools.product(BACKGROUNDS, things):
        yield Scene(background, (thing,))
    for background, relation, first, second in itertools.product(BACKGROUNDS, RELATIONS, things, things):
        if (first.color, first.shape) != (second.color, second.shape):  # two that differ by size alone are hard to tell
            yield Scene(background, (first, second), relation)


def make_splits() -> dict[str, list[str]]:
    """Draw the packaged splits: as many one-thing captions in each as a random scene would have, no picture in two splits.

    A picture told from its other thing ("a above b", "b below a") counts as the same.
    """
    rng = np.random.default_rng(20251122)
    scenes = list(all_scenes())
    single = [scene for scene in scenes if scene.relation is None]
    double = [scene for scene in scenes if scene.relation is not None]
    rng.shuffle(single)
    rng.shuffle(double)
    splits: dict[str, list[str]] = {}
    used: set[Scene] = set()
    for name in ("selection", "evaluation", "test", "train"):
        size = SPLITS[name]
        alone = min(size // 8, len(single)) if name != "train" else len(single)
        chosen = [single.pop() for _ in range(alone)]
        while len(chosen) < size:
            scene = double.pop()
            if scene not in used:
                used |= {scene, scene.mirrored()}
                chosen.append(scene)
        order = rng.permutation(size)
        splits[name] = [caption(chosen[k]) for k in order]
    return splits


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(11)
    scenes = [random_scene(rng) for _ in range(120)]
    pictures = render(scenes, rng)
    texts = [caption(scene) for scene in scenes]
    return scenes, texts, pictures, oracle_score(texts, pictures)


def test_every_caption_is_read_back():
    scenes = list(all_scenes())
    assert len(scenes) == len(set(scenes)) > 50_000
    for scene in scenes[::97]:
        assert parse_caption(caption(scene)) == scene


@pytest.mark.parametrize("text", ["", "a small red ring", "a tiny red ring on a black background", None])
def test_other_text_is_refused(text):
    with pytest.raises(PromptError, match="caption"):
        parse_caption(text)


def test_mirrored_tells_the_same_picture():
    scene = Scene("black", (Thing("small", "red", "ring"), Thing("large", "blue", "cross")), "left of")
    pictures = render([scene, scene.mirrored()], np.random.default_rng(0), jitter=False)
    assert scene.mirrored() != scene
    assert scene.mirrored().mirrored() == scene
    np.testing.assert_array_equal(pictures[0], pictures[1])


def test_render_is_deterministic_and_independent_of_the_batch():
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng) for _ in range(20)]
    first = render(scenes, np.random.default_rng(4))
    assert first.shape == (20, 32, 32, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, render(scenes, np.random.default_rng(4)))
    assert (first != render(scenes, np.random.default_rng(5))).any()
    # each scene draws the same count of numbers, so a prefix of the batch draws the same
    np.testing.assert_array_equal(first[:7], render(scenes[:7], np.random.default_rng(4)))


def test_things_never_touch():
    rng = np.random.default_rng(6)
    big = [Thing("large", "red", shape) for shape in SHAPES]
    scenes = [Scene("white", (a, Thing("large", "blue", b.shape)), r) for a in big for b in big for r in RELATIONS]
    for picture in render(scenes, rng).astype(float):
        ground = np.median(picture[0], axis=0)
        far = np.abs(picture - ground).max(axis=-1) > 60
        assert ndimage.label(far, structure=np.ones((3, 3)))[1] == 2


def test_oracle_is_near_one_on_renders_and_near_zero_on_noise(world):
    _, texts, pictures, right = world
    noise = np.random.default_rng(0).integers(0, 256, pictures.shape, dtype=np.uint8)
    assert right.mean() > 0.93
    assert np.quantile(right, 0.05) > 0.8
    assert oracle_score(texts, noise).mean() < 0.1
    assert oracle_score(texts, np.full_like(pictures, 128)).mean() < 0.1
    assert oracle_score(texts, pictures[::-1]).mean() < 0.3


@pytest.mark.parametrize("attribute, options", [("size", SIZES), ("color", COLORS), ("shape", SHAPES)])
def test_one_wrong_attribute_costs(world, attribute, options):
    scenes, _, pictures, right = world
    rng, wrong = np.random.default_rng(1), []
    for scene in scenes:
        things = list(scene.things)
        which = int(rng.integers(len(things)))
        others = [name for name in options if name != getattr(things[which], attribute)]
        things[which] = dataclasses.replace(things[which], **{attribute: str(rng.choice(others))})
        wrong.append(caption(dataclasses.replace(scene, things=tuple(things))))
    scores = oracle_score(wrong, pictures)
    assert (scores < right).mean() > 0.97
    assert (right - scores).mean() > 0.2


def test_wrong_background_relation_and_count_cost(world):
    scenes, _, pictures, right = world
    turn = {"black": "white", "white": "pink", "pink": "gray", "gray": "black"}
    other = [caption(dataclasses.replace(scene, background=turn[scene.background])) for scene in scenes]
    assert (oracle_score(other, pictures) < right - 0.2).mean() > 0.97
    two = [k for k, scene in enumerate(scenes) if scene.relation]
    opposite = [caption(dataclasses.replace(scenes[k].mirrored(), things=scenes[k].things)) for k in two]
    assert (oracle_score(opposite, pictures[two]) < right[two] - 0.2).mean() > 0.95
    alone = [caption(Scene(scenes[k].background, scenes[k].things[:1])) for k in two]
    assert (oracle_score(alone, pictures[two]) < right[two] - 0.1).mean() > 0.95


def test_oracle_falls_gradually_with_blur(world):
    _, texts, pictures, right = world
    blurred = [
        oracle_score(texts, ndimage.gaussian_filter(pictures / 255.0, (0, sigma, sigma, 0))).mean()
        for sigma in (0.5, 1.0, 2.0)
    ]
    assert right.mean() + 0.03 > blurred[0] > blurred[1] > blurred[2]


def test_oracle_reads_uint8_floats_and_pil_alike(world):
    from PIL import Image

    _, texts, pictures, right = world
    np.testing.assert_allclose(oracle_score(texts[:5], pictures[:5] / 255.0), right[:5], atol=1e-9)
    np.testing.assert_allclose(oracle_score(texts[:5], [Image.fromarray(p) for p in pictures[:5]]), right[:5])
    np.testing.assert_allclose(oracle_score(texts[0], pictures[:1]), right[:1])
    assert set(judge(parse_caption(texts[0]), pictures[0] / 255.0)) >= {"background", "count", "color_0", "shape_0"}


def test_oracle_refuses_what_it_cannot_judge(world):
    _, texts, pictures, _ = world
    with pytest.raises(RewardError, match="differ in number"):
        oracle_score(texts[:3], pictures[:2])
    with pytest.raises(RewardError, match="32"):
        oracle_score(texts[:1], pictures[:1, :16])
    with pytest.raises(RewardError, match="finite"):
        oracle_score(texts[:1], np.full((1, 32, 32, 3), np.nan))
    with pytest.raises(PromptError):
        oracle_score(["a dog"], pictures[:1])


def test_splits_are_disjoint_whole_and_the_packaged_ones():
    splits = {name: pocket_prompts(name) for name in SPLITS}
    assert {name: len(texts) for name, texts in splits.items()} == SPLITS
    seen: set = set()
    for texts in splits.values():
        told = {parse_caption(text) for text in texts}
        assert len(told) == len(texts)
        both = told | {scene.mirrored() for scene in told}
        assert not both & seen
        seen |= both
    packaged = json.loads(Path(prompt_module.__file__).with_name("prompts.json").read_text("utf-8"))
    assert make_splits() == packaged


def test_training_scenes_are_not_held_out():
    scenes = prompt_module.training_scenes(3000, np.random.default_rng(0))
    assert not set(scenes) & prompt_module.held_out()
    assert len(prompt_module.held_out()) >= 3 * 128


def test_names_and_sizes_are_checked():
    assert pocket_prompts("evaluation", 3) == pocket_prompts()[:3]
    with pytest.raises(PromptError, match="evaluation"):
        pocket_prompts("validation")
    with pytest.raises(PromptError, match="128"):
        pocket_prompts("test", 129)
    assert pocket_folder("pocket-flux").name == "pocket-flux"
    with pytest.raises(Exception, match="pocket-flux"):
        pocket_folder("pocket-fluks")


def test_hard_negatives_show_another_picture():
    rng = np.random.default_rng(0)
    for scene in list(all_scenes())[::1500]:
        wrong = hard_negative(scene, rng)
        assert wrong not in (scene, scene.mirrored())
        assert len(wrong.things) == len(scene.things)


def test_mislabeled_captions_are_wrong_at_the_rate():
    rng = np.random.default_rng(0)
    scenes = [scene for scene in list(all_scenes())[::37] if scene.relation is not None]
    wrong = [mislabeled(scene, rng, chance=0.2) for scene in scenes]
    told = lambda s: [s.background, s.relation, *(getattr(t, n) for t in s.things for n in ("size", "color", "shape"))]
    differs = np.array(
        [[a != b for a, b in zip(told(x), told(y), strict=True)] for x, y in zip(scenes, wrong, strict=True)]
    )
    assert len(differs) > 300
    np.testing.assert_allclose(differs.mean(axis=0), 0.2, atol=0.08)  # 3.5 standard errors of each attribute
    assert mislabeled(scenes[0], rng, chance=0.0) == scenes[0]


def test_what_the_world_does_not_have_is_named():
    assert "a green background; there are black, gray, white, pink" in outside("a small red ring on a green background")
    assert "'photo', 'fox', 'in', 'the', 'snow'; its words are small, large, red" in outside(
        "a photo of a red fox in the snow"
    )
    assert [outside(text) for text in (*pocket_prompts("test"), "A small red ring.", "a large ring above a cross")] == [
        ""
    ] * 130


def test_a_pocket_model_tells_once_what_is_outside_its_world(tmp_path):
    from ttsnap_lib import generate, load_pipeline, search

    flux = load_pipeline("pocket-flux")
    quick = {"settings": {"n_steps": 1}}
    with pytest.warns(UserWarning, match="pocket model does not know a green background") as told:
        search(flux, "a red ring on a green background", "pocket-clip", candidates=1, **quick)
    assert len(told) == 1
    prompts = ["a red ring", "a fox", "a cat"]
    with pytest.warns(UserWarning, match="does not know 'fox'.*, and 1 more prompt is outside its world") as told:
        generate(flux, prompts, tmp_path / "pool", images_per_prompt=1, **quick)
    assert len(told) == 1
