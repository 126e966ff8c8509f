"""Bad files, and files that are none: YAML, JSON, prompts, pictures, tensors, weights, checkpoints, notebooks, sweeps."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save, save_file

from tests.bad_input.drill import Cases, held
from tests.bad_input.samples import DECLARED, GOOD, IDENTITY, Payload, clip_folder, notebook, png, reward, saved
from tests.bad_input.samples import trajectories as trajectory_folder
from ttsnap_lib import CostModel, Schedule, import_published, load_pipeline, load_reward, open_rewards, save_rewards
from ttsnap_lib.files import atomic_write, write_json
from ttsnap_lib.finetuning.config import load_config
from ttsnap_lib.finetuning.data import ImageBank, open_images
from ttsnap_lib.finetuning.weights import import_series, read_state_file
from ttsnap_lib.live.record import SearchRecord
from ttsnap_lib.rewards.checkpoints import StepSeries, read_curriculum, read_state
from ttsnap_lib.runs.parameters import declared_parameters, from_text, read_notebook, resolve
from ttsnap_lib.runs.report import render
from ttsnap_lib.runs.run import find_notebook, plan
from ttsnap_lib.runs.sweep import load_grid
from ttsnap_lib.tensors.published import export_published, import_ground_truth, read_values
from ttsnap_lib.tensors.tensor import make_rewards, read_steps, synthetic_rewards
from ttsnap_lib.trajectories.layout import MANIFEST, Manifest, read_image
from ttsnap_lib.trajectories.prompts import read_prompts
from ttsnap_lib.trajectories.read import Trajectories

CASES = Cases()

# -- YAML and JSON, whoever reads them ---------------------------------------------------------------------------------

YAML_READERS = {
    "schedule": Schedule.from_yaml,
    "cost file": CostModel.load,
    "sweep": load_grid,
    "finetuning configuration": load_config,
    "published rewards": read_values,
    "ground truth": import_ground_truth,
}
BAD_YAML = [
    ("an object tag", "steps: !!python/object/apply:os.system ['touch ../outside/owned']\n", "ConstructorError"),
    ("a key twice", "0: [1.0]\n0: [2.0]\n", "twice"),
    ("cut off", "steps: [1, 2", "cannot be read"),
    ("bytes that are no text", b"\xff\xfe\x00\x01steps", "cannot be read"),
    ("nothing in it", "", "mapping"),
]
for reader, read in YAML_READERS.items():
    CASES.files(reader, "file.yaml", read, BAD_YAML)


def in_folder(name: str, read: Any) -> Any:
    """Return a reader of a folder that holds the file `name`."""
    return lambda path: (os.replace(path, path.parent / name), read(path.parent))


JSON_READERS = {
    "JSON cost file": CostModel.load,
    "notebook": read_notebook,
    "trajectory manifest": in_folder(MANIFEST, Manifest.read),
    "curriculum": in_folder("curriculum.json", read_curriculum),
    "search record": in_folder("record.json", SearchRecord.load),
}
BAD_JSON = [
    ("cut off", '{"step": 1, "ver', "not whole JSON"),
    ("a list at the top", "[1, 2]", "mapping"),
    ("nothing in it", "", "not whole JSON"),
]
for reader, read in JSON_READERS.items():
    CASES.files(reader, "file.ipynb" if reader == "notebook" else "file.json", read, BAD_JSON)

# -- things that are no files, places that cannot be written -----------------------------------------------------------

for reader, (name, read) in {
    "schedule": ("f.yaml", Schedule.from_yaml),
    "cost file": ("f.json", CostModel.load),
    "notebook": ("f.ipynb", read_notebook),
    "prompts": ("f.txt", read_prompts),
    "picture": ("f.png", read_image),
}.items():
    for what, make, names in [
        ("a pipe that nobody writes", os.mkfifo, "not a file"),
        ("a folder", os.mkdir, "not a file"),
        ("nothing", lambda path: None, "No such file|missing"),
    ]:
        CASES.add(
            f"{reader}: {what}", lambda f, name=name, read=read, make=make: (make(f / name), read(f / name)), names
        )
for reader, read in {"schedule": lambda path: Schedule.from_yaml(Path(path)), "reward tensor": open_rewards,
                     "prompts": read_prompts, "trajectories": Trajectories, "report": render}.items():  # fmt: skip
    CASES.each(reader, read, [("a path with a NUL", "a\0b.json", "a path")])


def write_into(folder: Path, part: str) -> None:
    """Write to `part` where ``file`` is a file and ``full`` a folder with something in it."""
    (folder / "file").write_text("x")
    (folder / "full" / "x").mkdir(parents=True)
    with atomic_write(folder / part) as file:
        file.write(b"y")


for part, what in (("file/x", "below a file"), ("full", "in the place of a folder")):
    CASES.add(f"unwritable place: {what}", lambda folder, part=part: write_into(folder, part), "cannot write")

# -- names that climb out of a folder ----------------------------------------------------------------------------------

TENSOR = synthetic_rewards(2, 3, 4)
for name in ("../outside/x", "/tmp/x", "..", ".hidden", "a\nb", "", 5):
    CASES.add(f"name that climbs: model {name!r}", lambda f, n=name: export_published(TENSOR, f, n), "model")
    CASES.files("name that climbs", "g.yaml", load_grid, [(f"sweep {name!r}", json.dumps({"notebook": "simulate", "name": name}),
                                                          "name")])  # fmt: skip
CASES.add(
    "name that climbs: a reward",
    lambda f: export_published(make_rewards(np.ones((1, 1, 2, 1)), rewards=["../x"]), f, "flux"), "reward name",
)  # fmt: skip

# -- prompts, reports, records -----------------------------------------------------------------------------------------

CASES.files(
    "prompts",
    "p.txt",
    read_prompts,
    [("a blank line", "a cat\n\na dog\n", "prompt 1"), ("not UTF-8", b"\xe9\n", "UTF-8")],
)
CASES.files(
    "prompts", "p.csv", read_prompts, [("commas without quotes", "prompt\na cat, red\n", "csv"), ("empty", "", "csv")]
)
CASES.files(
    "prompts", "p.json", read_prompts, [("a mapping", "{}", "list"), ("a number in it", '["a", 5]', "prompt 1")]
)
CASES.files("prompts", "p.parquet", read_prompts, [("no Parquet", b"PAR1", "parquet")])
CASES.files("prompts", "p.pdf", read_prompts, [("another ending", "x", "ending")])
CASES.each(
    "prompts",
    read_prompts,
    [("no such split", "pocket:trian", "Did you mean 'train'"), ("more than the split has", "pocket:test:100000", "128"),
     ("an empty list", [], "no prompt"), ("a prompt of bytes", [b"a cat"], "prompt 0")],
)  # fmt: skip
CASES.add("report: an empty folder", render, "nothing to report")
CASES.add(
    "search record: unknown field",
    lambda f: (write_json(f / "record.json", {"x": 1}), SearchRecord.load(f)), "record",
)  # fmt: skip

# -- trajectory folders ------------------------------------------------------------------------------------------------


def manifest(folder: Path, **changes: Any) -> Manifest:
    """Read a manifest with changes, of its identity where they belong there."""
    identity = {**IDENTITY, **{key: value for key, value in changes.items() if key in IDENTITY}}
    rest = {key: value for key, value in changes.items() if key not in IDENTITY}
    (folder / MANIFEST).write_text(json.dumps({**GOOD, "identity": identity, **rest}))
    return Manifest.read(folder)


for what, changes, names in [
    ("another schema", {"schema": 2}, "schema"),
    ("identity a list", {"identity": list(IDENTITY)}, "identity|not as it was written"),
    ("prompts blank", {"prompts": [" "]}, "prompt 0"),
    ("a billion images", {"images_per_prompt": 10**9}, "images_per_prompt|1000000"),
    ("steps as text", {"n_steps": "2"}, "n_steps"),
    ("format that climbs", {"image_format": "/../../../outside/secret.txt"}, "image_format"),
]:
    CASES.add(f"manifest: {what}", lambda folder, changes=changes: manifest(folder, **changes), names)
CASES.files(
    "picture",
    "s00.png",
    lambda path: read_image(path, (4, 6)),
    [
        ("text", "hello", "no PNG"),
        ("a bomb of 60000 x 60000", png(60_000, 60_000, b"x"), "s00.png"),
        ("half of it", png(6, 4)[:40], "damaged|no PNG"),
        ("another size", png(6, 5), r"\(5, 6\)"),
        (
            "an animation",
            saved(
                Image.new("RGB", (6, 4)), format="PNG", save_all=True, append_images=[Image.new("RGB", (6, 4), "red")]
            ),
            "2 frames",
        ),
        ("a TIFF by the name of PNG", saved(Image.new("RGB", (6, 4)), format="TIFF"), "no PNG"),
        ("PostScript, which would be handed to another program", "%!PS-Adobe-3.0 EPSF-3.0\n", "no PNG"),
    ],
)
CASES.add("trajectory folder: none", lambda folder: Trajectories(folder / "none"), "no trajectory folder")
CASES.add(
    "trajectory folder: a step out of range",
    lambda folder: Trajectories(trajectory_folder(folder)).pictures(0, steps=[2]), "steps",
)  # fmt: skip

# -- reward values -----------------------------------------------------------------------------------------------------

CASES.files(
    "published rewards",
    "p2_i2_s00.yaml",
    read_values,
    [
        ("prompt 0 is missing", "1: [1.0]\n2: [1.0]\n", "prompt 0 is missing"),
        ("uneven rows", "0: [1.0, 2.0]\n1: [1.0]\n", "prompt 1"),
        ("a text among the numbers", "0: [1.0, high]\n", "image 1"),
        ("NaN", "0: [.nan]\n", "finite"),
        ("a number beyond float32", "0: [1.0e+39]\n", "32 bits"),
    ],
)
CASES.files(
    "ground truth",
    "gt.yaml",
    import_ground_truth,
    [
        ("a prompt that climbs", "../p0000: {id000: 1.0}\n", "digits"),
        ("an image by two names", "p0000: {id0: 1.0, id000: 2.0}\n", "once"),
        ("other images for a prompt", "p0000: {id000: 1.0}\np0001: {id001: 1.0}\n", "prompt 1"),
    ],
)


def published(folder: Path, *files: str) -> Any:
    """Import a published folder made of `files`."""
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("0: [1.0, 2.0]\n")
    return import_published(folder, "flux")


BASE = "flux_imr_val_base/p1_i2_s00.yaml"
for what, files, names in [
    ("no folders", (), "flux"),
    ("a step is missing", ("flux_imr_val_base/p1_i2_s01.yaml",), "steps"),
    ("noise-aware beyond the base steps", (BASE, "flux_imr_val_naft/p1_i2_s07.yaml"), "7"),
]:
    CASES.add(f"published folder: {what}", lambda folder, files=files: published(folder, *files), names)


def spoilt_store(folder: Path, part: str, change: Any) -> Any:
    """Open a store, and read it, after changing a file or the metadata of a variable ("" for the group)."""
    place = save_rewards(TENSOR, folder / "r.zarr")
    if callable(change):
        change(place / part)
    else:
        about = json.loads((place / part / "zarr.json").read_text())
        write_json(place / part / "zarr.json", {**about, **change})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_steps(open_rewards(place)["base"], [0])


for what, part, change, names in [
    ("a negative shape", "base", {"shape": [1, -2, 3, 4]}, "opened"),
    ("values of integers", "base", {"data_type": "int32", "fill_value": 0}, "float32|int32"),
    ("a later schema", "", {"attributes": {"schema_version": 99}}, "at most 1"),
    ("without base", "base", shutil.rmtree, "base"),
    ("a chunk of garbage", "base/c/0/0/0/0", lambda path: path.write_bytes(b"garbage"), "damaged"),
]:
    CASES.add(f"Zarr store: {what}", lambda f, part=part, change=change: spoilt_store(f, part, change), names)
CASES.add("Zarr store: a picture folder", lambda folder: open_rewards(trajectory_folder(folder)), "Zarr")
CASES.add("Zarr store: a name that does not ship", lambda folder: open_rewards("pocket-fluks"), "pocket-fluks")

# -- weights and checkpoints -------------------------------------------------------------------------------------------

CASES.files(
    "weights",
    "w.safetensors",
    read_state,
    [("no bytes", b"", "cannot be read"), ("cut off", save({"a": torch.zeros(100)})[:-9], "cannot be read")],
)
for what, write, names in [
    (
        "a pickle that runs a command",
        lambda path: path.write_bytes(pickle.dumps(Payload(path.parent))),
        "cannot be read",
    ),
    ("a torch file that runs a command", lambda path: torch.save({"a": Payload(path.parent)}, path), "cannot be read"),
    ("a list", lambda path: torch.save([torch.zeros(2)], path), "mapping|tensors"),
    ("a folder", lambda path: path.mkdir(), "file"),
]:
    CASES.add(f"weights: {what}", lambda f, write=write: (write(f / "w.pt"), read_state(f / "w.pt")), names)


def loaded(folder: Path, **changes: torch.Tensor) -> Any:
    """Load the tiny reward with other weights."""
    own = {name: value.contiguous().clone() for name, value in reward().module.state_dict().items()}
    save_file({**own, **changes}, folder / "w.safetensors")
    return load_reward(clip_folder(), device="cpu", weights=folder / "w.safetensors")


CASES.add("weights: of another model", lambda folder: loaded(folder, x=torch.zeros(2)), "fit")
CASES.add("weights: of another shape", lambda folder: loaded(folder, logit_scale=torch.zeros(2)), "logit_scale")


def spoilt_model(folder: Path, file: str, change: Any) -> Any:
    """Load the tiny reward's folder after changing one of its files."""
    path = Path(shutil.copytree(clip_folder(), folder / "clip")) / file
    change(path)
    return load_reward(path.parent, device="cpu")


