"""Noise-aware finetuning: a clean-image reward learns, step by step, to judge noisy estimates as it judges images.

The base reward of a trajectory's clean image is the target; training starts where the estimates are nearly clean and
moves to earlier steps, each from the weights of the one before (arXiv 2511.22242, section 3).

>>> result = finetune("data_cache/trajectories", "data_cache/run", load_config("pocket-flux"))
>>> reward = load_reward("pocket-clip", adapters="data_cache/run").use_step(6)
"""

from __future__ import annotations

from ttsnap_lib._lazy import lazy_names

_NAMES = {
    "CurriculumConfig": "config",
    "CurriculumResult": "train",
    "ImageBank": "images",
    "Images": "images",
    "LiveCurves": "figures",
    "compare_at_steps": "report",
    "finetune": "train",
    "gain_by_step": "figures",
    "gain_where_useful": "report",
    "gather": "inputs",
    "ground_truth_targets": "targets",
    "import_series": "exchange",
    "load_config": "config_files",
    "load_series": "exchange",
    "loss_curves": "figures",
    "losses_table": "figures",
    "metrics_table": "report",
    "open_images": "images",
    "own_targets": "targets",
    "push_series": "exchange",
    "shipped_configs": "config_files",
    "tau_by_step": "figures",
    "validate": "validation",
}

__all__ = list(_NAMES)

__getattr__, __dir__ = lazy_names(__name__, _NAMES)
