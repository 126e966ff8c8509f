"""What reaches a reward model: pictures in memory, prompts, weights."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.bad_input.cases_pictures import png, trajectories
from tests.bad_input.drill import Cases
from tests.worlds import save_clip
from ttsnap_lib.rewards.checkpoints import read_state
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.scoring.score import score

CASES = Cases()


@functools.cache
def clip() -> tuple[Path, Any]:
    """Return a tiny CLIP reward and its folder, made once."""
    folder = save_clip(Path(tempfile.mkdtemp(prefix="bad-input-")) / "clip")
    return folder, load_reward(folder, name="tiny", device="cpu")


def reward() -> Any:
    return clip()[1]


def copied(folder: Path) -> Path:
    """Return a copy of the reward's folder, to be spoilt."""
    return Path(shutil.copytree(clip()[0], folder / "clip"))


# -- pictures and prompts ----------------------------------------------------------------------------------------------

GRAY, RGB = torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8)
CASES.each(
    "pictures in memory",
    lambda images: reward().score("a cat", images),
    [
        ("integers", RGB.byte(), "float tensor"),
        ("gray", GRAY, r"\(2, 1, 8, 8\)"),
        ("channels last", RGB.permute(0, 2, 3, 1), r"\(2, 8, 8, 3\)"),
        ("one picture without its axis", RGB[0], "float tensor"),
        ("no pixels", torch.zeros(2, 3, 0, 8), "float tensor"),
        ("levels up to 255", RGB + 255.0, r"\[0, 1\]"),
        ("levels from -1", RGB - 1.0, r"\[0, 1\]"),
        ("NaN", RGB * float("nan"), r"\[0, 1\]"),
        ("infinite", RGB + float("inf"), r"\[0, 1\]"),
        ("an array", np.zeros((2, 8, 8, 3)), "ndarray"),
        ("a number", 5, "int"),
        ("None", None, "NoneType"),
        ("a list of numbers", [1, 2], "int"),
        ("a picture of no pixels", Image.new("RGB", (0, 8)), "pixel"),
        ("a path of nothing", "none.png", "existing image"),
    ],
)
CASES.each(
    "pictures in memory",
    lambda prompts: reward().score(prompts, RGB),
    [
        ("prompts of another number", ["a", "b", "c"], "3 prompts, 2 images"),
        ("a prompt that is a number", ["a", 5], "text"),
        ("prompts None", None, "text"),
        ("prompts a number", 3, "text"),
    ],
)
CASES.add("pictures in memory", "a batch of none", lambda f: reward().score("a", RGB, batch_size=0), "batch_size")
for what, content in [
    ("text", b"hello"),
    ("PostScript, which Pillow would hand to another program", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n"),
    ("a bomb of 60000 x 60000", png(60_000, 60_000, b"x")),
    ("half a picture", png(6, 4)[:-30]),
]:
    CASES.files(
        "picture", "a.png", lambda path: reward().score("a cat", [path]), [(f"{what}, to a reward", content, "image")]
    )


def answer(value: Any) -> Any:
    """Return a reward whose function answers `value`."""

    def function(prompts, images):
        if isinstance(value, Exception):
            raise value
        return value

    return load_reward(function, name="odd")


for what, value, names in [
    ("one number for two pictures", [1.0], "shape"),
    ("a table", np.ones((2, 2)), "shape"),
    ("text", ["high", "low"], "numbers"),
    ("None", None, "numbers|shape"),
    ("NaN", [1.0, float("nan")], "not finite"),
    ("infinity", [float("inf"), 1.0], "not finite"),
    ("a mapping", {"a": 1}, "numbers"),
]:
    CASES.add("reward function", f"answers {what}", lambda f, value=value: answer(value).score("a", RGB), names)
for what, value, names in [
    ("raises", RuntimeError("boom"), "s00.png.*boom"),
    ("answers one number for all", 1.0, "s00.png.*shape"),
    ("answers NaN", [float("nan")] * 4, "s00.png"),
]:
    CASES.add(
        "reward function", f"{what}, on a trajectory folder",
        lambda folder, value=value: score(trajectories(folder / "t"), answer(value), folder / "r.zarr"), names,
    )  # fmt: skip
CASES.each(
    "reward function",
    load_reward,
    [
        ("of a module that is not", "no_such_module:f", "imported"),
        ("that is not in its module", "math:no_such", "imported"),
        ("that cannot be called", "math:pi", "callable"),
        ("a misspelt reward", "image_rewrd", "image_reward"),
        ("a number", 5, "callable"),
        ("None", None, "callable"),
        ("a NUL", "a\0b", "path"),
        ("nothing", "", "path|reward"),
        ("a dot", ".", "reward|model"),
    ],
)
CASES.each(
    "reward function",
    lambda options: load_reward("pocket-clip", **options),
    [
        ("an option that it does not take", {"scal": 2.0}, "Did you mean 'scale'"),
        ("a type that is none", {"dtype": "float33"}, "dtype"),
        ("a device that is none", {"device": "gpu"}, "device"),
        ("a device that is not there", {"device": "cuda:99"}, "cuda:99"),
        ("weights that are not there", {"weights": "none.pt"}, "weights"),
        ("adapters that are not there", {"adapters": "none"}, "curriculum"),
    ],
)

# -- weights -----------------------------------------------------------------------------------------------------------


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder.parent / 'outside' / 'owned'}"

    def __reduce__(self):
        return os.system, (self.command,)


def header(about: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    """Return a safetensors file of this header."""
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], *offsets: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": list(offsets)}


