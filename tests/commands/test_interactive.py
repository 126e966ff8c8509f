"""What `ttsnap lab` and `ttsnap explore` serve; that the pages work is tried in a browser elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ttsnap_lib.__main__ import main
from ttsnap_lib.files import notebooks_folder
from ttsnap_lib.runs.parameters import read_notebook


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Return the words that the server was started with, in the place of a server that runs until Ctrl-C."""
    calls = []
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "call", lambda words, env: calls.append(words) or 0)
    return calls


def test_lab_opens_the_notebooks(served):
    assert main(["lab", "--port", "8899", "--no-browser"]) == 0
    assert served == [[sys.executable, "-m", "jupyterlab", str(notebooks_folder()), "--port=8899", "--no-browser"]]


def test_explore_serves_the_notebook_with_the_given_parameters(served, monkeypatch, capsys):
    assert main(["explore", "-p", "tensor", "pocket-sdxl", "-p", "steps", "[3, 8]"]) == 0
    [[_, _, module, page]] = served
    cells = read_notebook(page)["cells"]
    [given] = [cell["source"] for cell in cells if "injected-parameters" in cell["metadata"]["tags"]]
    assert module == "voila" and 'tensor = "pocket-sdxl"' in given and "steps = [3, 8]" in given
    assert main(["explore", "-p", "tensr", "x"]) == 1 and "Did you mean 'tensor'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "voila", None)
    assert main(["explore"]) == 1 and "pip install 'ttsnap[notebooks]'" in capsys.readouterr().err
    assert len(served) == 1
