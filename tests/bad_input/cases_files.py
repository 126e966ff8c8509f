"""Files of text that the library reads: hostile YAML and JSON, no files at all, prompts, reports, records."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.bad_input.drill import Cases
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.files import atomic_folder, atomic_write, parse_yaml, write_json
from ttsnap_lib.finetuning.config import load_config
from ttsnap_lib.live.record import SearchRecord
from ttsnap_lib.rewards.checkpoints import read_curriculum
from ttsnap_lib.runs.parameters import read_notebook
from ttsnap_lib.runs.report import render
from ttsnap_lib.runs.sweep import load_grid
from ttsnap_lib.tensors.published import import_ground_truth, import_published, read_values
from ttsnap_lib.tensors.tensor import open_rewards
from ttsnap_lib.trajectories.layout import MANIFEST, Manifest, read_image
from ttsnap_lib.trajectories.prompts import check_prompts, read_prompts
from ttsnap_lib.trajectories.read import Trajectories

CASES = Cases()

# -- YAML and JSON, whoever reads them ---------------------------------------------------------------------------------

YAML_READERS = {
    "schedule": Schedule.from_yaml,
    "cost file": CostModel.load,
    "sweep grid": load_grid,
    "finetuning configuration": load_config,
    "published rewards": read_values,
    "ground truth": import_ground_truth,
}
OWNED = "../outside/owned"
ALIAS_BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{k}: &a{k} [{','.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 12)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{k}: &a{k}\n  <<: [{','.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 12)
)
HOSTILE_YAML = [
    ("object tag", f"steps: !!python/object/apply:os.system ['touch {OWNED}']\n", "ConstructorError"),
    ("object tag that opens a file", f"!!python/object/apply:builtins.open ['{OWNED}', w]\n", "ConstructorError"),
    ("name tag", "!!python/name:os.system\n", "ConstructorError"),
    ("alias bomb", ALIAS_BOMB, "aliases"),
    ("merge bomb", MERGE_BOMB, "aliases"),
    ("alias inside itself", "a: &a [*a]\n", "inside itself"),
    ("deep nesting in one line", "[" * 20_000, "100 levels"),
    ("deep nesting of blocks", "- " * 50_000 + "1\n", "100 levels"),
    ("a number of 5000 digits", f"0: [{'9' * 5000}]\n", "cannot be read"),
    ("a month that is not", "0: 2020-99-99\n", "month"),
    ("an integer of nothing", "0: !!int ''\n", "IndexError"),
    ("a key twice", "0: [1.0]\n0: [2.0]\n", "twice"),
    ("cut off", "steps: [1, 2", "cannot be read"),
    ("bytes that are no text", b"\xff\xfe\x00\x01steps", "cannot be read"),
    ("a NUL in it", "steps: a\0b\n", "cannot be read"),
    ("nothing in it", "", "mapping"),
    ("one word", "hello\n", "mapping"),
]
for reader, read in YAML_READERS.items():
    CASES.files("hostile YAML", "file.yaml", read, [(f"{what}, as {reader}", *rest) for what, *rest in HOSTILE_YAML])


def in_folder(name: str, read: Any) -> Any:
    """Return a reader of a folder that holds the file `name`."""

    def run(path: Path) -> Any:
        os.replace(path, path.parent / name)
        return read(path.parent)

    return run


JSON_READERS = {
    "cost file": CostModel.load,
    "notebook": read_notebook,
    "trajectory manifest": in_folder(MANIFEST, Manifest.read),
    "curriculum": in_folder("curriculum.json", read_curriculum),
    "search record": in_folder("record.json", SearchRecord.load),
}
HOSTILE_JSON = [
    ("deep nesting", "[" * 100_000, "RecursionError|not whole JSON"),
    ("cut off", '{"step": 1, "ver', "not whole JSON"),
    ("a list at the top", "[1, 2]", "mapping"),
    ("a number of 5000 digits", '{"step": ' + "9" * 5000 + "}", "not whole JSON"),
    ("bytes that are no text", b"\xff\xfe{}", "not whole JSON"),
    ("nothing in it", "", "not whole JSON"),
]
for reader, read in JSON_READERS.items():
    name = "file.ipynb" if reader == "notebook" else "file.json"
    CASES.files("hostile JSON", name, read, [(f"{what}, as {reader}", *rest) for what, *rest in HOSTILE_JSON])
    if reader != "notebook":  # other programs write notebooks
        twice = '{"schema": 1, "schema": 1, "step": NaN, "verify": 1}'
        CASES.files("hostile JSON", name, read, [(f"a key twice, as {reader}", twice, "twice|NaN")])
CASES.each(
    "hostile YAML",
    lambda text: parse_yaml(text, "value", remedy="Quote it."),
    [
        ("a set with a value", "!!set {a: 1, b: [}", "flow node"),
        ("binary that is none", "!!binary é", "base64"),
        ("omap", "!!omap 5", "ordered map"),
    ],
)

# -- things that are no files ------------------------------------------------------------------------------------------

PATH_READERS = {
    **{name: (f"f{k}.yaml", read) for k, (name, read) in enumerate(YAML_READERS.items())},
    "JSON cost file": ("f.json", CostModel.load),
    "notebook": ("f.ipynb", read_notebook),
    "prompts": ("f.txt", read_prompts),
    "picture": ("f.png", read_image),
}


def made(folder: Path, name: str, make: Any) -> Path:
    """Return the path `name` in `folder` after `make` has made it."""
    make(folder / name)
    return folder / name


for reader, (name, read) in PATH_READERS.items():
    for what, make, names in [
        ("a pipe that nobody writes", os.mkfifo, "not a file"),
        ("a folder", os.mkdir, "not a file|Is a directory"),
        ("a link to an endless device", lambda path: os.symlink("/dev/zero", path), "not a file"),
        ("a link to itself", lambda path: os.symlink(path.name, path), "symbolic links|not a file|does not exist"),
        ("nothing", lambda path: None, "No such file|does not exist|missing"),
    ]:
        CASES.add(
            "no file at all",
            f"{what}, as {reader}",
            lambda folder, name=name, read=read, make=make: read(made(folder, name, make)),
            f"{names}|a YAML file or one of" if reader == "finetuning configuration" else names,
        )
for reader, read in {
    "schedule": lambda path: Schedule.from_yaml(Path(path)),
    "cost file": CostModel.load,
    "sweep grid": load_grid,
    "prompts": read_prompts,
    "reward tensor": open_rewards,
    "trajectories": Trajectories,
    "published rewards": lambda path: import_published(path, "flux"),
    "report": render,
    "picture": read_image,
}.items():
    CASES.each(
        "no file at all",
        read,
        [
            (f"a path with a NUL, as {reader}", "a\0b.json", "without NUL"),
            (f"a name of 5000 letters, as {reader}", "x" * 5000 + ".json", "at most 255 bytes"),
        ],
    )

# -- places that cannot be written -------------------------------------------------------------------------------------


def write_into(folder: Path, part: str) -> None:
    """Write to `part` where ``file`` is a file and ``full`` a folder with something in it."""
    (folder / "file").write_text("x")
    (folder / "full" / "x").mkdir(parents=True)
    with atomic_write(folder / part) as file:
        file.write(b"y")


for part, what in (("file/x", "below a file"), ("full", "in the place of a folder"), ("n" * 254, "of a long name")):
    CASES.add("unwritable place", what, lambda folder, part=part: write_into(folder, part), "cannot write")


def folder_below_a_file(folder: Path) -> None:
    (folder / "file").write_text("x")
    with atomic_folder(folder / "file" / "store"):
        pass


CASES.add("unwritable place", "a folder below a file", folder_below_a_file, "cannot write")

# -- prompts -----------------------------------------------------------------------------------------------------------

CASES.each(
    "prompts",
    read_prompts,
    [
        ("no such split", "pocket:trian", "Did you mean 'train'"),
        ("more than the split has", "pocket:test:100000", "128"),
        ("a negative count", "pocket:test:-1", "pocket:test"),
        ("an empty name", " ", "non-empty"),
        ("a number for a file", 5, "list"),
        ("bytes", b"a cat", "list"),
        ("a mapping", {"0": "a cat"}, "list"),
        ("an empty list in Python", [], "no prompt"),
    ],
)
CASES.add("prompts", "a limit of none", lambda folder: read_prompts(["a cat"], limit=0), "limit")


CASES.each(
    "prompts", check_prompts, [("a prompt of bytes", [b"a cat"], "prompt 0"), ("a prompt None", [None], "prompt 0")]
)

# -- reports and records -----------------------------------------------------------------------------------------------


def reported(folder: Path, files: dict[str, Any]) -> Any:
    """Render a folder of `files`."""
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return render(folder)


RUN = {"notebook": "simulate", "status": "complete", "parameters": {}}
for what, files, names in [
    ("an empty folder", {}, "nothing to report"),
    ("a manifest that is a list", {"manifest.json": [1]}, "nothing to report"),
    ("runs that are numbers", {"sweep.json": {"runs": [1, 2]}}, "broken"),
    ("runs that are no list", {"sweep.json": {"runs": 5, "notebook": "x", "name": "y"}}, "broken"),
    ("parameters that are a list", {"manifest.json": {**RUN, "parameters": [1]}}, "broken"),
    ("an error that is text", {"manifest.json": {**RUN, "error": "x"}}, "broken"),
    ("a table that is none", {"manifest.json": RUN, "results.csv": 'a,b\n1,2,3\n"x'}, "broken"),
    ("a notebook that is none", {"manifest.json": RUN, "executed.ipynb": '{"cells": 5}'}, "broken"),
    ("inputs that are a list", {"manifest.json": {**RUN, "inputs": [1]}}, "broken"),
]:
    CASES.add("report", what, lambda folder, files=files: reported(folder, files), names)


def scripts_are_text(folder: Path) -> bool:
    evil = "<script>alert(1)</script>"
    page = reported(folder, {"manifest.json": {**RUN, "parameters": {evil: evil}, "notebook": evil}}).read_text()
    return "<script" not in page and "&lt;script&gt;" in page


CASES.add("report", "a script in names and parameters", scripts_are_text, skip="it is shown as text; no script runs")

for what, content in [
    ("unknown field", {"x": 1}),
    ("fields of other kinds", {"scores": "x", "stages": 3}),
    ("a stage of unknown fields", {"scores": [], "stages": [{"x": 1}]}),
]:
    CASES.add(
        "search record", what,
        lambda f, content=content: (write_json(f / "record.json", content), SearchRecord.load(f)), "record",
    )  # fmt: skip
