"""Tiny models of the real classes, with random weights, and the tokenizers they need."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

WORDS = ["a", "red", "blue", "green", "circle", "square", "above", "below", "left", "of", "and", "the", "cat", "with"]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Several test processes share few cores."""


def make_images(n: int, width: int = 40, height: int = 30, seed: int = 0) -> list[Image.Image]:
    """Return smooth colored pictures with sharp edges and some noise: resizing errors show on each."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(n):
        y, x = np.mgrid[0:height, 0:width]
        phase = rng.uniform(0, 6, 3)
        base = 127 + 90 * np.sin(x[..., None] / rng.uniform(2, 9) + y[..., None] / rng.uniform(2, 9) + phase)
        base[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
        images.append(Image.fromarray(np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8)))
    return images


def embedding(found):
    """Return the embedding of ``CLIPModel.get_image_features``: an object holds it since transformers 5."""
    return getattr(found, "pooler_output", found)


def pillow_processor():
    """Return the CLIPImageProcessor that resizes with Pillow: transformers 5 gives that name to torchvision's."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ModuleNotFoundError:
        from transformers import CLIPImageProcessor as CLIPImageProcessorPil
    return CLIPImageProcessorPil


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Return images as floats (n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2).float() / 255


@pytest.fixture
def images() -> list[Image.Image]:
    """Seven images of 40 x 30 pixels."""
    return make_images(7)


PROMPTS = [
    "a red circle",
    "a blue square above a green circle",
    "the cat",
    "a red circle",
    "a green square and a blue circle left of the red square",
    "circle",
    "the cat with the blue circle",
]


def save_clip(folder: Path, image_size: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny CLIPModel with a real byte-pair tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges = []
    for word in WORDS:  # every word one token, built letter by letter
        parts = [*word[:-1], word[-1] + "</w>"]
        for part in parts:
            vocab.setdefault(part, len(vocab))
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            parts = [parts[0] + parts[1], *parts[2:]]
            vocab.setdefault(parts[0], len(vocab))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizerFast(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16, unk_token="<|endoftext|>"
    )
    processor = CLIPProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            do_convert_rgb=True,
        ),
        tokenizer,
    )
    config = CLIPConfig(
        text_config={
            "vocab_size": len(vocab),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "projection_dim": 24,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": image_size,
            "patch_size": 8,
            "projection_dim": 24,
        },
        projection_dim=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.parameters():  # the tiny default init gives nearly constant scores
            if parameter.ndim > 1:
                parameter.data.mul_(4)
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """Folder of a tiny CLIPModel with its processor."""
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    """Folder of a small BERT tokenizer named as the image-reward package looks for it."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("bert") / "bert-base-uncased"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def med_config(tmp_path_factory) -> Path:
    """Small text configuration of ImageReward; its head wants a width of 768."""
    path = tmp_path_factory.mktemp("med") / "med_config.json"
    config = {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64,
        "model_type": "bert",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 24,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    path.write_text(json.dumps(config))
    return path
