"""Several processes by accelerate's launcher, on a machine without accelerators."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def launcher(processes: int) -> list[str]:
    """Return the beginning of a command that starts a script or ``-m module`` in `processes` processes.

    With ``--cpu`` accelerate starts a single process, whatever number is asked for, unless there is MPI. The launcher
    for GPUs starts them all, and what they run asks for the CPU.
    """
    words = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *words]


def environment() -> dict[str, str]:
    """Return the environment of such a command: our package, one thread a process."""
    paths = [str(ROOT), *([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
