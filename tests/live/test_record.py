"""What an online run leaves behind: the record, the picture, the gallery."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.worlds import N_STEPS, PROMPT, SCHEDULE, tiny_search
from ttsnap_lib.errors import SearchError
from ttsnap_lib.live.plots import LiveGallery, gallery, winners
from ttsnap_lib.live.record import SearchRecord

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_record_tells_all_and_comes_back(whole, tmp_path):
    assert whole.save(tmp_path / "run") == tmp_path / "run"
    loaded = SearchRecord.load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.scores, whole.record.scores)
    assert loaded.to_dict() == whole.record.to_dict()
    assert [loaded.pruned_at.count(step) for step in (1, 3, -1)] == [4, 2, 2]
    frame = pd.read_parquet(tmp_path / "run" / "candidates.parquet")
    assert frame["seed"].tolist() == whole.record.seeds and frame["winner"].sum() == 1
    assert frame.loc[whole.winner, f"clip_s{N_STEPS - 1:02d}"] == np.float32(whole.scores["clip"])
    stages = whole.record.stage_frame()
    assert stages["candidates"].tolist() == [8, 4, 2] and stages["forwards"].tolist() == [16, 8, 2]
    assert (stages["elapsed_s"] >= stages[["denoise_s", "decode_s", "score_s"]].sum(axis=1) - 1e-6).all()
    content = json.loads((tmp_path / "run" / "record.json").read_text())
    assert content["cost"] == pytest.approx(whole.cost) and content["complete"] is True


def test_the_picture_carries_its_origin(whole, tmp_path):
    whole.save(tmp_path)
    with Image.open(tmp_path / "image.png") as picture:
        notes = {key.removeprefix("ttsnap:"): value for key, value in picture.text.items()}
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(whole.image))
    with Image.open(tmp_path / "image_large.png") as large:  # for a person's eyes: pictures of 32 pixels are small
        factor = large.width // whole.image.width
        assert max(large.size) >= 256 and large.size == tuple(side * factor for side in whole.image.size)
        np.testing.assert_array_equal(np.asarray(large)[::factor, ::factor], np.asarray(whole.image))
    assert notes["prompt"] == PROMPT and int(notes["seed"]) == whole.record.seeds[whole.winner]
    assert json.loads(notes["schedule"]) == SCHEDULE.to_dict() and json.loads(notes["rewards"]) == ["clip"]
    assert float(notes["clip"]) == pytest.approx(whole.scores["clip"])


def test_a_record_that_cannot_be_read(tmp_path):
    with pytest.raises(SearchError, match="No such file"):
        SearchRecord.load(tmp_path)
    (tmp_path / "record.json").write_text('{"prompt": 1}')
    with pytest.raises(SearchError, match="cannot be read"):
        SearchRecord.load(tmp_path)
    (tmp_path / "record.json").write_text('{"colour": 1}')
    with pytest.raises(SearchError, match="unknown key"):
        SearchRecord.load(tmp_path)


def test_the_gallery_crosses_the_pruned_and_frames_the_winner(whole):
    import matplotlib.pyplot as plt

    figure = gallery(whole.record, columns=6)
    shown = [[ax for ax in figure.axes[row * 6 : row * 6 + 6] if ax.images] for row in range(3)]
    assert [len(row) for row in shown] == [6, 4, 2]
    for row, kept in zip(shown, (4, 2, 2), strict=True):  # best first: the first ones stay
        assert [len(ax.get_lines()) for ax in row] == [0] * kept + [1] * (len(row) - kept)
        assert len({ax.get_title().split()[0] for ax in row}) == len(row) and row[0].get_title().startswith("#")
        framed = [k for k, ax in enumerate(row) if ax.spines["left"].get_linewidth() == 3]
        assert len(framed) == 1 and framed[0] < kept
    assert "winner: candidate" in figure.get_suptitle()
    plt.close(figure)


def test_winners_stand_side_by_side(whole):
    import matplotlib.pyplot as plt

    figure = winners({"ttsp": whole, "best_of_n": whole})
    (name, score), *_ = whole.scores.items()
    for ax, method in zip(figure.axes, ("TTSp", "Best-of-N"), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), np.asarray(whole.image))
        assert ax.get_title() == f"{method}\n{name} {score:.3f}, {len(whole.record.seeds)} candidates"
    plt.close(figure)


def test_the_display_and_the_progress_follow_the_run(flux, clip, capsys):
    live, seen, checked = LiveGallery(columns=4), [], []

    def on_check(record):
        checked.append((len(record.stages), record.winner))
        live(record)

    result = tiny_search(flux, clip, schedule=SCHEDULE, on_check=on_check, progress=lambda *state: seen.append(state))
    assert [stages for stages, _ in checked] == [1, 2, 3] and checked[-1][1] == result.winner
    assert "winner" in live.figure.get_suptitle()
    total = 8 * 2 + 4 * 2 + 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1] == (total, total)
    assert all(done < total for done, _ in seen[:-1])  # it ends when everything is scored
