"""Errors: short whatever the value, and whole on the way to another process."""

import inspect
import pickle
from pathlib import Path

import pytest

from ttsnap_lib import errors
from ttsnap_lib.checks import integer

CLASSES = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, errors.TTSnapError)]
LONG = {
    "digits": 10**5000,
    "nested": [[[["x" * 1000] * 100] * 100] * 100],
    "mapping": {"a" * 10_000: "b" * 10_000},
}


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_comes_back_from_a_pickle_as_it_was(kind):
    error = kind("steps: got [3, 2], expected ascending. Sort them.")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind and str(back) == str(error) == "steps: got [3, 2], expected ascending. Sort them."


def test_what_a_run_error_was_told_comes_along():
    error = errors.RunError("simulate failed. See the notebook.")
    error.cell, error.last_line, error.folder = "cell 3", "KeyError: 'x'", Path("runs")
    back = pickle.loads(pickle.dumps(error))
    assert (back.cell, back.last_line, back.folder) == ("cell 3", "KeyError: 'x'", Path("runs"))
    assert errors.RunError("lost. Run again.").folder is None


@pytest.mark.parametrize("value", LONG.values(), ids=LONG)
def test_a_message_stays_short_whatever_the_value_and_keeps_its_remedy(value):
    with pytest.raises(errors.ConfigError, match="Set seed to an integer of at least 0") as caught:
        integer("seed", [value], 0)
    assert len(str(caught.value)) < 1000
    long = str(errors.ConfigError(f"got {'x' * 100_000}. Give less."))
    assert len(long) < 1300 and long.endswith("Give less.")
