"""Test-time scaling of text-to-image diffusion models: noise-aware pruning, simulated and live.

Names load on first use, so ``import ttsnap_lib`` costs next to nothing and the simulation never loads torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> module it is defined in
_NAMES = {
    "Schedule": "schedule",
    "PUBLISHED_SCHEDULE": "schedule",
    "CostModel": "costs",
    "import_published": "published",
    "open_rewards": "tensors",
    "save_rewards": "tensors",
    "best_of_n": "simulate",
    "prune": "simulate",
    "simulate": "simulate",
    "sweep": "simulate",
    "relative_gain": "metrics",
    "optimize_schedule": "optimize",
    "search": "search",
    "TTSnapError": "errors",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_NAMES[name]}", __name__)
    # `simulate` and `search` name a module and its function: the module is callable and stands for both.
    value = module if name == _NAMES[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_NAMES))
