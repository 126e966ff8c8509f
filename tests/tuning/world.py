"""A synthetic reward tensor where the right schedule is known, and what its candidates cost."""

from __future__ import annotations

import numpy as np

from ttsnap_lib import CostModel
from ttsnap_lib.tensors.tensor import make_rewards

COST = CostModel(step=1.0, verify=0.1, decode=0.1, n_steps=8)
BUDGETS = np.arange(2, 7) * COST.total(1)


def world(prompts=40, pool=32, steps=8, rewards=1, seed=0, noise=None):
    """Return a tensor whose checks tell the final reward with noise that shrinks with the step."""
    rng = np.random.default_rng(seed)
    noise = np.linspace(1.2, 0, steps) if noise is None else noise
    final = rng.normal(size=(rewards, prompts, pool, 1))
    aware = final + rng.normal(size=(rewards, prompts, pool, steps)) * noise
    base = final + 2 * rng.normal(size=(rewards, prompts, pool, steps)) * noise
    base[..., -1] = aware[..., -1] = final[..., 0]
    return make_rewards(base, aware, rewards=[f"r{k}" for k in range(rewards)])
