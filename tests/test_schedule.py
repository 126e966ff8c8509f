from pathlib import Path

import pytest

from ttsnap_lib import PUBLISHED_SCHEDULE, Schedule
from ttsnap_lib.errors import ScheduleError


def test_empty_is_best_of_n():
    assert Schedule().survivors(7) == (7,)
    assert len(Schedule()) == 0
    assert str(Schedule()) == "no pruning"


def test_survivors_use_pythons_round_and_never_reach_zero():
    assert Schedule((1,), (0.5,)).survivors(5) == (5, 2)  # 2.5 rounds to even
    assert Schedule((1,), (0.5,)).survivors(7) == (7, 4)  # 3.5 too
    assert Schedule((1, 2), (0.01, 0.01)).survivors(3) == (3, 1, 1)
    assert PUBLISHED_SCHEDULE.survivors(50) == (50, 20, 8, 4)


def test_round_trips(tmp_path: Path):
    schedule = Schedule([2, 6], [0.4, 1])
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert Schedule.from_yaml(schedule.to_yaml()) == schedule
    path = tmp_path / "s.yaml"
    path.write_text(schedule.to_yaml())
    assert Schedule.from_yaml(path) == schedule
    assert hash(schedule) == hash(Schedule((2, 6), (0.4, 1.0)))


@pytest.mark.parametrize(
    ("steps", "ratios", "value"),
    [
        ((6, 2), (0.5, 0.5), "(6, 2)"),
        ((2, 2), (0.5, 0.5), "(2, 2)"),
        ((-1,), (0.5,), "-1"),
        ((1.5,), (0.5,), "1.5"),
        ((True,), (0.5,), "True"),
        (("2",), (0.5,), "'2'"),
        (3, (0.5,), "3"),
        ("2", (0.5,), "'2'"),
        ((2,), (0.0,), "0.0"),
        ((2,), (-0.5,), "-0.5"),
        ((2,), (1.01,), "1.01"),
        ((2,), (float("nan"),), "nan"),
        ((2,), (float("inf"),), "inf"),
        ((2,), ("half",), "'half'"),
        ((2,), (0.5, 0.5), "(0.5, 0.5)"),
        ((2, 4), (0.5,), "(0.5,)"),
    ],
)
def test_bad_schedules_name_the_value(steps, ratios, value):
    with pytest.raises(ScheduleError, match="expected") as caught:
        Schedule(steps, ratios)
    assert value in str(caught.value)


def test_steps_at_or_past_the_last():
    Schedule((18,), (0.5,)).check(20)
    for step in (19, 20, 99):
        with pytest.raises(ScheduleError, match="at most 18"):
            Schedule((step,), (0.5,)).check(20)


@pytest.mark.parametrize("content", [["steps"], {"stepz": [1]}, "3", {"steps": [1], "keep_ratios": [0.5], "x": 1}])
def test_bad_yaml(content):
    import yaml

    with pytest.raises(ScheduleError):
        Schedule.from_yaml(yaml.safe_dump(content))
    with pytest.raises(ScheduleError, match="cannot be read"):
        Schedule.from_yaml("steps: [1")
    with pytest.raises(ScheduleError, match="cannot be read"):
        Schedule.from_yaml(Path("nowhere.yaml"))