for what, file, change in [
    ("a configuration that is no JSON", "config.json", lambda path: path.write_text("{")),
    ("a configuration of another model", "config.json", lambda path: path.write_text('{"model_type": "bert"}')),
    ("no weights", "model.safetensors", lambda path: path.unlink()),
    ("weights cut off", "model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:1000])),
    # transformers 5 keeps it in a file of another name.
    (
        "a processor that is no JSON",
        "preprocessor_config.json",
        lambda path: [(path.parent / f"{kind}_config.json").write_text("[") for kind in ("processor", "preprocessor")],
    ),
]:
    CASES.add(f"model folder: {what}", lambda f, file=file, change=change: spoilt_model(f, file, change), "clip")
PARTS = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}
for what, content, names in [
    ("another class", {"_class_name": "AudioLDMPipeline"}, "AudioLDMPipeline"),
    ("code of its own", {"_class_name": ["evil", "Pipeline"], "_diffusers_version": "0.39.0"}, "evil"),
    ("parts missing", PARTS, "parts|missing|broken"),
]:
    CASES.add(
        f"pipeline folder: {what}",
        lambda f, content=content: (write_json(f / "model_index.json", content), load_pipeline(f)), names,
    )  # fmt: skip


def adapters(folder: Path, curriculum: Any = None, config: dict[str, Any] | None = None, weights: bytes = b"") -> Path:
    """Write a run folder of one adapter."""
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
    (step / "adapter_model.safetensors").write_bytes(weights or save({"x": torch.zeros(2)}))
    return folder / "run"


