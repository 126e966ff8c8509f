"""Any Python function as a reward."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ttsnap_lib.checks import choice
from ttsnap_lib.errors import RewardError

from .base import Reward
from .inputs import check_tensor, open_image

__all__ = ["CallableReward", "import_function"]


class CallableReward(Reward):
    """``function(prompts, images) -> n numbers`` as a reward.

    Parameters
    ----------
    function : callable
        Takes a list of prompts and as many images; returns numbers, an array or a tensor of shape (n,).
    name : str, optional
        The function's name when not given.
    takes : {"pil", "tensor"}
        Whether the function gets RGB PIL images or a float tensor (n, 3, H, W) in [0, 1] on `device`. With ``"pil"``
        tensors are rounded to 256 levels, as a PNG is.
    device, batch_size
        As :class:`Reward` takes them.
    """

    def __init__(
        self,
        function: Callable[[list[str], Any], Any],
        name: str | None = None,
        *,
        takes: str = "pil",
        device: torch.device | str | None = None,
        batch_size: int = 32,
    ) -> None:
        if not callable(function):
            raise RewardError("reward function", value=function, bound="a callable", remedy="Pass a function.")
        super().__init__(
            str(name or getattr(function, "__name__", type(function).__name__)),
            device=device or "cpu",
            batch_size=batch_size,
        )
        self.function = function
        self.takes = choice("takes", takes, ("pil", "tensor"), error=RewardError)

    def _score_batch(self, prompts: list[str], images: Any, *, ready: bool = False) -> np.ndarray:
        given = self._as_tensor(images) if self.takes == "tensor" else self._as_pil(images)
        scores = self.function(prompts, given)
        if isinstance(scores, torch.Tensor):
            scores = scores.detach().float().cpu().numpy()
        try:
            scores = np.asarray(scores, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward {self.name} gave something that is not numbers",
                value=scores,
                bound=f"{len(prompts)} numbers",
                remedy="Return one number per image.",
            ) from error
        if scores.shape != (len(prompts),):
            raise RewardError(
                f"reward {self.name} gave scores of the wrong shape",
                value=scores.shape,
                bound=f"({len(prompts)},)",
                remedy="Return one number per image.",
            )
        return scores

    def _as_pil(self, images: Any) -> list[Image.Image]:
        if isinstance(images, torch.Tensor):
            levels = (check_tensor(images).float().clamp(0, 1) * 255).round().to(torch.uint8)
            return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]
        return [open_image(image).convert("RGB") for image in images]

    def _as_tensor(self, images: Any) -> torch.Tensor:
        if isinstance(images, torch.Tensor):
            return check_tensor(images).to(self.device)
        arrays = [np.array(open_image(image).convert("RGB")) for image in images]
        if len({array.shape for array in arrays}) > 1:
            raise RewardError(
                "images differ in size",
                value=sorted({array.shape[:2] for array in arrays}),
                bound="one size in a batch",
                remedy='Use takes="pil" or batch_size=1.',
            )
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(self.device, torch.float32) / 255


def import_function(source: str) -> Callable[[Sequence[str], Any], Any]:
    """Return the function that ``"package.module:function"`` names.

    Raises
    ------
    RewardError
        No such module or function, or something that cannot be called.
    """
    module, _, attribute = source.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise RewardError(
            f"reward function cannot be imported ({error})",
            value=source,
            bound='"package.module:function"',
            remedy="Check the name; the module has to be importable from here.",
        ) from error
    return found
