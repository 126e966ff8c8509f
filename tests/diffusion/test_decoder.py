"""Loading what a search takes beside pipeline and reward."""

from __future__ import annotations

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch

from ttsnap_lib.diffusion.pipelines import load_decoder
from ttsnap_lib.pocket import pocket_folder


@pytest.fixture
def warnings_of_diffusers():
    """Collect what diffusers logs while a model is loaded; its loggers do not reach the root logger."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    log = logging.getLogger("diffusers")
    log.addHandler(handler)
    yield texts
    log.removeHandler(handler)


def _pipeline(channels: int) -> SimpleNamespace:
    vae = SimpleNamespace(dtype=torch.float32, config=SimpleNamespace(latent_channels=channels))
    return SimpleNamespace(vae=vae, _execution_device=torch.device("cpu"))


def test_a_decoder_that_diffusers_saved_loads_without_a_warning(warnings_of_diffusers):
    from diffusers import AutoencoderTiny

    folder = pocket_folder("pocket-tiny")
    channels = json.loads((folder / "config.json").read_text())["latent_channels"]
    AutoencoderTiny.from_pretrained(folder)
    assert len(warnings_of_diffusers) == 1  # once diffusers stops this, the filter can go
    load_decoder("pocket-tiny", _pipeline(channels))
    assert len(warnings_of_diffusers) == 1


def test_other_unknown_entries_are_still_told(warnings_of_diffusers, tmp_path):
    folder = shutil.copytree(pocket_folder("pocket-tiny"), tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sharpness": 2}))
    load_decoder(folder, _pipeline(config["latent_channels"]))
    assert ["sharpness" in text for text in warnings_of_diffusers] == [True]
