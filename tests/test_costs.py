import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttsnap_lib import PUBLISHED_SCHEDULE, CostModel, Schedule
from ttsnap_lib.costs import PRESETS, preset_for
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


@st.composite
def batch_costs(draw):
    """Costs in seconds with tables, also such as no machine has."""
    sizes = sorted(draw(st.sets(st.integers(1, 40), min_size=2, max_size=5)))
    price = st.floats(0.5, 5)
    table = st.fixed_dictionaries(dict.fromkeys(sizes, price))
    return CostModel(
        step=draw(table), verify=draw(price | table), decode=draw(price | table), per_prompt=draw(st.floats(0, 9)),
        preview_decode=draw(st.none() | price | table), unit="seconds",
        batch_size=draw(st.none() | st.integers(1, sizes[-1])), prompts_together=draw(st.integers(1, 9)),
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


@given(costs() | batch_costs(), schedules(), st.integers(0, 300))
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


SECONDS = CostModel(
    step={1: 1.0, 2: 0.6, 8: 0.5}, verify={1: 0.2, 8: 0.1}, decode=0.3, preview_decode={2: 0.2, 8: 0.1}, per_prompt=7,
    n_steps=5, unit="seconds",
)  # fmt: skip


@pytest.mark.parametrize(
    ("part", "size", "seconds"),
    [
        ("step", 1, 1.0), ("step", 2, 1.2), ("step", 8, 4.0), ("step", 5, (1.2 + 4.0) / 2),
        ("step", 14, 4.0 + 4.0 - 1.2), ("decode", 3, 0.9), ("preview_decode", 1, 0.4),
    ],
)  # fmt: skip
def test_the_time_of_a_batch(part, size, seconds):
    # Linear in the size between measured ones, as long as the smallest below, on the last line above.
    assert SECONDS.each(part, size) * size == pytest.approx(seconds)


def test_batches_by_hand():
    pruned = Schedule((2,), (0.3,))
    step, verify, preview = (
        {n: SECONDS.each(part, n) * n for n in range(1, 9)} for part in ("step", "verify", "preview_decode")
    )
    # 10 candidates: a batch of 8 and one of 2; then 3.
    first, last = SECONDS.stages(10, pruned)
    assert first.denoise == pytest.approx(3 * (step[8] + step[2])) and first.decode == pytest.approx(
        preview[8] + preview[2]
    )
    assert last.denoise == pytest.approx(2 * step[3]) and last.decode == pytest.approx(3 * 0.3)
    assert last.verify == pytest.approx(verify[3]) and SECONDS.batch_size == 8
    # Of four prompts together, 40 and 12 candidates share batches; each prompt pays its quarter.
    four = replace(SECONDS, prompts_together=4)
    assert four.stages(10, pruned)[0].denoise == pytest.approx(3 * 5 * step[8] / 4)
    assert four.stages(10, pruned)[1].denoise == pytest.approx(2 * (step[8] + step[4]) / 4)
    assert four.total(10, pruned) < SECONDS.total(10, pruned)
    # A smaller batch, and one table that ends before the other.
    assert replace(SECONDS, batch_size=2).stages(3)[0].denoise == pytest.approx(5 * (step[2] + step[1]))
    assert CostModel(step={1: 2.0, 8: 0.5}, verify={1: 0.4, 4: 0.3}).batch_size == 4


def test_more_candidates_may_cost_less():
    cost = CostModel(step={1: 1.0, 4: 0.2}, verify=0, n_steps=1, unit="seconds")
    assert cost.total(4) < cost.total(1) and cost.candidates(0.9) == 4 and cost.candidates(0.7) == 0


@settings(max_examples=300)
@given(batch_costs(), schedules() | st.none(), st.floats(0, 1e4))
def test_candidates_of_batches_is_the_largest_that_fits(cost, schedule, budget):
    fits = [n for n in range(1, 400) if cost.total(n, schedule) <= budget * (1 + 1e-9)]
    n = cost.candidates(budget, schedule)
    assert n == (fits[-1] if fits else 0) or n > 300
    if n:
        assert cost.total(n, schedule) <= budget * (1 + 1e-9)


def test_budgets_beyond_any_pool():
    assert SECONDS.candidates(1e9) == pytest.approx(1e9 / (SECONDS.total(8000) / 8000), rel=1e-3)


def test_without_tables_batches_change_nothing():
    plain = CostModel(step=3, verify=1)
    assert replace(plain, batch_size=8, prompts_together=4) == plain and "batch_size" not in plain.to_dict()


def test_tables_in_files(tmp_path):
    cost = replace(SECONDS, prompts_together=4, batch_size=4)
    assert CostModel.load(cost.save(tmp_path / "c.json")) == cost
    (tmp_path / "c.yaml").write_text("step: {8: 0.5, 1: 1}\nverify: {1: 0.2, 8: 0.1}\nunit: seconds\n")
    assert CostModel.load(tmp_path / "c.yaml").step == ((1, 1.0), (8, 0.5))
    # A file of `ttsnap cost` from before costs by batch: numbers, and what was measured beside them.
    model = CostModel(step=0.5, verify=0.1, decode=0.3, unit="seconds").to_dict()
    rows = [{"batch_size": size, "part": part, "seconds": seconds, "low": 0, "high": 1}
            for part, size, seconds in (("step", 1, 1.0), ("step", 8, 0.5), ("verify", 1, 0.2), ("verify", 8, 0.1), ("decode", 8, 0.3))]  # fmt: skip
    measured = {"cost": model, "seconds": model, "by_batch": rows}
    (tmp_path / "old.json").write_text(json.dumps(measured))
    old = CostModel.load(tmp_path / "old.json")
    assert old.step == ((1, 1.0), (8, 0.5)) and old.decode == 0.3 and old.batch_size == 8
    # Numbers that someone changed stand, and so do TFLOPs.
    (tmp_path / "own.json").write_text(json.dumps({**measured, "cost": {**model, "step": 0.4}}))
    assert CostModel.load(tmp_path / "own.json").step == 0.4
    (tmp_path / "bad.json").write_text(json.dumps({**measured, "by_batch": [{"part": "step"}]}))
    with pytest.raises(CostError, match="by_batch"):
        CostModel.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"step": {8: 0.5}}, r"table of 1 batch sizes, \[8\], expected two or more"),
        ({"decode": {}}, "two or more"),
        ({"step": {1: 0.0, 2: 1.0}}, "step at batch size 1: got 0.0"),
        ({"step": {0: 1.0, 2: 1.0}}, "batch size of cost.step: got 0"),
        ({"step": {1.5: 1.0, 2: 1.0}}, "batch size of cost.step: got 1.5"),
        ({"verify": {"one": 1.0, "2": 1.0}}, "batch size of cost.verify: got 'one'"),
        ({"verify": {"1": 1.0, 1: 2.0}}, "batch size 1 twice"),
        ({"verify": {1: math.nan, 2: 1.0}}, "verify at batch size 1"),
        ({"verify": (1.0, 2.0)}, "cost.verify: got"),
        ({"step": {1: 1.0, 2: 1.0}, "accounting": "published"}, "knows no batches"),
        ({"batch_size": 0}, "cost.batch_size: got 0"),
        ({"prompts_together": 0}, "cost.prompts_together: got 0"),
    ],
)
def test_bad_tables(fields, match):
    with pytest.raises(CostError, match=match):
        CostModel(**{"step": 1, "verify": 1, **fields})


