"""``python -m tests.benchmarks [name ...]``: run the benchmarks and print one table; exit 1 when a promise is missed.

``--tiny`` is for ``device``: its models tiny on an accelerator, too.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import tests.benchmarks as package
from tests.benchmarks.rows import show


def main() -> int:
    """Run all benchmarks, or those named on the command line."""
    found = sorted(info.name for info in pkgutil.iter_modules(package.__path__) if info.name.startswith("bench_"))
    wanted = [given for given in sys.argv[1:] if given != "--tiny"] or [name.removeprefix("bench_") for name in found]
    missed = 0
    for name in wanted:
        print(f"\n{name}", flush=True)
        missed += show(importlib.import_module(f"tests.benchmarks.bench_{name}").run())
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