for what, options, names in [
    ("of another reward", {"curriculum": {"reward": "pickscore"}}, "pickscore"),
    ("of another kind", {"config": {"peft_type": "PROMPT_TUNING"}}, "LORA|PROMPT_TUNING"),
    ("with a start that changes the base weights", {"config": {"init_lora_weights": "pissa"}}, "init_lora_weights"),
    ("with targets that are not there", {"config": {"target_modules": ["no_such"]}}, "step_02"),
    ("with weights of other names", {}, "fit"),
    ("with weights that are no safetensors", {"weights": b"hello"}, "step_02"),
]:
    CASES.add(
        f"checkpoint: an adapter {what}",
        lambda f, options=options: StepSeries(
            load_reward(clip_folder(), device="cpu").module, adapters(f, **options), reward_name="tiny"
        ),
        names,
    )
for what, base in [
    ("itself", "itself"),
    ("code to import", "os:system"),
    ("nothing", None),
    ("a misspelt reward", "pikscore"),
]:
    CASES.add(
        f"checkpoint: a run that names {what} as its base",
        lambda f, base=base: load_reward(adapters(f, {"reward": str(f / "run") if base == "itself" else base})), "rewar",
    )  # fmt: skip


def imported(folder: Path, **files: Any) -> Any:
    """Import full checkpoints."""
    (folder / "from").mkdir()
    for name, content in files.items():
        torch.save(content(folder) if callable(content) else content, folder / "from" / f"{name}.pt")
    return import_series(folder / "from", folder / "run", reward())