def test_a_batch_above_the_table_is_told():
    with pytest.warns(
        UserWarning,
        match=r"batch_size 16 is above what was measured \(step up to 8, preview_decode up to 8, .*extrapolated",
    ):
        assert replace(SECONDS, batch_size=16).total(16) > SECONDS.total(8)


def test_a_first_stage_that_is_free_as_released():
    cost = CostModel(step=1, verify=0, accounting="published")
    schedule = Schedule((0,), (0.5,))
    assert cost.candidates(95, schedule) == 10  # half of them go on for 19 steps


def test_a_multiple_of_the_cost_buys_that_multiple():
    cost = CostModel(step=0.1, verify=0.3)
    assert [cost.candidates(k * cost.total(1)) for k in range(1, 50)] == list(range(1, 50))


def test_presets_are_those_of_the_design():
    assert CostModel.preset("flux-512+hpsv2") == CostModel(step=21.5, verify=0.335, decode=2.51)
    assert CostModel.preset("sdxl-1024-tiny+image_reward").preview_decode == 0.57
    assert CostModel.preset("flux-512+hpsv2", n_steps=28).n_steps == 28
    card = CostModel.preset("h100-sdxl-512")
    assert (
        card.batch_size == 16 and card.unit == "seconds" and CostModel.preset("h100-flux-512-compiled").batch_size == 8
    )
    assert [round(1000 * size * each, 2) for size, each in card.step] == [67.2, 68.72, 60.69, 77.0, 138.48, 265.3]
    names = {
        "Tongyi-MAI/Z-Image-Turbo": "z-image-turbo", "Tongyi-MAI/Z-Image": "z-image", "Qwen/Qwen-Image": "qwen-image",
        "black-forest-labs/FLUX.2-klein-4B": "flux2-klein-4b", "black-forest-labs/FLUX.2-dev": "flux2-dev",
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana", "lodestones/Chroma1-HD": "chroma",
        "black-forest-labs/FLUX.1-Krea-dev": "flux", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart-sigma",
        "black-forest-labs/flux-3-image-klein-base": "flux3-klein-base", "black-forest-labs/flux-3-image-klein": "flux3-klein",
    }  # fmt: skip
    assert {model: preset_for(model, "hpsv2", 1024) for model in names} == {
        model: f"{short}-1024+hpsv2" for model, short in names.items()
    }
    turbo = CostModel.preset("z-image-turbo-1024-tiny+pickscore")
    assert (turbo.step, turbo.decode, turbo.preview_decode, turbo.per_prompt) == (55.6, 10.5, 0.57, 3.88)
    assert "hidream-1024+hpsv2" in PRESETS and "hidream-512+hpsv2" not in PRESETS  # it makes large pictures alone
    assert "qwen-image-512+hpsv2" in PRESETS and "qwen-image-512-tiny+hpsv2" not in PRESETS  # no tiny decoder
    assert all(name == "published" or preset.accounting == "exact" for name, preset in PRESETS.items())
    with pytest.raises(CostError, match=r"Did you mean 'flux-512\+hpsv2'"):
        CostModel.preset("flux-512+hpv2")


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
