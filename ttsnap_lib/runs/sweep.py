"""Sweeps of a notebook over a grid of parameters: in parallel, resumable, collected into one table and a figure.

Every run has its own run folder, named by its parameters (:mod:`ttsnap_lib.runner`); a sweep only says which runs
there are. So a sweep that was interrupted, or that another sweep overlaps, takes up what has finished.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from ttsnap_lib.checks import integer, known_keys, plain_name, real
from ttsnap_lib.errors import ConfigError, RunError, TTSnapError
from ttsnap_lib.files import as_path, atomic_write, data_cache, lock, read_yaml, repository_root, write_json
from ttsnap_lib.provenance import device, git_state, now, versions
from ttsnap_lib.runs.parameters import Parameter, declared_parameters, parameter_hash, read_notebook, resolve
from ttsnap_lib.runs.run import Plan, find_notebook, finished, lean_imports, plan

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


_KEYS = ("notebook", "name", "parameters", "grid", "cases", "exclude", "metric", "table")


_MOST_RUNS = 100_000


@dataclass(frozen=True)
class GridSpec:
    """A checked sweep: the notebook and the parameter sets, in the order of the file, no set twice.

    Attributes
    ----------
    runs : tuple of dict
        Resolved parameters of each run.
    cases : tuple of str
        The named case of each run, "" where the file names none.
    axes : tuple of str
        Names of the parameters under ``grid``, in the order of the file.
    metric, table : str
        Column to draw in the summary figure ("" to choose one), and the saved table to collect.
    """

    name: str
    notebook: Path
    runs: tuple[dict[str, Any], ...]
    cases: tuple[str, ...]
    axes: tuple[str, ...]
    metric: str = ""
    table: str = "results"


def load_grid(path: str | Path) -> GridSpec:
    """Read a sweep from the YAML file `path`; a notebook's path in it is relative to the file.

    Returns
    -------
    GridSpec

    Raises
    ------
    ConfigError
        Anything in the file that is unknown, of the wrong kind, or that the notebook does not accept.
    """
    path = as_path("sweep", path)
    content = read_yaml(path, "sweep", remedy="Check the path; indent with spaces, and write `name: value`.")
    if not isinstance(content, dict):
        raise ConfigError(f"{path!s}: got {content!r}, expected a mapping. Write notebook: and grid: lines.")
    notebook = content.get("notebook")
    if isinstance(notebook, str) and (path.parent / as_path("sweep: notebook", notebook or " ")).is_file():
        content = {**content, "notebook": str(path.parent / notebook)}
    return parse_grid(content, default_name=path.stem)


def parse_grid(content: Mapping[str, Any], default_name: str = "sweep") -> GridSpec:
    """Check a sweep given as a mapping with the keys of the YAML file, and expand it.

    Returns
    -------
    GridSpec

    Raises
    ------
    ConfigError
        An unknown key, a bad value, or an unknown notebook.
    """
    known_keys("sweep", content, _KEYS)
    if not isinstance(content.get("notebook"), str):
        raise ConfigError(
            f"sweep: notebook: got {content.get('notebook')!r}, expected the name or path of a notebook. Write for "
            "example `notebook: simulate`."
        )
    for key in ("name", "metric", "table"):
        if key in content and not (isinstance(content[key], str) and content[key].strip()):
            raise ConfigError(f"sweep: {key}: got {content[key]!r}, expected text. Write `{key}: some_name`.")
    name = content.get("name", default_name)
    plain_name("sweep: name", name)
    plain_name("sweep: table", content.get("table", "results"))
    notebook = find_notebook(content["notebook"])
    declared = declared_parameters(read_notebook(notebook), notebook.name)
    sets = expand(content, declared, notebook.name)
    return GridSpec(
        name=name,
        notebook=notebook,
        runs=tuple(resolved for _, resolved in sets),
        cases=tuple(case for case, _ in sets),
        axes=tuple(content.get("grid") or ()),
        metric=content.get("metric", ""),
        table=content.get("table", "results"),
    )


def expand(
    content: Mapping[str, Any], declared: Mapping[str, Parameter], name: str = "notebook"
) -> list[tuple[str, dict[str, Any]]]:
    """Return (case, resolved parameters) for every point of the grid, first axis slowest, duplicates dropped.

    Raises
    ------
    ConfigError
        An axis or case that names no parameter, or a grid without a point.
    """
    parts = {key: content.get(key) or {} for key in ("parameters", "grid", "cases")}
    for key, value in parts.items():
        if not isinstance(value, dict):
            raise ConfigError(f"sweep: {key}: got {value!r}, expected a mapping. Write `name: value` lines.")
    constants, grid, cases = parts.values()
    exclude = content.get("exclude") or []
    if not isinstance(exclude, list):
        raise ConfigError(f"sweep: exclude: got {exclude!r}, expected a list of mappings. Write `- {{name: value}}`.")
    resolve(declared, constants, name)
    if cases and "case" in declared:
        raise ConfigError(
            "sweep: cases: got 'case', expected a notebook without a parameter of that name. Use grid instead."
        )
    for case, overlay in cases.items():
        if not isinstance(case, str) or not isinstance(overlay, dict):
            raise ConfigError(f"sweep: cases: got {case!r}, expected a name and a mapping. Write `name: {{x: 1}}`.")
        known_keys(f"case {case}", overlay, declared)
        resolve(declared, overlay, name)
    known_keys("sweep: grid", grid, declared)
    twice = next((key for part in (constants, *cases.values()) for key in part if key in grid), None)
    if twice is not None:
        raise ConfigError(
            f"sweep: a parameter under grid stands elsewhere too: got {twice!r}, expected each parameter under one of "
            "grid, parameters and cases (a case may change a constant). Keep one of the two."
        )
    axes = {key: axis_values(f"grid.{key}", axis) for key, axis in grid.items()}
    names = [*declared, *(["case"] if cases else [])]
    for where, condition in [
        *((f"grid.{key}", when) for key, (when, _) in axes.items()),
        *(("exclude", x) for x in exclude),
    ]:
        if not isinstance(condition, dict):
            raise ConfigError(f"sweep: {where}: got {condition!r}, expected a mapping. Write `{{name: value}}`.")
        known_keys(f"sweep: {where}", condition, names)
    size = math.prod(len(values) for _, values in axes.values()) * max(1, len(cases))
    integer("number of runs in the sweep", size, 1, _MOST_RUNS)

    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for case, overlay in cases.items() or [("", {})]:
        for point in _points({**constants, **overlay}, axes, declared, case, name):
            if not any(_matches(rule, point, case) for rule in exclude):
                found.setdefault(parameter_hash(point), (case, point))
    if not found:
        raise ConfigError(f"sweep: exclude: got {exclude!r}, expected rules that leave a run. Remove a rule.")
    return list(found.values())


def _points(
    base: dict[str, Any],
    axes: Mapping[str, tuple[dict[str, Any], list[Any]]],
    declared: Mapping[str, Parameter],
    case: str,
    name: str,
) -> Iterator[dict[str, Any]]:
    """Yield the resolved points; an axis whose condition does not hold leaves its parameter at the default."""
    free = [key for key, (when, _) in axes.items() if not when]
    bound = [key for key, (when, _) in axes.items() if when]
    for values in itertools.product(*(axes[key][1] for key in free)):
        points = [{**base, **dict(zip(free, values, strict=True))}]
        for key in bound:  # in the order of the file, so a condition may rest on an earlier conditional axis
            when, options = axes[key]
            points = [
                wider
                for point in points
                for wider in (
                    [{**point, key: option} for option in options]
                    if _matches(when, resolve(declared, point, name), case)
                    else [point]
                )
            ]
        for point in points:
            yield resolve(declared, point, name)


def _matches(condition: Mapping[str, Any], point: Mapping[str, Any], case: str) -> bool:
    """Return whether every named value is the given one, or one of the given list."""
    return all(_equals(case if key == "case" else point[key], wanted) for key, wanted in condition.items())


def _equals(value: Any, wanted: Any) -> bool:
    if isinstance(value, tuple):
        value = list(value)
    return value == wanted or (isinstance(wanted, list) and value in wanted)


def axis_values(label: str, axis: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return (condition, values) of one axis.

    Forms: a list; ``{start, stop, step}`` with both ends; ``{linspace: [first, last, count]}``;
    ``{logspace: [first, last, count]}`` (the values themselves, not exponents); ``{values: ..., when: {...}}``.

    Raises
    ------
    ConfigError
        Another form, or an axis without values.
    """
    if isinstance(axis, dict) and "values" in axis:
        known_keys(label, axis, ("values", "when"))
        when = axis.get("when") or {}
        return when, axis_values(label, axis["values"])[1]
    if isinstance(axis, dict):
        rest = {key: value for key, value in axis.items() if key != "when"}
        values = _range_values(label, rest)
        return axis.get("when") or {}, values
    if not isinstance(axis, list) or not axis:
        raise ConfigError(
            f"{label}: got {axis!r}, expected a list of values, {{start, stop, step}}, {{linspace: [first, last, "
            "count]}, {logspace: ...} or {values: [...], when: {...}}. Put a value that does not vary under parameters."
        )
    return {}, axis


