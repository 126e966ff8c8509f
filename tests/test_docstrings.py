"""Public names are documented: a docstring each, with the sections of numpydoc that apply."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import pkgutil
import textwrap
from collections.abc import Callable

import griffe
import pytest

import ttsnap_lib

logging.getLogger("griffe").setLevel(logging.ERROR)  # it wants a type behind every parameter

# The interface that notebooks and users write against: here parameters have a section too.
INTERFACE = ("ttsnap_lib", "ttsnap_lib.rewards", "ttsnap_lib.finetuning", "ttsnap_lib.pocket")
PROMISED = ["CostModel", "Schedule", "best_of_n", "import_published", "open_rewards", "optimize_schedule", "prune",
            "relative_gain", "save_rewards", "search", "simulate", "sweep"]  # fmt: skip
_NOTHING = ("None", "Iterator[None]", inspect.Signature.empty)
_LEFT_OUT = ("ttsnap_lib.commands", "ttsnap_lib.pocket.")  # the command line; the training of the pocket models


def public_modules() -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(ttsnap_lib.__path__, "ttsnap_lib.")]
    private = [name for name in found if any(part.startswith("_") for part in name.split("."))]
    return ["ttsnap_lib", *(name for name in found if name not in private and not name.startswith(_LEFT_OUT))]


def documented(module: str) -> list[tuple[str, type | Callable]]:
    """Return the functions and classes of ``__all__``; those that another public module defines belong there."""
    package = importlib.import_module(module)
    found = []
    for name in getattr(package, "__all__", []):
        value = getattr(package, name)
        value = getattr(value, name) if inspect.ismodule(value) else value  # simulate and search name a module too
        home = getattr(value, "__module__", module)
        own = home == module or "._" in home or module in INTERFACE
        if own and (inspect.isfunction(value) or inspect.isclass(value)):
            found.append((name, value))
    return found


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


def faults(value: type | Callable, *, interface: bool) -> list[str]:
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
    elif interface and len(parameters) > 2 and "attributes" not in found:
        faults.append("has no section Parameters")
    if inspect.isfunction(value):
        told = found.keys() & {"returns", "yields"} or inspect.cleandoc(text).startswith(("Return ", "Yield "))
        if not told and inspect.signature(value).return_annotation not in _NOTHING:
            faults.append("says nowhere what it returns")
        if raised(value) and "raises" not in found:
            faults.append(f"has no section Raises for {sorted(raised(value))}")
    return faults


@pytest.mark.parametrize("module", public_modules())
def test_public_names_are_documented(module):
    assert importlib.import_module(module).__doc__
    wrong = {
        name: found
        for name, value in documented(module)
        if not _is_exception(value) and (found := faults(value, interface=module in INTERFACE))
    }
    assert not wrong, wrong


def _is_exception(value: type | Callable) -> bool:
    return inspect.isclass(value) and issubclass(value, BaseException) and bool(value.__doc__)


def test_promised_interface_can_be_imported():
    assert set(PROMISED) <= set(ttsnap_lib.__all__) <= set(dir(ttsnap_lib))
    assert all(callable(getattr(ttsnap_lib, name)) for name in PROMISED)


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
    assert faults(function, interface=True) == says
