"""Files of every kind that the library reads: hostile YAML and JSON, prompts, manifests, rewards, pictures, stores."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.bad_input.drill import Cases
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib._images import read_image
from ttsnap_lib._reading import parse_yaml
from ttsnap_lib.curriculum import load_config
from ttsnap_lib.grids import load_grid
from ttsnap_lib.interop import export_ground_truth, export_published, import_ground_truth
from ttsnap_lib.parameters import read_notebook
from ttsnap_lib.paths import atomic_folder, atomic_write, write_json
from ttsnap_lib.prompts import check_prompts, read_prompts
from ttsnap_lib.published import import_published, read_values
from ttsnap_lib.report import render
from ttsnap_lib.rewards.steps import read_curriculum
from ttsnap_lib.search_record import SearchRecord
from ttsnap_lib.synthetic import synthetic_rewards
from ttsnap_lib.tensors import drop_missing, make_rewards, open_rewards, read_steps, save_rewards
from ttsnap_lib.trajectories import MANIFEST, Manifest, Trajectories, read_batches, verify

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
    ("nothing in it", "", ""),
    ("one word", "hello\n", ""),
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
    for what, make in {
        "a pipe that nobody writes": os.mkfifo,
        "a folder": os.mkdir,
        "a link to an endless device": lambda path: os.symlink("/dev/zero", path),
        "a link to itself": lambda path: os.symlink(path.name, path),
        "nothing": lambda path: None,
    }.items():
        CASES.add(
            "no file at all",
            f"{what}, as {reader}",
            lambda folder, name=name, read=read, make=make: read(made(folder, name, make)),
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
            (f"a path with a NUL, as {reader}", "a\0b.json", ""),
            (f"a name of 5000 letters, as {reader}", "x" * 5000 + ".json", ""),
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

for ending, files in {
    ".json": [
        ("a mapping with ids that climb", '{"../../x": "a cat"}', "JSON list"),
        ("a list with a number", '["a cat", 5]', "prompt 1"),
        ("a list with null", "[null]", "prompt 0"),
        ("a list in a list", '[["a cat"]]', "prompt 0"),
        ("an empty list", "[]", "no prompt"),
        ("half a surrogate pair", '["a \\ud800 cat"]', "not text"),
        ("a NUL in a prompt", '["a \\u0000 cat"]', "not text"),
        ("deep nesting", "[" * 100_000, "not JSON"),
    ],
    ".txt": [
        ("a blank line between", "a cat\n\na dog\n", "prompt 1 is blank"),
        ("nothing but line ends", "\n\n\n", "no prompt"),
        ("an empty file", "", "empty"),
        ("Latin-1", "caf\xe9\n".encode("latin-1"), "UTF-8"),
        ("UTF-16", "a cat\n".encode("utf-16"), "UTF-8"),
        ("a program", b"\x7fELF\x02\x01\x01\x00\x00", "not text"),
        ("one line of 20000 letters", "x" * 20_000, "too long"),
    ],
    ".csv": [
        ("rows of other length", "prompt,seed\na cat\n", "columns"),
        ("an open quote", 'prompt\n"a cat\n', "CSV"),
        ("a column twice", "prompt,prompt\na,b\n", "twice"),
        ("two text columns", "first,second\na,b\n", "several"),
        ("no header", "a small red ring on a green field\na cat\n", "header"),
        ("no rows", "prompt\n", "no prompt"),
        ("a field of 200000 letters", "prompt\n" + "x" * 200_000 + "\n", "CSV"),
    ],
    ".parquet": [("no Parquet", "PAR1 not really PAR1", "Parquet"), ("cut off", b"PAR1", "Parquet")],
    ".exe": [("an unknown ending", "a cat\n", "unknown prompt format")],
}.items():
    CASES.files("prompts", f"prompts{ending}", read_prompts, files)
CASES.each(
    "prompts",
    read_prompts,
    [
        ("no such split", "pocket:trian", "Did you mean 'train'"),
        ("more than the split has", "pocket:test:100000", "128"),
        ("a negative count", "pocket:test:-1", "pocket:test"),
        ("an empty name", " ", ""),
        ("a number for a file", 5, "list"),
        ("bytes", b"a cat", "list"),
        ("a mapping", {"0": "a cat"}, "list"),
        ("an empty list in Python", [], "no prompt"),
    ],
)
CASES.add("prompts", "a limit of none", lambda folder: read_prompts(["a cat"], limit=0), "limit")


def parquet_bomb(folder: Path) -> Any:
    """Read a small Parquet file that stands for many gigabytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000_000, np.int32)), pa.array(["x" * 5000]))
    pq.write_table(pa.table({"prompt": column}), folder / "p.parquet")
    assert (folder / "p.parquet").stat().st_size < 100_000
    return read_prompts(folder / "p.parquet")


