"""Adapters of attention layers that leave the base weights alone, to the bit."""

from __future__ import annotations

import functools
from typing import Any

import torch

__all__ = ["keep_base_exact"]


def keep_base_exact(module: torch.nn.Module) -> None:
    """Make peft's adapters of ``torch.nn.MultiheadAttention`` (open_clip's attention) exact, in place.

    peft adds such an adapter to the base weights at every forward and takes it off again. The sums round, so the base
    would drift with every picture: a killed run would not end with the same weights, and the base reward in bfloat16
    would be off by a thousandth. peft 0.21 also adds the adapter of the output projection twice.
    """
    from peft.tuners.lora.layer import MultiheadAttention

    for part in module.modules():
        if type(part) is MultiheadAttention:
            part.__class__ = _exact_class()


@functools.cache
def _exact_class() -> type:
    from peft.tuners.lora.layer import MultiheadAttention

    class ExactAttention(MultiheadAttention):
        _kept: Any = None

        def merge(self, *args: Any, **kwargs: Any) -> None:
            base: Any = self.get_base_layer()
            projection = base.out_proj.get_base_layer()
            if not self.merged:
                self._kept = (base.in_proj_weight.data, projection.weight.data)
            super().merge(*args, **kwargs)
            if self.merged:
                weight = self._kept[1]
                for name in self.merged_adapters:
                    weight = weight + base.out_proj.get_delta_weight(name).to(weight.dtype)
                del projection.weight
                projection.weight = weight  # no parameter: gradients go to the adapter

        def unmerge(self) -> None:
            super().unmerge()
            if self._kept is not None:
                base: Any = self.get_base_layer()
                base.in_proj_weight.data, base.out_proj.get_base_layer().weight.data = self._kept
                self._kept = None

    return ExactAttention
