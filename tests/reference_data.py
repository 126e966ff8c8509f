"""Where the published reward tensors lie; they are no part of the project, and what needs them is skipped without."""

from __future__ import annotations

import os
from pathlib import Path

MISSING = "published reference data not found; set TTSNAP_REFERENCE to its folder"


def reference_folder() -> Path | None:
    """Return the folder that ``TTSNAP_REFERENCE`` names, else the one beside the repository, if it is there."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "reference"
    folder = Path(os.environ.get("TTSNAP_REFERENCE", beside))
    return folder if (folder / "golden_official.npz").exists() else None
