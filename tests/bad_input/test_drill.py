"""The drill itself can fail: each of its holds lets a bad case through to an assertion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.bad_input import drill
from tests.bad_input.drill import Case, check
from ttsnap_lib.errors import ConfigError


def refuse(folder: Path | None = None) -> None:
    raise ConfigError("x", value=1, bound="2", remedy="Give 2.")


def escape(folder: Path) -> None:
    (folder.parent / "outside" / "owned").write_text("x")
    refuse()


def fill(folder: Path) -> None:
    np.ones(20 * 2**20)  # 160 MB
    refuse()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case("k", "taken", lambda folder: None), "DID NOT RAISE"),
        (Case("k", "names something else", refuse, "another"), "not in"),
        (Case("k", "not handled", lambda folder: False, skip="handled"), "not handled"),
        (Case("k", "written outside", escape), "owned"),
        (Case("k", "fills the memory", fill), "MB more"),
        (Case("k", "fills the memory again", fill), "MB more"),
    ],
    ids=lambda given: getattr(given, "what", ""),
)
def test_a_case_that_breaks_a_promise_fails(case, says, tmp_path, monkeypatch):
    monkeypatch.setattr(drill, "GROWTH_MB", 100)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=says):
        check(case, tmp_path)


def test_a_case_that_never_ends_is_stopped():
    with pytest.raises(drill.TooSlowError, match="computed too long"), drill.time_limit(cpu_s=0.05):
        while True:
            pass


def test_a_refusal_with_value_bound_and_remedy_passes(tmp_path):
    check(Case("k", "refused", refuse, "Give 2"), tmp_path)