def _range_values(label: str, axis: dict[str, Any]) -> list[Any]:
    if "linspace" in axis or "logspace" in axis:
        known_keys(label, axis, ("linspace",) if "linspace" in axis else ("logspace",))
        ((kind, ends),) = axis.items()
        if not isinstance(ends, list) or len(ends) != 3:
            raise ConfigError(f"{label}.{kind}: got {ends!r}, expected [first, last, count]. Give three numbers.")
        low = 0 if kind == "logspace" else None
        first, last = (real(f"{label}.{kind}", end, low, open_low=low == 0) for end in ends[:2])
        count = integer(f"{label}.{kind} count", ends[2], 1, _MOST_RUNS)
        if kind == "logspace":
            first, last = math.log(first), math.log(last)
        points = [first + (last - first) * k / max(1, count - 1) for k in range(count)]
        values = [math.exp(point) for point in points] if kind == "logspace" else points
        return [float(f"{value:.12g}") for value in values]
    known_keys(label, axis, ("start", "stop", "step"))
    missing = [key for key in ("start", "stop", "step") if key not in axis]
    if missing:
        raise ConfigError(f"{label}: got {axis!r}, expected {missing[0]} as well. Give start, stop and step.")
    start, stop, step = (real(f"{label}.{key}", axis[key]) for key in ("start", "stop", "step"))
    if step == 0 or (stop - start) / step < 0:
        raise ConfigError(f"{label}.step: got {step!r}, expected a step from start towards stop. Change its sign.")
    count = math.floor(real(f"{label}: number of values", (stop - start) / step + 1, 1, _MOST_RUNS) + 1e-9)
    if all(isinstance(axis[key], int) for key in axis):
        return [axis["start"] + k * axis["step"] for k in range(count)]
    return [float(f"{start + k * step:.12g}") for k in range(count)]


