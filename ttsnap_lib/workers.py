"""Many runs at once in local worker processes; :func:`run_task` is what a worker does, here and on a Dask cluster.

A local worker is a Python process that reads tasks as lines of JSON and answers in kind. It ends with the process
that started it, however that one ends, and takes its kernel along.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from . import execution
from .errors import RunError, TTSnapError
from .paths import repository_root

__all__ = ["cores", "final_outcome", "run_local", "run_task"]

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
    from . import runner

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

    execution.lean_imports()
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
