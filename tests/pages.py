"""The README and the documentation's pages as tests read them: their blocks, and each command at pocket size."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests.conftest import ROOT

OTHERS = ("faults.md", "bad-input.md", "coverage.md")
"""Pages whose commands are tests of their own."""
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in OTHERS),
         *sorted((ROOT / "docs" / "notebooks").glob("*.md"))]  # fmt: skip
HEADS = ("ttsnap ", "accelerate launch ", "make ", "python ")

# What needs a GPU or a download runs on the pocket models under the same options.
_NAMES = {"black-forest-labs/FLUX.1-dev": "pocket-flux", "SG161222/RealVisXL_V4.0": "pocket-sdxl",
          "madebyollin/taesdxl": "pocket-tiny"}  # fmt: skip
_REWARDS = ("image_reward", "pickscore", "hpsv2", "mps", "aesthetic", "vqascore")
_DROPPED = {"--size": 1, "--guidance": 1, "--dtype": 1, "--offload": 1, "--fp8": 0, "--reward-option": 1}
_AT_MOST = {"--candidates": 6, "--trials": 40}


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return language and content of the page's fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the page's commands; every line of a block without a language must be one."""
    lines = [
        line.split("  #")[0].strip() for language, code in blocks(page) if not language for line in code.splitlines()
    ]
    strange = [line for line in lines if line and not line.startswith(HEADS)]
    assert not strange, f"{name_of(page)}: neither a command nor labelled with a language: {strange}"
    return [line for line in lines if line]


def given_words(command: str) -> list[str]:
    """Return the words behind ``ttsnap``, also of a command that ``accelerate launch`` starts."""
    words = shlex.split(command)
    return words[words.index("ttsnap_lib") + 1 :] if words[0] == "accelerate" else words[1:]


def at_pocket_size(command: str, places: dict[str, str]) -> list[str]:
    """Return the command's words with models, rewards and sizes of the pocket world."""
    words = [places.get(word, word) for word in given_words(command)]
    kind, changed, skip = words[0], [], 0
    loads_models = kind in ("generate", "score", "finetune", "cost", "search", "import-checkpoints")
    for before, word in zip(["", *words], words, strict=False):
        if skip:
            skip -= 1
        elif word in _DROPPED and loads_models:
            skip = _DROPPED[word]
        elif word in _REWARDS and before == "--reward" and loads_models:
            keeps_name = (
                kind in ("generate", "score") and "--noise-aware" not in words
            )  # a series belongs to its reward
            changed.append(f"{word}=pocket-clip" if keeps_name else "pocket-clip")
        elif before in _AT_MOST:
            changed.append(str(min(int(word), _AT_MOST[before])))
        elif before == "--images":
            changed.append(str(min(int(word), 16 if "--score" in words else 8)))
        elif before == "--config" and "--show" not in words:
            changed.append(f"pocket-{word.removeprefix('pocket-').split('-')[0]}")
        else:
            changed.append(_NAMES.get(word, word))
    if kind == "finetune" and "--show" not in words:
        changed += ["-p", "steps", "[5]", "-p", "max_updates_per_step", "2"]
        if "--targets" in words:
            changed += ["-p", "check_targets", "false"]  # drawn numbers, of no picture
        if "--validation" not in words:
            changed += ["-p", "validation", "null", "-p", "validation_prompts", "1"]
    if kind == "cost":
        changed += ["--repeats", "1"]
    return changed


def make_world(folder: Path, page: Path) -> dict[str, str]:
    """Write what the commands of a page find there; return what stands for the capital names."""
    from ttsnap_lib import save_rewards
    from ttsnap_lib.tensors.tensor import synthetic_rewards

    for model in ("flux", "sdxl"):
        for short, seed in (("imr", 0), ("pic", 1)):
            _published(folder, f"{model}_{short}", synthetic_rewards(4, 120, 20, rng=seed))
    prompts = ["a small red ring on a white background", "a large blue square", "a red cross", "a small white circle"]
    for name in ("validation.json", "prompts.json", "train.json"):
        (folder / name).write_text(json.dumps(prompts))
    tensor = synthetic_rewards(8, 120, 20)
    save_rewards(tensor, folder / "tensor.zarr")
    np.save(folder / "scores.npy", tensor["base"].values[0])
    grid = next(
        (code for source in (page, ROOT / "README.md") for language, code in blocks(source) if language == "yaml")
    )
    shutil.copy(ROOT / "tests" / "cases" / "reward" / "my_reward.py", folder)
    (folder / "grid.yaml").write_text(
        grid.replace("TENSOR", "tensor.zarr").replace("[flux-512+image_reward, published]", "[published]")
    )
    rng = np.random.default_rng(0)
    numbers = (2, 3) if "PICTURES" in page.read_text("utf-8") else ()
    for prompt, image, step in itertools.product(numbers, range(8), range(20)):
        path = folder / "pictures" / f"p{prompt:04d}" / f"id{image:03d}" / f"s{step:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return {"PICTURES": str(folder / "pictures"), "VALUES": str(folder), "TENSOR": str(folder / "tensor.zarr"), "CHECKPOINTS": str(folder / "checkpoints"),
            "GRID.yaml": "grid.yaml"}  # fmt: skip


def _published(folder: Path, stem: str, dataset) -> None:
    """Write a small pool in the published layout."""
    for name, variant in (("base", "base"), ("noise_aware", "naft")):
        target = folder / f"{stem}_val_{variant}"
        target.mkdir(parents=True)
        for step in range(20):
            rows = dataset[name].values[0, :, :, step]
            content = {p: [float(x) for x in row] for p, row in enumerate(rows)}
            (target / f"p4_i120_s{step:02d}.yaml").write_text(yaml.dump(content, Dumper=yaml.CSafeDumper))
