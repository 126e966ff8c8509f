"""The command line: ``ttsnap ...`` or ``python -m ttsnap_lib ...``.

Exit status: 0 done, 1 an error of ours with one line on standard error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import warnings

from ttsnap_lib import __version__
from ttsnap_lib.commands import COMMANDS, EXAMPLES, GROUPS
from ttsnap_lib.commands.options import Defaults
from ttsnap_lib.errors import TTSnapError, missing_extra
from ttsnap_lib.files import disk_error
from ttsnap_lib.style import close_bars

_ABOUT = "Test-time scaling of text-to-image diffusion models: Best-of-N, TTSp and TTSnap, simulated on recorded rewards and live."
_MORE = "`ttsnap COMMAND --help` shows a command's options. `python -m ttsnap_lib` is the same as `ttsnap`."


def parser(command: str = "") -> argparse.ArgumentParser:
    """Return the parser of the whole command line, or of one command, whose module alone is loaded then."""
    whole = argparse.ArgumentParser(
        prog="ttsnap", usage="ttsnap COMMAND ...", description=_ABOUT, formatter_class=Defaults, allow_abbrev=False
    )
    whole.add_argument("--version", action="version", version=f"ttsnap {__version__}")
    whole.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
    subparsers = whole.add_subparsers(dest="command", metavar="COMMAND", prog="ttsnap", help=argparse.SUPPRESS)
    for module in [module for module, names in COMMANDS.items() if command in names] or COMMANDS:
        importlib.import_module(f"ttsnap_lib.commands.{module}").add(subparsers)
    for name, one in subparsers.choices.items():
        one.formatter_class = Defaults
        one.epilog = "\n\n".join(filter(None, (one.epilog, f"example:\n  {EXAMPLES[name]}")))
    told = {choice.dest: choice.help for choice in subparsers._choices_actions}
    groups = [
        [title, *(f"  {name:<20} {told[name]}" for name in names if name in told)] for title, names in GROUPS.items()
    ]
    whole.epilog = "\n\n".join([*map("\n".join, groups), _MORE])
    return whole


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    known = parser(next((word for word in words if not word.startswith("-")), ""))
    given = known.parse_args(words)
    if given.command is None:
        known.print_help()
        return 0
    try:
        return given.func(given) or 0
    except KeyboardInterrupt:
        close_bars()
        print("ttsnap: interrupted; what was finished is kept, the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ttsnap ... | head`: nothing is wrong, and Python's own flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # A disk that fills up or refuses may be met by a library, far from where we write.
        ours: Exception | None = error if isinstance(error, TTSnapError) else missing_extra(error)
        ours = ours or disk_error(error, _file_of(error), "open or write")
        close_bars()
        if ours is None or given.traceback:
            raise
        print(f"ttsnap: {ours}", file=sys.stderr)
        return 1


def _file_of(error: BaseException) -> str:
    """Return the file that an error of the system, or the one it came from, names."""
    link: BaseException | None = error
    while link is not None:
        name = getattr(link, "filename", None)
        if name:
            return str(name)
        link = link.__cause__ or link.__context__
    return "a file"


def run() -> int:
    """Run the command of ``sys.argv`` as the whole of this process."""
    # A user reads a warning of ours as a sentence, not as a place in our source.
    warnings.formatwarning = lambda message, *place, **more: f"ttsnap: {message}\n"
    try:
        return main()
    except KeyboardInterrupt:  # while the message was being printed, or before the command began
        return 130
    finally:
        # What is left is Python's own end: an impatient second Ctrl-C there would print a traceback and change nothing.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(run())
