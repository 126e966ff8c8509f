"""The public face is documented in full: a docstring each, with the sections of numpydoc that apply."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import textwrap
from collections.abc import Callable

import griffe
import pytest

import ttsnap_lib
from tests.test_rooms import MODULES

logging.getLogger("griffe").setLevel(logging.ERROR)  # it wants a type behind every parameter

_NOTHING = ("None", "Iterator[None]", inspect.Signature.empty)


def sections(text: str) -> dict[str, list[str]]:
    """Return section -> names in it, of a docstring."""
    found: dict[str, list[str]] = {}
    for section in griffe.Docstring(inspect.cleandoc(text), parser="numpy").parse():
        items = section.value if isinstance(section.value, list) else []
        names = [part.strip().lstrip("*") for item in items for part in (getattr(item, "name", None) or "").split(",")]
        found[section.kind.value] = names
    return found


def raised(function: Callable) -> set[str]:
    """Return the errors that the body raises by name; those handed in as a parameter do not count."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc.func for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {ast.unparse(call) for call in calls} - set(inspect.signature(function).parameters)


def faults(value: type | Callable) -> list[str]:
    """Return what the docstring of a public function or class lacks."""
    text = value.__doc__
    if not text:
        return ["has no docstring"]
    found, faults = sections(text), []
    parameters = inspect.signature(value).parameters
    if "parameters" in found:
        given = set(found["parameters"])
        catch_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        if missing := [name for name in parameters if name not in given]:
            faults.append(f"leaves out of Parameters: {missing}")
        if not catch_all and (foreign := given - set(parameters)):
            faults.append(f"names parameters that are none: {sorted(foreign)}")
    elif len(parameters) > 2 and "attributes" not in found:
        faults.append("has no section Parameters")
    if inspect.isfunction(value):
        told = found.keys() & {"returns", "yields"} or inspect.cleandoc(text).startswith(("Return ", "Yield "))
        if not told and inspect.signature(value).return_annotation not in _NOTHING:
            faults.append("says nowhere what it returns")
        if raised(value) and "raises" not in found:
            faults.append(f"has no section Raises for {sorted(raised(value))}")
    return faults


@pytest.mark.parametrize("name", [name for name in ttsnap_lib.__all__ if name != "PUBLISHED_SCHEDULE"])
def test_the_public_face_is_documented_in_full(name):
    assert not faults(getattr(ttsnap_lib, name))


@pytest.mark.parametrize("module", list(MODULES))
def test_every_file_says_what_is_in_it(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text("utf-8")))


def test_the_public_face_can_be_imported():
    assert set(ttsnap_lib.__all__) <= set(dir(ttsnap_lib))
    assert all(hasattr(importlib.import_module("ttsnap_lib"), name) for name in ttsnap_lib.__all__)


def bad_parameters(a, b, c):
    """Return a sum.

    Parameters
    ----------
    a, d : int
    """


def bad_raise(a):
    """Check `a`."""
    raise ValueError(a)


def silent(a) -> int:
    """Do something."""
    return a


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (bad_parameters, ["leaves out of Parameters: ['b', 'c']", "names parameters that are none: ['d']"]),
        (bad_raise, ["has no section Raises for ['ValueError']"]),
        (silent, ["says nowhere what it returns"]),
        (lambda a: a, ["has no docstring"]),
    ],
)
def test_a_lack_is_found(function, says):
    assert faults(function) == says
