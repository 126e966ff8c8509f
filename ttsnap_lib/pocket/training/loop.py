"""The training loop of every pocket stage: seeded, resumable, with a moving average of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ttsnap_lib.errors import CheckpointError
from ttsnap_lib.files import atomic_write, write_json

_WARMUP, _FLOOR = 100, 0.02  # steps, and the last learning rate as a fraction of the peak
_WEIGHT_DECAY, _CLIP = 0.01, 1.0


@dataclass(frozen=True)
class Fit:
    """How a stage is trained."""

    steps: int
    batch: int
    lr: float  # peak of AdamW
    ema: float = 0.999  # decay of the moving average of the weights, shorter at the start
    muon: bool = False  # Muon's step for the matrices inside transformer blocks

    def rate(self, step: int) -> float:
        """Return the learning rate of `step` as a fraction of the peak: a warm-up, then a cosine."""
        rise = min(1.0, (step + 1) / max(1, min(_WARMUP, self.steps // 4)))
        return rise * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


def fit(
    name: str,
    modules: Mapping[str, nn.Module],
    loss: Callable[[np.random.Generator, int], Mapping[str, torch.Tensor]],
    how: Fit,
    *,
    seed: int,
    scratch: Path,
    save_every_s: float = 30.0,
    log: Callable[[str], None] = print,
) -> list[dict[str, float]]:
    """Train `modules` in place; go on from the state ``<name>.pt`` when `scratch` holds one.

    Of what ``loss(rng, batch)`` returns the entry ``"loss"`` is minimized, the others are logged. Returns the log, as it
    stands in ``<name>.json``: mean losses over each interval, with ``step`` and ``elapsed_s`` (over all sittings).
    """
    weights = {
        f"{key}.{n}": p for key, module in modules.items() for n, p in module.named_parameters() if p.requires_grad
    }
    optimizers = _optimizers(weights, how)
    average = {key: p.detach().clone() for key, p in weights.items()}
    state_file = scratch / f"{name}.pt"
    first, before_s = 0, 0.0
    history: list[dict[str, float]] = []
    if state_file.exists():
        first, before_s, history = _load(state_file, weights, average, optimizers)
        log(f"{name}: going on from step {first}")
    started, saved, count = time.monotonic(), time.monotonic(), 0
    sums: dict[str, float] = {}
    every = max(1, how.steps // 60)
    for module in modules.values():
        module.train()
    for step in range(first, how.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = how.lr * how.rate(step)
        # What a step draws does not depend on when the run was interrupted.
        parts = loss(np.random.default_rng(np.random.SeedSequence([seed, step])), how.batch)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(weights.values(), _CLIP)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(how.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in weights.values()], 1 - decay)
        for key, value in parts.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        count += 1
        elapsed = before_s + time.monotonic() - started
        if (step + 1) % every == 0 or step + 1 == how.steps:
            history.append(
                {"step": step + 1, "elapsed_s": round(elapsed, 1), **{k: v / count for k, v in sums.items()}}
            )
            log(f"{name}: " + ", ".join(f"{key} {value:.5g}" for key, value in history[-1].items()))
            if not math.isfinite(history[-1]["loss"]):
                raise CheckpointError(
                    f"training of {name} diverged: got {history[-1]['loss']!r}, expected a finite loss. Lower fit.lr."
                )
            sums, count = {}, 0
        if time.monotonic() - saved > save_every_s or step + 1 == how.steps:
            _save(state_file, weights, average, optimizers, step + 1, elapsed, history)
            write_json(scratch / f"{name}.json", history)
            saved = time.monotonic()
    with torch.no_grad():
        for key, p in weights.items():
            p.copy_(average[key])
    for module in modules.values():
        module.eval()
    return history


def _optimizers(weights: Mapping[str, nn.Parameter], how: Fit) -> list[torch.optim.Optimizer]:
    """Return AdamW, and Muon (Jordan et al., 2024) at AdamW's step size (arXiv 2502.16982) for the inner matrices."""
    # Modulation, embeddings and the last layer are no inner matrices; AdamW suits them.
    inner = {
        key
        for key, p in weights.items()
        if how.muon and p.ndim == 2 and ("blocks." in key or "layers." in key) and "norm" not in key
    }
    rest = [p for key, p in weights.items() if key not in inner]
    adam = torch.optim.AdamW(rest, how.lr, betas=(0.9, 0.99), weight_decay=_WEIGHT_DECAY)
    if not inner:
        return [adam]
    matrices = [weights[key] for key in sorted(inner)]
    muon = torch.optim.Muon(matrices, how.lr, weight_decay=_WEIGHT_DECAY, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    return [adam, muon]


def _save(path: Path, weights, average, optimizers, step: int, elapsed: float, history: list) -> None:
    state = {
        "weights": {key: p.detach() for key, p in weights.items()},
        "average": average,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "elapsed_s": elapsed,
        "history": history,
    }
    with atomic_write(path) as file:
        torch.save(state, file)


def _load(path: Path, weights, average, optimizers) -> tuple[int, float, list]:
    state = torch.load(path, weights_only=True)
    shapes = {key: p.shape for key, p in weights.items()}
    if {key: p.shape for key, p in state["weights"].items()} != shapes:
        raise CheckpointError(
            f"training state of another architecture: got {path}. Delete that file to start the stage afresh."
        )
    with torch.no_grad():
        for key, p in weights.items():
            p.copy_(state["weights"][key])
            average[key].copy_(state["average"][key])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["elapsed_s"], state["history"]
