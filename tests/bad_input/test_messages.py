"""Every error that the library raises carries value, bound and remedy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ttsnap_lib
from tests.bad_input.drill import check_message
from ttsnap_lib import errors

LIBRARY = Path(ttsnap_lib.__file__).parent
KINDS = set(errors.__all__)
GIVEN = "error"  # the class that a check is told to raise


def raised(path: Path) -> Iterator[tuple[int, set[str]]]:
    """Yield line and keywords of each error that a module makes."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else None
        attribute = node.func.attr if isinstance(node.func, ast.Attribute) else None
        if name in KINDS or attribute in KINDS or name == GIVEN:
            yield node.lineno, {keyword.arg or "**" for keyword in node.keywords}


def test_every_error_has_value_bound_and_remedy():
    found = [(path, line, keywords) for path in sorted(LIBRARY.rglob("*.py")) for line, keywords in raised(path)]
    assert len(found) > 350  # the walk finds them
    poor = [
        f"{path.relative_to(LIBRARY)}:{line}" for path, line, keys in found if not {"value", "bound", "remedy"} <= keys
    ]
    assert not poor


LONG = {
    "digits": 10**5000,
    "nested": [[[["x" * 1000] * 100] * 100] * 100],
    "mapping": {"a" * 10_000: "b" * 10_000},
}


@pytest.mark.parametrize("value", LONG.values(), ids=LONG)
def test_a_message_stays_short_whatever_the_value(value):
    check_message(errors.ConfigError("value", value=value, bound="less", remedy="Give less."))


def test_an_error_survives_the_way_to_another_process():
    import pickle

    error = pickle.loads(pickle.dumps(errors.BudgetError("b", value=3, bound="at most 2", remedy="Lower it.")))
    assert (error.value, error.bound, error.remedy) == (3, "at most 2", "Lower it.")
    check_message(error)
