"""ImageReward and CycleReward on the BLIP classes of transformers; the authors' files load as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ttsnap_lib.checks import integer
from ttsnap_lib.errors import RewardError
from ttsnap_lib.files import failures_as, read_json, reason
from ttsnap_lib.rewards.base import Reward, TextBatch
from ttsnap_lib.rewards.checkpoints import fetch, fetch_weights, is_local, load_strict, offline_error, read_state
from ttsnap_lib.rewards.pixels import IMAGE_REWARD_PIXELS

_MAX_TOKENS = 35  # the package truncates prompts here
_CYCLE_TOKENS = 128  # and CycleReward's here
_CYCLE_REPO = "carolineec/CycleReward-Combo"

_LORA_TARGETS = (
    r"blip\.visual_encoder\.encoder\.layers\.\d+\.(self_attn\.(qkv|projection)|mlp\.fc[12])"
    r"|blip\.text_encoder\.encoder\.layer\.\d+\.crossattention\.(self\.(query|key|value)|output\.dense)"
)
_VISION = {
    "patch_size": 16,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
"""The large vision transformer, the one that ImageReward was trained with."""
_TEXT = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
"""What med_config.json may set, with BERT's defaults, which the package takes for what the file leaves out."""
_BLIP_TEXT: dict[str, Any] = {**_TEXT, "vocab_size": 30524}
"""BLIP's own med_config.json: BERT, with [DEC] and [ENC]."""


HEAD_WIDTH = 768


def linear_head() -> torch.nn.Sequential:
    """Return the head of linear layers that ImageReward and the LAION aesthetic predictor read an embedding with."""
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    return torch.nn.Sequential(
        linear(HEAD_WIDTH, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1),
        linear(64, 16), linear(16, 1),
    )  # fmt: skip


def _gelu_head() -> torch.nn.Sequential:
    """Return CycleReward's head: the same layers with a GELU between them."""
    linear, gelu = torch.nn.Linear, torch.nn.GELU
    return torch.nn.Sequential(
        linear(HEAD_WIDTH, 1024), gelu(), linear(1024, 128), gelu(), linear(128, 64), gelu(), linear(64, 16), gelu(),
        linear(16, 1),
    )  # fmt: skip


