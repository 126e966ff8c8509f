"""ImageReward gives what the image-reward package gives, at real size; the package has an environment of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.parity.image_reward import TOLERANCE, ours

PACKAGE = Path(os.environ.get("TTSNAP_PARITY_PYTHON", ROOT / ".venv-parity" / "bin" / "python"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_real_size_equals_the_package(tmp_path):
    if not PACKAGE.exists():
        pytest.skip(f"{PACKAGE} is not there: `make parity` makes the environment of the image-reward package")
    script = ROOT / "tests" / "parity" / "image_reward.py"
    subprocess.run([PACKAGE, script, "package", tmp_path], check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    found = ours(tmp_path, small=False)
    print()
    for name, value in found.items():
        print(f"  {name:26} {value:.2e}")
    assert found.pop("spread of the raw output") > 0.1  # equal scores that hardly differ would show nothing
    assert max(found.values()) <= TOLERANCE
