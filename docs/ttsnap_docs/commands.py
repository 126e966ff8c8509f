"""The command line reference, from the argparse parsers."""

from __future__ import annotations

import argparse

from ttsnap_lib.__main__ import parser
from ttsnap_lib.commands import EXAMPLES, GROUPS

__all__ = ["page", "subparsers"]


def subparsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command by name."""
    action = next(one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    return dict(action.choices)


def page() -> str:
    """Return the page's Markdown."""
    action = next(one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
    lines = [
        "# Command line\n",
        "`ttsnap COMMAND ...`, or `python -m ttsnap_lib COMMAND ...`. Exit status: 0 done, 1 an error with one line on",
        "standard error (`ttsnap --traceback COMMAND ...` shows where it came from), 2 wrong usage, 130 interrupted.\n",
        "| to | command | what it does |",
        "| --- | --- | --- |",
    ]
    shown = [(title, name) for title, names in GROUPS.items() for name in names if name in action.choices]
    for title, name in shown:
        first = title if (title, name) == next(one for one in shown if one[0] == title) else ""
        lines.append(f"| {first} | [`{name}`](#{name}) | {_cell(helps.get(name, ''))} |")
    lines.append("")
    for _, name in shown:
        lines += _command(name, action.choices[name])
    return "\n".join(lines) + "\n"


def _command(name: str, sub: argparse.ArgumentParser) -> list[str]:
    positional = " ".join(_metavar(one) for one in sub._actions if not one.option_strings)
    required = " ".join(
        f"{one.option_strings[-1]} {_metavar(one)}" for one in sub._actions if one.option_strings and one.required
    )
    usage = " ".join(part for part in ("ttsnap", name, positional, required, "[options]") if part)
    lines = [f"## {name} {{ #{name} }}\n", f"    {usage}\n"]
    if sub.description:
        lines += [f"{' '.join(sub.description.split())}\n"]
    lines += ["| argument | what it is | default |", "| --- | --- | --- |"]
    for one in sub._actions:
        if one.help == argparse.SUPPRESS or isinstance(one, argparse._HelpAction):
            continue
        names = ", ".join(f"`{option}`" for option in one.option_strings) or f"`{_metavar(one)}`"
        value = f" `{_metavar(one)}`" if one.option_strings and one.nargs != 0 else ""
        lines.append(f"| {names}{value} | {_cell(_help(one, sub))} | {_default(one)} |")
    more = (sub.epilog or "").partition("example:\n")[0].split()
    return [*lines, "", *([" ".join(more), ""] if more else []), f"    {EXAMPLES[name]}", ""]


def _metavar(one: argparse.Action) -> str:
    if one.choices:
        return "{" + ",".join(map(str, one.choices)) + "}"
    shown = one.metavar or (one.dest.upper() if one.option_strings else one.dest)
    return " ".join(shown) if isinstance(shown, tuple) else str(shown)


def _help(one: argparse.Action, sub: argparse.ArgumentParser) -> str:
    text = (one.help or "") % {**vars(one), "prog": sub.prog} if "%" in (one.help or "") else one.help or ""
    many = " (may stand several times)" if isinstance(one, argparse._AppendAction) and "several" not in text else ""
    return text + many


def _default(one: argparse.Action) -> str:
    if one.default in (None, False, argparse.SUPPRESS, []) or one.required:
        return "required" if one.required and one.option_strings else ""
    return f"`{one.default}`"


def _cell(text: str) -> str:
    """Return text for a table: on one line, and nothing in it taken for Markdown or HTML."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text.replace("[", "\\[").replace("*", "\\*").replace("_", "\\_") if "`" not in text else text
