"""The LAION aesthetic predictor against simple_inference.py of its authors; the real classes, a tiny tower, random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import CLIPModel

from tests.worlds import as_tensor, embedding, make_bank, make_images, save_clip, small_config
from ttsnap_lib.errors import RewardError
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.rewards.pixels import CLIP_MEAN, CLIP_STD


class MLP(torch.nn.Module):
    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(input_size, 1024),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(1024, 128),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(128, 64),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(64, 16),
            torch.nn.Linear(16, 1),
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the folder of a tiny CLIP with the real embedding's width, and a head in the authors' form."""
    folder = save_clip(tmp_path_factory.mktemp("aesthetic") / "clip", width=768, image_size=224, patch_size=56)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        head = MLP(768)
    for parameter in head.parameters():
        parameter.data.mul_(3)
    torch.save(head.state_dict(), folder / "head.pth")
    return folder, head.eval()


def _simple_inference(folder, head, image: Image.Image) -> float:
    transform = Compose(  # clip.clip._transform
        [
            Resize(224, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(224),
            lambda image: image.convert("RGB"),
            ToTensor(),
            Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        features = embedding(model.get_image_features(transform(image).unsqueeze(0))).numpy()
        norm = np.atleast_1d(np.linalg.norm(features, 2, -1))
        norm[norm == 0] = 1
        return head.layers(torch.from_numpy(features / np.expand_dims(norm, -1))).item()


def test_equals_the_authors_script_whatever_the_prompt(files):
    folder, head = files
    images = [make_images(1, *size, seed=seed)[0] for seed, size in enumerate([(512, 512), (301, 227), (64, 40)])]
    expected = [_simple_inference(folder, head, image) for image in images]
    assert np.ptp(expected) > 0.01
    reward = load_reward("aesthetic", model=folder, weights=folder / "head.pth", device="cpu")
    for prompts in ("a cat", ["a", "b", "c"]):
        np.testing.assert_allclose(reward.score(prompts, images, batch_size=2), expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(reward.score("", as_tensor(images[:1])), reward.score("", images[:1]))
    with reward.embeddings() as found:
        reward.score("", images, batch_size=2)
    torch.testing.assert_close(torch.cat(found).norm(dim=-1), torch.ones(3))
    assert all(p.grad is None for p in reward.module.parameters())


def test_a_head_or_a_tower_that_does_not_fit(files, clip_folder, tmp_path):
    folder, head = files
    state = head.state_dict()

    def refused(changed: dict, model, message: str) -> None:
        torch.save(changed, tmp_path / "bad.pth")
        with pytest.raises(RewardError, match=message):
            load_reward("aesthetic", model=model, weights=tmp_path / "bad.pth", device="cpu")

    refused(
        {**state, "layers.7.weight": torch.zeros(2, 16)}, folder, r"7\.weight: got \(2, 16\), expected shape \(1, 16\)"
    )
    refused({key: value for key, value in state.items() if "0." not in key}, folder, "2 missing and 0 unexpected")
    refused(state, clip_folder, "projection_dim of .*: got 64, expected an integer of 768|got 64")


def test_it_becomes_noise_aware(files, tmp_path):
    from ttsnap_lib.finetuning.train import finetune

    given = {"model": files[0], "weights": files[0] / "head.pth", "device": "cpu"}
    images = make_images(3)
    base = load_reward("aesthetic", **given).score("", images)
    finetune(
        make_bank(), tmp_path / "run", small_config("aesthetic", steps=(2,)), reward=load_reward("aesthetic", **given)
    )
    tuned = load_reward("aesthetic", adapters=tmp_path / "run", **given)
    np.testing.assert_allclose(tuned.score("", images), base, rtol=1e-4, atol=1e-5)
    assert np.abs(tuned.use_step(2).score("", images) - base).max() > 1e-4
