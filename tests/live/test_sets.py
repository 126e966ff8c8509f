"""Searches for a set of images: who is in it, what is told of it, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.worlds import N_STEPS, SCHEDULE, brightness, load_clip, pruned_winner, settings, tiny_search
from ttsnap_lib import Schedule
from ttsnap_lib.errors import BudgetError, ConfigError, SearchError
from ttsnap_lib.live.many import search_many
from ttsnap_lib.live.plots import gallery, image_sets
from ttsnap_lib.live.record import SearchRecord
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.sets import choose_set, pairwise_distances

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = Schedule((1, 3), (0.75, 0.7))  # 8, 6, 4


def by_hand(record: SearchRecord, keep: int, diversity: float) -> list[int]:
    """Return the set that the rule makes of what a record and its embeddings tell."""
    alive = np.arange(len(record.seeds))
    counts = [*Schedule.from_dict(record.schedule).survivors(len(alive))[1:], keep]
    for k, count in enumerate(counts):
        far = pairwise_distances(np.stack([record.embeddings[one, k] for one in alive.tolist()]))
        chosen = alive[choose_set(record.scores[alive, k], count, diversity, far)]
        alive = np.sort(chosen)
    return chosen.tolist()


@pytest.mark.parametrize("method", ["best_of_n", "ttsnap"])
def test_a_set_is_chosen_at_every_check_as_the_rule_says(flux, clip, folders, adapters, method):
    reward = load_clip(folders[0], adapters=adapters)
    options = {"schedule": WIDE, "method": method}
    one = tiny_search(flux, reward, **options)
    sets = {w: tiny_search(flux, reward, keep=3, diversity=w, **options) for w in (0.0, 9.0)}
    for diversity, result in sets.items():
        record = result.record
        assert record.chosen == by_hand(record, 3, diversity) and result.winner == record.chosen[0]
        far = pairwise_distances(np.stack([record.embeddings[k, len(record.checks) - 1] for k in record.chosen]))
        np.testing.assert_array_equal(record.distances, far)
        assert len(result.images) == 3 and result.images[0] is result.image
        for image, candidate in zip(result.images, record.chosen, strict=True):  # a picture is that of its score
            assert reward.score(record.prompt, image)[0] == pytest.approx(record.scores[candidate, -1, 0], rel=1e-3)
    plain = sets[0.0].record
    np.testing.assert_array_equal(plain.scores, one.record.scores)
    assert plain.pruned_at == one.record.pruned_at and one.winner == plain.chosen[0] == pruned_winner(plain)
    finals = np.flatnonzero(~np.isnan(plain.scores[:, -1, 0]))
    assert plain.chosen == finals[np.argsort(-plain.scores[finals, -1, 0], kind="stable")][:3].tolist()
    apart = [np.sum(result.record.distances) for result in sets.values()]
    assert apart[1] > apart[0]
    if method == "ttsnap":  # difference counts at the checks too
        assert sets[9.0].record.pruned_at != plain.pruned_at
    assert one.images == (one.image,) and one.record.set == [one.winner] and not one.record.embeddings


def test_what_is_left_of_a_set(flux, clip, tmp_path):
    import matplotlib.pyplot as plt

    result = tiny_search(flux, clip, schedule=WIDE, keep=3, diversity=0.5)
    for _ in range(2):
        folder = result.save(tmp_path)
        (tmp_path / "image_9.png").write_bytes(b"of a larger set before")
    result.save(tmp_path)
    assert sorted(path.name for path in folder.glob("image*.png")) == [
        "image.png", "image_0.png", "image_1.png", "image_2.png", "image_large.png",
    ]  # fmt: skip
    table = result.set_frame()
    for place, image in enumerate(result.images):
        with Image.open(folder / f"image_{place}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(image))
            assert int(picture.text["ttsnap:seed"]) == table["seed"][place]
            assert float(picture.text["ttsnap:clip"]) == pytest.approx(table["clip"][place])
    loaded = SearchRecord.load(folder)
    assert loaded.chosen == result.record.chosen and loaded.to_dict() == result.record.to_dict()
    assert pd.read_parquet(folder / "candidates.parquet")["place"].max() == 2
    summary = result.summary()
    assert summary["set"] == " ".join(map(str, loaded.chosen))
    assert summary["set_clip"] == pytest.approx(table["clip"].mean())
    assert summary["set_distance"] == pytest.approx(np.sum(loaded.distances) / 6)
    figure = gallery(result.record, columns=3)
    framed = [ax.get_title().split()[0] for ax in figure.axes[-3:] if ax.spines["left"].get_linewidth() == 3]
    assert framed == [f"#{candidate}" for candidate in loaded.chosen]
    assert f"set of 3: mean {summary['set_clip']:.3f}, mean distance" in figure.get_suptitle()
    plt.close(figure)
    figure = image_sets({"ttsp": result, "best_of_n": tiny_search(flux, clip, candidates=2)})
    assert [len([ax for ax in figure.axes[row * 3 : row * 3 + 3] if ax.images]) for row in range(2)] == [3, 1]
    assert figure.axes[1].get_title() == f"#{loaded.chosen[1]}  {table['clip'][1]:.2f}"
    plt.close(figure)


def test_an_interrupted_set_and_images_that_fail(flux, clip, folders):
    def stop(record):
        if len(record.stages) == 2:
            raise KeyboardInterrupt

    result = tiny_search(flux, clip, schedule=WIDE, keep=3, diversity=0.5, on_check=stop)
    record = result.record
    assert not result.complete and len(result.images) == 3 and result.winner == record.chosen[0]
    assert np.isfinite(record.scores[record.chosen, 1]).all()
    halves = iter(range(100))

    class Fussy(type(clip)):
        """Fails on half of the pictures, together and one by one."""

        def score(self, prompts, images, **options):
            if len(images) > 1 or next(halves) % 2:
                raise ValueError("not this one")
            return super().score(prompts, images, **options)

    fussy = load_clip(folders[0])
    fussy.__class__ = Fussy
    with pytest.warns(UserWarning, match="not this one"):
        result = tiny_search(flux, fussy, keep=3, diversity=0.5)
    assert len(result.images) == 3 and np.isfinite(result.record.scores[result.record.chosen, -1]).all()
    alone = load_reward(lambda prompts, images: [1.0, *[ValueError("not this one")] * (len(images) - 1)], name="alone")
    with pytest.warns(UserWarning, match="not this one"):  # one image is left, which has no distance to others
        result = tiny_search(flux, [clip, alone], candidates=3, keep=2, diversity=0.5)
    assert len(result.images) == 1 and result.summary()["set_distance"] is None


def test_prompts_of_a_file(flux, clip, tmp_path):
    options = {"settings": settings(n_steps=N_STEPS), "schedule": WIDE, "candidates": 8}
    prompts = ["a red circle", "the cat"]
    shared = search_many(flux, prompts, clip, tmp_path / "set", keep=3, diversity=0.5, together=2, **options)
    alone = search_many(flux, prompts, clip, None, keep=3, diversity=0.5, **options)
    assert shared["set"].tolist() == alone["set"].tolist() and (shared["set_distance"] > 0).all()
    assert (tmp_path / "set" / "p0001" / "image_2.png").is_file()
    with pytest.raises(SearchError, match=r"other settings: .*diversity"):
        search_many(flux, prompts, clip, tmp_path / "set", keep=3, **options)
    search_many(flux, prompts[:1], clip, tmp_path / "one", **options)
    search_many(flux, prompts[:1], clip, tmp_path / "one", keep=1, **options)  # as before there were sets


def test_bad_input(clip):
    function = load_reward(brightness)
    for options, error, told in (
        ({"keep": 9}, BudgetError, "keep: got 9, expected at most 8 candidates"),
        ({"keep": 3, "schedule": SCHEDULE}, BudgetError, "expected at most 2 candidates, those that the schedule"),
        ({"diversity": 0.5}, ConfigError, "with keep=1"),
        ({"keep": 2, "diversity": 0.5, "reward": function}, ConfigError, "image tower to tell images apart"),
    ):
        with pytest.raises(error, match=told):  # before the pipeline is looked at
            tiny_search("no-such-pipeline", options.pop("reward", clip), **options)
