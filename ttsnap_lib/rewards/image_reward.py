"""ImageReward, through the class of the image-reward package."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ttsnap_lib.errors import RewardError
from ttsnap_lib.rewards.base import Reward, TextBatch
from ttsnap_lib.rewards.checkpoints import fetch, is_local, load_strict, offline_error, read_state
from ttsnap_lib.rewards.pixels import IMAGE_REWARD_PIXELS

_MAX_TOKENS = 35  # the package truncates prompts here
_LORA_TARGETS = (
    r"blip\.visual_encoder\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
    r"|blip\.text_encoder\.encoder\.layer\.\d+\.crossattention\.(self\.(query|key|value)|output\.dense)"
)
_CONSTANTS = (r"blip\.text_encoder\.embeddings\.position_ids",)  # versions of transformers keep it or compute it
_patching = threading.Lock()


class ImageRewardModel(Reward):
    """The raw head output of ImageReward, as the published values are, or the package's standardized score.

    `module` is the package's model. `standardize` returns ``(x - mean) / std`` with the package's 0.16717 and 1.03334,
    as its `score` and `inference_rank` do.
    """

    module: Any

    def __init__(self, name: str, module: Any, *, standardize: bool = False, **options: Any) -> None:
        super().__init__(name, module, preprocessing=IMAGE_REWARD_PIXELS, default_lora_targets=_LORA_TARGETS, **options)
        self.standardize = bool(standardize)
        module.to(device=self.device, dtype=self.dtype).eval()
        module.device = self.device  # the package's own entry points read it

    def encode_text(self, prompts: Sequence[str]) -> TextBatch:
        """Return ``input_ids`` and ``attention_mask`` (n, 35): the text tower itself looks at the image."""
        tokens = self.module.blip.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
        return TextBatch({key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")})

    def forward(self, pixels: torch.Tensor, text: TextBatch | Sequence[str]) -> torch.Tensor:
        """Return the rewards (n,) of preprocessed images; see :meth:`Reward.forward`."""
        if not isinstance(text, TextBatch):
            text = self.encode_text(text)
        tokens = text.expand(len(pixels)).tensors
        image = self.module.blip.visual_encoder(pixels.to(self.dtype))
        output = self.module.blip.text_encoder(
            tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:-1], dtype=torch.long, device=image.device),
            return_dict=True,
        )
        raw = self.module.mlp(output.last_hidden_state[:, 0, :]).squeeze(-1).float()
        return (raw - self.module.mean) / self.module.std if self.standardize else raw


def load_image_reward(
    name: str,
    *,
    weights: str | Path | None = None,
    med_config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    **options: Any,
) -> ImageRewardModel:
    """Load ImageReward: checkpoint and text configuration of `THUDM/ImageReward`, the package's BERT tokenizer."""
    repo = "THUDM/ImageReward"
    weights = Path(weights) if weights is not None else fetch(repo, "ImageReward.pt", revision=revision)
    med_config = Path(med_config) if med_config is not None else fetch(repo, "med_config.json", revision=revision)
    state = read_state(weights)
    module = build_module(med_config, tokenizer)
    load_strict(module, state, source=str(weights), constants=_CONSTANTS)
    return ImageRewardModel(name, module, **options)


def build_module(med_config: str | Path, tokenizer: str | Path | None = None) -> Any:
    """Return the package's model with random weights.

    The import takes seconds and pulls in half of the ecosystem, so it happens here and nowhere else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from ImageReward.ImageReward import ImageReward
    except ImportError as error:
        raise RewardError(
            f"the image-reward package cannot be imported ({error}), expected image-reward 1.5. Run `pip install "
            'image-reward clip-anytorch "transformers<4.56" "setuptools<81"`.'
        ) from error
    med_config = Path(med_config)
    if not med_config.is_file():
        raise RewardError(f"med_config: got {med_config}, expected an existing JSON file. Download med_config.json.")
    with _tokenizer_from(tokenizer):
        try:
            return ImageReward(device="cpu", med_config=str(med_config))
        except OSError as error:  # the package asks the hub for its tokenizer
            if tokenizer is not None and is_local(tokenizer):
                raise RewardError(
                    f"tokenizer cannot be loaded: got {tokenizer}, expected a BERT tokenizer folder. Check the path."
                ) from error
            raise offline_error(str(tokenizer or "bert-base-uncased"), "tokenizer", error) from error


@contextlib.contextmanager
def _tokenizer_from(folder: str | Path | None) -> Iterator[None]:
    """Let the package, which knows only `bert-base-uncased`, build its tokenizer from `folder`."""
    if folder is None:
        yield
        return
    from ImageReward.models.BLIP import blip_pretrain
    from transformers import BertTokenizer

    def init_tokenizer() -> Any:  # what the package adds to the plain BERT tokenizer
        tokenizer = BertTokenizer.from_pretrained(str(folder))
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
        return tokenizer

    with _patching:
        original = blip_pretrain.init_tokenizer
        blip_pretrain.init_tokenizer = init_tokenizer
        try:
            yield
        finally:
            blip_pretrain.init_tokenizer = original
