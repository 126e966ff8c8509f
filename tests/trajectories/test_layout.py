"""Names, and the manifest that says what decides a folder's bytes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.worlds import IDENTITY, fill, prompts_of
from ttsnap_lib.errors import TrajectoryError
from ttsnap_lib.trajectories.layout import (
    MANIFEST,
    Manifest,
    comparable,
    extend,
    image_name,
    prompt_name,
    step_name,
)
from ttsnap_lib.trajectories.prompts import PromptList, read_prompts
from ttsnap_lib.trajectories.read import Trajectories, verify

PROMPTS = prompts_of(2)


def test_names_widen_when_needed():
    assert (prompt_name(7), image_name(7), step_name(7, "png")) == ("p0007", "id007", "s07.png")
    assert (prompt_name(12345), image_name(1234), step_name(123, "webp")) == ("p12345", "id1234", "s123.webp")


def test_manifest_goes_round_and_only_grows(tmp_path):
    extend(tmp_path, IDENTITY, PROMPTS, 3, {"host": "a", "time": "1"})
    again = extend(tmp_path, IDENTITY, PROMPTS[:1], 2, {"host": "a", "time": "2"})
    assert (again.prompts, again.images_per_prompt, len(again.provenance)) == (tuple(PROMPTS), 3, 1)
    wider = extend(tmp_path, IDENTITY, [*PROMPTS, "a bird"], 5, {"host": "b"})
    assert Manifest.read(tmp_path) == wider
    assert (len(wider.prompts), wider.images_per_prompt, len(wider.provenance)) == (3, 5, 2)


def test_metadata_of_prompts_is_kept_and_may_come_later(tmp_path):
    extend(tmp_path, IDENTITY, PROMPTS, 3)
    assert Manifest.read(tmp_path).metadata == ()
    table = pd.DataFrame({"prompt": PROMPTS[:1], "count": [2], "seen": [np.nan], "box": [np.arange(2)]})
    extend(tmp_path, IDENTITY, read_prompts(table), 3)
    extend(tmp_path, IDENTITY, PromptList([*PROMPTS, "a bird"], [{}, {"count": 5}, {}]), 3)
    extend(tmp_path, IDENTITY, PROMPTS, 3)
    assert Manifest.read(tmp_path).metadata == ({"count": 2, "seen": None, "box": [0, 1]}, {"count": 5}, {})
    assert Trajectories(tmp_path).prompts.metadata[1] == {"count": 5}


def test_other_settings_are_refused_with_the_difference(tmp_path):
    extend(tmp_path, {**IDENTITY, "scheduler": {"class": "Euler", "shift": 1.0}}, PROMPTS, 3)
    before = (tmp_path / MANIFEST).read_bytes()
    with pytest.raises(TrajectoryError, match=r"scheduler\.shift: 1\.0 there, 3\.0 now.*seed: 0 there, 1 now"):
        extend(tmp_path, {**IDENTITY, "seed": 1, "scheduler": {"class": "Euler", "shift": 3.0}}, PROMPTS, 3)
    with pytest.raises(TrajectoryError, match="prompt 1 differs"):
        extend(tmp_path, {**IDENTITY, "scheduler": {"class": "Euler", "shift": 1.0}}, [PROMPTS[0], "a cow"], 3)
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_equal_weights_outweigh_the_name_of_the_model():
    old = {**IDENTITY, "weights": "aa"}
    for new, same in (
        ({**IDENTITY, "model": "/elsewhere/tiny", "weights": "aa"}, True),
        ({**IDENTITY, "weights": "bb"}, False),
        ({**IDENTITY, "weights": None}, True),
        ({**IDENTITY, "model": "other", "weights": None}, False),
    ):
        one, other = comparable(old, new)
        assert (one == other) == same


def test_images_without_manifest_are_left_alone(tmp_path):
    folder = fill(tmp_path / "set", n_prompts=1, n_images=1)
    (folder / MANIFEST).unlink()
    with pytest.raises(TrajectoryError, match="holds images but no"):
        extend(folder, IDENTITY, PROMPTS, 3)
    assert (folder / "p0000" / "id000" / "s00.png").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 9}', '{"schema": 1, "identity": {}}', "\xff"])
def test_broken_manifests(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content.encode("latin-1"))
    with pytest.raises(TrajectoryError, match="manifest"):
        Trajectories(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(TrajectoryError, match="no trajectory folder"):
        verify(tmp_path / "none")