class BlipScorer(torch.nn.Module):
    """ImageReward's network: the text tower looks at the image, and a head of linear layers reads its first token.

    `blip` holds `visual_encoder` and `text_encoder`, `mlp` the `layers` of the head; the package standardizes its scores
    with `mean` and `std`.
    """

    blip: Any
    mlp: Any
    mean = 0.16717362830052426
    std = 1.0333394966054072

    def __init__(
        self,
        visual_encoder: torch.nn.Module,
        text_encoder: torch.nn.Module,
        tokenizer: Any,
        layers: torch.nn.Sequential,
    ) -> None:
        super().__init__()
        self.blip = torch.nn.ModuleDict({"visual_encoder": visual_encoder, "text_encoder": text_encoder})
        for layer in layers:
            if isinstance(layer, torch.nn.Linear):  # as the package starts its head
                torch.nn.init.normal_(layer.weight, std=1 / (HEAD_WIDTH + 1))
                torch.nn.init.zeros_(layer.bias)
        self.mlp = torch.nn.ModuleDict({"layers": layers})
        self.tokenizer = tokenizer

    def forward(
        self, pixels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the raw rewards (n,), float32, of preprocessed images and one prompt each, and the class token (n, d)."""
        image = self.blip.visual_encoder(pixel_values=pixels).last_hidden_state
        read = self.blip.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:-1], dtype=torch.long, device=image.device),
            is_decoder=False,  # no causal mask
        )
        return self.mlp.layers(read.last_hidden_state[:, 0, :]).squeeze(-1).float(), image[:, 0]


class ImageRewardModel(Reward):
    """The raw head output of ImageReward or CycleReward, as the published values are, or a standardized score.

    `standardize` returns ``(x - mean) / std`` with ImageReward's 0.16717 and 1.03334, as its package's `score` and
    `inference_rank` do. Prompts are cut at `max_tokens`.
    """

    module: BlipScorer

    def __init__(
        self,
        name: str,
        module: BlipScorer,
        *,
        standardize: bool = False,
        max_tokens: int = _MAX_TOKENS,
        **options: Any,
    ) -> None:
        super().__init__(name, module, preprocessing=IMAGE_REWARD_PIXELS, default_lora_targets=_LORA_TARGETS, **options)
        self.standardize, self.max_tokens = bool(standardize), max_tokens
        module.to(device=self.device, dtype=self.dtype).eval()

    def encode_text(self, prompts: Sequence[str]) -> TextBatch:
        """Return ``input_ids`` and ``attention_mask`` (n, max_tokens): the text tower itself looks at the image."""
        tokens = self.module.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return TextBatch({key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")})

    def forward_embedding(
        self, pixels: torch.Tensor, text: TextBatch | Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rewards (n,) and the image tower's class tokens (n, d); see :meth:`Reward.forward_embedding`."""
        if not isinstance(text, TextBatch):
            text = self.encode_text(text)
        tokens = text.expand(len(pixels)).tensors
        raw, image = self.module(pixels.to(self.dtype), tokens["input_ids"], tokens["attention_mask"])
        scores = (raw - self.module.mean) / self.module.std if self.standardize else raw
        return scores, torch.nn.functional.normalize(image.float(), dim=-1)


def load_image_reward(
    name: str,
    *,
    weights: str | Path | None = None,
    med_config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    **options: Any,
) -> ImageRewardModel:
    """Load ImageReward: checkpoint and text configuration of `THUDM/ImageReward`, and BERT's tokenizer."""
    repo = "THUDM/ImageReward"
    weights = Path(weights) if weights is not None else fetch(repo, "ImageReward.pt", revision=revision)
    med_config = Path(med_config) if med_config is not None else fetch(repo, "med_config.json", revision=revision)
    state = read_state(weights)
    module = build_module(med_config, tokenizer)
    load_strict(module, state, source=str(weights))
    return ImageRewardModel(name, module, **options)


def load_cycle_reward(
    name: str,
    *,
    weights: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    **options: Any,
) -> ImageRewardModel:
    """Load CycleReward: a checkpoint, by default that of `carolineec/CycleReward-Combo`, and BERT's tokenizer."""
    weights = Path(weights) if weights is not None else fetch_weights(_CYCLE_REPO, revision=revision)
    state = read_state(weights)
    module = build_module(None, tokenizer, _gelu_head())
    load_strict(module, state, source=str(weights))
    return ImageRewardModel(name, module, max_tokens=_CYCLE_TOKENS, **options)


def build_module(
    med_config: str | Path | None, tokenizer: str | Path | None = None, layers: torch.nn.Sequential | None = None
) -> BlipScorer:
    """Return the network with random weights; `med_config` is the text tower's configuration, a BERT's; None is BLIP's."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel  # the package has it, its top does not

    text = _BLIP_TEXT if med_config is None else _read_med_config(Path(med_config))
    read = _load_tokenizer("bert-base-uncased" if tokenizer is None else str(tokenizer))
    if len(read) > text["vocab_size"]:
        raise RewardError(
            f"tokenizer of BLIP's text tower: got {len(read)} tokens with [DEC] and [ENC], expected at most "
            f"{text['vocab_size']}, the vocab_size of {med_config or 'BLIP'}. Use the tokenizer bert-base-uncased."
        )
    with failures_as(
        RewardError,
        f"med_config {med_config}: no text tower can be built, expected a BERT configuration. Download med_config.json "
        "of THUDM/ImageReward.",
    ):
        # Built as a decoder to have cross-attention; the defaults name tokens that the vocabulary need not have.
        config = BlipTextConfig(
            **text,
            encoder_hidden_size=_VISION["hidden_size"],
            is_decoder=True,
            bos_token_id=None,
            eos_token_id=None,
            sep_token_id=None,
        )
        encoder = BlipTextModel(config, add_pooling_layer=False)
    seen = BlipVisionConfig(
        **_VISION,
        image_size=IMAGE_REWARD_PIXELS.size,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        initializer_range=0.02,
    )
    return BlipScorer(BlipVisionModel(seen), encoder, read, linear_head() if layers is None else layers)


def _read_med_config(path: Path) -> dict[str, Any]:
    remedy = "Download med_config.json of THUDM/ImageReward."
    if not path.is_file():
        raise RewardError(f"med_config: got {path}, expected an existing JSON file. {remedy}")
    given = read_json(path, "med_config", error=RewardError, remedy=remedy)
    if not given.get("add_cross_attention"):
        raise RewardError(
            f"med_config {path}: add_cross_attention: got {given.get('add_cross_attention')!r}, expected true: the "
            f"text tower looks at the image. {remedy}"
        )
    text = {key: given.get(key, default) for key, default in _TEXT.items()}
    integer(f"med_config {path}: hidden_size", text["hidden_size"], HEAD_WIDTH, HEAD_WIDTH, error=RewardError)
    for key, least in (("vocab_size", 1), ("num_hidden_layers", 1), ("max_position_embeddings", _MAX_TOKENS)):
        integer(f"med_config {path}: {key}", text[key], least, error=RewardError)
    return text


def _load_tokenizer(source: str) -> Any:
    """Return a BERT tokenizer with the two tokens that BLIP adds at the end: [DEC], then [ENC]."""
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(source)
        if "[CLS]" not in tokenizer.get_vocab() or len(tokenizer) < 6:
            raise ValueError("no vocabulary")
    except Exception as error:  # OSError, ValueError, TypeError, JSON errors, all for one bad folder
        if is_local(source):
            raise RewardError(
                f"tokenizer cannot be loaded ({reason(error)}): got {source!r}, expected a folder with the vocab.txt "
                "of a BERT tokenizer. Check the path."
            ) from error
        raise offline_error(source, "tokenizer", error) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer
