"""Fixtures shared by all tests."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.reference_data import MISSING, reference_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def one_thread():
    """One thread for torch: several test processes share few cores, and sums come out the same."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """Let the test compute into a data cache of its own."""
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of the published reward tensors and golden results; tests that need it skip without it."""
    folder = reference_folder()
    if folder is None:
        pytest.skip(MISSING)
    return folder


@pytest.fixture(scope="session")
def pools(reference):
    """Return the published reward tensors by model, in memory, repeats kept."""
    from ttsnap_lib import import_published

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the SDXL pool repeats itself
        return {model: import_published(reference / "values", model) for model in ("flux", "sdxl")}
