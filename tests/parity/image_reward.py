"""ImageReward against the image-reward package: the same pictures, prompts and random weights in two environments.

``python tests/parity/image_reward.py package FOLDER`` writes pictures, tokenizer, configuration, random weights and what
the package makes of them; it needs image-reward. ``... ours FOLDER`` reads them and compares; ``make parity`` runs both.
``--small`` takes a vision tower and a text tower of one or two layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

TOLERANCE = 1e-5
WORDS = ["a", "red", "blue", "green", "circle", "square", "above", "below", "left", "of", "and", "the", "cat", "with"]
SMALL_VISION = {"patch_size": 56, "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2}
SMALL_VISION |= {"num_attention_heads": 4}
MEAN, STD = 0.16717362830052426, 1.0333394966054072


def pictures(n: int) -> list[Image.Image]:
    """Return smooth pictures with edges and noise, of many sizes, every fifth grey or with an alpha channel.

    Opaque ones, and none with a palette: the package leaves transparency out, and resizes the numbers of a palette; here a
    picture is made RGB first, as it is looked at.
    """
    rng = np.random.default_rng(7)
    found = []
    for i in range(n):
        width, height = (int(side) for side in rng.integers(40, 700, 2))
        y, x = np.mgrid[0:height, 0:width]
        waves = rng.uniform(3, 60, 2)
        base = 127 + 90 * np.sin(x[..., None] / waves[0] + y[..., None] / waves[1] + rng.uniform(0, 6, 3))
        base[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
        levels = np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8)
        picture = Image.fromarray(levels)
        found.append(picture.convert(("L", "RGBA")[i // 5 % 2]) if i % 5 == 4 else picture)
    return found


def prompts(n: int) -> list[str]:
    """Return `n` prompts of the small vocabulary, every seventh longer than the 35 tokens that are read."""
    rng = np.random.default_rng(8)
    return [" ".join(rng.choice(WORDS, 50 if i % 7 == 6 else int(rng.integers(1, 12)))) for i in range(n)]


def med_config(small: bool) -> dict[str, Any]:
    """Return a text configuration: that of the published file but for the vocabulary, or one layer."""
    layers, heads, inner = (1, 2, 128) if small else (12, 12, 3072)
    return {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64 if small else 512,
        "model_type": "bert",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 24 if small else 30524,
        "encoder_width": 768,
        "add_cross_attention": True,
    }


def random_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return random weights under which scores differ; a weight depends on its name and shape alone."""
    state = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            values = values * 0.05 + (name.endswith("weight"))  # the scale of a normalization, or a bias
        else:
            values /= np.prod(shape[1:]) ** 0.5 if len(shape) != 3 else 5
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


