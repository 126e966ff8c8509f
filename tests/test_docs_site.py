"""The documentation site builds without a warning, and what it takes from the code is all of it."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys

import pytest

import ttsnap_lib
from tests.conftest import ROOT
from tests.test_rooms import FLOORS, MODULES
from ttsnap_lib.files import write_json
from ttsnap_lib.provenance import code_hash
from ttsnap_lib.runs.parameters import declared_parameters, read_notebook

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site; not with --quiet, under which --strict sees no warning."""
    folder, cache = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("cache")
    run, source = cache / "runs" / "score" / "0123", ROOT / "notebooks" / "score.ipynb"
    run.mkdir(parents=True)
    shutil.copy(source, run / "executed.ipynb")
    told = {
        "run_hash": "0123",
        "status": "complete",
        "parameters": {},
        "notebook_sha256": code_hash(read_notebook(source)),
    }
    write_json(run / "manifest.json", told)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "TTSNAP_DATA_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from ttsnap_docs import api, commands, estimates, parameters

    return {"api": api, "commands": commands, "estimates": estimates, "parameters": parameters}


def read(site, page):
    return (site / f"{page}.html").read_text("utf-8")


def test_home_is_the_readme(site):
    text = (site / "index.html").read_text("utf-8")
    assert "figures/reward_against_budget.png" in text and "Path 4: several GPUs or machines" in text


def test_a_finished_run_is_shown_as_it_ran(site):
    assert 'href="score-executed.html"' in read(site, "notebooks/score")
    assert "current_run(" in re.sub("<[^>]*>", "", read(site, "notebooks/score-executed"))
    assert "-executed.html" not in read(site, "notebooks/search")


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_notebook_has_a_page_with_its_parameters(site, notebook):
    text = read(site, f"notebooks/{notebook}")
    for name in declared_parameters(read_notebook(ROOT / "notebooks" / f"{notebook}.ipynb")):
        assert f"<td><code>{name}</code></td>" in text
    assert "<img" in text and f"ttsnap run {notebook}" in text


def test_every_option_of_every_command_is_in_the_reference(site, tools):
    text = read(site, "commands")
    for name, parser in tools["commands"].subparsers().items():
        assert f'id="{name}"' in text
        for action in parser._actions:
            names = {*action.option_strings} - {"-h", "--help"}
            hidden = action.help == argparse.SUPPRESS  # an old spelling
            assert hidden or all(f"<code>{option}</code>" in text for option in names)


def test_every_public_name_is_in_the_reference(site, tools):
    api = tools["api"]
    for room in api.rooms():
        text = read(site, f"api/{room}")
        for module in api.modules(room):
            for name in api.shown(module):
                assert f'id="ttsnap_lib.{module}.{name}"' in text, f"{module}.{name}"
    for name, module in ttsnap_lib._HOME.items():
        assert name in api.shown(module), name


def test_the_page_of_the_rooms_shows_every_room_and_every_file(site):
    text = read(site, "rooms")
    for room, (_, job) in FLOORS.items():
        assert f'href="#{room}"' in text and f'id="{room}"' in text and job.replace(">", "&gt;") in text
    for module in MODULES:
        if module not in ("", *FLOORS) and not module.startswith("pocket.training"):
            assert f"<code>{module.rpartition('.')[2]}</code>" in text, module


def test_no_marker_is_left(site):
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        assert not re.search(r"<!-- (parameters|estimates|rooms):|:(func|class|data):`", text), path


def test_weights_are_those_of_the_real_architectures(tools):
    """Counted on the meta device: nothing is allocated."""
    import torch
    from diffusers import FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    text = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                    feed_forward_proj="gated-gelu")  # fmt: skip
    with torch.device("meta"):
        models = {"transformer": FluxTransformer2DModel(guidance_embeds=True), "T5-XXL encoder": T5EncoderModel(text)}
    for name, model in models.items():
        count = sum(weight.numel() for weight in model.parameters()) / 1e9
        assert tools["estimates"].WEIGHTS["FLUX.1-dev"][name] == pytest.approx(count, abs=0.005)


def test_estimates_follow_the_cost_model(tools):
    from ttsnap_lib import CostModel

    cost = CostModel.preset("flux-512+image_reward")
    one = tools["estimates"].Recording("flux-512", 512, 3, 5, steps=20)
    assert one.image_tflops == pytest.approx(cost.total(1) + 19 * (cost.decode + cost.verify))
    assert one.pictures == 300 and one.tensor_bytes() == 2400
    assert one.picture_bytes("png") == pytest.approx(300 * 512 * 512 * 3 * 0.56)
    assert tools["estimates"].hours(312 * 0.4 * 3600, "A100") == pytest.approx(1)


def test_long_commands_are_broken_as_a_shell_takes_them(tools):
    import shlex

    from ttsnap_docs.hooks import wrap_commands

    long = 'ttsnap search "a red fox" ' + " ".join(f"--option-{k} {k}" for k in range(9)) + " -p steps [2]"
    page = wrap_commands(f"```\nttsnap demo\n{long}\n```\n\n```python\n{'x' * 99} --y\n```\n{'x' * 99} --z\n")
    shown = page.split("```")[1].strip()
    assert max(map(len, shown.splitlines())) <= 80 and all(f"{'x' * 99} --{name}\n" in page for name in "yz")
    assert shlex.split(shown.replace("\\\n", "")) == shlex.split(f"ttsnap demo {long}")