Task = dict[str, Any]
"""One run: key (its hash), notebook, parameters, folder (of the runs), timeout_s."""


Outcome = dict[str, Any]
"""What became of it: status (complete or failed), reused, elapsed_s, folder, last_line, cell, died."""


_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_task(task: Task, say: Callable[[str], None] | None = None) -> Outcome:
    """Run one task; a notebook that fails is an outcome, not an exception.

    Returns
    -------
    Outcome
    """
    from ttsnap_lib.runs import run as runner

    try:
        result = runner.run(
            task["notebook"], task["parameters"], folder=task["folder"], timeout_s=task["timeout_s"], progress=say,
            warm=True,
        )  # fmt: skip
    except RunError as error:
        last_line = getattr(error, "last_line", str(error))
        return {
            "status": "failed",
            "folder": str(getattr(error, "folder", "")),
            "cell": getattr(error, "cell", ""),
            "last_line": last_line,
            "died": "kernel died" in last_line.lower(),
        }
    except TTSnapError as error:
        return {"status": "failed", "folder": "", "cell": "", "last_line": str(error), "died": False}
    return {
        "status": "complete",
        "folder": str(result.folder),
        "elapsed_s": result.manifest["elapsed_s"],
        "reused": result.reused,
    }


# -- local worker processes ----------------------------------------------------------------------------------------


def serve() -> None:
    """Be a local worker: read tasks from standard input until it closes, answer on standard output."""
    os.environ["TTSNAP_WORKER_PID"] = str(os.getpid())  # for whoever looks at the processes, from a notebook too
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    tasks: deque[Task] = deque()
    ready = threading.Semaphore(0)
    busy = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            tasks.append(json.loads(line))
            ready.release()
        ready.release()
        if busy.is_set():  # the sweep has ended in mid-run: stop the kernel in an orderly way
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(15)
            os._exit(1)

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    lean_imports()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=read, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        while True:
            ready.acquire()
            if not tasks:
                return
            busy.set()
            outcome = run_task(tasks.popleft(), lambda line: answer({"said": line}))
            busy.clear()
            answer({"outcome": outcome})


