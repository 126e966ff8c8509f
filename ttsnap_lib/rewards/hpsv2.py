"""HPSv2 and HPSv2.1: an open_clip ViT-H-14 with the checkpoints of `xswu/HPSv2`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ttsnap_lib.checks import choice, real
from ttsnap_lib.errors import RewardError

from .cosine import CosineReward
from .preprocess import HPS_PIXELS, Preprocessing
from .weights import fetch, load_strict, read_state

__all__ = ["HPS_FILES", "OpenClipReward", "load_hpsv2"]

HPS_FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
"""Checkpoint files of the repository `xswu/HPSv2`."""

_LORA_TARGETS = r"visual\.transformer\.resblocks\.\d+\.(attn|mlp\.(c_fc|c_proj))"
# Constant masks that some versions of open_clip kept in the state.
_MAY_HAVE = (r"(.*\.)?attn_mask",)


class OpenClipReward(CosineReward):
    """Cosine similarity of an open_clip model's embeddings, times `scale`.

    HPSv2 is the plain cosine, without the logit scale (about 0.2 to 0.3; often shown times 100).

    Parameters
    ----------
    name : str
        The name under which scores are kept.
    module : open_clip.CLIP
        The model.
    tokenizer : callable
        ``tokenizer(prompts) -> LongTensor (n, 77)``, as `open_clip.get_tokenizer` returns; it truncates.
    preprocessing : Preprocessing
    scale : float
        What the cosine is multiplied with.
    options : Any
        Device, dtype and batch_size, as :class:`Reward` takes them.
    """

    def __init__(
        self,
        name: str,
        module: Any,
        tokenizer: Any,
        preprocessing: Preprocessing = HPS_PIXELS,
        *,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(name, module, preprocessing=preprocessing, default_lora_targets=_LORA_TARGETS, **options)
        self.tokenizer = tokenizer
        self.scale = real("scale", scale, error=RewardError)
        module.to(device=self.device, dtype=self.dtype).eval()

    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """Return the text embeddings (n, d)."""
        return self.module.encode_text(self.tokenizer(prompts).to(self.device))

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the image embeddings (n, d)."""
        return self.module.encode_image(pixels)

    def factor(self) -> float:
        """Return the scale."""
        return self.scale


def load_hpsv2(
    name: str = "hpsv2",
    *,
    version: str = "hpsv2",
    weights: str | Path | None = None,
    revision: str | None = None,
    scale: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
) -> OpenClipReward:
    """Load HPSv2 (or v2.1) from a checkpoint file, or from the hub when none is given.

    Returns
    -------
    OpenClipReward
    """
    import open_clip

    choice("version", version, HPS_FILES, error=RewardError)
    path = Path(weights) if weights is not None else fetch("xswu/HPSv2", HPS_FILES[version], revision=revision)
    state = read_state(path)
    module = open_clip.create_model("ViT-H-14", pretrained=None, precision="fp32", device="cpu")
    load_strict(module, state, source=str(path), may_have=_MAY_HAVE)
    return OpenClipReward(
        name,
        module,
        open_clip.get_tokenizer("ViT-H-14"),
        scale=scale,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
    )