for what, files, names in [
    ("none to import", {}, "no checkpoints"),
    ("two files for a step", {"Ct14": {}, "step_14": {}}, "two checkpoints"),
    ("a pickle that runs a command", {"Ct14": Payload}, "cannot be read"),
    ("of another model", {"Ct14": {"x": torch.zeros(2)}}, "another model|fit"),
]:
    CASES.add(f"checkpoints to import: {what}", lambda folder, files=files: imported(folder, **files), names)
CASES.add(
    "saved state: of something else",
    lambda folder: (torch.save({"a": 1}, folder / "state.pt"), read_state_file(folder)), "state",
)  # fmt: skip


def bank(folder: Path, pixels: np.ndarray, **options: Any) -> Any:
    from ttsnap_lib.finetuning import data

    buffer = io.BytesIO()
    np.save(buffer, pixels, **options)
    (folder / data._BANK).write_text(json.dumps({"schema": 1, "prompts": ["a cat"], "steps": [0]}))
    (folder / data._PIXELS).write_bytes(buffer.getvalue())
    return ImageBank.load(folder)


CASES.add("training pictures: a bank of another shape", lambda f: bank(f, np.zeros((2, 2), np.uint8)), "bank")
CASES.add("training pictures: a bank of pickles", lambda f: bank(f, np.array([{}]), allow_pickle=True), "bank")
CASES.each("training pictures", open_images, [("a folder that is not there", "none/at/all", "none/at/all")])

