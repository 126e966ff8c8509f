"""The table of docs/rewards.md against the code: what can be counted, on the published architectures without values."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from ttsnap_lib.costs import SAME_TOWER, VERIFY, preset_for
from ttsnap_lib.rewards.aesthetic import AestheticReward
from ttsnap_lib.rewards.base import Reward
from ttsnap_lib.rewards.loading import REWARDS, load_reward


def _rows() -> dict[str, list[str]]:
    """Return the cells of the table by the name of a reward."""
    found = {}
    for line in (ROOT / "docs" / "rewards.md").read_text("utf-8").splitlines():
        if line.startswith("| `"):
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", first), cells)
    return found


@pytest.fixture(scope="module")
def real():
    from tests.benchmarks.real_rewards import real_rewards

    return real_rewards()


def test_the_table_is_what_the_code_says(real):
    rows = _rows()
    assert set(rows) == set(REWARDS)
    for name, one in real.items():
        _, _, reads, _, memory, tflops, tuned = rows[name]
        assert memory == f"{2 * one.millions / 1e3:.1f}, {4 * one.millions / 1e3:.1f}", name
        assert tuned == (str(one.lora_layers) if one.lora_targets else "no"), name
        assert (reads == "picture alone") == (name == "aesthetic")
        if name != "vqascore":  # of any model: the benchmark counts the one that the table names
            assert float(tflops) == VERIFY[SAME_TOWER.get(name, name)], name
            assert preset_for("flux", name, 512).startswith("flux-512+")
    assert not AestheticReward.reads_prompt and Reward.reads_prompt


@pytest.mark.slow
def test_the_tflops_are_counted(real):
    said = {name: [float(number) for number in re.findall(r"\d+\.\d+", cells[5])] for name, cells in _rows().items()}
    for name, one in real.items():
        assert said[name] == pytest.approx([one.tflops(side) for side in one.sides], rel=0.01), name


def test_the_shipped_reward_s_row():
    from ttsnap_lib import CostModel

    reward = load_reward("pocket-clip", device="cpu")
    _, _, _, _, memory, tflops, tuned = _rows()["pocket-clip"]
    weights = sum(parameter.numel() for parameter in reward.module.parameters())
    assert memory == f"{2e-9 * weights:.3f}, {4e-9 * weights:.3f}"
    assert float(tflops) == pytest.approx(CostModel.preset("pocket-flux+pocket-clip").verify / 1e3, rel=0.01)
    names = (name for name, _ in reward.module.named_modules())
    assert int(tuned) == sum(re.fullmatch(reward.default_lora_targets, name) is not None for name in names)
