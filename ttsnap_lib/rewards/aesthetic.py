"""The LAION aesthetic predictor: how well people like a picture, whatever it shows; CLIP's image tower and a small head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ttsnap_lib.checks import integer
from ttsnap_lib.errors import RewardError
from ttsnap_lib.rewards.base import Reward, TextBatch
from ttsnap_lib.rewards.checkpoints import fetch, load_strict, read_state, refuse_keys
from ttsnap_lib.rewards.image_reward import HEAD_WIDTH, linear_head
from ttsnap_lib.rewards.pixels import IMAGE_REWARD_PIXELS
from ttsnap_lib.rewards.towers import CLIP_CONSTANTS, CLIP_LORA_TARGETS, pretrained

_CLIP = "openai/clip-vit-large-patch14"
_HEAD = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")  # sac+logos+ava1-l14-linearMSE.pth of the authors


class AestheticScorer(torch.nn.Module):
    """The image half of a `CLIPModel`, and the `layers` that read its normalized embedding."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = clip.vision_model, clip.visual_projection
        self.layers = linear_head()


class AestheticReward(Reward):
    """The predicted rating of a picture, about 1 to 10; the prompt is not read."""

    module: AestheticScorer
    reads_prompt = False

    def __init__(self, name: str, module: AestheticScorer, **options: Any) -> None:
        # OpenAI's own transform is that of ImageReward, which took it from there.
        super().__init__(
            name, module, preprocessing=IMAGE_REWARD_PIXELS, default_lora_targets=CLIP_LORA_TARGETS, **options
        )
        module.to(device=self.device, dtype=self.dtype).eval()
        module.layers.float()

    def forward_embedding(
        self, pixels: torch.Tensor, text: TextBatch | Sequence[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rewards (n,) and the embeddings (n, d) of preprocessed images; see :meth:`Reward.forward_embedding`."""
        seen = self.module.vision_model(pixel_values=pixels.to(self.dtype)).pooler_output
        embedding = functional.normalize(self.module.visual_projection(seen).float(), dim=-1)
        return self.module.layers(embedding).squeeze(-1), embedding


def load_aesthetic(
    name: str,
    *,
    model: str | Path = _CLIP,
    weights: str | Path | None = None,
    revision: str | None = None,
    **options: Any,
) -> AestheticReward:
    """Load the head from a file or the hub, and the image tower of a `CLIPModel` (folder or hub id)."""
    from transformers import CLIPModel

    head = Path(weights) if weights is not None else fetch(*_HEAD, revision=revision)
    state, source = read_state(head), str(model)
    clip, info = pretrained(CLIPModel.from_pretrained, source, "model", None, output_loading_info=True)
    refuse_keys(info["missing_keys"], info["unexpected_keys"], source=source, constants=CLIP_CONSTANTS)
    sizes = {"projection_dim": clip.config.projection_dim, "image_size": clip.config.vision_config.image_size}
    for side, expected in {"projection_dim": HEAD_WIDTH, "image_size": IMAGE_REWARD_PIXELS.size}.items():
        integer(f"{side} of {source}", sizes[side], expected, expected, error=RewardError)
    module = AestheticScorer(clip)
    load_strict(module.layers, {key.removeprefix("layers."): value for key, value in state.items()}, source=str(head))
    return AestheticReward(name, module, **options)