# -- notebooks, their parameters, sweeps -------------------------------------------------------------------------------

for what, content, names in [
    ("format 3", notebook("", nbformat=3), "format 4"),
    ("no cells", {"nbformat": 4}, "cells"),
    ("a cell that is text", notebook("", cells=["x = 1"]), "cells"),
    ("an import among the parameters", notebook("import os"), "line 1"),
    ("a call among the parameters", notebook("a = print(1)"), "line 1"),
    ("no Python", notebook("a = ("), "line 1"),
]:
    CASES.add(
        f"notebook: {what}",
        lambda f, content=content: (
            write_json(f / "n.ipynb", content),
            declared_parameters(read_notebook(f / "n.ipynb")),
        ),
        names,
    )
CASES.each(
    "notebook", find_notebook, [("misspelt", "simulat", "simulate"), ("climbing", "../../etc/passwd", "simulate")]
)
CASES.each(
    "notebook parameter",
    lambda given: resolve(DECLARED, given),
    [
        ("unknown", {"cuont": 1}, "Did you mean 'count'"),
        ("text for int", {"count": "3"}, "int"),
        ("true for int", {"count": True}, "int"),
        ("NaN", {"ratio": float("nan")}, "finite"),
        ("number for text", {"name": 5}, "str"),
        ("text in a list of int", {"steps": [2, "6"]}, "steps"),
        ("a number as key", {"extra": {1: 2.0}}, "extra"),
        ("an object", {"loose": object()}, "loose"),
        ("a word that is Python", {"count": from_text("__import__('os').getpid()", DECLARED["count"])}, "int"),
    ],
)
CASES.add(
    "notebook parameter: wrong before anything is written",
    lambda folder: plan("simulate", {"iterations": "many"}, folder=folder), "iterations",
)  # fmt: skip
CASES.files(
    "sweep",
    "grid.yaml",
    load_grid,
    [
        ("no notebook", "notebook:\n", "notebook"),
        ("unknown key", "notebook: simulate\ngird: {iterations: [1]}\n", "Did you mean 'grid'"),
        ("unknown axis", "notebook: simulate\ngrid: {iteratoins: [1]}\n", "Did you mean 'iterations'"),
        ("axis one number", "notebook: simulate\ngrid: {iterations: 5}\n", "list of values"),
        ("a parameter in two places", "notebook: simulate\nparameters: {seed: 1}\ngrid: {seed: [1]}\n", "elsewhere"),
        ("cases that are numbers", "notebook: simulate\ncases: {a: 1}\n", "cases"),
        ("a table that climbs", "notebook: simulate\ntable: ../../outside/secret\n", "table"),
    ],
)

test_bad_file = held(CASES)
