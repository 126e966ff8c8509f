"""Test-time scaling of text-to-image diffusion models: noise-aware pruning, simulated and live.

Names load on first use, so ``import ttsnap_lib`` costs next to nothing and the simulation never loads torch.
"""

from __future__ import annotations

from ._lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _NAMES)
