"""What a search knows of its price before it runs."""

from __future__ import annotations

import pytest

from tests import worlds
from ttsnap_lib import CostModel, load_pipeline, load_reward, search
from ttsnap_lib.errors import CostError
from ttsnap_lib.live.many import search_many
from ttsnap_lib.live.record import SearchRecord

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_automatic_cost_is_that_of_model_size_and_reward(tmp_path):
    own = CostModel.preset("pocket-flux-tiny+pocket-clip", n_steps=4)
    options = {"settings": {"n_steps": 4}, "decoder": "pocket-tiny", "budget": own.total(3)}
    pipeline, reward = load_pipeline("pocket-flux"), load_reward("pocket-clip")
    result = search(pipeline, "a small red ring", reward, cost="auto", **options)
    assert len(result.record.seeds) == 3 and CostModel.from_dict(result.record.cost_model) == own
    search_many(pipeline, ["a small red ring"], reward, tmp_path, cost="auto", **options)
    again = search_many(pipeline, ["a small red ring"], reward, tmp_path, cost=own, **options)  # the same identity
    assert again["cost"].tolist() == [result.cost] and SearchRecord.load(tmp_path / "p0000").winner == result.winner
    with pytest.raises(CostError, match="there is no preset for pictures of 'unnamed' at 32 px with the reward 'mean'"):
        search(worlds.build("sdxl"), "a ring", load_reward(worlds.brightness, name="mean"), cost="auto", candidates=2)


def test_an_automatic_cost_that_is_not_known_names_the_choices_before_anything_is_loaded():
    with pytest.raises(CostError, match=r"at 768 px .*Name one \(flux-512\+pickscore, flux-1024\+pickscore\)"):
        search(
            "black-forest-labs/FLUX.1-dev",
            "a ring",
            "pickscore",
            cost="auto",
            budget=900,
            settings={"height": 768, "width": 768},
        )
    with pytest.raises(CostError, match="Give cost 'auto'"):
        search("pocket-flux", "a ring", "pocket-clip", budget=900)
