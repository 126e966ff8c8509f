"""Errors cross process borders whole."""

import inspect
import pickle
from pathlib import Path

import pytest

from ttsnap_lib import errors

CLASSES = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, errors.TTSnapError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_comes_back_from_a_pickle_as_it_was(kind):
    error = kind("steps", value=[3, 2], bound="ascending", remedy="Sort them.")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind and str(back) == str(error) and vars(back) == vars(error)
    assert all(part in str(back) for part in ("steps", "[3, 2]", "ascending", "Sort them."))


def test_what_a_run_error_was_told_comes_along():
    error = errors.RunError("simulate failed", value="KeyError: 'x'", remedy="See the notebook.")
    error.cell, error.last_line, error.folder = "cell 3", "KeyError: 'x'", Path("runs")
    back = pickle.loads(pickle.dumps(error))
    assert (back.cell, back.last_line, back.folder) == ("cell 3", "KeyError: 'x'", Path("runs"))
    assert errors.RunError("lost", remedy="Run again.").folder is None
