"""The pages of the Python reference: which module stands where, and what of it is shown."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect

import ttsnap_lib

__all__ = ["GROUPS", "INTERNAL", "pages", "shown", "slug"]

GROUPS: dict[str, tuple[str, ...]] = {
    "Schedules and costs": ("schedule", "costs"),
    "Reward tensors": ("tensors", "published", "interop", "synthetic"),
    "Simulation": ("simulate", "results", "metrics", "selection", "answers"),
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
    found = {}
    for name in loaded.__all__:
        home = f"{loaded.__name__}.{lazy[name]}" if name in lazy else _home(name, loaded.__name__)
        found[name] = f"{home}.{name}"
    return found


def _home(name: str, module: str) -> str:
    """Return the module that a name of `module` is written in, following the imports of the source."""
    source = inspect.getsource(importlib.import_module(module))
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            package = (
                module if importlib.util.find_spec(module).submodule_search_locations else module.rpartition(".")[0]
            )
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if origin.startswith("ttsnap_lib."):
                return _home(name, origin)
    return module


def slug(title: str) -> str:
    """Return the file name of a page, without its ending."""
    return title.lower().replace(",", "").replace(" ", "-")


def _module(name: str) -> str:
    """Return the section of a module: its docstring, then each public name that no other page shows."""
    path = f"ttsnap_lib.{name}"
    elsewhere = {f"ttsnap_lib.{other}" for names in GROUPS.values() for other in names} - {path}
    lines = [f"## {path} {{ #{path} }}\n", f"::: {path}", "    options:", "      heading_level: 2",
             "      show_root_heading: false", "      show_root_toc_entry: false", "      members: []\n"]  # fmt: skip
    for target in shown(name).values():
        if target.rpartition(".")[0] not in elsewhere:
            lines += [f"::: {target}", "    options:", "      heading_level: 3\n"]
    return "\n".join(lines)


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
