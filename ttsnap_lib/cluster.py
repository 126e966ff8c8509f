"""A sweep's runs on a Dask cluster."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from .errors import RunError
from .workers import Outcome, Task, final_outcome, run_task

__all__ = ["run_dask"]

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
            "no Dask scheduler answers",
            value=scheduler,
            bound="an address such as tcp://host:8786, or a scheduler file",
            remedy="Start one with `dask scheduler` and workers with `dask worker ADDRESS`.",
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
            "the Dask scheduler is gone",
            value=client.status,
            bound="a running cluster",
            remedy="Start it again and run the same sweep: what has finished is kept.",
        )
    if future.status == "finished":
        return future.result()
    error = future.exception() if future.status == "error" else None
    if error is None or isinstance(error, KilledWorker):
        return None
    line = f"{type(error).__name__}: {error}"
    return {"status": "failed", "folder": "", "cell": "", "last_line": line, "died": False}
