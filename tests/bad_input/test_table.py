"""How many cases there are, and what the documentation says about them."""

from __future__ import annotations

from tests.bad_input import table


def test_the_drill_does_not_shrink():
    cases = table.all_cases()
    assert len(cases) >= 850
    refused = {(case.kind, case.what) for case in cases if not case.skip}
    assert len(refused) >= 700
    assert len({(case.kind, case.what) for case in cases}) == len(cases)  # none is counted twice


def test_the_documentation_has_this_table():
    page = table.PAGE.read_text("utf-8")
    assert page == table.page_with(page), "run `python -m tests.bad_input.table`"


def test_every_refusal_is_held_to_its_words():
    assert [case.id for case in table.all_cases() if not case.skip and not case.names] == []
