"""The command line: ``ttsnap ...`` or ``python -m ttsnap_lib ...``.

Exit status: 0 done, 1 an error of ours with one line on standard error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys

from . import __version__, commands
from .errors import TTSnapError
from .progress import close_bars

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    whole = argparse.ArgumentParser(prog="ttsnap", description=__doc__.splitlines()[0], allow_abbrev=False)
    whole.add_argument("--version", action="version", version=f"ttsnap {__version__}")
    whole.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
    subparsers = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in sorted(info.name for info in pkgutil.iter_modules(commands.__path__)):
        importlib.import_module(f"{commands.__name__}.{module}").add(subparsers)
    return whole


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given = parser().parse_args(arguments)
    try:
        return given.func(given) or 0
    except TTSnapError as error:
        close_bars()
        if given.traceback:
            raise
        print(f"ttsnap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        close_bars()
        print("ttsnap: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ttsnap ... | head`: nothing is wrong, and Python's own flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
