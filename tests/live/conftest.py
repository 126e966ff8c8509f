"""Tiny rewards and pipelines, and one undisturbed online run."""

from __future__ import annotations

import pytest

from tests import worlds
from tests.worlds import COST, SCHEDULE, load_clip, save_clip, tiny_search, write_adapters


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("clips")
    return [save_clip(place / "one", seed=1), save_clip(place / "two", seed=2)]


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    """Noise-aware weights for step 1 and 3."""
    return write_adapters(folders[0], tmp_path_factory.mktemp("adapters"), steps=(3, 1))


@pytest.fixture(scope="module")
def clip(folders):
    return load_clip(folders[0])


@pytest.fixture(scope="module")
def pipelines():
    return {name: worlds.build(name) for name in ("flux", "sdxl")}


@pytest.fixture(scope="module")
def flux(pipelines):
    return pipelines["flux"]


@pytest.fixture(scope="module")
def whole(pipelines, clip):
    """Search undisturbed, to hold disturbed runs to."""
    return tiny_search(pipelines["flux"], clip, schedule=SCHEDULE, cost=COST)