CASES.add("prompts", "a Parquet file that swells to ten gigabytes", parquet_bomb, "at most")

# -- manifests ---------------------------------------------------------------------------------------------------------

IDENTITY = {"n_steps": 2, "height": 4, "width": 6, "image_format": "png", "seed": 0}
GOOD = {"schema": 1, "identity": IDENTITY, "prompts": ["a cat"], "images_per_prompt": 2, "provenance": []}


def manifest(folder: Path, **changes: Any) -> Manifest:
    """Read a manifest with changes, of its identity where they belong there; "gone" takes a key out."""
    content = {**GOOD, "identity": dict(IDENTITY)}
    for key, value in changes.items():
        part = content["identity"] if key in (*IDENTITY, "batch") and isinstance(content["identity"], dict) else content
        part[key] = value
        if value == "gone":
            del part[key]
    (folder / MANIFEST).write_text(json.dumps(content))
    return Manifest.read(folder)


for what, changes, names in [
    ("another schema", {"schema": 2}, "schema"),
    ("no schema", {"schema": "gone"}, "schema"),
    ("no identity", {"identity": "gone"}, "identity"),
    ("identity a list", {"identity": list(IDENTITY)}, "identity"),
    ("prompts one text", {"prompts": "a cat"}, "prompts"),
    ("prompts of numbers", {"prompts": [5]}, "prompt 0"),
    ("prompts blank", {"prompts": [" "]}, "prompt 0"),
    ("no prompts", {"prompts": []}, "prompt"),
    ("no images", {"images_per_prompt": 0}, "images_per_prompt"),
    ("a billion images", {"images_per_prompt": 10**9}, "1000000"),
    ("images as text", {"images_per_prompt": "2"}, "images_per_prompt"),
    ("a billion steps", {"n_steps": 10**9}, "n_steps"),
    ("steps negative", {"n_steps": -2}, "n_steps"),
    ("steps as text", {"n_steps": "2"}, "n_steps"),
    ("no steps", {"n_steps": "gone"}, "n_steps"),
    ("a picture of 10^12 pixels", {"height": 10**6, "width": 10**6}, "height x width"),
    ("no height", {"height": "gone"}, "height"),
    ("width negative", {"width": -6}, "width"),
    ("format that climbs", {"image_format": "/../../../outside/secret.txt"}, "image_format"),
    ("format not in use", {"image_format": "bmp"}, "image_format"),
    ("format a list", {"image_format": ["png"]}, "image_format"),
    ("seed as text", {"seed": "0"}, "seed"),
    ("batch a number", {"batch": 8}, "batch"),
    ("batch of none", {"batch": {"size": 0}}, "batch"),
    ("provenance of texts", {"provenance": ["me"]}, "provenance"),
]:
    CASES.add("manifest", what, lambda folder, changes=changes: manifest(folder, **changes), names)