class _Worker:
    """The sweep's side of one local worker."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        root = repository_root()
        paths = [str(root)] if root is not None else []
        paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        with open(log, "ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from ttsnap_lib.workers import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                encoding="utf-8",
                env={**os.environ, **environment, **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})},
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which then ends its workers
            )
        self.input, self._output = cast("IO[str]", self.process.stdin), cast("IO[str]", self.process.stdout)

    def do(self, task: Task, say: Callable[[str], None]) -> Outcome | None:
        """Return the outcome of `task`, or None when the worker was lost on the way."""
        try:
            self.input.write(json.dumps(task) + "\n")
            self.input.flush()
            for line in self._output:
                message = json.loads(line)
                if "outcome" in message:
                    return message["outcome"]
                say(message["said"])
        except (BrokenPipeError, ValueError):
            pass
        return None

    def end(self) -> None:
        """Close the worker's input, which ends it; kill it when that takes too long."""
        with contextlib.suppress(OSError):
            self.input.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._output.close()


def run_local(
    tasks: Sequence[Task],
    workers: int,
    *,
    retries: int,
    log: Path,
    on_start: Callable[[str, int], None],
    on_said: Callable[[str, str], None],
    on_end: Callable[[str, Outcome], None],
) -> None:
    """Run `tasks` in `workers` local processes; the callbacks get a task's key and come one at a time.

    A worker that is lost (killed, out of memory) is replaced and its task tried again, `retries` times at most; so is
    a kernel that dies. Each worker may use its share of the cores.

    Raises
    ------
    Exception
        What starting a worker or a callback raised first.
    """
    share = str(max(1, cores() // workers))
    limits = {name: share for name in _THREAD_VARIABLES if name not in os.environ}
    waiting = deque((task, 0) for task in tasks)
    guard = threading.RLock()  # of the queue and of the callbacks
    ending = threading.Event()
    problems: list[BaseException] = []
    alive: list[_Worker] = []

    def work(number: int) -> None:
        worker: _Worker | None = None
        while not ending.is_set():
            with guard:
                if not waiting:
                    return
                task, lost = waiting.popleft()
                if worker is None:
                    worker = _Worker(limits, log)
                    alive.append(worker)
                on_start(task["key"], number)
            outcome = worker.do(task, partial(_guarded, guard, on_said, task["key"]))
            if ending.is_set():
                return
            if outcome is None:
                with guard:
                    alive.remove(worker)
                worker.end()
                worker = None
            with guard:
                again = final_outcome(lost, outcome, retries)
                if again is None:
                    waiting.append((task, lost + 1))
                else:
                    on_end(task["key"], again)

    def guarded_work(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            problems.append(error)
            ending.set()

    threads = [threading.Thread(target=guarded_work, args=(k,), daemon=True) for k in range(min(workers, len(tasks)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # in slices, so that Ctrl-C is heard
                thread.join(0.2)
    finally:
        ending.set()
        with guard:
            ended = list(alive)
        for worker in ended:
            with contextlib.suppress(OSError):
                worker.input.close()  # all first, so that they end side by side
        for worker in ended:
            worker.end()
    if problems:
        raise problems[0]


def _guarded(guard: Any, call: Callable[..., None], *arguments: Any) -> None:
    with guard:
        call(*arguments)


def final_outcome(lost: int, outcome: Outcome | None, retries: int) -> Outcome | None:
    """Return the final outcome of a task whose worker was lost `lost` times before; None when it deserves another try.

    An `outcome` of None is a worker that was lost this time.
    """
    if outcome is not None and not outcome.get("died"):
        return outcome
    if lost < retries:
        return None
    if outcome is not None:
        return {**outcome, "last_line": f"{outcome['last_line']} ({lost + 1} times)"}
    line = f"the worker died {lost + 1} times at this run (killed, or out of memory)"
    return {"status": "failed", "folder": "", "cell": "", "last_line": line, "died": True}


CONNECT_S = 20  # a scheduler on a busy cluster answers within this


def run_dask(
    tasks: Sequence[Task],
    scheduler: str,
    *,
    retries: int,
    on_end: Callable[[str, Outcome], None],
) -> None:
    """Run `tasks` on the Dask cluster at `scheduler` (``tcp://host:port``, or a scheduler file).

    The workers import this package and see the folder of the runs at the same path. Dask moves the task of a lost
    worker to another one; a run that had finished there is found and not run again.

    Raises
    ------
    RunError
        When no scheduler answers there.
    """
    from distributed import Client, as_completed

    where = {"scheduler_file": scheduler} if scheduler.endswith(".json") else {"address": scheduler}
    try:
        client = Client(**where, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise RunError(
            f"no Dask scheduler answers: got {scheduler!r}, expected an address such as tcp://host:8786, or a "
            "scheduler file. Start one with `dask scheduler` and workers with `dask worker ADDRESS`."
        ) from error
    by_key = {task["key"]: task for task in tasks}
    lost = dict.fromkeys(by_key, 0)
    flying: dict[Any, str] = {}
    with client:
        done = as_completed(loop=client.loop)

        def submit(key: str) -> None:
            future = client.submit(run_task, by_key[key], key=f"ttsnap-{key}-{uuid.uuid4().hex[:8]}", pure=False)
            flying[future] = key
            done.add(future)

        try:
            for key in by_key:
                submit(key)
            for future in done:
                key = flying.pop(future)
                again = final_outcome(lost[key], _dask_outcome(future, client), retries)
                if again is None:
                    lost[key] += 1
                    submit(key)
                else:
                    on_end(key, again)
        finally:
            client.cancel(list(flying))


def _dask_outcome(future: Any, client: Any) -> Outcome | None:
    """Return what a task of the cluster gave, None when its worker was lost once too often for Dask."""
    from distributed import KilledWorker

    if client.status != "running":
        raise RunError(
            f"the Dask scheduler is gone: got {client.status!r}, expected a running cluster. Start it again and run "
            "the same sweep: what has finished is kept."
        )
    if future.status == "finished":
        return future.result()
    error = future.exception() if future.status == "error" else None
    if error is None or isinstance(error, KilledWorker):
        return None
    line = f"{type(error).__name__}: {error}"
    return {"status": "failed", "folder": "", "cell": "", "last_line": line, "died": False}


_SWEEP_COLUMNS = {"method", "reward", "budget", "mean", "low", "high"}


_USUAL_METRICS = ("mean", "reward", "value", "score", "gain", "test_gain", "tau", "loss")


def collect(spec: GridSpec, runs: Sequence[tuple[int, Path]]) -> pd.DataFrame:
    """Return the tables of `runs` (index in the sweep, run folder) under each other, parameters as first columns.

    Rows stand in the sweep's order, so the same runs give the same table, to the byte. A parameter whose name the
    results use too is called ``<name>_parameter``. A run without the table gives one row of its parameters.
    """
    import pandas as pd

    frames: list[tuple[int, pd.DataFrame | None]] = []
    for index, folder in runs:
        path = folder / f"{spec.table}.parquet"
        frames.append((index, pd.read_parquet(path) if path.exists() else None))
    taken = {column for _, frame in frames if frame is not None for column in frame.columns}
    parts = []
    for (index, frame), (_, folder) in zip(frames, runs, strict=True):
        rows = 1 if frame is None else len(frame)
        own: dict[str, Any] = {"run": folder.name}
        if any(spec.cases):
            own["case"] = spec.cases[index]
        own |= spec.runs[index]
        columns = {
            (f"{name}_parameter" if name in taken else name): [_cell(value)] * rows for name, value in own.items()
        }
        left = pd.DataFrame(columns, index=range(rows))
        parts.append(left if frame is None else left.join(frame.reset_index(drop=True)))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"run": []})
    for name in table.columns:  # one type a column, or Parquet refuses it
        kinds = {type(value) for value in table[name] if value is not None} if table[name].dtype == object else set()
        if len(kinds) > 1:
            table[name] = [None if value is None else str(value) for value in table[name]]
    return table


def _cell(value: Any) -> Any:
    """Return a parameter as a table's cell: lists and mappings as JSON text."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | dict) else value


def main_metric(spec: GridSpec, table: pd.DataFrame) -> str | None:
    """Return the column to draw: the one the sweep names, else a usual one, else the last number of the results."""
    if spec.metric:
        if spec.metric not in table.columns:
            raise ConfigError(
                f"sweep: metric: got {spec.metric!r}, expected one of {list(table.columns)}. Name a column."
            )
        return spec.metric
    own = {"run", "case", *spec.runs[0]}
    numbers = [
        name for name in table.select_dtypes("number").columns
        if name not in own and not name.endswith("_parameter")
    ]  # fmt: skip
    return next((name for name in _USUAL_METRICS if name in numbers), numbers[-1] if numbers else None)


def draw(spec: GridSpec, table: pd.DataFrame) -> Figure | None:
    """Return a figure of the main metric against what the sweep varies; None when there is nothing to draw.

    A table of :func:`ttsnap_lib.sweep`'s columns with one row for each method and budget is drawn as reward against
    budget. Otherwise the numeric axis with the most values runs along x, and the next two axes give color and line
    style; what else varies is averaged over, and a band or bar shows its whole spread.
    """
    import seaborn as sns
    from matplotlib.figure import Figure

    metric = main_metric(spec, table)
    if metric is None or table.empty:
        return None
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    ax = figure.add_subplot()
    axes = [name if name in table.columns else f"{name}_parameter" for name in spec.axes]
    axes = [name for name in axes if name in table.columns and table[name].nunique() > 1]
    if set(table.columns) >= _SWEEP_COLUMNS and table.groupby(["method", "budget"]).size().max() == 1:
        from ttsnap_lib.simulation.plots import reward_against_budget

        reward_against_budget(table, ax=ax)
        return figure
    if any(spec.cases):
        axes.append("case")
    axes += [
        name for name in ("method", "reward", "budget")
        if name in table.columns and name not in axes and table[name].nunique() > 1
    ]  # fmt: skip
    numeric = [name for name in axes if table[name].dtype.kind in "if"]
    numeric.sort(key=lambda name: -table[name].nunique())
    along = numeric[0] if numeric else axes[0] if axes else "run"
    rest = [name for name in axes if name != along][:2]
    colors = {}
    if rest:
        colors = {"hue": table[rest[0]].astype(str)}
        colors["palette"] = sns.color_palette("colorblind", colors["hue"].nunique())
    band = ("pi", 100)  # the whole spread; nothing random, so the same table gives the same picture
    if numeric:
        style = {"style": table[rest[1]].astype(str)} if len(rest) > 1 else {}
        sns.lineplot(x=table[along], y=table[metric], ax=ax, errorbar=band, marker="o", **colors, **style)
        values = sorted(table[along].unique())
        if len(values) > 3 and values[0] > 0 and _even_in_log(values):
            ax.set_xscale("log")
    else:
        sns.barplot(x=table[along].astype(str), y=table[metric], ax=ax, errorbar=band, **colors)
        if table[along].nunique() > 4:
            ax.tick_params(axis="x", labelrotation=45)
    ax.set(xlabel=along, ylabel=metric, title=spec.name)
    if rest and ax.get_legend() is not None:
        sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), frameon=False, title=", ".join(rest))
    sns.despine(ax=ax)
    return figure


def _even_in_log(values: Sequence[float]) -> bool:
    ratios = [b / a for a, b in itertools.pairwise(values)]
    return min(ratios) > 1.2 and max(ratios) / min(ratios) < 1.05


def short_parameters(parameters: Mapping[str, Any], axes: tuple[str, ...], case: str = "") -> str:
    """Return the varied parameters in one short line."""
    parts = [case] if case else []
    parts += [f"{name}={_short(parameters[name])}" for name in axes]
    return ", ".join(parts) or "defaults"


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 30 else text[:27] + "..."


class SweepView:
    """Counts runs and tells about them on `stream`; a stream of None keeps it silent.

    Parameters
    ----------
    stream : TextIO or None
        Redrawn in place when it is a terminal.
    labels : dict
        What to call each run, by key.
    reused : int
        Runs that had finished before.
    """

    def __init__(self, stream: TextIO | None, name: str, labels: Mapping[str, str], reused: int) -> None:
        self._stream, self._name, self._labels = stream, name, labels
        self._total, self._reused = len(labels), reused
        self._done, self._failed = reused, 0
        self._running: dict[str, tuple[int, float, str]] = {}
        self._begin = time.monotonic()
        self._drawn_lines, self._drawn_at = 0, 0.0
        self._live = stream is not None and stream.isatty()
        if stream is not None:
            before = f", {reused} finished before" if reused else ""
            self._write(f"sweep {name}: {self._total} runs{before}\n")

    def start(self, key: str, worker: int) -> None:
        """Tell that a worker has begun a run."""
        self._running[key] = (worker, time.monotonic(), "starting")
        self._draw()

    def said(self, key: str, line: str) -> None:
        """Tell what a run reports (its cell)."""
        if key in self._running:
            worker, begin, _ = self._running[key]
            self._running[key] = (worker, begin, line)
            self._draw()

    def end(self, key: str, outcome: Mapping[str, Any]) -> None:
        """Tell how a run ended."""
        _, begin, _ = self._running.pop(key, (0, 0.0, ""))
        failed = outcome["status"] != "complete"
        self._failed += failed
        self._done += not failed
        seconds = outcome.get("elapsed_s") or (time.monotonic() - begin if begin else 0.0)
        count = f"[{self._done + self._failed:>{len(str(self._total))}}/{self._total}]"
        if self._stream is None:
            return
        tail = f": {outcome['last_line']}" if failed else ""
        line = f"{count} {outcome['status']:<8} {seconds:7.1f} s  {self._labels[key]}{tail}\n"
        if self._live and not failed:
            self._draw(force=True)
            return
        self._clear()
        self._write(line)
        self._draw(force=True)

    def close(self) -> None:
        """Leave one last line with the counts."""
        if self._stream is not None:
            self._clear()
            self._write(self._summary() + "\n")

    def _summary(self) -> str:
        gone = time.monotonic() - self._begin
        ran = self._done + self._failed - self._reused
        left = self._total - self._done - self._failed
        rest = f", about {_clock(gone / ran * left)} left" if ran and left else ""
        return f"sweep {self._name}: {self._done}/{self._total} done, {self._failed} failed, {_clock(gone)} gone{rest}"

    def _draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if not self._live or (not force and now - self._drawn_at < 0.2):
            return
        self._clear()
        lines = [self._summary()]
        for key, (worker, begin, said) in sorted(self._running.items(), key=lambda item: item[1][0]):
            label = self._labels[key]
            lines.append(f"  worker {worker + 1:<3} {_clock(now - begin)}  {said:<12} {label[:80]}")
        self._write("".join(line + "\n" for line in lines))
        self._drawn_lines, self._drawn_at = len(lines), now

    def _clear(self) -> None:
        if self._drawn_lines:
            self._write(f"\x1b[{self._drawn_lines}A\x1b[J")
            self._drawn_lines = 0

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gave.

    Attributes
    ----------
    folder : Path
        Holds ``results.csv``, ``results.parquet``, ``summary.png`` and ``sweep.json``.
    table : pandas.DataFrame
        Parameters as first columns, then each run's results, in the sweep's order.
    failed : list of dict
        Of each failed run: label, parameters, folder, cell, last_line.
    reused : int
        How many runs had finished before.
    """

    folder: Path
    table: pd.DataFrame
    failed: list[dict[str, Any]]
    reused: int
    elapsed_s: float


def run_sweep(
    grid: GridSpec | str | Path | Mapping[str, Any],
    *,
    folder: str | Path | None = None,
    runs_folder: str | Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    retries: int = 2,
    timeout_s: float | None = None,
    stream: TextIO | None = None,
) -> SweepResult:
    """Run every parameter set of `grid` that has not finished before, and collect all of them.

    Parameters
    ----------
    grid : GridSpec, path or mapping
        The sweep, a YAML file of it, or its content.
    folder : str or Path, optional
        For the sweep's table and figure; ``data_cache/sweeps/<name>`` by default.
    runs_folder : str or Path, optional
        Holds the run folders; ``data_cache/runs`` by default, where single runs stand too. On a cluster it has to be
        on a file system that all workers share.
    workers : int, optional
        Local worker processes; as many as there are cores by default. Each may use its share of the cores.
    scheduler : str, optional
        Address of a Dask scheduler (or its scheduler file): the runs go there, `workers` plays no part.
    retries : int
        How often a run is tried again when its worker or kernel is lost. A cell that raises is not tried again.
    timeout_s : float, optional
        Longest time for one cell.
    stream : TextIO, optional
        Where to show the live table.

    Returns
    -------
    SweepResult

    Raises
    ------
    ConfigError
        Anything wrong in the grid, before the first run.
    DiskError
        Another process is at the same sweep.
    """
    import nbformat  # noqa: F401 - without the extra "notebooks" every worker would die of it, three times each run

    if isinstance(grid, str | Path):
        grid = load_grid(grid)
    elif not isinstance(grid, GridSpec):
        grid = parse_grid(grid)
    workers = integer("workers", cores() if workers is None else workers, 1)
    retries = integer("retries", retries, 0)
    timeout_s = None if timeout_s is None else real("timeout_s", timeout_s, 0, open_low=True)
    home = (Path(folder) if folder is not None else data_cache() / "sweeps" / grid.name).absolute()
    plans = [plan(grid.notebook, parameters, folder=runs_folder) for parameters in grid.runs]
    with lock(home / ".lock"):
        return _run_locked(grid, plans, home, workers, scheduler, retries, timeout_s, stream)


def _run_locked(
    grid: GridSpec,
    plans: list[Plan],
    home: Path,
    workers: int,
    scheduler: str | None,
    retries: int,
    timeout_s: float | None,
    stream: TextIO | None,
) -> SweepResult:
    begin, started = time.monotonic(), now()
    done: dict[str, Outcome] = {}
    for planned in plans:
        before = finished(planned)
        if before is not None:
            done[planned.run_hash] = {"status": "complete", "folder": str(before.folder), "reused": True}
    reused = len(done)
    tasks: list[Task] = [
        {
            "key": planned.run_hash,
            "notebook": str(planned.notebook),
            "parameters": planned.parameters,
            "folder": str(planned.folder.parent.parent),
            "timeout_s": timeout_s,
        }
        for planned in plans
        if planned.run_hash not in done
    ]
    labels = {
        planned.run_hash: short_parameters(planned.parameters, grid.axes, case)
        for planned, case in zip(plans, grid.cases, strict=True)
    }
    view = SweepView(stream, grid.name, labels, reused)

    def on_end(key: str, outcome: Outcome) -> None:
        done[key] = outcome
        view.end(key, outcome)

    try:
        if tasks and scheduler is not None:
            run_dask(tasks, scheduler, retries=retries, on_end=on_end)
        elif tasks:
            run_local(
                tasks, workers, retries=retries, log=home / "workers.log",
                on_start=view.start, on_said=view.said, on_end=on_end,
            )  # fmt: skip
    finally:
        view.close()
    good = [(k, p.folder) for k, p in enumerate(plans) if done[p.run_hash]["status"] == "complete"]
    table = collect(grid, good)
    _save(home, grid, table)
    failed = [
        {
            "label": labels[planned.run_hash],
            "run_hash": planned.run_hash,
            "parameters": planned.parameters,
            "folder": str(planned.folder),
            "cell": done[planned.run_hash]["cell"],
            "last_line": done[planned.run_hash]["last_line"],
        }
        for planned in plans
        if done[planned.run_hash]["status"] != "complete"
    ]
    elapsed_s = round(time.monotonic() - begin, 3)
    write_json(
        home / "sweep.json",
        {
            "name": grid.name,
            "notebook": grid.notebook.stem,
            "axes": list(grid.axes),
            "runs": [
                {
                    "run_hash": planned.run_hash,
                    "case": case,
                    "parameters": planned.parameters,
                    "status": done[planned.run_hash]["status"],
                    "folder": str(planned.folder),
                }
                for planned, case in zip(plans, grid.cases, strict=True)
            ],
            "failed": failed,
            "reused": reused,
            "workers": scheduler or workers,
            "git": git_state(),
            "versions": versions(),
            "device": device(),
            "started": started,
            "ended": now(),
            "elapsed_s": elapsed_s,
        },
    )
    return SweepResult(home, table, failed, reused, elapsed_s)


def _save(home: Path, grid: GridSpec, table: pd.DataFrame) -> None:
    """Write the table as CSV and Parquet and the figure as PNG and PDF."""
    with atomic_write(home / "results.csv", "w") as file:
        table.to_csv(file, index=False, lineterminator="\n")
    with atomic_write(home / "results.parquet") as file:
        table.to_parquet(file, index=False)
    figure = draw(grid, table)
    for suffix, options in ((".png", {"dpi": 200}), (".pdf", {"metadata": {"CreationDate": None}})):
        path = home / f"summary{suffix}"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        with atomic_write(path) as file:
            figure.savefig(file, format=suffix[1:], **options)
