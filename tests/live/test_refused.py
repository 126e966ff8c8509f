"""What an online run refuses, before a model is touched."""

from __future__ import annotations

import pytest

from tests.worlds import COST, N_STEPS, SCHEDULE, tiny_search
from ttsnap_lib import CostModel, Schedule
from ttsnap_lib.errors import BudgetError, ConfigError, CostError, PipelineError, RewardError, ScheduleError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"budget": 0.5, "cost": COST}, BudgetError, "the cost of one candidate"),
        ({"budget": -1.0, "cost": COST}, ConfigError, "budget"),
        ({"budget": float("nan"), "cost": COST}, ConfigError, "budget"),
        ({"budget": 9.0}, CostError, "ttsnap cost"),
        ({"budget": 9.0, "candidates": 3, "cost": COST}, BudgetError, "exactly one"),
        ({"budget": None}, BudgetError, "exactly one"),
        ({"candidates": 0}, BudgetError, "candidates"),
        ({"candidates": 2.5}, BudgetError, "candidates"),
        ({"cost": CostModel(step=1, verify=1)}, CostError, "n_steps"),
        ({"cost": "no-such-file.json"}, CostError, "cannot be read"),
        ({"cost": 3.0}, CostError, "a CostModel"),
        ({"schedule": Schedule((N_STEPS - 1,), (0.5,))}, ScheduleError, "Prune before the last step"),
        ({"schedule": [1, 2]}, ScheduleError, "a Schedule"),
        ({"method": "beam"}, ConfigError, "best_of_n"),
        ({"method": "ttsnap", "schedule": SCHEDULE}, ConfigError, "noise-aware"),
        ({"prompt": " "}, ConfigError, "prompt"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"deadline_s": 0}, ConfigError, "deadline_s"),
        ({"combine": "median"}, ConfigError, "rank_sum"),
        ({"weights": [1.0]}, ConfigError, "weighted_sum"),
        ({"report": ["clip"]}, ConfigError, "Leave one reward"),
        ({"reward": []}, ConfigError, "distinct names"),
        ({"reward": "no/such/folder"}, RewardError, "no/such/folder"),
    ],
)
def test_bad_input_is_told_before_a_model_is_touched(clip, options, error, says):
    options = dict(options)
    reward = options.pop("reward", clip)
    with pytest.raises(error, match=says):
        tiny_search(object(), reward, **options)  # object(): whoever touched the pipeline would raise a PipelineError


def test_two_rewards_of_one_name_and_a_foreign_decoder(flux, clip):
    with pytest.raises(ConfigError, match="distinct names"):
        tiny_search(flux, [clip, clip])
    with pytest.raises(PipelineError, match="cannot be loaded"):
        tiny_search(flux, clip, decoder="/no/such/folder")
    with pytest.raises(PipelineError, match="latent channels"):
        tiny_search(flux, clip, decoder="pocket-tiny")


def test_an_unreadable_cost_file(clip, tmp_path):
    path = tmp_path / "cost.json"
    path.write_text('{"cost": {"step": 1.0}}')
    with pytest.raises(CostError, match="without verify"):
        tiny_search(object(), clip, cost=str(path))
