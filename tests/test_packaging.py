"""What travels with the package: the citation, and a wheel that works without the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml

import ttsnap_lib

ROOT = Path(__file__).resolve().parent.parent

_PERSON = {"type": "object", "required": ["family-names", "given-names"], "additionalProperties": {"type": "string"}}
_ENTITY = {"type": "object", "required": ["name"], "additionalProperties": {"type": "string"}}
_WORK = {
    "type": "object",
    "required": ["title", "authors"],
    "properties": {
        "title": {"type": "string", "minLength": 1},
        "authors": {"type": "array", "minItems": 1, "items": {"anyOf": [_PERSON, _ENTITY]}},
        "url": {"type": "string", "pattern": "^https://"},
    },
}
CITATION = {  # what version 1.2.0 of the Citation File Format asks for, of the keys used here
    **_WORK,
    "required": ["cff-version", "message", *_WORK["required"]],
    "properties": {
        **_WORK["properties"],
        "cff-version": {"const": "1.2.0"},
        "message": {"type": "string", "minLength": 1},
        "type": {"enum": ["software", "dataset"]},
        "keywords": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "preferred-citation": {**_WORK, "required": ["type", *_WORK["required"]]},
    },
}


def test_citation():
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    jsonschema.validate(content, CITATION)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert (content["version"], content["license"]) == (ttsnap_lib.__version__, project["license"])
    paper = content["preferred-citation"]
    assert paper["identifiers"][0]["value"] == "arXiv:2511.22242" and len(paper["authors"]) == 9
    assert "arxiv.org/abs/2511.22242" in paper["url"] and paper["url"] in (ROOT / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path of the wheel, built with the build backend at hand."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def call(wheel, tmp_path_factory):
    """Return a function that runs a command of an environment that holds the wheel and what it depends on."""
    place = tmp_path_factory.mktemp("outside")
    environment = place / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    # Path files in a folder that a path file names are not read: the repository, installed as editable, stays outside.
    packages = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TTSNAP_REFERENCE")}
    variables |= {"TTSNAP_DATA_CACHE": str(place / "cache"), "MPLBACKEND": "Agg"}

    def run(*command: str) -> str:
        program = environment / "bin" / command[0]
        done = subprocess.run(
            [str(program), *command[1:]],
            cwd=place,
            env=variables,
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.place = place
    return run


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for path in ROOT.joinpath("notebooks").glob("*.ipynb"):
        assert f"ttsnap_lib/_notebooks/{path.name}" in names
    for start in ("_data_cache/pocket/flux.zarr/", "_data_cache/pocket/sdxl.zarr/", "configs/", "pocket/models/"):
        assert any(name.startswith(f"ttsnap_lib/{start}") for name in names), start
    outside = [name for name in names if not name.startswith("ttsnap_lib/") and ".dist-info/" not in name]
    assert not outside, outside


@pytest.mark.slow
def test_wheel_imports_without_the_repository(call):
    told = call(
        "python", "-c",
        "import sys, ttsnap_lib; print(ttsnap_lib.__file__); "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'xarray'} & set(sys.modules); assert not heavy, heavy; "
        "from ttsnap_lib import open_rewards; "
        "from ttsnap_lib.files import SHIPPED_TENSORS, repository_root; assert repository_root() is None; "
        "print([float(open_rewards(name)['noise_aware'].mean()) for name in SHIPPED_TENSORS])",
    )  # fmt: skip
    place, means = told.strip().splitlines()
    assert place.startswith(str(call.place))
    assert len(json.loads(means)) == 2 and np.isfinite(json.loads(means)).all()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_wheel_simulates_generates_and_scores(call):
    folder = Path(call("ttsnap", "run", "simulate", "-p", "iterations", "5", "-q").strip().splitlines()[-1])
    assert folder.is_relative_to(call.place) and (folder / "executed.ipynb").exists() and list(folder.glob("*.csv"))
    call("ttsnap", "generate", "--model", "pocket-flux", "--prompts", "pocket:test:1", "--images", "1", "--out", "made",
         "-q")  # fmt: skip
    assert len(list((call.place / "made" / "p0000" / "id000").glob("*.png"))) == 20
    call("ttsnap", "score", "made", "--out", "made.zarr", "-q")
    assert (call.place / "made.zarr").is_dir()
    assert "steps" in call("ttsnap", "finetune", "--config", "pocket-flux", "--show")