def write_inputs(folder: Path, n: int, small: bool) -> None:
    """Write the pictures, the tokenizer's vocabulary and the text configuration."""
    tokenizer = folder / "bert-base-uncased"
    for path in (tokenizer, folder / "pictures"):
        path.mkdir(parents=True, exist_ok=True)
    (tokenizer / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    # transformers 4 takes its settings from here, and so does 5
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    (folder / "med_config.json").write_text(json.dumps(med_config(small)))
    for i, picture in enumerate(pictures(n)):
        picture.save(folder / "pictures" / f"{i:03d}.png")


def package(folder: Path, n: int, small: bool) -> None:
    """Run the image-reward package, and keep its weights, its pixels, its tokens and its scores."""
    import os

    folder = folder.resolve()
    write_inputs(folder, n, small)
    os.chdir(folder)  # the package takes the folder bert-base-uncased from where it runs
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    if small:  # the package knows a base and a large one only

        def create_vit(vit: str, image_size: int, *others: Any) -> tuple[Any, int]:
            width, depth = SMALL_VISION["hidden_size"], SMALL_VISION["num_hidden_layers"]
            heads, patch = SMALL_VISION["num_attention_heads"], SMALL_VISION["patch_size"]
            return VisionTransformer(image_size, patch, embed_dim=width, depth=depth, num_heads=heads), width

        blip_pretrain.create_vit = create_vit
    module = ImageReward(device="cpu", med_config="med_config.json").eval()
    own = module.state_dict()
    state = random_state({name: tuple(value.shape) for name, value in own.items() if value.is_floating_point()})
    module.load_state_dict(state, strict=False)
    torch.save(module.state_dict(), "ImageReward.pt")
    files = sorted(Path("pictures").iterdir())
    raw: list[float] = []
    module.mlp.register_forward_hook(lambda layer, given, result: raw.extend(result.flatten().tolist()))
    with torch.no_grad():
        score = [module.score(prompt, str(path)) for prompt, path in zip(prompts(n), files, strict=True)]
        rank, ranked = module.inference_rank(prompts(n)[0], [str(path) for path in files])
        pixels = torch.stack([module.preprocess(Image.open(path)) for path in files])
    tokens = module.blip.tokenizer(
        prompts(n), padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    np.savez(
        "package.npz",
        raw=raw[:n],
        score=score,
        rank=rank,
        ranked=ranked,
        pixels=pixels.numpy(),
        input_ids=tokens["input_ids"].numpy(),
        attention_mask=tokens["attention_mask"].numpy(),
    )


def ours(folder: Path, small: bool) -> dict[str, float]:
    """Score the same with ttsnap; return the largest differences by what they are of."""
    from ttsnap_lib.rewards import image_reward
    from ttsnap_lib.rewards.loading import load_reward

    if small:
        image_reward._VISION = SMALL_VISION
    theirs = np.load(folder / "package.npz")
    given = {"weights": folder / "ImageReward.pt", "med_config": folder / "med_config.json"}
    given |= {"tokenizer": folder / "bert-base-uncased", "device": "cpu"}
    files = sorted((folder / "pictures").iterdir())
    reward = load_reward("image_reward", **given)
    standard = image_reward.ImageRewardModel("standard", reward.module, standardize=True, device="cpu")
    tokens = reward.encode_text(prompts(len(files))).tensors
    with torch.no_grad():
        ranked = standard.score(prompts(len(files))[0], files, batch_size=8)
        raw = reward.score(prompts(len(files)), files, batch_size=8)
        found = {
            "tokens": max(float(np.abs(tokens[key].numpy() - theirs[key]).max()) for key in tokens),
            "pixels of files": float(np.abs(reward.preprocess(files).numpy() - theirs["pixels"]).max()),
            "raw output": float(np.abs(raw - theirs["raw"]).max()),
            "score": float(np.abs((raw - np.float32(MEAN)) / np.float32(STD) - theirs["score"]).max()),
            "inference_rank, scores": float(np.abs(ranked - theirs["ranked"]).max()),
            "inference_rank, ranks": float(np.abs(np.argsort(np.argsort(-ranked)) + 1 - theirs["rank"]).max()),
        }
        # The other path of pixels: float tensors, as a search has them.
        plain = [i for i, path in enumerate(files) if Image.open(path).mode == "RGB"][:10]
        floats = [torch.from_numpy(np.array(Image.open(files[i]))).permute(2, 0, 1)[None].float() / 255 for i in plain]
        seen = torch.cat([reward.preprocess(tensor) for tensor in floats]).numpy()
        found["pixels of tensors"] = float(np.abs(seen - theirs["pixels"][plain]).max())
        scores = [reward.score(prompts(len(files))[i], tensor)[0] for i, tensor in zip(plain, floats, strict=True)]
        found["raw output of tensors"] = float(np.abs(np.array(scores) - theirs["raw"][plain]).max())
    found["spread of the raw output"] = float(np.ptp(theirs["raw"]))
    return found


def main() -> int:
    """Run one of the two halves; the second one ends with 1 when something differs by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=("package", "ours"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if given.half == "package":
        package(given.folder, given.pictures, given.small)
        return 0
    found = ours(given.folder, given.small)
    spread = found.pop("spread of the raw output")
    print(f"raw outputs spread over {spread:.3g}; largest differences, at most {TOLERANCE:g}:")
    for name, difference in found.items():
        print(f"  {name:24} {difference:.2e}")
    # Equal scores that hardly differ among themselves would show nothing.
    return int(not (spread > 0.1 and max(found.values()) <= TOLERANCE))


if __name__ == "__main__":
    sys.exit(main())
