"""What reaches a model: pictures in memory, prompts, weights, checkpoints, settings of a pipeline."""

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

from tests.bad_input.cases_files import png, trajectories
from tests.bad_input.drill import Cases
from tests.rewards.conftest import save_clip
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.curriculum.exchange import find_checkpoints, import_series
from ttsnap_lib.curriculum.images import ImageBank, open_images
from ttsnap_lib.curriculum.state import read_state_file
from ttsnap_lib.denoise import Settings
from ttsnap_lib.generate import generate
from ttsnap_lib.measure import measure_costs
from ttsnap_lib.negtome import NegToMe
from ttsnap_lib.pipelines import load_pipeline
from ttsnap_lib.rewards import load_reward
from ttsnap_lib.rewards.steps import StepSeries
from ttsnap_lib.rewards.weights import read_state
from ttsnap_lib.score import score
from ttsnap_lib.search import search

CASES = Cases()


@functools.cache
def _clip() -> tuple[Path, Any]:
    """Return a tiny CLIP reward and its folder, made once."""
    folder = save_clip(Path(tempfile.mkdtemp(prefix="bad-input-")) / "clip")
    return folder, load_reward(folder, name="tiny", device="cpu")


def reward() -> Any:
    return _clip()[1]


def copied(folder: Path) -> Path:
    """Return a copy of the reward's folder, to be spoilt."""
    return Path(shutil.copytree(_clip()[0], folder / "clip"))


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
        ("a NUL", "a\0b", "NUL"),
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
    return load_reward(_clip()[0], device="cpu", weights=folder / "w.safetensors")


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

# -- checkpoints -------------------------------------------------------------------------------------------------------


def run_folder(folder: Path, curriculum: Any = None, config: dict[str, Any] | None = None, **files: bytes) -> Path:
    """Write a run folder of one adapter with a configuration."""
    step = folder / "run" / "step_02"
    step.mkdir(parents=True)
    (folder / "run" / "curriculum.json").write_text(json.dumps({} if curriculum is None else curriculum))
    plain = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": None,
    }
    (step / "adapter_config.json").write_text(json.dumps({**plain, **(config or {})}))
    save_file({"x": torch.zeros(2)}, step / "adapter_model.safetensors")
    for name, content in files.items():
        (step / name.replace("__", ".")).write_bytes(content)
    return folder / "run"


def attach(folder: Path, **options: Any) -> Any:
    return StepSeries(load_reward(_clip()[0], device="cpu").module, run_folder(folder, **options), reward_name="tiny")


for what, options, names in [
    ("curriculum a list", {"curriculum": [1]}, "mapping"),
    ("of another reward", {"curriculum": {"reward": "pickscore"}}, "another reward"),
    ("adapter of another kind", {"config": {"peft_type": "PROMPT_TUNING"}}, "LORA"),
    ("adapter of an unknown kind", {"config": {"peft_type": ["LORA"]}}, "LORA"),
    ("a rank of 10^9", {"config": {"r": 10**9}}, "1024"),
    ("a rank that is text", {"config": {"r": "2"}}, "r"),
    ("a start that changes the base weights", {"config": {"init_lora_weights": "pissa"}}, "init_lora_weights"),
    ("a start of another kind", {"config": {"init_lora_weights": {"a": 1}}}, "init_lora_weights"),
    ("whole modules beside the adapter", {"config": {"modules_to_save": ["text_model"]}}, "modules_to_save"),
    ("targets that are not there", {"config": {"target_modules": ["no_such"]}}, "attached"),
    ("a target pattern that is none", {"config": {"target_modules": "(["}}, "attached"),
    ("an unknown setting of the adapter", {"config": {"bias": "everything"}}, "attached|fit"),
    ("weights of other names", {}, "fit"),
    ("weights that are no safetensors", {"adapter_model__safetensors": b"hello"}, "attached"),
    ("configuration that is no JSON", {"adapter_config__json": b"{"}, "JSON"),
    ("two kinds in one run", {"model__safetensors": b""}, "attached|fit|kinds"),
]:
    CASES.add("checkpoint", what, lambda folder, options=options: attach(folder, **options), names)