# -- pictures and trajectory folders -----------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int, height: int, data: bytes | None = None, extra: bytes = b"", depth: int = 8, color: int = 2
) -> bytes:
    """Return the bytes of a PNG that claims a size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = zlib.compress(bytes((width * 3 + 1) * height)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def saved(image: Image.Image, **options: Any) -> bytes:
    """Return an image's file."""
    import io

    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


SVG = '<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
PICTURES = [
    ("no bytes", b"", "no PNG"),
    ("text", "hello", "no PNG"),
    ("a bomb of 60000 x 60000", png(60_000, 60_000, zlib.compress(bytes(10_000_000))), "size|large|damaged"),
    ("a bomb in a text chunk", png(6, 4, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))), "damaged"),
    ("half of it", png(6, 4)[:40], "damaged|no PNG"),
    ("no picture data", png(6, 4, b""), "damaged"),
    ("another size", png(6, 5), "another size"),
    ("size zero", png(0, 0, b""), ""),
    ("gray", saved(Image.new("L", (6, 4)), format="PNG"), "RGB"),
    ("a palette", saved(Image.new("P", (6, 4)), format="PNG"), "RGB"),
    ("with transparency", saved(Image.new("RGBA", (6, 4)), format="PNG"), "RGB"),
    ("a JPEG by the name of PNG", saved(Image.new("RGB", (6, 4)), format="JPEG"), "no PNG"),
    ("a TIFF by the name of PNG", saved(Image.new("RGB", (6, 4)), format="TIFF"), "no PNG"),
    ("a vector graphic", SVG, "no PNG"),
    ("PostScript", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n", "no PNG"),
    ("WebP header alone", b"RIFF\x10\x00\x00\x00WEBPVP8L", ""),
]
CASES.files("picture", "s00.png", lambda path: read_image(path, (4, 6)), PICTURES)
CASES.files(
    "picture",
    "big.png",
    read_image,
    [("a bomb, where no size is known", png(60_000, 60_000, zlib.compress(bytes(10_000_000))), "large|damaged")],
)


def trajectories(folder: Path) -> Path:
    """Fill a small trajectory folder by hand."""
    folder.mkdir(exist_ok=True)
    manifest(folder)
    for image in range(2):
        (folder / "p0000" / f"id{image:03d}").mkdir(parents=True)
        for step in range(2):
            (folder / "p0000" / f"id{image:03d}" / f"s{step:02d}.png").write_bytes(png(6, 4))
    return folder


def linked(folder: Path, part: str, target: str) -> Path:
    """Return a trajectory folder in which `part` is a symbolic link."""
    place = trajectories(folder) / part
    if place.is_dir():
        place.rename(folder.parent / "outside" / "moved")
        shutil.move(folder.parent / "outside" / "moved", folder / "elsewhere")
        target = str(folder / "elsewhere")
    else:
        place.unlink()
    place.symlink_to(target)
    return folder


LINKS = {
    "a prompt's folder": "p0000",
    "an image's folder": "p0000/id001",
    "a picture": "p0000/id001/s01.png",
}
for what, part in LINKS.items():
    CASES.add(
        "trajectory folder",
        f"{what} is a link, read in batches",
        lambda folder, part=part: list(read_batches(linked(folder, part, "../../../outside/secret.txt"))),
        "missing|incomplete",
    )
    CASES.add(
        "trajectory folder",
        f"{what} is a link, read alone",
        lambda folder, part=part: Trajectories(linked(folder, part, "../../../outside/secret.txt")).read(0, 1, 1),
        "link",
    )


def link_is_foreign(folder: Path, part: str) -> bool:
    report = verify(linked(folder, part, "../../../outside/secret.txt"))
    return not report.ok and bool(report.repairs()) and report.count("foreign") >= 1


for what, part in LINKS.items():
    CASES.add(
        "trajectory folder",
        f"{what} is a link, verified",
        lambda folder, part=part: link_is_foreign(folder, part),
        skip="`ttsnap verify` lists the link as foreign and the pictures as missing",
    )


