"""The explorer's widgets, driven without a browser."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from ttsnap_lib import CostModel, Schedule, save_rewards
from ttsnap_lib.errors import ConfigError, ScheduleError
from ttsnap_lib.explorer.explorer import Explorer, explore, nobody_watches
from ttsnap_lib.explorer.pool import Pool
from ttsnap_lib.explorer.result import compute
from ttsnap_lib.runs.run import Run, current_run
from ttsnap_lib.tensors.tensor import synthetic_rewards

COST = "flux-512+image_reward"
MULTIPLES = (2, 4, 8, 12)


class Clock:
    """An event loop with a clock of its own: callbacks run when time is moved on."""

    def __init__(self) -> None:
        self.now, self._queue, self._count = 0.0, [], itertools.count()

    def call_later(self, delay_s, callback):
        handle = SimpleNamespace(callback=callback)
        handle.cancel = lambda: setattr(handle, "callback", lambda: None)
        heapq.heappush(self._queue, (self.now + delay_s, next(self._count), handle))
        return handle

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, handle = heapq.heappop(self._queue)
            handle.callback()
        self.now = end


@pytest.fixture(scope="module")
def dataset():
    return synthetic_rewards(20, 60, 20, rewards=("a", "b"))


@pytest.fixture
def explorer(dataset, tmp_path):
    """Return an explorer that computes every change to the end at once (there is no event loop here)."""
    return Explorer(dataset, rewards=["a"], multiples=MULTIPLES, multiple=8, iterations=20, run=Run(tmp_path))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def timed(dataset, clock, monkeypatch):
    monkeypatch.setattr("asyncio.get_running_loop", lambda: clock)
    return Explorer(dataset, rewards=["a"], multiples=MULTIPLES, multiple=8, iterations=300)


def test_moving_a_step_changes_numbers_and_picture(explorer):
    image, text = bytes(explorer.image.value), explorer.numbers.value
    assert image.startswith(b"\x89PNG")
    explorer.controls.steps[0].index = 4
    explorer.controls.keeps[1].value = 0.6
    assert explorer.controls.schedule == explorer.state.schedule == Schedule((4, 6, 11), (0.4, 0.6, 0.5))
    assert explorer.image.value != image and explorer.numbers.value != text
    gain = explorer.result.gains["current"].value
    assert gain == compute(explorer.state, explorer.pool).gains["current"].value
    assert f"{gain:+.1f}" in explorer.numbers.value


def test_method_rewards_budget_and_accounting_are_followed(explorer):
    controls, gain = explorer.controls, explorer.result.gains["current"].value
    controls.method.value = "ttsp"
    assert explorer.result.curves["current"].method == "ttsp" and explorer.result.gains["current"].value < gain
    controls.multiple.value = 4
    assert explorer.result.at["best_of_n"].n[0] == 4
    controls.rewards.value = ("a", "b")
    assert explorer.state.rewards == ("a", "b")
    controls.shown.value = "b"
    assert explorer.result.state.shown == "b"
    before = explorer.result.at["current"].n[0]
    controls.accounting.value = "published"
    assert explorer.result.at["current"].n[0] > before  # one step fewer is charged
    controls.method.value = "best_of_n"
    assert explorer.result.over["best_of_n"].value == 0
    assert len(explorer.result.stages) == 1


def test_step_sliders_cannot_cross(explorer):
    controls = explorer.controls
    controls.steps[0].index = 15
    assert controls.schedule.steps == (5, 6, 11)
    controls.steps[2].index = 0
    assert controls.schedule.steps == (5, 6, 7)
    controls.steps[1].index = 12
    assert controls.schedule.steps == (5, 6, 7)
    controls.steps[2].index = 18
    assert controls.schedule.steps == (5, 6, 18)


def test_stages_appear_in_order_and_with_room(explorer):
    controls = explorer.controls
    controls.steps[2].index = 18  # the last place: a fourth stage has to push it back
    controls.stages.value = 4
    steps = controls.schedule.steps
    assert len(steps) == 4 and all(a < b for a, b in itertools.pairwise(steps)) and steps[-1] <= 18
    assert explorer.message.value == ""
    controls.stages.value = 1
    assert controls.schedule.steps == (2,)
    assert [slider.layout.display for slider in controls.steps] == [None, "none", "none", "none"]
    controls.stages.value = 0
    assert explorer.result.over["best_of_n"].value == 0


def test_three_pins_stand_side_by_side_and_can_be_set_and_removed(explorer):
    controls, over = explorer.controls, lambda: explorer.result.over
    first = controls.schedule
    controls.steps[0].index = 4
    assert set(over()) == {"best_of_n", "A"} and over()["A"].value != 0
    controls.pin.click()
    assert over()["B"].value == 0 and over()["A"].value != 0
    second = controls.schedule
    controls.keeps[0].value = 0.8
    controls.pin.click()
    assert controls.pin.disabled and [row.box.layout.display for row in controls.pins.values()] == [None] * 3
    assert "at 4, 6, 11, keeps 0.8, 0.4, 0.5" in controls.pins["C"].text.value
    controls.pins["B"].back.click()
    assert controls.schedule == second and over()["B"].value == 0
    controls.pins["A"].back.click()
    assert controls.schedule == first and over()["A"].value == 0
    controls.pins["B"].remove.click()
    assert set(over()) == {"best_of_n", "A", "C"} and controls.pins["B"].box.layout.display == "none"
    assert "minus C" in explorer.numbers.value and "minus B" not in explorer.numbers.value
    controls.pin.click()  # the first letter that is free
    assert explorer.pins["B"] == ("ttsnap", first) and controls.pin.disabled
    for pin in "ABC":
        controls.pins[pin].remove.click()
    assert set(over()) == {"best_of_n"} and explorer.message.value == ""


def test_sections_open_and_close(explorer):
    shown = {title: box.layout.display for title, (_, box) in explorer.controls.sections.items()}
    assert list(shown) == ["Schedule", "Budget and cost", "Data", "Optimise", "Export"]
    assert [title for title, display in shown.items() if display is None] == ["Schedule"]
    heading, box = explorer.controls.sections["Optimise"]
    heading.click()
    assert box.layout.display is None and heading.icon == "caret-down"
    heading.click()
    assert box.layout.display == "none"


def test_a_bad_state_is_a_message_and_goes_away(explorer):
    controls = explorer.controls
    controls.multiple.value = 0.5
    assert "Raise the budget" in explorer.message.value and "Traceback" not in explorer.message.value
    assert explorer.result is None and "ttsnap-stale" in explorer.image._dom_classes
    controls.multiple.value = 12
    assert explorer.message.value == "" and "ttsnap-stale" not in explorer.image._dom_classes
    controls.stages.value = 1
    controls.steps[0].index = 0
    controls.keeps[0].value = 0.02
    assert "the images in the pool" in explorer.message.value
    controls.rewards.value = ()
    assert "Choose a reward" in explorer.message.value


def test_typed_paths(explorer, dataset, tmp_path):
    controls = explorer.controls
    controls.cost_path.value = str(tmp_path / "none.json")
    assert "cannot be read" in explorer.message.value
    path = CostModel(step=1, verify=0.5, unit="seconds").save(tmp_path / "mine.json")
    controls.cost_path.value = str(path)
    assert explorer.message.value == "" and explorer.state.cost.unit == "seconds" and controls.cost_path.value == ""
    other = save_rewards(synthetic_rewards(8, 50, 12, rewards=("a",)), tmp_path / "other.zarr")
    controls.tensor_path.value = str(other)
    assert "n_steps" in explorer.message.value  # the cost file is of 20 steps
    controls.cost.value = COST
    assert explorer.message.value == "" and explorer.state.cost.n_steps == 12
    assert max(controls.steps[0].options) == 10
    controls.tensor_path.value = str(tmp_path)
    assert "reward tensor" in explorer.message.value
    assert controls.tensor.value == str(other)


def test_another_tensor_brings_its_cost():
    explorer = Explorer("pocket-flux", multiples=MULTIPLES, multiple=8, iterations=10)
    controls = explorer.controls
    assert controls.cost.value == "pocket-flux+pocket-clip" and explorer.message.value == ""
    controls.tensor.value = "pocket-sdxl"
    assert controls.cost.value == "pocket-sdxl+pocket-clip" and explorer.message.value == ""
    assert explorer.state.cost == CostModel.preset("pocket-sdxl+pocket-clip")
    assert controls.cost.options == ("pocket-sdxl+pocket-clip", "pocket-sdxl-tiny+pocket-clip", "published")
    controls.cost_path.value = "pocket-flux+pocket-clip"  # any other is typed
    assert controls.cost.value == "pocket-flux+pocket-clip" and controls.cost_path.value == ""
    assert "is not that of this tensor" in explorer.message.value
    controls.cost.value = "pocket-sdxl-tiny+pocket-clip"
    assert explorer.message.value == ""
    controls.cost_path.value = "pocket-sdxl-tinny+pocket-clip"
    assert "Did you mean &#x27;pocket-sdxl-tiny+pocket-clip&#x27;?" in explorer.message.value
    assert len(explorer.message.value) < 500  # not all 153


def test_another_reward_brings_its_cost(tmp_path):
    explorer = Explorer(synthetic_rewards(8, 50, 20, rewards=("image_reward", "pickscore")), multiple=4, iterations=10)
    controls = explorer.controls
    controls.rewards.value = ("pickscore",)
    assert controls.cost.value == "flux-512+pickscore" and "flux-512+image_reward" not in controls.cost.options
    assert explorer.state.cost == CostModel.preset("flux-512+pickscore") and explorer.message.value == ""
    controls.accounting.value = "published"
    controls.rewards.value = ("image_reward", "pickscore")
    assert controls.cost.value == "flux-512+image_reward" and controls.accounting.value == "exact"
    own = CostModel(step=1, verify=0.5, unit="seconds", accounting="published").save(tmp_path / "mine.json")
    controls.cost_path.value = str(own)
    controls.accounting.value = "exact"
    controls.rewards.value = ("pickscore",)  # a cost of one's own stays
    assert controls.cost.value == str(own) and controls.accounting.value == "exact"


def test_moves_are_drawn_together_and_settle_later(timed, clock, dataset):
    drawn = []
    show = timed._show
    timed._show = lambda iterations: (drawn.append(iterations), show(iterations))
    clock.pass_time(10)
    assert timed.result.complete
    drawn.clear()
    for index in (3, 4, 5):
        timed.controls.steps[0].index = index
        clock.pass_time(0.002)
    assert drawn == []
    clock.pass_time(0.01)
    assert drawn == [25] and timed.result.state.schedule.steps[0] == 5
    assert not timed.result.complete and "a preview" in timed.numbers.value
    clock.pass_time(0.1)
    assert drawn == [25]  # still waiting whether it goes on
    timed.controls.steps[0].index = 4
    clock.pass_time(0.1)
    assert drawn == [25, 25]
    clock.pass_time(10)
    assert timed.result.complete and drawn == [25, 25, None] and "a preview" not in timed.numbers.value
    direct = compute(timed.state, Pool(dataset, iterations=300))  # the way there makes no difference
    np.testing.assert_array_equal(timed.result.curves["current"].per_prompt, direct.curves["current"].per_prompt)
    timed.controls.steps[0].index = 5  # never pruned in full
    timed.controls.steps[0].index = 4
    clock.pass_time(0.02)
    assert timed.result.complete  # what is known already needs no preview


def test_a_move_need_not_wait_for_the_whole(timed, clock):
    clock.pass_time(0.1501)  # the first part of the whole is done
    timed.controls.keeps[0].value = 0.7
    clock.pass_time(0.011)
    assert timed.result.state.schedule.keep_ratios[0] == 0.7 and not timed.result.complete


def test_a_drag_that_goes_on_is_followed(timed, clock):
    clock.pass_time(10)
    images = set()
    for k in range(40):
        timed.controls.keeps[0].value = 0.3 + 0.01 * k
        clock.pass_time(0.01)
        images.add(bytes(timed.image.value))
    assert len(images) > 10  # not only when the hand stops


def test_optimise_sets_the_schedule_keeps_the_pins_and_can_be_undone(explorer):
    controls = explorer.controls
    controls.stages.value = 1
    controls.steps[0].index = 17
    poor = controls.schedule
    controls.pin.click()
    pins = dict(explorer.pins)
    controls.seconds.value = 6
    explorer.optimise()
    explorer.thread.join(300)
    assert explorer.pins == pins and controls.schedule != poor
    assert explorer.result.gain_changes["B"].value > 5
    text = controls.optimised.value
    assert "Found and set: TTSnap at" in text and re.search(r"did not see is \+\d+\.\d % \[", text)
    assert not controls.optimise.disabled and controls.cancel.disabled
    controls.undo.click()
    assert controls.schedule == poor and controls.undo.disabled and explorer.pins == pins


def test_optimise_can_be_cancelled_and_tells_what_it_cannot(explorer):
    controls = explorer.controls
    controls.method.value = "best_of_n"
    controls.optimise.click()
    assert "Best-of-N has no schedule" in controls.optimised.value and explorer.message.value == ""
    controls.method.value = "ttsnap"
    controls.seconds.value = 600
    controls.optimise.click()
    controls.cancel.click()
    explorer.thread.join(300)
    assert not explorer.thread.is_alive() and not controls.optimise.disabled
    assert "The search was cut short" in controls.optimised.value or "Cancelled" in controls.optimised.value


def test_copied_text_leads_back_to_the_state(dataset, tmp_path):
    path = save_rewards(dataset, tmp_path / "ours.zarr")
    first = Explorer(str(path), rewards=["b"], multiples=MULTIPLES, multiple=4, iterations=10)
    first.controls.steps[1].index = 8
    first.controls.accounting.value = "published"
    first.controls.method.value = "ttsp"
    first.controls.copy_as.value = "papermill parameters"
    parameters = yaml.safe_load(first.copy())
    assert first.controls.copied.value and first.controls.copied.layout.display is None
    first.unpin("A")
    first.pin()  # pin A begins as the schedule that is given
    second = Explorer(**parameters)
    assert second.state == first.state
    assert second.numbers.value == first.numbers.value

    first.controls.copy_as.value = "schedule YAML"
    assert Schedule.from_yaml(first.copy()) == first.controls.schedule

    first.controls.copy_as.value = "command that runs it"
    words = shlex.split(first.copy())
    assert words[:2] == ["ttsnap", "search"]
    assert Schedule.from_yaml(words[words.index("--schedule") + 1]) == first.controls.schedule
    state = first.state
    assert int(words[words.index("--candidates") + 1]) == state.cost.candidates(state.budget, state.schedule)

    first.controls.copy_as.value = "command line"
    words = shlex.split(first.copy())
    assert words[:3] == ["ttsnap", "run", "explore"]
    given = dict(zip(words[4::3], words[5::3], strict=True))
    assert yaml.safe_load(given["steps"]) == list(first.controls.schedule.steps)
    assert set(given) == set(parameters) <= _declared()


def test_what_is_given_in_memory_cannot_be_copied(explorer):
    assert explorer.copy() == ""
    assert "in memory" in explorer.controls.exported.value


def _declared() -> set[str]:
    from ttsnap_lib.runs.parameters import declared_parameters, read_notebook

    return set(declared_parameters(read_notebook(Path(__file__).parents[2] / "notebooks" / "explore.ipynb")))


def test_save(explorer, tmp_path, capsys):
    path = explorer.save()
    assert path == tmp_path / "explore.png" and path.stat().st_size > 20_000
    assert path.with_suffix(".pdf").exists()
    text = (tmp_path / "results.csv").read_text()
    assert text.startswith("curve,method,reward,budget,n,spent,mean,low,high") and len(text.splitlines()) == 13
    assert str(path) in explorer.controls.exported.value and capsys.readouterr().out == ""


def test_every_label_has_a_tooltip(explorer):
    rows = [row for _, box in explorer.controls.sections.values() for row in box.children]
    labels = [row for row in rows if getattr(row, "description", "")]
    assert len(labels) > 20 and all(row.tooltip for row in labels)


def test_a_figure_stands_in_where_no_widgets_can_be_shown(explorer):
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["image/png"].startswith("iVBOR")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"method": "ttsnapp"}, ConfigError),
        ({"rewards": ["c"]}, ConfigError),
        ({"steps": [19], "keep_ratios": [0.5]}, ScheduleError),
        ({"steps": [1, 2, 3, 4, 5], "keep_ratios": [0.9] * 5}, ScheduleError),
        ({"cost": "flux-513"}, ConfigError),
        ({"accounting": "honest"}, ConfigError),
    ],
)
def test_wrong_arguments_raise(dataset, given, error):
    with pytest.raises(error):
        Explorer(dataset, **given)


@pytest.mark.parametrize("headless", [True, False])
def test_explore_saves_when_nobody_watches(dataset, tmp_path, monkeypatch, headless):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)  # as in any front end but JupyterLab
    given = {"multiples": MULTIPLES, "multiple": 8, "iterations": 10}
    if headless:
        monkeypatch.setenv("TTSNAP_RUN_FOLDER", str(tmp_path))
        (tmp_path / "manifest.json").write_text('{"token": ""}')
    explorer = explore(dataset, **given, run=current_run("explore") if headless else Run(tmp_path))
    assert explorer.result.complete and (tmp_path / "explore.png").exists() == headless


@pytest.mark.parametrize(
    ("asks", "python", "server", "alone"),
    [
        (True, False, "", False),  # JupyterLab
        (True, True, "", False),  # jupyter console, Spyder
        (False, False, "", False),  # front ends that cannot ask a person for input
        (False, True, "", True),  # papermill, nbclient
        (False, True, "voila/0.5", False),
    ],
)
def test_who_watches_is_told_by_the_request(monkeypatch, tmp_path, asks, python, server, alone):
    from jupyter_client.session import Session

    header = Session().msg("execute_request")["header"]
    if not python:
        header |= {"session": str(uuid.uuid4()), "msg_id": str(uuid.uuid4())}
    shell = SimpleNamespace(parent_header={"header": header, "content": {"allow_stdin": asks}})
    monkeypatch.setattr("ttsnap_lib.explorer.explorer.get_ipython", lambda: shell)
    monkeypatch.setenv("SERVER_SOFTWARE", server)
    assert nobody_watches(Run(tmp_path)) == alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "python", "asks", "alone"),
    [
        # VS Code sends cells through @jupyterlab/services (a UUID for session and message) with allow_stdin: true; source:
        # microsoft/vscode-jupyter, src/kernels/execution/cellExecution.ts and raw/session/rawKernelConnection.node.ts.
        ({"VSCODE_PID": "1", "VSCODE_CWD": "/", "VSCODE_IPC_HOOK": "/tmp/hook"}, False, True, False),
        # Colab runs an ipykernel of its own class, with the front end's session in the parent header; source:
        # googlecolab/colabtools, google/colab/_kernel.py and _message.py. Whether it lets a cell ask is nowhere written.
        ({"COLAB_RELEASE_TAG": "release", "COLAB_GPU": "", "COLAB_JUPYTER_IP": "172.28.0.12"}, False, True, False),
        ({"COLAB_RELEASE_TAG": "release", "COLAB_GPU": "", "COLAB_JUPYTER_IP": "172.28.0.12"}, False, False, False),
        ({"VSCODE_PID": "1", "COLAB_RELEASE_TAG": "release"}, True, False, True),  # papermill in a terminal of either
    ],
)
def test_a_real_kernel_is_asked_as_vs_code_and_colab_ask(environment, python, asks, alone, monkeypatch):
    from jupyter_client.manager import KernelManager

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        code = "from pathlib import Path; from ttsnap_lib.explorer.explorer import nobody_watches; from ttsnap_lib.runs.run import Run"
        ask = {"code": code, "silent": False, "store_history": True, "allow_stdin": asks, "stop_on_error": False}
        ask["user_expressions"] = {"alone": "nobody_watches(Run(Path()))"}
        message = client.session.msg("execute_request", ask)
        if not python:
            message["header"] |= {"session": str(uuid.uuid4()), "msg_id": str(uuid.uuid4())}
            message["msg_id"] = message["header"]["msg_id"]
        client.shell_channel.send(message)
        while (reply := client.get_shell_msg(timeout=120))["parent_header"]["msg_id"] != message["header"]["msg_id"]:
            pass  # replies to the greeting before
        told = reply["content"]["user_expressions"]["alone"]
        assert told["status"] == "ok" and told["data"]["text/plain"] == str(alone)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_tensors_of_the_data_cache_are_offered(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path))
    paths = [str(tmp_path / name) for name in ("own.zarr", "published/flux.zarr", "trajectories/mine.zarr")]
    for path in paths:
        save_rewards(synthetic_rewards(4, 30, 6, rewards=("a",)), path)
    explorer = Explorer(dataset, multiples=MULTIPLES, multiple=8, iterations=10)
    assert [name for name in explorer.controls.tensor.options if name.endswith(".zarr")] == paths
    explorer.controls.tensor.value = paths[1]
    assert explorer.message.value == "" and explorer.result.steps == tuple(range(6))
    shutil.rmtree(paths[2])
    explorer.controls.tensor.value = paths[2]
    assert paths[2] in explorer.message.value and explorer.result is None
    explorer.controls.tensor.value = paths[0]
    assert explorer.message.value == "" and explorer.result is not None


@pytest.mark.slow
def test_papermill_runs_the_notebook(tmp_path):
    """With papermill's own command line and a parameters file."""
    parameters = tmp_path / "given.yaml"
    parameters.write_text(yaml.safe_dump({"steps": [3, 8], "keep_ratios": [0.3, 0.5], "iterations": 20}))
    notebook = Path(__file__).parents[2] / "notebooks" / "explore.ipynb"
    environment = {**os.environ, "TTSNAP_DATA_CACHE": str(tmp_path), "PYTHONPATH": str(notebook.parents[1])}
    command = [sys.executable, "-m", "papermill", str(notebook), str(tmp_path / "out.ipynb"), "-f", str(parameters)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=500)
    content = json.loads((tmp_path / "out.ipynb").read_text())
    outputs = [output for cell in content["cells"] for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "runs" / "explore" / "interactive" / "explore.png").exists()
