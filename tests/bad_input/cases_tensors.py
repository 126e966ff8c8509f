"""Reward values: published files, ground truth, Zarr stores; and names that climb out of a folder."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tests.bad_input.cases_pictures import trajectories
from tests.bad_input.drill import Cases
from ttsnap_lib.files import write_json
from ttsnap_lib.tensors.published import (
    export_ground_truth,
    export_published,
    import_ground_truth,
    import_published,
    read_values,
)
from ttsnap_lib.tensors.tensor import (
    drop_missing,
    make_rewards,
    open_rewards,
    read_steps,
    save_rewards,
    synthetic_rewards,
)

CASES = Cases()

# -- published rewards and ground truth --------------------------------------------------------------------------------

CASES.files(
    "published rewards",
    "p2_i2_s00.yaml",
    read_values,
    [
        ("a list at the top", "- 1.0\n", "mapping"),
        ("prompt 0 is missing", "1: [1.0]\n2: [1.0]\n", "prompt 0 is missing"),
        ("a prompt named by text", "0: [1.0]\np1: [1.0]\n", "mapping from prompt"),
        ("a prompt named true", "0: [1.0]\ntrue: [1.0]\n", "mapping from prompt"),
        ("uneven rows", "0: [1.0, 2.0]\n1: [1.0]\n", "prompt 1"),
        ("an empty row", "0: []\n", "prompt 0"),
        ("a text among the numbers", "0: [1.0, high]\n", "image 1"),
        ("null among the numbers", "0: [1.0, null]\n", "image 1"),
        ("true among the numbers", "0: [true]\n", "image 0"),
        ("NaN", "0: [.nan]\n", "finite"),
        ("infinity", "0: [-.inf]\n", "finite"),
        ("a number beyond float32", "0: [1.0e+39]\n", "32 bits"),
        ("a number beyond floats", f"0: [{10**400}]\n", "32 bits"),
        ("numbers in quotes", "0: ['1.0']\n", "image 0"),
    ],
)
CASES.files(
    "ground truth",
    "gt.yaml",
    import_ground_truth,
    [
        ("a list at the top", "- 1.0\n", "mapping"),
        ("a prompt that climbs", "../p0000: {id000: 1.0}\n", "digits"),
        ("a prompt of 30 digits", f"p{'9' * 30}: {{id000: 1.0}}\n", "digits"),
        ("a prompt by two names", "p0: {id000: 1.0}\np0000: {id000: 2.0}\n", "once"),
        ("an image by two names", "p0000: {id0: 1.0, id000: 2.0}\n", "once"),
        ("an image that is a number", "p0000: {0: 1.0}\n", "digits"),
        ("other images for a prompt", "p0000: {id000: 1.0}\np0001: {id001: 1.0}\n", "prompt 1"),
        ("a text for a reward", "p0000: {id000: high}\n", "id000"),
        ("a number beyond floats", f"p0000: {{id000: {10**400}}}\n", "32 bits"),
        ("a row that is no mapping", "p0000: [1.0]\n", "p0000"),
    ],
)


def published(folder: Path, files: dict[str, str], **options: Any) -> Any:
    """Import a published folder made of `files`."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return import_published(folder, "flux", **options)


ROW = "0: [1.0, 2.0]\n"
for what, files, names in [
    ("no folders", {}, "flux"),
    ("an empty folder", {"flux_imr_val_base/readme.txt": ""}, "steps"),
    ("a step is missing", {"flux_imr_val_base/p1_i2_s01.yaml": ROW}, "steps"),
    (
        "another number of images at a step",
        {"flux_imr_val_base/p1_i2_s00.yaml": ROW, "flux_imr_val_base/p1_i2_s01.yaml": "0: [1.0]\n"},
        "shape",
    ),
    (
        "noise-aware beyond the base steps",
        {"flux_imr_val_base/p1_i2_s00.yaml": ROW, "flux_imr_val_naft/p1_i2_s07.yaml": ROW},
        "7",
    ),
]:
    CASES.add("published rewards", what, lambda folder, files=files: published(folder, files), names)
WHOLE = {"flux_imr_val_base/p1_i2_s00.yaml": ROW}
CASES.add("published rewards", "too few prompts", lambda f: published(f, WHOLE, prompts=[]), "prompts")
CASES.add("published rewards", "a reward that is not there", lambda f: published(f, WHOLE, rewards=["hpsv2"]), "hps")

# -- names that climb out of a folder ----------------------------------------------------------------------------------

TENSOR = synthetic_rewards(2, 3, 4)
CLIMBING = ["../outside/x", "/tmp/x", "a/b", "..", ".hidden", "a\0b", "a\nb", "x" * 200, "", " ", "a:b", 5, None]
for number, name in enumerate(CLIMBING):
    CASES.add(
        "name that climbs", f"model {number} of an export", lambda f, n=name: export_published(TENSOR, f, n), "model"
    )
for number, name in enumerate(CLIMBING[:9]):
    other = make_rewards(np.ones((1, 1, 2, 1)), rewards=[str(name)])
    CASES.add(
        "name that climbs",
        f"reward {number} of an export",
        lambda folder, other=other: export_published(other, folder, "flux"),
        "reward name",
    )
    CASES.add("name that climbs", f"model {number} of an import", lambda f, n=name: import_published(f, n), "model")


def result_name(folder: Path, name: Any) -> None:
    from ttsnap_lib.runs.run import Run

    Run(folder).save_table(None, name)


