"""Every picture that is scored or trained on is opened by one rule, whatever its file holds."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests import worlds
from tests.conftest import ROOT
from ttsnap_lib.errors import RewardError, TrajectoryError
from ttsnap_lib.finetuning.data import open_images
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.rewards.pictures import as_rgb, open_picture
from ttsnap_lib.trajectories.read import Trajectories

CASES = ROOT / "tests" / "cases" / "images"
PICTURE = worlds.make_images(1, 32, 24)[0]
GREY = np.asarray(PICTURE.convert("L"))
COLOURS = PICTURE.quantize(16)


def half_hidden() -> Image.Image:
    """Return the picture with its left half transparent, over colours that nobody sees."""
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[:, :16] = 0
    picture = PICTURE.convert("RGBA")
    picture.putalpha(Image.fromarray(alpha))
    return picture


def over_white(picture: Image.Image) -> np.ndarray:
    """Return what one sees of `half_hidden` on a white page."""
    seen = np.array(picture.convert("RGB"))
    seen[:, :16] = 255
    return seen


def transparent_colour() -> Image.Image:
    picture = COLOURS.copy()
    picture.info["transparency"] = 3
    return picture


def without_colour() -> np.ndarray:
    seen = np.array(COLOURS.convert("RGB"))
    seen[np.asarray(COLOURS) == 3] = 255
    return seen


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


RGB_GREY = np.repeat(GREY[..., None], 3, axis=2)
GIVEN = {  # file name -> image, options of saving it, what is seen
    "plain.png": (PICTURE, {}, np.asarray(PICTURE)),
    "grey.png": (Image.fromarray(GREY), {}, RGB_GREY),
    "grey16.png": (Image.fromarray(GREY.astype(np.uint16) * 257), {}, RGB_GREY),
    "grey16.tif": (Image.fromarray(GREY.astype(np.uint16) * 257), {}, RGB_GREY),
    "upper16.png": (Image.fromarray(GREY.astype(np.uint16) << 8), {}, RGB_GREY),
    "rgba.png": (half_hidden(), {}, over_white(PICTURE)),
    "rgba.webp": (half_hidden(), {"lossless": True, "exact": True}, over_white(PICTURE)),
    "la.png": (half_hidden().convert("LA"), {}, over_white(Image.fromarray(GREY))),
    "palette.png": (COLOURS, {}, np.asarray(COLOURS.convert("RGB"))),
    "palette.gif": (COLOURS, {}, np.asarray(COLOURS.convert("RGB"))),
    "clear_colour.png": (transparent_colour(), {"transparency": 3}, without_colour()),
    "cmyk.tif": (PICTURE.convert("CMYK"), {}, np.asarray(PICTURE)),
    "bits.png": (Image.fromarray(GREY > 127), {}, np.where(GREY > 127, 255, 0)[..., None].repeat(3, 2)),
    "upside_down.png": (PICTURE, {"exif": exif(3)}, np.asarray(PICTURE)[::-1, ::-1]),
    "mirrored.tif": (PICTURE, {"exif": exif(2)}, np.asarray(PICTURE)[:, ::-1]),
    "turned.webp": (PICTURE, {"exif": exif(6), "lossless": True}, np.rot90(np.asarray(PICTURE), -1)),
}
REFUSED = {
    "floats.tif": (Image.fromarray(GREY.astype(np.float32) / 255), {}, "mode F"),
    "integers.tif": (Image.fromarray(GREY.astype(np.int32) * 2**20), {}, "mode I"),
    **{
        f"frames.{kind}": (PICTURE, {"save_all": True, "append_images": [PICTURE.rotate(180)]}, "2 frames or pages")
        for kind in ("png", "gif", "webp", "tif")
    },
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_picture_is_read_as_it_is_looked_at(name, tmp_path):
    image, options, seen = GIVEN[name]
    image.save(tmp_path / name, **options)
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / name, name)), seen)
    with Image.open(tmp_path / name) as given:
        found = as_rgb(given, "given in memory")
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), seen)
    if "exif" not in options:
        np.testing.assert_array_equal(np.asarray(as_rgb(image, "given in memory")), seen)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_in_a_sentence(name, tmp_path):
    image, options, says = REFUSED[name]
    image.save(tmp_path / name, **options)
    reward = load_reward(worlds.brightness)
    with pytest.raises(RewardError, match=says):
        reward.score("a", tmp_path / name)
    with Image.open(tmp_path / name) as given, pytest.raises(RewardError, match=says):
        reward.score("a", given)


def test_a_frame_that_was_loaded_before_its_file_was_closed_is_a_picture(tmp_path):
    COLOURS.save(tmp_path / "one.gif")
    with Image.open(tmp_path / "one.gif") as given:
        given.load()
    np.testing.assert_array_equal(np.asarray(as_rgb(given, "x")), np.asarray(COLOURS.convert("RGB")))


def test_a_broken_image_in_memory_is_told_in_a_sentence(tmp_path):
    PICTURE.save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:-300])
    with (
        Image.open(tmp_path / "half.png") as given,
        pytest.raises(RewardError, match="in memory cannot be read.*truncated"),
    ):
        load_reward(worlds.brightness).score("a", given)


def test_the_pictures_of_others_score_as_they_are_looked_at():
    with Image.open(CASES / "gray16.png") as file:
        grey = (np.asarray(file) / 257).round()
    found = np.asarray(open_picture(CASES / "gray16.png", "gray16"))
    assert np.abs(found - grey[..., None]).max() <= 1  # the upper byte, not the nearest level
    eight = Image.fromarray(grey.astype(np.uint8))
    first, second = load_reward(worlds.brightness).score("a", [CASES / "gray16.png", eight])
    assert first == pytest.approx(second, abs=0.5)  # of 255 levels
    with Image.open(CASES / "exif6.jpg") as file:
        lying = np.asarray(file)
    np.testing.assert_array_equal(np.asarray(open_picture(CASES / "exif6.jpg", "exif6")), np.rot90(lying, -1))
    with Image.open(CASES / "rgba_hidden.png") as file:
        hidden = np.asarray(file)
    seen = np.where(hidden[..., 3:] > 0, hidden[..., :3], 255)
    assert set(np.unique(hidden[..., 3])) == {0, 255} and (seen != hidden[..., :3]).any()
    np.testing.assert_array_equal(np.asarray(open_picture(CASES / "rgba_hidden.png", "rgba")), seen)


@pytest.mark.parametrize("name", ["rgba.png", "grey16.png", "palette.png", "clear_colour.png", "upside_down.png"])
def test_score_and_finetuning_read_a_folder_by_the_same_rule(name, tmp_path):
    image, options, seen = GIVEN[name]
    found = Trajectories(worlds.fill(tmp_path))
    image.save(found.path(0, 1, 3), **options)
    np.testing.assert_array_equal(found.read(0, 1, 3), seen)
    np.testing.assert_array_equal(open_images(tmp_path).read(np.array([0]), np.array([1]), 3)[0], seen)


def test_an_animation_in_a_folder_is_refused(tmp_path):
    image, options, says = REFUSED["frames.png"]
    found = Trajectories(worlds.fill(tmp_path))
    image.save(found.path(0, 1, 3), **options)
    with pytest.raises(TrajectoryError, match=says):
        found.read(0, 1, 3)
    with pytest.raises(TrajectoryError, match=says):
        open_images(tmp_path).read(np.array([0]), np.array([1]), 3)
