"""Rewards that are a transformers `CLIPModel`: PickScore, CLIPScore, the pocket reward, and any folder or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ttsnap_lib._reading import reason
from ttsnap_lib.checks import real
from ttsnap_lib.errors import RewardError

from .cosine import CosineReward
from .preprocess import Preprocessing, from_clip_processor
from .weights import check_keys, is_local, offline_error, read_state

__all__ = ["ClipReward", "load_clip"]

_LORA_TARGETS = r".*vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
# Buffers that older versions of transformers wrote and newer ones compute.
_MAY_HAVE = (r"(text|vision)_model\.embeddings\.position_ids",)


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

    Raises
    ------
    RewardError
        The processor and the model disagree on the image size.
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
        super().__init__(name, module, preprocessing=preprocessing, default_lora_targets=_LORA_TARGETS, **options)
        if preprocessing.size != module.config.vision_config.image_size:
            raise RewardError(
                f"processor of {name} and its model disagree on the image size",
                value=preprocessing.size,
                bound=str(module.config.vision_config.image_size),
                remedy="Save the processor that belongs to the model beside it.",
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
        return self.module.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens.get("attention_mask"))

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the image embeddings (n, d)."""
        return self.module.get_image_features(pixel_values=pixels)

    def factor(self) -> torch.Tensor | float:
        """Return the logit scale, or the number given instead."""
        return self.module.logit_scale.float().exp() if isinstance(self.scale, str) else self.scale


def load_clip(
    name: str,
    source: str | Path,
    *,
    processor: str | Path | None = None,
    weights: str | Path | None = None,
    revision: str | None = None,
    scale: str | float = "logit",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
) -> ClipReward:
    """Load a `CLIPModel` reward from a folder or a hub id.

    Parameters
    ----------
    name : str
        Name of the reward.
    source : str or Path
        Folder or hub id of the model.
    processor : str or Path, optional
        Folder or hub id of the tokenizer and image processor; `source` when not given.
    weights : str or Path, optional
        A file of weights to put into the model's architecture instead of its own.
    revision : str, optional
        Commit, branch or tag on the hub.
    scale
        As :class:`ClipReward` takes it.
    device, dtype, batch_size
        As :class:`Reward` takes them.

    Returns
    -------
    ClipReward
    """
    from transformers import CLIPConfig, CLIPModel

    source = str(source)
    processor = str(processor) if processor is not None else source
    if weights is None:
        module, info = _pretrained(
            CLIPModel.from_pretrained, source, "model", revision, output_loading_info=True, torch_dtype=torch.float32
        )
        check_keys(info["missing_keys"], info["unexpected_keys"], source=source, may_have=_MAY_HAVE)
    else:
        from .weights import load_strict

        module = CLIPModel(_pretrained(CLIPConfig.from_pretrained, source, "config", revision))
        load_strict(module, read_state(weights), source=str(weights), may_have=_MAY_HAVE)
    processor_revision = revision if processor == source else None
    tokenizer, preprocessing = load_processor(processor, processor_revision)
    return ClipReward(
        name,
        module,
        tokenizer,
        preprocessing,
        scale=scale,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
    )


def load_processor(source: str, revision: str | None = None) -> tuple[Any, Preprocessing]:
    """Return the tokenizer and the preprocessing kept in a folder or hub repository."""
    from transformers import AutoTokenizer, CLIPImageProcessor

    tokenizer = _pretrained(AutoTokenizer.from_pretrained, source, "tokenizer", revision)
    images = _pretrained(CLIPImageProcessor.from_pretrained, source, "image processor", revision)
    return tokenizer, from_clip_processor(images, source)


def _pretrained(load: Any, source: str, what: str, revision: str | None, **options: Any) -> Any:
    """Call a `from_pretrained` and turn its many errors into one that says what to do."""
    from huggingface_hub import constants

    local = is_local(source)
    try:
        # Unless told so, transformers asks on the terminal whether to run code that stands in the folder.
        trust = {"trust_remote_code": False} if what == "tokenizer" else {}
        return load(source, **({} if local else {"revision": revision or "main"}), **trust, **options)
    except Exception as error:  # OSError, ValueError, JSON and safetensors errors, all for one bad folder
        if local:
            raise RewardError(
                f"{what} cannot be loaded ({reason(error)})",
                value=source,
                bound="a folder with a CLIPModel, its tokenizer and its CLIPImageProcessor",
                remedy="Save model and processor into it with save_pretrained(), or check the path.",
            ) from error
        raise offline_error(source, None, constants.HF_HUB_CACHE, what, error, revision) from error