def names_its_base(folder: Path, base: Any) -> Any:
    run = run_folder(folder, curriculum={"reward": str(folder / "run") if base == "itself" else base})
    return load_reward(run)


for what, base in [
    ("itself", "itself"),
    ("code to import", "os:system"),
    ("code that is there", "tests.bad_input.cases_models:reward"),
    ("nothing", None),
    ("a list", ["pickscore"]),
    ("a misspelt reward", "pikscore"),
    ("a path with a NUL", "a\0b"),
]:
    CASES.add(
        "checkpoint", f"a run that names {what} as its base", lambda f, base=base: names_its_base(f, base), "rewar|path"
    )


def full(folder: Path, state: dict[str, torch.Tensor] | bytes) -> Any:
    """Switch to a step of full weights."""
    step = folder / "run" / "step_02"
    step.mkdir(parents=True)
    (folder / "run" / "curriculum.json").write_text("{}")
    if isinstance(state, bytes):
        (step / "model.safetensors").write_bytes(state)
    else:
        save_file(state, step / "model.safetensors")
    return StepSeries(reward().module, folder / "run").use(2)


for what, state in {
    "full weights of no bytes": b"",
    "full weights of other names": {"x": torch.zeros(1)},
    "full weights of another shape": {"logit_scale": torch.zeros(3)},
}.items():
    CASES.add("checkpoint", what, lambda folder, state=state: full(folder, state), "checkpoint")


def imported(folder: Path, files: dict[str, Any]) -> Any:
    """Import full checkpoints."""
    (folder / "from").mkdir()
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / "from" / name).write_bytes(content)
        else:
            torch.save(content(folder) if callable(content) else content, folder / "from" / name)
    return import_series(folder / "from", folder / "run", reward())


for what, files, names in [
    ("none to import", {"readme.txt": b"x"}, "no checkpoints"),
    ("two files for a step", {"Ct14.pt": {}, "step_14.pt": {}}, "two checkpoints"),
    ("imported from a pickle that runs a command", {"Ct14.pt": Payload}, "cannot be read"),
    ("imported from another model", {"Ct14.pt": {"x": torch.zeros(2)}}, "another model"),
    ("imported from nothing", {"Ct14.pt": {}}, "another model"),
]:
    CASES.add("checkpoint", what, lambda folder, files=files: imported(folder, files), names)
CASES.add(
    "checkpoint", "a folder to import that is not there", lambda f: import_series(f / "no", f / "r", reward()), "no"
)
CASES.add(
    "checkpoint", "a saved state of something else",
    lambda folder: (torch.save({"a": 1}, folder / "state.pt"), read_state_file(folder)), "saved state",
)  # fmt: skip
CASES.add(
    "checkpoint", "a saved state that runs a command",
    lambda folder: ((folder / "state.pt").write_bytes(pickle.dumps(Payload(folder))), read_state_file(folder)), "saved state",
)  # fmt: skip


def passed_over(folder: Path) -> bool:
    """Names that are no steps are passed over."""
    for name in ("step_../x", "step_1x", "step_", "Ct14.pt.exe", "ct.pt"):
        (folder / name.replace("/", "_")).write_text("x")
    return find_checkpoints(folder) == {}


CASES.add("checkpoint", "names that are no steps", passed_over, skip="files by other names are passed over")


def bank(folder: Path, about: Any, pixels: bytes) -> Any:
    from ttsnap_lib.curriculum import images

    (folder / images._BANK).write_text(json.dumps(about))
    (folder / images._PIXELS).write_bytes(pixels)
    return ImageBank.load(folder)


