"""Test-time scaling of text-to-image diffusion models: noise-aware pruning, simulated and live.

Names load on first use, so ``import ttsnap_lib`` costs next to nothing and the simulation never loads torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Where each public name is defined. What is not among them is imported from its room.
_HOME = {
    "Schedule": "schedule",
    "PUBLISHED_SCHEDULE": "schedule",
    "CostModel": "costs",
    "open_rewards": "tensors.tensor",
    "save_rewards": "tensors.tensor",
    "import_published": "tensors.published",
    "best_of_n": "simulation.pruning",
    "prune": "simulation.pruning",
    "simulate": "simulation.simulate",
    "sweep": "simulation.simulate",
    "relative_gain": "simulation.metrics",
    "optimize_schedule": "tuning.optimize",
    "load_pipeline": "diffusion.pipelines",
    "load_reward": "rewards.loading",
    "generate": "trajectories.generate",
    "score": "scoring.score",
    "finetune": "finetuning.train",
    "search": "live.run",
    "measure_costs": "live.measure",
    "explore": "explorer.explorer",
    "current_run": "runs.run",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    except ModuleNotFoundError as error:
        from ttsnap_lib.errors import missing_extra

        ours = missing_extra(error)
        if ours is None:
            raise
        raise ours from error
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
