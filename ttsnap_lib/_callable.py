"""Makes a module callable, for the two names that the public interface gives to a module and to its function."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType

__all__ = ["make_callable"]


def make_callable(module_name: str, function: Callable) -> None:
    """Let ``module(...)`` call `function`.

    ``ttsnap_lib.simulate`` is a module as soon as anything imports it, and also the function of that name:
    without this, what ``from ttsnap_lib import simulate`` gives would hang on what was imported before.
    """

    class CallableModule(ModuleType):
        __signature__ = inspect.signature(function)

        @functools.wraps(function)
        def __call__(self, *args, **kwargs):
            return function(*args, **kwargs)

    sys.modules[module_name].__class__ = CallableModule
