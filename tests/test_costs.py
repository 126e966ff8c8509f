import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel, Schedule
from ttsnap_lib.costs import PRESETS
from ttsnap_lib.errors import CostError, ScheduleError

N_STEPS = 20


@st.composite
def schedules(draw):
    steps = sorted(draw(st.sets(st.integers(0, N_STEPS - 2), max_size=4)))
    return Schedule(steps, [draw(st.floats(0.01, 1)) for _ in steps])


@st.composite
def costs(draw, accountings=("exact", "published")):
    price = st.floats(0, 100)
    return CostModel(
        step=draw(st.floats(0.01, 100)), verify=draw(price), decode=draw(price),
        preview_decode=draw(st.none() | price), per_prompt=draw(price), accounting=draw(st.sampled_from(accountings)),
    )  # fmt: skip


def test_exact_by_hand():
    cost = CostModel(step=10, verify=1, decode=2, preview_decode=0.5, per_prompt=7)
    # 5 candidates for 3 forwards and a preview check, then 2 for 17 forwards and a full decode.
    assert cost.total(5, Schedule((2,), (0.4,))) == pytest.approx(7 + 5 * (30 + 0.5 + 1) + 2 * (170 + 2 + 1))
    assert cost.total(5) == pytest.approx(7 + 5 * (200 + 3))
    assert cost.total(5, Schedule()) == cost.total(5)


def test_published_formula():
    cost = CostModel.preset("published")
    # The released figures per candidate; the golden file holds the same numbers.
    assert cost.total(1, PUBLISHED_SCHEDULE) == pytest.approx(51.864)
    assert cost.total(38, PUBLISHED_SCHEDULE) == pytest.approx(38 * 51.864)
    assert cost.total(1) == pytest.approx(20 * 9.9 + 1.2)
    assert cost.total(1, Schedule()) == pytest.approx(19 * 9.9 + 1.2)
    assert cost.candidates(2000, PUBLISHED_SCHEDULE) == 38


@given(costs(), schedules(), st.integers(0, 300))
def test_stages_add_up_to_the_total(cost, schedule, n):
    parts = cost.stages(n, schedule)
    assert cost.per_prompt + sum(part.total for part in parts) == pytest.approx(cost.total(n, schedule))
    assert parts[-1].last_step == N_STEPS - 1
    assert [part.last_step for part in parts[:-1]] == list(schedule.steps)


@settings(max_examples=300)
@given(costs(), schedules() | st.none(), st.floats(0, 1e5))
def test_candidates_is_the_largest_that_fits(cost, schedule, budget):
    n = cost.candidates(budget, schedule)
    limit = budget * (1 + 1e-9)
    assert n == 0 or cost.total(n, schedule) <= limit
    assert cost.total(n + 1, schedule) > limit


@given(costs(accountings=["exact"]), st.integers(0, 500))
def test_empty_schedule_costs_best_of_n(cost, n):
    assert cost.total(n, Schedule()) == cost.total(n)


def test_a_multiple_of_the_cost_buys_that_multiple():
    cost = CostModel(step=0.1, verify=0.3)
    assert [cost.candidates(k * cost.total(1)) for k in range(1, 50)] == list(range(1, 50))


def test_presets_are_those_of_the_design():
    assert CostModel.preset("flux-512+hpsv2") == CostModel(step=21.5, verify=0.335, decode=2.51)
    assert CostModel.preset("sdxl-1024-tiny+image_reward").preview_decode == 0.57
    assert CostModel.preset("flux-512+hpsv2", n_steps=28).n_steps == 28
    assert all(name == "published" or preset.accounting == "exact" for name, preset in PRESETS.items())
    with pytest.raises(CostError, match=r"Did you mean 'flux-512\+hpsv2'"):
        CostModel.preset("flux-512+hpsv")


def test_files(tmp_path):
    cost = CostModel(step=3, verify=1, unit="seconds")
    assert CostModel.load(cost.save(tmp_path / "c.json")) == cost
    (tmp_path / "measured.json").write_text(json.dumps({"cost": cost.to_dict(), "device": "cpu"}))
    assert CostModel.load(tmp_path / "measured.json") == cost
    (tmp_path / "c.yaml").write_text("step: 3\nverify: 1\nunit: seconds\n")
    assert CostModel.load(tmp_path / "c.yaml") == cost
    assert CostModel.load("published") == CostModel.preset("published")
    for name, text in {
        "a.json": "{",
        "b.yaml": "step: [",
        "c2.yaml": "- 1",
        "d.yaml": "verify: 1",
        "e.json": "\xff",
    }.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(CostError):
            CostModel.load(tmp_path / name)
    with pytest.raises(CostError, match="cannot be read"):
        CostModel.load(tmp_path / "missing.json")
    with pytest.raises(CostError, match=r"Did you mean 'flux-512\+image_reward'"):
        CostModel.load("flux-512+imagereward")


@pytest.mark.parametrize(
    "fields",
    [
        {"step": 0}, {"step": -1}, {"step": math.nan}, {"step": "9"}, {"verify": -1}, {"verify": math.inf},
        {"decode": -0.1}, {"preview_decode": -1}, {"per_prompt": -1}, {"n_steps": 0}, {"n_steps": 2.5}, {"unit": ""},
        {"accounting": "guess"},
    ],
)  # fmt: skip
def test_bad_fields(fields):
    with pytest.raises(CostError, match="expected"):
        CostModel(**{"step": 1, "verify": 1, **fields})


def test_unknown_field_and_step_past_the_loop():
    with pytest.raises(CostError, match="Did you mean 'verify'"):
        CostModel.from_dict({"step": 1, "verfy": 1})
    with pytest.raises(ScheduleError, match="at most 18"):
        CostModel(step=1, verify=1).total(3, Schedule((19,), (0.5,)))
