"""pyproject.toml, constraints.txt and environment.yml give one environment, and it is the installed one."""

import importlib.metadata
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
PINS = {
    requirement.name.lower().replace("_", "-"): requirement
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_every_requirement_has_an_exact_pin_that_fits(requirement):
    pin = PINS[requirement.name.lower().replace("_", "-")]
    assert re.fullmatch(r"==[^*]+", str(pin.specifier))
    version = str(pin.specifier).removeprefix("==")
    assert requirement.specifier.contains(version)
    assert importlib.metadata.version(requirement.name).split("+")[0] == version


def test_conda_takes_the_same_python_and_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python"))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.partition("=")[2] + ".7")
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-c constraints.txt", "-e .[dev]"]


def test_torch_and_torchvision_are_a_matching_pair():
    import torch
    import torchvision

    assert torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5).tolist() == [0]


def test_the_named_stack_imports_together():
    import accelerate
    import diffusers
    import ImageReward
    import ipywidgets
    import jupyterlab
    import open_clip
    import papermill
    import peft
    import seaborn
    import transformers

    modules = (
        accelerate,
        diffusers,
        ImageReward,
        ipywidgets,
        jupyterlab,
        open_clip,
        papermill,
        peft,
        seaborn,
        transformers,
    )
    assert all(module.__name__ for module in modules)
    assert hasattr(diffusers.FluxPipeline, "from_pretrained") and hasattr(ImageReward, "load")
