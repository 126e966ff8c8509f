"""The drill itself can fail: each of its holds lets a bad case through to an assertion."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input import drill
from tests.bad_input.drill import Case, check
from ttsnap_lib.errors import ConfigError


def refuse(folder: Path | None = None, text: str = "x: got 1, expected 2. Give 2.") -> None:
    raise ConfigError(text)


def escape(folder: Path) -> None:
    (folder.parent / "outside" / "owned").write_text("x")
    refuse()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case("taken", lambda folder: None, ""), "DID NOT RAISE"),
        (Case("names something else", refuse, "another"), "not in"),
        (Case("no remedy", lambda folder: refuse(text="x: got 1"), "x"), "no remedy"),
        (Case("written outside", escape, ""), "owned"),
    ],
    ids=lambda given: getattr(given, "what", ""),
)
def test_a_case_that_breaks_a_promise_fails(case, says, tmp_path):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=says):
        check(case, tmp_path)


def test_a_case_that_never_ends_is_stopped():
    with pytest.raises(drill.TooSlowError, match="computed too long"), drill.time_limit(cpu_s=0.05):
        while True:
            pass


def test_a_refusal_with_value_bound_and_remedy_passes(tmp_path):
    check(Case("refused", refuse, "Give 2"), tmp_path)
