"""The house: which room stands on which floor. A room imports lower floors only, and no file goes in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import ttsnap_lib

# room -> (floor, its one job). A room may import every room below its floor, and none beside it or above.
FLOORS = {
    "commands": (8, "the command line, a file for each group of commands"),
    "explorer": (8, "sliders over a reward tensor"),
    "finetuning": (7, "noise-aware rewards by curriculum self-distillation"),
    "scoring": (7, "pictures x rewards -> reward tensor"),
    "live": (7, "the live search: one prompt, one budget, one best image"),
    "tuning": (7, "the best pruning schedule for a budget"),
    "runs": (7, "notebooks run headless: single runs, sweeps and reports"),
    "trajectories": (6, "images with every estimate, on disk"),
    "simulation": (6, "what a method gives at a budget, on recorded rewards"),
    "rewards": (5, "one interface, many reward models"),
    "diffusion": (5, "drive a stock diffusers pipeline, part by part"),
    "tensors": (4, "the reward tensor: made, opened, saved, checked"),
    "pocket": (4, "the tiny world that ships"),
    "ground": (0, "schedule, sets, costs, files, argument checks, errors, provenance, style"),
}
GROUND = {"__init__", "__main__", "checks", "costs", "errors", "files", "provenance", "schedule", "sets", "style"}
LIBRARY = Path(ttsnap_lib.__file__).parent


def module_of(path: Path) -> str:
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return first if first in FLOORS else "ground"


MODULES = {module_of(path): path for path in sorted(LIBRARY.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """Return the modules of the library that a module imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("ttsnap_lib"):
            home = (node.module or "").removeprefix("ttsnap_lib").removeprefix(".")
            for alias in node.names:
                inside = f"{home}.{alias.name}" if home else alias.name
                found.add(inside if inside in MODULES else home)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("ttsnap_lib.") for alias in node.names if "ttsnap_lib." in alias.name}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module}: write imports from the top"
    return found - {module}


IMPORTS = {module: imports(module) for module in MODULES}


def test_every_file_stands_in_a_room_under_a_plain_name():
    files = {path.stem for path in LIBRARY.glob("*.py")}
    folders = {path.name for path in LIBRARY.iterdir() if any(path.glob("*.py"))}
    assert files == GROUND and folders == FLOORS.keys() - {"ground"}
    assert not [module for module in MODULES if any(part.startswith("_") for part in module.split("."))
                and module != "__main__"]  # fmt: skip


def test_a_room_imports_lower_floors_only():
    # `python -m ttsnap_lib` has to stand at the top and starts the commands; nothing else on the ground looks up.
    upward = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if room_of(module) != room_of(other)
        and FLOORS[room_of(module)][0] <= FLOORS[room_of(other)][0]
        and module not in ("__main__", "")
    ]
    assert not upward


def test_the_training_of_the_pocket_models_is_imported_by_nothing_else():
    assert not [module for module, others in IMPORTS.items() if not module.startswith("pocket.training")
                and any(other.startswith("pocket.training") for other in others)]  # fmt: skip


def test_no_files_import_each_other_in_a_circle():
    left = {module: set(others) - {""} for module, others in IMPORTS.items()}
    while free := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in free}
    assert not left


if __name__ == "__main__":  # the table of the README of a change: python -m tests.test_rooms
    for room, (floor, job) in FLOORS.items():
        files = [path for module, path in MODULES.items() if room_of(module) == room]
        lines = sum(len(path.read_text("utf-8").splitlines()) for path in files)
        print(f"floor {floor}  {room:<13} {len(files):>3} files {lines:>6} lines  {job}")
    total = sum(len(path.read_text("utf-8").splitlines()) for path in MODULES.values())
    print(f"{len(MODULES)} files, {total} lines, {len({floor for floor, _ in FLOORS.values()})} floors")
