"""What the command line says of itself: groups, examples, old spellings."""

from __future__ import annotations

import shlex

import pytest

from ttsnap_lib.__main__ import main, parser
from ttsnap_lib.commands import EXAMPLES, GROUPS

COMMANDS = parser()._subparsers._group_actions[0].choices


def test_without_a_command_the_help_is_shown_in_groups(capsys):
    assert main([]) == 0
    alone = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out == alone
    places = [alone.index(f"\n{title}\n  ") for title in GROUPS]
    assert places == sorted(places)
    assert sorted(COMMANDS) == sorted(name for names in GROUPS.values() for name in names if name in COMMANDS)
    for name in COMMANDS:
        assert alone.count(f"\n  {name} ") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_an_example_that_the_parser_takes(name):
    assert COMMANDS[name].format_help().rstrip().endswith(f"\n\nexample:\n  {EXAMPLES[name]}")
    given = parser(name).parse_args(shlex.split(EXAMPLES[name])[1:])
    assert given.command == name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("score t --steps 1 2", "score t --at-steps 1 2"),
        ("import s.npy --out t --steps 1 2", "import s.npy --out t --at-steps 1 2"),
        ("import-published v --model m --rewards a b", "import-published v --model m --reward a --reward b"),
        ("report f --output r.html", "report f --out r.html"),
    ],
)
def test_old_spellings_are_taken_and_not_shown(old, new):
    assert parser().parse_args(old.split()) == parser().parse_args(new.split())
    command, option = old.split()[0], next(word for word in old.split() if word.startswith("--") and word not in new)
    assert f"{option} " not in COMMANDS[command].format_help()


def test_presets_are_listed_and_a_measurement_needs_a_file(capsys):
    assert main(["cost", "--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    line = next(line.split() for line in shown if line.startswith("flux-512-tiny+pickscore "))
    assert line == ["flux-512-tiny+pickscore", "21.5", "2.51", "0.14", "0.335", "432.8", "TFLOPs"]
    assert main(["cost"]) == 1 and "--list for the presets" in capsys.readouterr().err
