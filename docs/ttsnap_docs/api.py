"""The pages of the Python reference: which module stands where, and what of it is shown."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import ttsnap_lib

__all__ = ["GROUPS", "INTERNAL", "pages", "shown", "slug"]

GROUPS: dict[str, tuple[str, ...]] = {
    "Schedules and costs": ("schedule", "costs"),
    "Reward tensors": ("tensors", "published", "interop", "synthetic"),
    "Simulation": ("simulate", "results", "metrics", "selection"),
    "Schedule optimiser": ("optimize", "transfer"),
    "Figures and explorer": ("plots", "plots_images", "plots_scores", "plots_search", "widgets", "score_report"),
    "Generation": ("prompts", "pipelines", "denoise", "negtome", "generate", "trajectories", "diversity"),
    "Rewards and scoring": ("rewards", "score", "inline_score"),
    "Finetuning": ("curriculum",),
    "Search": ("search", "search_many", "search_models", "search_record", "measure"),
    "Runs, sweeps and reports": ("runner", "parameters", "grids", "sweeps", "report", "paths", "progress"),
    "Pocket world": ("pocket",),
    "Errors": ("errors",),
}
"""Page title -> modules of ``ttsnap_lib``."""
INTERNAL = ("checks", "cluster", "commands", "execution", "forkserver", "provenance", "reward_store", "workers")
"""Modules without a page: the command line has one of its own, the rest serves the modules above."""


def pages() -> dict[str, str]:
    """Return the path of each page and its Markdown."""
    found = {"api/index.md": _index()}
    for title, modules in GROUPS.items():
        parts = [f"# {title}\n", *(_module(name) for name in modules)]
        found[f"api/{slug(title)}.md"] = "\n".join(parts)
    return found


def shown(module: str) -> dict[str, str]:
    """Return the public names of a module and where each is defined, in the order of ``__all__``."""
    loaded = importlib.import_module(f"ttsnap_lib.{module}")
    lazy = getattr(loaded, "_NAMES", {})

    def target(name: str) -> str:
        if name in lazy:
            return f"{loaded.__name__}.{lazy[name]}.{name}"
        origin = str(getattr(getattr(loaded, name), "__module__", ""))
        # What a private module defines belongs to the public one that offers it.
        return f"{origin if origin.startswith('ttsnap_lib._') else loaded.__name__}.{name}"

    return {name: target(name) for name in loaded.__all__}


def slug(title: str) -> str:
    """Return the file name of a page, without its ending."""
    return title.lower().replace(",", "").replace(" ", "-")


def _module(name: str) -> str:
    """Return the section of a module: its docstring, then each public name."""
    own = _defined(name)
    path = f"ttsnap_lib.{name}"
    lines = [f"## {path} {{ #{path} }}\n", f"::: {path}", "    options:", "      heading_level: 2",
             "      show_root_heading: false", "      show_root_toc_entry: false", "      members: []\n"]  # fmt: skip
    for public, target in shown(name).items():
        if target.startswith(f"{path}.") and target.count(".") == 2 and public not in own:
            continue  # another module's, shown on its page
        lines += [f"::: {target}", "    options:", "      heading_level: 3\n"]
    return "\n".join(lines)


def _defined(name: str) -> set[str]:
    """Return the names that a module's own source defines; for a package, what its modules define too."""
    place = Path(ttsnap_lib.__file__).parent / name
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    found: set[str] = set()
    for node in ast.parse(source.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif place.is_dir() and isinstance(node, ast.ImportFrom):  # a package shows what it gathers
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def _index() -> str:
    """Return the page of the names that ``import ttsnap_lib`` gives."""
    rows = ["| name | what it does |", "| --- | --- |"]
    for name, target in _top().items():
        rows.append(f"| [`{name}`][{target}] | {_first_line(name)} |")
    groups = [
        f"- [{title}]({slug(title)}.md): {', '.join(f'`{name}`' for name in names)}" for title, names in GROUPS.items()
    ]
    return "\n".join([
        "# Python interface\n",
        "What `import ttsnap_lib` gives. Names load on first use; nothing here but `search` loads torch.\n",
        *rows,
        "\n## Modules\n",
        *groups,
        "\nEvery error is a [`TTSnapError`][ttsnap_lib.errors.TTSnapError] that names the value, the bound and the remedy.\n",
    ])  # fmt: skip


def _top() -> dict[str, str]:
    return {name: shown(module)[name] for name, module in ttsnap_lib._NAMES.items()}


def _first_line(name: str) -> str:
    value = getattr(ttsnap_lib, name)
    # `simulate` and `search` are callable modules: the function's docstring is meant.
    value = getattr(value, name, value)
    if name == "PUBLISHED_SCHEDULE":
        return f"The schedule of the paper's simulation: `{value!r}`."
    return (value.__doc__ or "").strip().splitlines()[0].replace("|", "\\|")
