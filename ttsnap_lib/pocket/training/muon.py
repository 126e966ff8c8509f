"""Muon for the inner matrices of the pocket transformers, AdamW for the rest.

Each matrix moves along its momentum made orthogonal by Newton-Schulz iterations (Jordan et al., 2024), scaled to the
root mean square of an AdamW step (Liu et al., arXiv 2502.16982). In float32: torch's own Muon works in bfloat16,
which is slow on processors without it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: torch.Tensor, rounds: int = 4) -> torch.Tensor:
    """Return (n, rows, columns) matrices with singular values pushed to about one."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(rounds):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """AdamW whose groups marked ``orthogonal`` take Muon's step instead, with a momentum of 0.95 and Nesterov's look-ahead."""

    def __init__(self, groups: Iterable[dict], lr: float, betas=(0.9, 0.99), weight_decay: float = 0.01) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """Take one step."""
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            (self._orthogonal if group["orthogonal"] else self._adam)(given, group)

    def _adam(self, given: list, group: dict) -> None:
        for p in given:
            state = self.state[p]
            if not state:
                state.update(step=0, first=torch.zeros_like(p), second=torch.zeros_like(p))
            state["step"] += 1
        first, second = ([self.state[p][key] for p in given] for key in ("first", "second"))
        grads, (b1, b2) = [p.grad for p in given], group["betas"]
        torch._foreach_lerp_(first, grads, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, grads, grads, 1 - b2)
        count = self.state[given[0]]["step"] if given else 1
        root = torch._foreach_sqrt(second)
        torch._foreach_div_(root, (1 - b2**count) ** 0.5)
        torch._foreach_add_(root, 1e-8)
        torch._foreach_mul_(given, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(given, first, root, -group["lr"] / (1 - b1**count))

    def _orthogonal(self, given: list, group: dict) -> None:
        by_shape: dict[tuple, list] = {}
        for p in given:
            by_shape.setdefault(tuple(p.shape), []).append(p)
        for shape, same in by_shape.items():
            for p in same:
                self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum, grads = [self.state[p]["momentum"] for p in same], [p.grad for p in same]
            torch._foreach_lerp_(momentum, grads, 0.05)
            step = orthogonal(torch.stack(torch._foreach_lerp(momentum, grads, 0.05)))
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, list(step.unbind()), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