for number, name in enumerate(CLIMBING):
    CASES.add("name that climbs", f"table {number} of a run", lambda f, n=name: result_name(f, n), "name of a result")
CASES.add(
    "ground truth", "of two rewards, none named",
    lambda f: export_ground_truth(synthetic_rewards(2, 2, 2, ("a", "b")), f / "x.yaml"), "Name the reward",
)  # fmt: skip
CASES.add(
    "published rewards", "export with a missing value",
    lambda f: export_published(make_rewards(np.full((1, 1, 1, 1), np.nan), rewards=["a"]), f, "flux"), "missing",
)  # fmt: skip

# -- stores ------------------------------------------------------------------------------------------------------------


def store(folder: Path) -> Path:
    """Return a good store."""
    return save_rewards(TENSOR, folder / "r.zarr")


def damaged(folder: Path, part: str, **changes: Any) -> Any:
    """Open a store after changing the metadata of a variable ("" for the group), and read it."""
    path = store(folder) / part / "zarr.json"
    about = json.loads(path.read_text())
    for key, value in changes.items():
        about[key] = value
    path.write_text(json.dumps(about))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_steps(open_rewards(folder / "r.zarr")["base"], [0])


def grid(*shape: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


for what, part, changes, names in [
    ("a shape of 10^24", "base", {"shape": [10**6] * 4}, "opened"),
    ("a chunk of nothing", "base", {"chunk_grid": grid(0, 0, 0, 0)}, "read"),
    ("no chunks", "base", {"chunk_grid": None}, "opened"),
    ("a negative shape", "base", {"shape": [1, -2, 3, 4]}, "opened"),
    ("shape a text", "base", {"shape": "2x3"}, "opened"),
    ("an unknown codec", "base", {"codecs": [{"name": "pickle"}]}, "opened|read"),
    ("an unknown type", "base", {"data_type": "float31"}, "opened|read"),
    ("values of integers", "base", {"data_type": "int32", "fill_value": 0}, "float32|int32"),
    ("another shape than its neighbour", "base", {"shape": [1, 2, 3, 5]}, "conflicting sizes"),
    ("another node type", "", {"node_type": "array"}, "opened"),
    ("format 2 in name", "", {"zarr_format": 2}, "base"),
    ("a later schema", "", {"attributes": {"schema_version": 99}}, "at most 1"),
    ("a schema that is a list", "", {"attributes": {"schema_version": [1]}}, "schema"),
]:
    CASES.add("Zarr store", what, lambda f, part=part, changes=changes: damaged(f, part, **changes), names)


def pickled_store(folder: Path) -> Any:
    """Open a store of format 2 whose chunks are pickles: reading one would run it."""
    import pickle

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {folder.parent / 'outside' / 'owned'}",)

    where = folder / "r.zarr"
    write_json(where / ".zgroup", {"zarr_format": 2})
    for name, dims in (("base", 4), ("reward", 1)):
        about = {
            "zarr_format": 2, "shape": [1] * dims, "chunks": [1] * dims, "dtype": "|O", "fill_value": None, "order": "C",
            "compressor": None, "filters": [{"id": "pickle", "protocol": 5}],
        }  # fmt: skip
        write_json(where / name / ".zarray", about)
        (where / name / ".".join("0" * dims)).write_bytes(pickle.dumps(Payload()))
    return open_rewards(where)


def without(folder: Path, part: str) -> Any:
    """Open a store after removing a part, and read it."""
    shutil.rmtree(store(folder) / part)
    return open_rewards(folder / "r.zarr")


def spoilt_chunk(folder: Path, content: bytes) -> Any:
    path = next(path for path in (store(folder) / "base" / "c").rglob("*") if path.is_file())
    path.write_bytes(content)
    return read_steps(open_rewards(folder / "r.zarr")["base"], [0])


def zipped(folder: Path) -> Any:
    import zipfile

    with zipfile.ZipFile(folder / "r.zarr", "w") as file:
        file.writestr("../../outside/owned", "x")
        file.writestr("zarr.json", "{}")
    return open_rewards(folder / "r.zarr")


CASES.add("Zarr store", "chunks that are pickles", pickled_store, "format 3")
CASES.add("Zarr store", "without base", lambda folder: without(folder, "base"), "base")
CASES.add("Zarr store", "without steps", lambda folder: without(folder, "step"), "step")
CASES.add("Zarr store", "a chunk of garbage", lambda folder: spoilt_chunk(folder, b"garbage"), "damaged")
CASES.add("Zarr store", "a chunk of no bytes", lambda folder: spoilt_chunk(folder, b""), "damaged")
CASES.add("Zarr store", "a zip with a path that climbs", zipped, "Zarr folder")
CASES.add("Zarr store", "a picture folder", lambda folder: open_rewards(trajectories(folder)), "Zarr")
CASES.add("Zarr store", "a name that does not ship", lambda folder: open_rewards("pocket-fluks"), "pocket-fluks")


def lost_chunk(folder: Path) -> bool:
    for path in (store(folder) / "base" / "c").rglob("*"):
        if path.is_file():
            path.unlink()
    values = open_rewards(folder / "r.zarr")["base"].values
    return bool(np.isnan(values).all())


CASES.add("Zarr store", "a chunk is lost", lost_chunk, skip="its values read as NaN, which nothing takes for a reward")
CASES.add(
    "Zarr store", "nothing left after dropping what is missing",
    lambda f: drop_missing(make_rewards(np.full((1, 2, 2, 2), np.nan), rewards=["a"])), "variable|again",
)  # fmt: skip