def npy(array: Any, **options: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


PIXELS = npy(np.zeros((1, 1, 1, 2, 2, 3), np.uint8))
ABOUT = {"schema": 1, "prompts": ["a cat"], "steps": [0]}
for what, about, pixels in [
    ("a bank without prompts", {"steps": [0]}, PIXELS),
    ("a bank that is a list", [1], PIXELS),
    ("a bank of no bytes", ABOUT, b""),
    ("a bank of pickled pixels", ABOUT, npy(np.array([{}], dtype=object), allow_pickle=True)),
    ("a bank that claims 10^15 pixels", ABOUT, PIXELS.replace(b"(1, 1, 1, 2, 2, 3)", b"(99999, 99999, 3)")),
    ("a bank of another shape", ABOUT, npy(np.zeros((2, 2), np.uint8))),
]:
    CASES.add("training pictures", what, lambda f, about=about, pixels=pixels: bank(f, about, pixels), "bank")
CASES.each(
    "training pictures",
    open_images,
    [
        ("a folder that is not there", "none/at/all", "trajectories"),
        ("a pocket set of no numbers", "pocket-flux:train:manyxfew", "trajectories"),
        ("a number", 5, ""),
        ("a NUL", "a\0b", ""),
    ],
)

# -- pipelines ---------------------------------------------------------------------------------------------------------

CASES.each(
    "pipeline settings",
    Settings.from_dict,
    [
        ("unknown key", {"n_step": 4}, "Did you mean 'n_steps'"),
        ("a number for a mapping", 5, "mapping"),
        ("no steps", {"n_steps": 0}, "n_steps"),
        ("10^9 steps", {"n_steps": 10**9}, "10000"),
        ("size zero", {"height": 0}, "height"),
        ("10^12 pixels", {"height": 10**6, "width": 10**6}, "height x width"),
        ("size as text", {"width": "512"}, "width"),
        ("guidance negative", {"guidance": -1}, "guidance"),
        ("guidance NaN", {"guidance": float("nan")}, "guidance"),
        ("text of 10^6 tokens", {"max_sequence_length": 10**6}, "512"),
        ("negative prompt a list", {"negative_prompt": ["x"]}, "negative_prompt"),
    ],
)
CASES.each(
    "pipeline settings",
    lambda options: NegToMe(**options),
    [
        ("a group of none", {"group_size": 0}, "group_size"),
        ("a cosine of two", {"threshold": 2}, "threshold"),
        ("alpha negative", {"alpha": -1}, "alpha"),
        ("a window turned round", {"start": 100, "end": 900}, "start"),
        ("unknown matching", {"matching": "both"}, "matching"),
    ],
)
CASES.each(
    "pipeline",
    load_pipeline,
    [
        ("misspelt", "pocket-fluks", "Did you mean 'pocket-flux'"),
        ("nothing", "", "model"),
        ("a number", 5, "model"),
        ("a path that is not there", "./none", "none"),
        ("a NUL", "a\0b", ""),
        ("a name of 5000 letters", "x" * 5000, ""),
    ],
)
CASES.each(
    "pipeline",
    lambda options: load_pipeline("pocket-flux", **options),
    [
        ("a device that is none", {"device": "gpu"}, "device"),
        ("a device a number", {"device": 1.5}, "device"),
        ("a type that is none", {"dtype": "fp13"}, "dtype"),
        ("a scheduler that is none", {"scheduler": "eular"}, "Did you mean 'euler'"),
        ("offload on the CPU", {"device": "cpu", "offload": "model"}, "offload"),
    ],
)


@functools.cache
def flux() -> Any:
    """Return the pocket pipeline, loaded once."""
    return load_pipeline("pocket-flux", device="cpu")


def bright(prompts: Any, images: Any) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


SHORT = Settings(n_steps=3)
CASES.each(
    "search",
    lambda changes: search(**{"pipeline": flux(), "prompt": "a cat", "reward": bright, "candidates": 2, **changes}),
    [
        ("a blank prompt", {"prompt": " "}, "prompt"),
        ("a list of prompts", {"prompt": ["a cat"]}, "prompt"),
        ("a pipeline that is none", {"pipeline": 5}, "model|pipeline"),
        ("no reward", {"reward": []}, "reward"),
        ("a reward that is none", {"reward": 5}, "callable"),
        ("the same reward twice", {"reward": [bright, bright]}, "reward|distinct"),
        ("a schedule that is a tuple", {"schedule": (1, 2)}, "schedule"),
        ("a schedule past the end", {"schedule": Schedule((5,), (0.5,)), "settings": SHORT}, "at most 1"),
        ("an unknown method", {"method": "ttsnp"}, "Did you mean"),
        ("ttsnap with a base reward", {"method": "ttsnap", "schedule": Schedule((2,), (0.5,))}, "noise-aware"),
        ("budget and candidates", {"budget": 10.0}, "either budget or candidates"),
        ("a budget without a cost", {"candidates": None, "budget": 10.0}, "cost"),
        ("a cost that is a number", {"cost": 5}, "cost"),
        ("a cost of other steps", {"cost": CostModel(step=1, verify=1, n_steps=7)}, "n_steps"),
        ("10^12 candidates", {"candidates": 10**12}, "1000000"),
        ("seed negative", {"seed": -1}, "seed"),
        ("deadline NaN", {"deadline_s": float("nan")}, "deadline_s"),
        ("deadline zero", {"deadline_s": 0}, "deadline_s"),
        ("batch zero", {"batch_size": 0}, "batch_size"),
        ("weights for a rank sum", {"weights": [1.0]}, "weights"),
        ("a reward reported that is not there", {"report": ["x"]}, "report"),
        ("a decoder that is not there", {"decoder": "./none"}, "decoder"),
        ("a size that the model cannot take", {"settings": Settings(n_steps=3, height=33)}, "multiple"),
        (
            "a negative prompt without guidance",
            {"settings": Settings(n_steps=3, negative_prompt="x")},
            "negative_prompt",
        ),
        ("settings that are a mapping", {"settings": {"n_steps": 3}}, "settings"),
    ],
)
CASES.each(
    "generation",
    lambda changes: generate(
        **{"pipeline": flux(), "prompts": ["a cat"], "on_batch": lambda *given: None, "settings": SHORT, **changes}
    ),
    [
        ("a blank prompt", {"prompts": [" "]}, "blank"),
        ("nowhere to put it", {"on_batch": None}, "folder"),
        ("no images", {"images_per_prompt": 0}, "images_per_prompt"),
        ("10^12 images", {"images_per_prompt": 10**12}, "1000000"),
        ("a step out of range", {"steps": [3]}, "steps"),
        ("seed negative", {"seed": -1}, "seed"),
        ("batch zero", {"batch_size": 0}, "batch_size"),
        ("10^9 rows in a batch", {"batch_size": 10**9}, "65536"),
        ("a shard beyond its count", {"shard": (2, 2)}, "shard"),
        ("no threads", {"cpu_threads": 0}, "cpu_threads"),
        ("no workers", {"workers": 0}, "workers"),
        ("an image that is not wanted", {"only": [(0, 99)]}, "only"),
        ("a format with loss", {"image_format": "jpeg"}, "image_format"),
        ("a pipeline that is none", {"pipeline": 5}, "pipeline"),
        ("a NegToMe group that does not divide", {"negtome": NegToMe(group_size=4), "batch_size": 6}, "multiple"),
    ],
)
CASES.add(
    "generation", "into a file",
    lambda folder: ((folder / "f").write_text("x"), generate(flux(), ["a cat"], folder / "f" / "g")), "not a folder",
)  # fmt: skip
CASES.each(
    "cost measurement",
    lambda changes: measure_costs(**{"pipeline": flux(), "reward": reward(), "settings": SHORT, **changes}),
    [
        ("no batch sizes", {"batch_sizes": []}, "batch_sizes"),
        ("a batch of none", {"batch_sizes": [0]}, "batch_sizes"),
        ("no repeats", {"repeats": 0}, "repeats"),
    ],
)


def model_index(folder: Path, content: Any) -> Any:
    (folder / "model_index.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return load_pipeline(folder)


EVIL = {"_class_name": ["evil", "Pipeline"], "_diffusers_version": "0.39.0"}
for what, content in [
    ("a folder of another class", {"_class_name": "AudioLDMPipeline"}),
    ("a folder that brings code", EVIL),
    ("a folder whose part is code", {"_class_name": "FluxPipeline", "vae": ["evil", "Vae"]}),
    ("a folder with parts missing", {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}),
    ("an index that is no JSON", "{"),
    ("an index that is a list", [1]),
    ("an index nested too deep", "[" * 100_000),
    ("an index without a class", {}),
]:
    CASES.add("pipeline", what, lambda folder, content=content: model_index(folder, content), "")