CASES.files(
    "weights",
    "w.safetensors",
    read_state,
    [
        ("safetensors of no bytes", b"", "cannot be read"),
        ("a header of 2^60 bytes", header({}, length=2**60), "cannot be read"),
        ("a header longer than the file", header({}, length=4096), "cannot be read"),
        ("a header that is no JSON", header(b"{" * 16), "cannot be read"),
        ("a tensor past the end", header({"a": tensor([1000], 0, 4000)}), "cannot be read"),
        ("a shape that does not fit its bytes", header({"a": tensor([10**12], 0, 64)}), "cannot be read"),
        ("offsets that go back", header({"a": tensor([16], 64, 0)}), "cannot be read"),
        ("a shape that overflows", header({"a": tensor([2**62, 2**62], 0, 64)}), "cannot be read"),
        ("an unknown type", header({"a": tensor([16], 0, 64, kind="F33")}), "cannot be read"),
        ("tensors that overlap", header({"a": tensor([16], 0, 64), "b": tensor([16], 0, 64)}), "cannot be read"),
        ("nested too deep", header(b'{"a":' * 5000 + b"1" + b"}" * 5000), "cannot be read"),
    ],
)
CASES.files(
    "weights",
    "w.pt",
    read_state,
    [
        ("no bytes", b"", "cannot be read"),
        ("text", "hello", "cannot be read"),
        ("a pickle of plain values", pickle.dumps({"a": 1}), "cannot be read|mapping"),
        ("a zip of nothing", b"PK\x05\x06" + bytes(18), "cannot be read"),
    ],
)


def written(folder: Path, write: Any) -> Any:
    """Read weights that `write` has put into a file."""
    write(folder / "w.pt")
    return read_state(folder / "w.pt")


def climbing_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../outside/owned", "x")
        file.writestr("archive/data.pkl", pickle.dumps({"a": 1}))


def cut(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


for what, write, names in [
    (
        "a pickle that runs a command",
        lambda path: path.write_bytes(pickle.dumps(Payload(path.parent))),
        "cannot be read",
    ),
    ("a torch file that runs a command", lambda path: torch.save({"a": Payload(path.parent)}, path), "cannot be read"),
    ("a whole module", lambda path: torch.save(torch.nn.Linear(2, 2), path), "cannot be read"),
    ("a list", lambda path: torch.save([torch.zeros(2)], path), "mapping"),
    ("names that are numbers", lambda path: torch.save({1: torch.zeros(2)}, path), "mapping"),
    ("values that are no tensors", lambda path: torch.save({"a": 5}, path), "mapping"),
    ("a zip with a path that climbs", climbing_zip, "cannot be read"),
    ("cut off", cut, "cannot be read"),
    ("a folder", lambda path: path.mkdir(), "existing file"),
]:
    CASES.add("weights", what, lambda folder, write=write: written(folder, write), names)


def loaded(folder: Path, state: dict[str, torch.Tensor]) -> Any:
    """Load the tiny reward with other weights."""
    save_file(state, folder / "w.safetensors")
    return load_reward(clip()[0], device="cpu", weights=folder / "w.safetensors")


CASES.add("weights", "of another model", lambda folder: loaded(folder, {"x": torch.zeros(2)}), "do not fit")
CASES.add(
    "weights", "of another shape",
    lambda folder: loaded(folder, {**{k: v.contiguous().clone() for k, v in reward().module.state_dict().items()},
                                   "visual_projection.weight": torch.zeros(2, 2)}), "shape",
)  # fmt: skip


def spoilt(folder: Path, file: str, change: Any) -> Any:
    """Load a model's folder after changing the JSON in one of its files."""
    path = copied(folder) / file
    if callable(change):
        change(path)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return load_reward(path.parent, device="cpu")


for what, file, change in [
    ("a configuration that is no JSON", "config.json", lambda path: path.write_text("{")),
    ("a configuration of another model", "config.json", lambda path: path.write_text('{"model_type": "bert"}')),
    ("a width of 10^12", "config.json", {"vision_config": {"hidden_size": 10**12, "num_attention_heads": 1}}),
    ("a width that is text", "config.json", {"projection_dim": "wide"}),
    ("no configuration", "config.json", lambda path: path.unlink()),
    ("no weights", "model.safetensors", lambda path: path.unlink()),
    ("weights cut off", "model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:1000])),
    ("pickled weights that run a command", "model.safetensors", lambda path: (
        path.unlink(), (path.parent / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(path.parent.parent))))),
    ("a processor of another size", "preprocessor_config.json", {"size": {"shortest_edge": 64},
                                                              "crop_size": {"height": 64, "width": 64}}),
    ("a processor that is no JSON", "preprocessor_config.json", lambda path: path.write_text("[")),
]:  # fmt: skip
    CASES.add("model folder", what, lambda f, file=file, change=change: spoilt(f, file, change), "clip|tiny|shape|size")


def tokenizer_with_code(folder: Path) -> bool:
    """Load a folder whose tokenizer brings code of its own: nobody is asked on the terminal, and it does not run."""
    path = copied(folder)
    about = json.loads((path / "tokenizer_config.json").read_text())
    about |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}, "tokenizer_class": "Evil"}
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    (path / "evil.py").write_text(f"open({str(folder.parent / 'outside' / 'owned')!r}, 'w')\nclass Tokenizer: pass\n")
    load_reward(path, device="cpu")
    return True


CASES.add("model folder", "a tokenizer that brings code", tokenizer_with_code, "tokenizer|trust")
