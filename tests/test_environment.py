"""pyproject.toml, constraints.txt and environment.yml give one environment, and it is the installed one."""

import ast
import importlib.metadata
import re
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT
from ttsnap_lib import errors

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = Requirement(EXTRAS["dev"][0])  # the other extras, by name
DECLARED = [
    Requirement(text)
    for part in (PROJECT["dependencies"], EXTRAS["dev"][1:], *(EXTRAS[extra] for extra in sorted(OURS.extras)))
    for text in part
]
HEAVY = ("torch", "diffusers", "transformers", "jupyterlab", "papermill", "dask", "distributed")
# What the project's description names; image-reward is told in a comment, with the reason.
NAMED = {"jupyterlab", "papermill", "torch", "diffusers", "transformers", "peft", "numpy", "pandas", "seaborn"}
NAMED |= {"ipywidgets"}


def _pins(lines):
    found = {}
    for line in lines:
        if line and not line.startswith(("#", "-")):
            requirement = Requirement(line)
            found[requirement.name.lower().replace("_", "-")] = requirement
    return found


PINS = _pins((ROOT / "constraints.txt").read_text().splitlines())


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_every_requirement_has_an_exact_pin_that_fits(requirement):
    pin = PINS[requirement.name.lower().replace("_", "-")]
    assert re.fullmatch(r"==[^*]+", str(pin.specifier))
    version = str(pin.specifier).removeprefix("==")
    assert requirement.specifier.contains(version)
    assert importlib.metadata.version(requirement.name).split("+")[0] == version


def test_all_but_the_parity_environment_is_in_dev():
    assert OURS.name == PROJECT["name"]
    assert OURS.extras == EXTRAS.keys() - {"dev", "image-reward"}


def test_the_core_is_light():
    core = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert not core & {*HEAVY, *(Requirement(text).name for extra in OURS.extras for text in EXTRAS[extra])}


def test_what_the_library_imports_is_declared_or_named_with_its_extra():
    imported = set()
    for path in (ROOT / "ttsnap_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    imported -= {*sys.stdlib_module_names, "ttsnap_lib"}
    homes = importlib.metadata.packages_distributions()
    declared = {requirement.name.lower().replace("_", "-") for requirement in DECLARED}
    told = {module for modules in errors._EXTRAS.values() for module in modules}
    told.add("llvmlite")  # half of numba
    missing = {m for m in imported if not declared & {home.lower().replace("_", "-") for home in homes[m]}} - told
    assert not missing


def test_no_pin_shuts_users_out():
    bounded = [str(r) for r in DECLARED if any(part.operator not in (">=", "!=") for part in r.specifier)]
    assert not bounded
    for classifier in PROJECT["classifiers"]:
        assert SpecifierSet(PROJECT["requires-python"]).contains(classifier.rpartition(" ")[2])


def test_conda_takes_the_same_python_and_the_same_pins():
    text = (ROOT / "environment.yml").read_text()
    environment = yaml.safe_load(text)
    python = next(d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python"))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.partition("=")[2] + ".7")
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip[:2] == ["-c constraints.txt", "-e .[dev]"]
    named = _pins(pip)
    assert named.keys() == NAMED and "# image-reward" in text
    assert all(str(named[name].specifier) == str(PINS[name].specifier) for name in named)


def test_the_oldest_environment_is_as_old_as_allowed():
    oldest = _pins((ROOT / "tests" / "oldest.txt").read_text().splitlines())
    for requirement in DECLARED:
        for bound in requirement.specifier:
            if bound.operator == ">=":
                pin = str(oldest[requirement.name].specifier)
                assert re.fullmatch(rf"=={re.escape(bound.version)}(\.0)*", pin), requirement


def test_torch_and_torchvision_are_a_matching_pair():
    import torch
    import torchvision

    assert torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5).tolist() == [0]


def test_the_named_stack_imports_together():
    import accelerate
    import diffusers
    import ipywidgets
    import jupyterlab
    import open_clip
    import papermill
    import peft
    import seaborn
    import transformers

    modules = (accelerate, diffusers, ipywidgets, jupyterlab, open_clip, papermill, peft, seaborn, transformers)
    assert all(module.__name__ for module in modules)
    assert hasattr(diffusers.FluxPipeline, "from_pretrained")
