"""The table of bad input in the documentation: ``python -m tests.bad_input.table`` writes it, a test compares it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.bad_input import (
    cases_checkpoints,
    cases_commands,
    cases_files,
    cases_models,
    cases_notebooks,
    cases_pictures,
    cases_pipelines,
    cases_tensors,
    cases_values,
)
from tests.bad_input.drill import Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bad-input.md"
MODULES = (
    cases_values,
    cases_files,
    cases_pictures,
    cases_tensors,
    cases_notebooks,
    cases_models,
    cases_checkpoints,
    cases_pipelines,
    cases_commands,
)
BEGIN, END = "<!-- table: python -m tests.bad_input.table -->", "<!-- end of the table -->"


def all_cases() -> list[Case]:
    """Return every case of the drill."""
    return [case for module in MODULES for case in module.CASES]


def table() -> str:
    """Return the table: a row for each kind, and a row for each documented handling that is no error."""
    cases = all_cases()
    lines = ["| kind of input | cases | what happens |", "| --- | ---: | --- |"]
    for kind in dict.fromkeys(case.kind for case in cases):
        own = [case for case in cases if case.kind == kind]
        handled = Counter(case.skip for case in own if case.skip)
        refused = len(own) - sum(handled.values())
        if refused:
            lines.append(f"| {kind} | {refused} | refused |")
        lines += [f"| {kind} | {count} | {what} |" for what, count in handled.items()]
    lines.append(f"| **all** | **{len(cases)}** | |")
    return "\n".join(lines)


def page_with(text: str) -> str:
    """Return the page with a fresh table in it."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text("utf-8")), "utf-8")
    print(PAGE)
