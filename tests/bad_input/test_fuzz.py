"""Random damage: whatever comes in, a reader gives a checked value or a TTSnapError with value, bound and remedy."""

from __future__ import annotations

import functools
import io
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from tests.bad_input.drill import check_message, time_limit
from tests.bad_input.samples import DECLARED, GOOD, IDENTITY, notebook, png, saved
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.errors import TTSnapError
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.rewards.checkpoints import read_state
from ttsnap_lib.runs.parameters import declared_parameters, from_text, read_notebook, resolve
from ttsnap_lib.runs.sweep import GridSpec, load_grid, parse_grid
from ttsnap_lib.tensors.published import import_ground_truth, read_values
from ttsnap_lib.tensors.tensor import open_rewards, read_steps, save_rewards, synthetic_rewards
from ttsnap_lib.trajectories.layout import MANIFEST, Manifest, read_image
from ttsnap_lib.trajectories.prompts import read_prompts

QUICK, LONG = 12, 1500

numbers = st.one_of(
    st.integers(), st.integers(-3, 40), st.floats(), st.sampled_from([10**400, -1, 0, 1, 2**63, 1e-320])
)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=12), st.binary(max_size=6))
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
plain = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=12)
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Return copies of a file with some bytes changed, and perhaps an end cut off or added."""
    places = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6)

    def damage(changes: list[tuple[int, int]], end: int, more: bytes) -> bytes:
        out = bytearray(content)
        for place, value in changes:
            out[place] = value
        return bytes(out[: len(content) - end]) + more

    ends = st.one_of(st.just(0), st.integers(0, len(content)))
    return st.builds(damage, places, ends, st.sampled_from([b"", b"", b"\0", b"[" * 300, b"\xff\n"]))


def mapping_of(*names: str) -> st.SearchStrategy[dict]:
    """Return mappings of some known keys, now and then an unknown one, to anything."""
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=4), values, max_size=5)


def from_file(name: str, read: Callable[[Path], Any]) -> Callable[[Any], Any]:
    """Return a function of a file's content (JSON where it is no bytes)."""

    def run(content: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            return read(path)

    return run


def manifest_of(path: Path) -> None:
    found = Manifest.read(path.parent)
    assert 1 <= found.n_steps <= 10_000 and found.images_per_prompt >= 1
    assert found.image_format in ("png", "webp") and all(isinstance(text, str) and text for text in found.prompts)


def picture_of(path: Path) -> None:
    pixels = read_image(path, (4, 6))
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8


def rewards_of(path: Path) -> None:
    found = read_values(path)
    assert found.ndim == 2 and found.dtype == np.float32 and np.isfinite(found).all()


def plain_parameters(given: Any) -> None:
    resolved = resolve(DECLARED, given)
    assert repr(json.loads(json.dumps(resolved, ensure_ascii=False, allow_nan=False).encode())) == repr(resolved)


def word(text: str) -> None:
    for parameter in DECLARED.values():
        resolve(DECLARED, {parameter.name: from_text(text, parameter)})


def prompts_of(path: Path) -> None:
    assert all(isinstance(text, str) and text.strip() for text in read_prompts(path))


def cost_of(content: Any) -> None:
    assert np.isfinite(CostModel.from_dict(content).total(1))


def grid_of(content: Any) -> None:
    assert isinstance(parse_grid({"notebook": "simulate", **content}), GridSpec)


@functools.cache
def store_metadata() -> dict[str, bytes]:
    """Return the metadata of a good store, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_rewards(synthetic_rewards(2, 3, 4), Path(folder) / "r.zarr")
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def store_of(damage: tuple[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**store_metadata(), damage[0]: damage[1]}.items():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_bytes(content)
        found = open_rewards(folder)
        assert found["base"].dtype.kind == "f"
        read_steps(found["base"], [0])


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3), "b": torch.ones(2)}, buffer)
    return buffer.getvalue()


def parquet_file() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a cat", "a dog"]}), buffer)
    return buffer.getvalue()


YAML = st.one_of(
    st.text(st.sampled_from("abp0129id:-[]{}&*!,\n '\"|>?%@#.\t\0é"), max_size=60).map(lambda text: text.encode()),
    damaged(b"0:\n- 1.5\n- -2.0\n1:\n- 3.0\n- 4.0e-05\n"),
    damaged(b"p0000: {id000: 1.5, id001: 2}\np0001: {id000: 1, id001: 2}\n"),
    damaged(b"steps: &s [2, 6]\nkeep_ratios: [0.5, 0.25]\n"),
    damaged(b"notebook: simulate\ngrid:\n  iterations: [1, 2, 3]\n"),
)
COST_KEYS = ("step", "verify", "decode", "n_steps", "unit", "accounting", "preview_decode", "per_prompt")
GRID_KEYS = ("name", "parameters", "grid", "cases", "metric", "table")
FUZZ: dict[str, tuple[st.SearchStrategy, Callable[[Any], Any]]] = {
    "schedule": (st.tuples(values, values), lambda given: Schedule(*given)),
    "schedule file": (YAML, from_file("s.yaml", Schedule.from_yaml)),
    "cost": (mapping_of(*COST_KEYS).map(lambda fields: {"step": 1, "verify": 1, **fields}), cost_of),
    "cost file": (YAML, from_file("c.yaml", CostModel.load)),
    "finetuning settings": (mapping_of("steps", "mse", "batch_size", "method", "seed"), CurriculumConfig.from_dict),
    "published rewards": (YAML, from_file("r.yaml", rewards_of)),
    "ground truth": (YAML, from_file("g.yaml", import_ground_truth)),
    "sweep": (mapping_of(*GRID_KEYS), grid_of),
    "sweep axis": (plain.map(lambda axis: {"grid": {"seed": axis}}), grid_of),
    "sweep file": (YAML, from_file("g.yaml", load_grid)),
    "manifest": (damaged(json.dumps(GOOD).encode()), from_file(MANIFEST, manifest_of)),
    "manifest values": (
        st.tuples(st.sampled_from([*IDENTITY, "batch"]), plain).map(
            lambda one: {**GOOD, "identity": {**IDENTITY, one[0]: one[1]}}
        ),
        from_file(MANIFEST, manifest_of),
    ),
    "PNG": (damaged(png(6, 4)), from_file("s00.png", picture_of)),
    "WebP": (
        damaged(saved(Image.new("RGB", (6, 4), "red"), format="WEBP", lossless=True)),
        from_file("s.webp", picture_of),
    ),
    "safetensors": (damaged(save({"a": torch.zeros(3), "b": torch.ones(2)})), from_file("w.safetensors", read_state)),
    "torch file": (damaged(torch_file()), from_file("w.pt", read_state)),
    "prompts, text": (st.binary(max_size=60), from_file("p.txt", prompts_of)),
    "prompts, CSV": (damaged(b'prompt,seed\n"a cat, red",1\na dog,2\n'), from_file("p.csv", prompts_of)),
    "prompts, JSON": (plain, from_file("p.json", prompts_of)),
    "prompts, Parquet": (damaged(parquet_file()), from_file("p.parquet", prompts_of)),
    "notebook": (
        plain.map(lambda cell: notebook("a: int = 1", cells=[cell])),
        from_file("n.ipynb", lambda path: declared_parameters(read_notebook(path))),
    ),
    "parameters cell": (
        st.text(st.sampled_from("ab=:[]{}()'\"#,\n 1.0-\\\0f"), max_size=40),
        lambda text: declared_parameters(notebook(text)),
    ),
    "notebook parameter": (st.dictionaries(st.sampled_from(list(DECLARED)), values, max_size=3), plain_parameters),
    "word of the command line": (st.text(max_size=30), word),
    "Zarr metadata": (
        st.sampled_from(
            ["zarr.json", "base/zarr.json", "step/zarr.json", "reward/zarr.json", "base/c/0/0/0/0"]
        ).flatmap(lambda name: st.tuples(st.just(name), damaged(store_metadata()[name]))),
        store_of,
    ),
}


def fuzz(name: str, examples: int) -> None:
    """Give random input of a kind to its reader."""
    strategy, run = FUZZ[name]

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(strategy)
    def one(content: Any) -> None:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                run(content)
            except TTSnapError as error:
                check_message(error)

    one()


@pytest.mark.parametrize("name", FUZZ)
def test_random_damage(name):
    fuzz(name, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZ)
def test_random_damage_long(name):
    fuzz(name, LONG)
