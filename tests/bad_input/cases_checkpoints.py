"""Checkpoints of finetuning, and the pictures it trains on."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.bad_input.cases_models import Payload, clip, reward
from tests.bad_input.drill import Cases
from ttsnap_lib.finetuning.data import ImageBank, open_images
from ttsnap_lib.finetuning.weights import find_checkpoints, import_series, read_state_file
from ttsnap_lib.rewards.checkpoints import StepSeries
from ttsnap_lib.rewards.loading import load_reward

CASES = Cases()

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
    return StepSeries(load_reward(clip()[0], device="cpu").module, run_folder(folder, **options), reward_name="tiny")


for what, options, names in [
    ("curriculum a list", {"curriculum": [1]}, "mapping"),
    ("of another reward", {"curriculum": {"reward": "pickscore"}}, "another reward"),
    ("adapter of another kind", {"config": {"peft_type": "PROMPT_TUNING"}}, "LORA"),
    ("adapter of an unknown kind", {"config": {"peft_type": ["LORA"]}}, "LORA"),
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
    from ttsnap_lib.finetuning import data as images

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
        ("a number", 5, "a path"),
        ("a NUL", "a\0b", "a path"),
    ],
)
