"""Pixels equal those of each package's own preprocessing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from tests.worlds import as_tensor, make_images, pillow_processor
from ttsnap_lib.errors import RewardError
from ttsnap_lib.rewards.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    HPS_PIXELS,
    IMAGE_REWARD_PIXELS,
    Preprocessing,
    from_clip_processor,
    resize_levels,
)

# Sizes that leave an odd number of pixels to crop, need enlarging, or match already.
SIZES = [(512, 512), (224, 224), (301, 227), (227, 302), (64, 40), (1000, 301)]


def _modes(image: Image.Image) -> list[Image.Image]:
    alpha = image.convert("RGBA")
    alpha.putalpha(128)
    return [image, image.convert("L"), image.convert("P"), alpha]


@pytest.mark.parametrize("size", SIZES)
def test_image_reward_pixels(size):
    # As image-reward 1.5 writes it; tests/parity compares with the package itself.
    transform = Compose(
        [
            Resize(224, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(224),
            lambda image: image.convert("RGB"),
            ToTensor(),
            Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    for image in _modes(make_images(1, *size)[0]):
        torch.testing.assert_close(IMAGE_REWARD_PIXELS.image(image), transform(image), rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("edge", [224, 256])
def test_clip_pixels(size, edge):
    processor = pillow_processor()(size={"shortest_edge": edge}, crop_size={"height": 224, "width": 224})
    ours = from_clip_processor(processor, "test")
    for image in _modes(make_images(1, *size)[0]):
        # Transparency is left out; transformers 5 puts such a picture on white, which 4 did not.
        expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        # The processor divides by 255 in float64; the difference is one unit in the last place.
        torch.testing.assert_close(ours.image(image), expected, rtol=0, atol=1e-6)


def hps_transform(image: Image.Image) -> torch.Tensor:
    """Do what ``image_transform(224, is_train=False, resize_longest_max=True)`` of hpsv2 1.2.0 does, step by step.

    An image without transparency; the package does not pad one whose longest side is 224 already.
    """
    pixels = tv.to_tensor(image.convert("RGB"))
    scale = 224 / float(max(pixels.shape[1:]))
    if scale != 1.0:
        height, width = (round(side * scale) for side in pixels.shape[1:])
        pixels = tv.resize(pixels, [height, width], InterpolationMode.BICUBIC)
        below, right = 224 - height, 224 - width
        pixels = tv.pad(pixels, [right // 2, below // 2, right - right // 2, below - below // 2], fill=0)
    return tv.normalize(pixels, CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize("size", SIZES)
def test_hps_pixels(size):
    for image in _modes(make_images(1, *size)[0]):
        torch.testing.assert_close(HPS_PIXELS.image(image), hps_transform(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "preprocessing",
    [
        IMAGE_REWARD_PIXELS,
        HPS_PIXELS,
        Preprocessing(224, resize_to=256, centre="floor"),
        Preprocessing(224, fit="stretch"),
        Preprocessing(224, resample=int(Image.Resampling.BILINEAR)),
    ],
    ids=["image_reward", "hps", "clip", "stretch", "bilinear"],
)
@pytest.mark.parametrize("size", [(512, 512), (301, 227), (64, 40), (1000, 301)])
def test_tensor_equals_the_written_png(preprocessing, size, tmp_path):
    """A float tensor gives the pixels of the PNG written from it."""
    rng = np.random.default_rng(1)
    exact = as_tensor(make_images(1, *size))
    exact = (exact + torch.from_numpy(rng.uniform(-0.0019, 0.0019, exact.shape)).float()).clamp(0, 1)
    levels = (exact[0].permute(1, 2, 0).numpy() * 255).round().astype("uint8")  # as diffusers writes images
    Image.fromarray(levels).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as file:
        expected = preprocessing.image(file)
    tolerance = 0 if preprocessing.levels else 2e-6
    torch.testing.assert_close(preprocessing.tensor(exact)[0], expected, rtol=0, atol=tolerance)


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_files_give_an_accelerator_the_same_bits():
    resized = [IMAGE_REWARD_PIXELS.resized(image) for image in make_images(4, 301, 227)]
    assert torch.equal(IMAGE_REWARD_PIXELS.batch(resized, "cuda").cpu(), IMAGE_REWARD_PIXELS.batch(resized, "cpu"))


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize(
    ("before", "after"), [((512, 512), (224, 224)), ((301, 227), (298, 224)), ((64, 40), (358, 224))]
)
def test_resize_gives_the_levels_of_pillow(resample, before, after):
    """The path that tensors take on a device, run here on the CPU, equals Pillow to the bit."""
    image = make_images(1, *before)[0]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    expected = torch.from_numpy(np.array(image.resize(after, resample))).permute(2, 0, 1)
    ours = resize_levels(pixels, after[1], after[0], resample=int(resample))
    assert torch.equal(ours, expected.float())
    smooth = resize_levels(pixels, after[1], after[0], resample=int(resample), rounded=False)
    assert (smooth - expected).abs().max() < 2


def test_differentiable_path_reaches_the_images():
    pixels = as_tensor(make_images(2, 301, 227)).requires_grad_()
    out = IMAGE_REWARD_PIXELS.tensor(pixels, differentiable=True)
    out.square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    rounded = IMAGE_REWARD_PIXELS.tensor(pixels.detach())
    assert ((out - rounded).abs() * 0.276 * 255).max() < 2


def test_input_size_without_resizing():
    pixels = as_tensor(make_images(3, 32, 32))
    plain = Preprocessing(32, fit="none", mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(plain.tensor(pixels), pixels)
    with pytest.raises(RewardError, match="smaller than the model's input"):
        plain.image(make_images(1, 20, 32)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_rescale": False}, "do_rescale False"),
        ({"do_normalize": False}, "do_normalize False"),
        ({"crop_size": {"height": 224, "width": 112}}, "width\\W+112"),
        ({"size": {"shortest_edge": 112}}, "shortest_edge\\W+112"),
        ({"do_center_crop": False}, "do_center_crop False"),
    ],
)
def test_unknown_processors_are_refused(change, message):
    processor = pillow_processor()(**{"size": {"shortest_edge": 224}, **change})
    with pytest.raises(RewardError, match=message):
        from_clip_processor(processor, "test")
