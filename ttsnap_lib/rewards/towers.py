"""Rewards with an image and a text tower: CLIP models (PickScore, CLIPScore, pocket-clip) and open_clip's (HPSv2)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ttsnap_lib.checks import real
from ttsnap_lib.errors import RewardError
from ttsnap_lib.files import reason
from ttsnap_lib.rewards.base import Reward, TextBatch
from ttsnap_lib.rewards.checkpoints import fetch, is_local, load_strict, offline_error, read_state, refuse_keys
from ttsnap_lib.rewards.pixels import HPS_PIXELS, Preprocessing, from_clip_processor
from ttsnap_lib.style import quiet_loading

HPS_FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
"""Checkpoint files of the repository `xswu/HPSv2`."""

CLIP_LORA_TARGETS = r".*vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
_OPEN_CLIP_LORA_TARGETS = r"visual\.transformer\.resblocks\.\d+\.(attn|mlp\.(c_fc|c_proj))"
# Buffers that some versions of the libraries wrote and others compute.
CLIP_CONSTANTS = (r"(text|vision)_model\.embeddings\.position_ids",)
_OPEN_CLIP_CONSTANTS = (r"(.*\.)?attn_mask",)


class CosineReward(Reward):
    """A two-tower reward: families fill in how their towers are called. `module` is of the family's own class."""

    module: Any

    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """Return the text embeddings (n, d)."""
        raise NotImplementedError

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the image embeddings (n, d) of preprocessed images, in the model's type."""
        raise NotImplementedError

    def factor(self) -> torch.Tensor | float:
        """Return what the cosine is multiplied with."""
        raise NotImplementedError

    def encode_text(self, prompts: Sequence[str]) -> TextBatch:
        """Return the normalized text embeddings ``features`` (n, d), float32."""
        return TextBatch({"features": functional.normalize(self.text_features(list(prompts)).float(), dim=-1)})

    def forward_embedding(
        self, pixels: torch.Tensor, text: TextBatch | Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rewards (n,) and the embeddings (n, d) of preprocessed images; see :meth:`Reward.forward_embedding`."""
        if not isinstance(text, TextBatch):
            text = self.encode_text(text)
        image = functional.normalize(self.image_features(pixels.to(self.dtype)).float(), dim=-1)
        return (image * text.expand(len(pixels)).tensors["features"]).sum(-1) * self.factor(), image


class ClipReward(CosineReward):
    """``scale`` times the cosine similarity of the image's and the prompt's embedding.

    Parameters
    ----------
    name : str
        The name under which scores are kept.
    module : transformers.CLIPModel
        The model.
    tokenizer : transformers tokenizer
        Prompts are truncated at the text tower's length (77 for the published models).
    preprocessing : Preprocessing
    scale : "logit" or float
        ``"logit"`` is ``logit_scale.exp()``, the PickScore model card's formula (scores about 20); 1 is the plain
        cosine (the image-reward package's CLIPScore).
    options : Any
        Device, dtype and batch_size, as :class:`Reward` takes them.
    """

    def __init__(
        self,
        name: str,
        module: Any,
        tokenizer: Any,
        preprocessing: Preprocessing,
        *,
        scale: str | float = "logit",
        **options: Any,
    ) -> None:
        super().__init__(name, module, preprocessing=preprocessing, default_lora_targets=CLIP_LORA_TARGETS, **options)
        if preprocessing.size != module.config.vision_config.image_size:
            raise RewardError(
                f"processor of {name} and its model disagree on the image size: got {preprocessing.size}, expected "
                f"{module.config.vision_config.image_size}. Save the processor that belongs to the model beside it."
            )
        self.tokenizer = tokenizer
        self.scale = "logit" if scale == "logit" else real("scale", scale, error=RewardError)
        self.max_length = module.config.text_config.max_position_embeddings
        scale_value = module.logit_scale.detach().float().clone()
        module.to(device=self.device, dtype=self.dtype).eval()
        # exp() of a bfloat16 logarithm would be off by a percent.
        module.logit_scale.data = scale_value.to(self.device)

    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """Return the text embeddings (n, d)."""
        tokens = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        found = self.module.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens.get("attention_mask")
        )
        return getattr(found, "pooler_output", found)  # a tensor before transformers 5

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the image embeddings (n, d)."""
        found = self.module.get_image_features(pixel_values=pixels)
        return getattr(found, "pooler_output", found)

    def factor(self) -> torch.Tensor | float:
        """Return the logit scale, or the number given instead."""
        return self.module.logit_scale.float().exp() if isinstance(self.scale, str) else self.scale


class OpenClipReward(CosineReward):
    """Cosine similarity of an open_clip model's embeddings, times `scale`.

    HPSv2 is the plain cosine, without the logit scale (about 0.2 to 0.3; often shown times 100). The tokenizer is that
    of `open_clip.get_tokenizer`, ``tokenizer(prompts) -> LongTensor (n, 77)``; it truncates.
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
        targets = _OPEN_CLIP_LORA_TARGETS
        super().__init__(name, module, preprocessing=preprocessing, default_lora_targets=targets, **options)
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


def load_clip(
    name: str,
    source: str | Path,
    *,
    processor: str | Path | None = None,
    weights: str | Path | None = None,
    revision: str | None = None,
    **options: Any,
) -> ClipReward:
    """Load a `CLIPModel` from a folder or hub id; `processor` is another one, `weights` a file for its architecture."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    source = str(source)
    if weights is None:
        module, info = pretrained(CLIPModel.from_pretrained, source, "model", revision, output_loading_info=True)
        refuse_keys(info["missing_keys"], info["unexpected_keys"], source=source, constants=CLIP_CONSTANTS)
    else:
        module = CLIPModel(pretrained(CLIPConfig.from_pretrained, source, "config", revision))
        load_strict(module, read_state(weights), source=str(weights), constants=CLIP_CONSTANTS)
    if processor is not None and str(processor) != source:
        source, revision = str(processor), None
    # Unless told so, transformers asks on the terminal whether to run code that stands in the folder.
    tokenizer = pretrained(AutoTokenizer.from_pretrained, source, "tokenizer", revision, trust_remote_code=False)
    images = pretrained(CLIPImageProcessor.from_pretrained, source, "image processor", revision)
    return ClipReward(name, module, tokenizer, from_clip_processor(images, source), **options)


def pretrained(
    load: Any,
    source: str,
    what: str,
    revision: str | None,
    *,
    expected: str = "a CLIPModel, its tokenizer and its CLIPImageProcessor",
    **options: Any,
) -> Any:
    """Call a `from_pretrained` and turn its many errors into one that says what to do."""
    local = is_local(source)
    try:
        with quiet_loading() if local else contextlib.nullcontext():
            return load(source, **({} if local else {"revision": revision or "main"}), **options)
    except Exception as error:  # OSError, ValueError, JSON and safetensors errors, all for one bad folder
        if local:
            raise RewardError(
                f"{what} cannot be loaded ({reason(error)}): got {source!r}, expected a folder with {expected}. "
                "Save model and processor into it with save_pretrained(), or "
                "check the path."
            ) from error
        raise offline_error(source, what, error, revision) from error


def load_hpsv2(
    name: str,
    *,
    version: str = "hpsv2",
    weights: str | Path | None = None,
    revision: str | None = None,
    **options: Any,
) -> OpenClipReward:
    """Load HPSv2 (or v2.1) from a checkpoint file, or from the hub when none is given."""
    import open_clip

    path = Path(weights) if weights is not None else fetch("xswu/HPSv2", HPS_FILES[version], revision=revision)
    state = read_state(path)
    module = open_clip.create_model("ViT-H-14", pretrained=None, precision="fp32", device="cpu")
    load_strict(module, state, source=str(path), constants=_OPEN_CLIP_CONSTANTS)
    return OpenClipReward(name, module, open_clip.get_tokenizer("ViT-H-14"), **options)
