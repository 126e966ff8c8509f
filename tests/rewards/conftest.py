"""One thread for the tests of this room."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Several test processes share few cores."""