def pipe_for_a_picture(folder: Path) -> Path:
    place = trajectories(folder) / "p0000" / "id000" / "s00.png"
    place.unlink()
    os.mkfifo(place)
    return folder


CASES.add(
    "trajectory folder", "a picture is a pipe", lambda f: Trajectories(pipe_for_a_picture(f)).read(0, 0, 0), "file"
)
CASES.add("trajectory folder", "no folder", lambda folder: Trajectories(folder / "none"), "no trajectory folder")
CASES.add("trajectory folder", "a step out of range", lambda f: list(read_batches(trajectories(f), steps=[2])), "steps")
CASES.add(
    "trajectory folder", "a prompt out of range", lambda f: list(read_batches(trajectories(f), prompts=[1])), "prom"
)


def broken_journal(folder: Path) -> bool:
    journal = trajectories(folder) / ".ttsnap" / "checksums" / "x.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_bytes(
        b'{"prompt": 0}\n[1]\n\xff\xfe\n{"prompt": [], "image": {}, "crc32": {"a": 1}}\n' + b"[" * 100_000
    )
    return verify(folder).ok


CASES.add(
    "trajectory folder",
    "a journal of checksums that is garbage",
    broken_journal,
    skip="lines that are no checksums are passed over; pictures are decoded instead",
)

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
    from ttsnap_lib.runner import Run

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


def text_of(length: int) -> dict[str, Any]:
    return {"name": "fixed_length_utf32", "configuration": {"length_bytes": length}}


for what, part, changes, names in [
    ("a shape of 10^24", "base", {"shape": [10**6] * 4}, "at most"),
    ("a coordinate of 10^12", "prompt", {"shape": [10**12]}, "at most"),
    ("a chunk of 10^12 values", "base", {"chunk_grid": grid(1, 10**6, 10**6, 4)}, "chunk"),
    ("a chunk of nothing", "base", {"chunk_grid": grid(0, 0, 0, 0)}, "chunk_shape"),
    (
        "chunks that are text",
        "base",
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": "all"}}},
        "chu",
    ),
    ("no chunks", "base", {"chunk_grid": None}, "chunk_shape"),
    ("a negative shape", "base", {"shape": [1, -2, 3, 4]}, "shape"),
    ("shape a text", "base", {"shape": "2x3"}, "shape"),
    ("names of a gigabyte", "reward", {"data_type": text_of(2**40)}, "at most"),
    ("an unknown codec", "base", {"codecs": [{"name": "pickle"}]}, "opened|read"),
    ("an unknown type", "base", {"data_type": "float31"}, "opened|read"),
    ("values of integers", "base", {"data_type": "int32", "fill_value": 0}, "float32|int32"),
    ("another shape than its neighbour", "base", {"shape": [1, 2, 3, 5]}, ""),
    ("a scale on the values", "base", {"attributes": {"scale_factor": 1000.0}}, "scale_factor"),
    ("another node type", "", {"node_type": "array"}, "group"),
    ("format 2 in name", "", {"zarr_format": 2}, "format 3"),
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


def linked_store(folder: Path) -> Any:
    target = store(folder) / "base"
    target.rename(folder / "base")
    target.symlink_to(folder / "base")
    return open_rewards(folder / "r.zarr")


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
CASES.add("Zarr store", "a variable behind a link", linked_store, "symbolic link")
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
CASES.each(
    "prompts", check_prompts, [("a prompt of bytes", [b"a cat"], "prompt 0"), ("a prompt None", [None], "prompt 0")]
)
CASES.each(
    "hostile YAML",
    lambda text: parse_yaml(text, "value", remedy="Quote it."),
    [
        ("a set with a value", "!!set {a: 1, b: [}", ""),
        ("binary that is none", "!!binary é", ""),
        ("omap", "!!omap 5", ""),
    ],
)
