"""Notebooks, their parameters, and sweeps over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.bad_input.drill import Cases
from ttsnap_lib.files import read_if_whole, write_json
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.runs.parameters import declared_parameters, from_text, injected_source, read_notebook, resolve
from ttsnap_lib.runs.run import find_notebook, finished, plan
from ttsnap_lib.runs.sweep import load_grid

CASES = Cases()
HUGE = 10**5000

# -- notebooks ---------------------------------------------------------------------------------------------------------


def notebook(source: Any, **changes: Any) -> dict[str, Any]:
    """Return a notebook whose parameters cell is `source`."""
    cell = {"cell_type": "code", "source": source, "metadata": {"tags": ["parameters"]}}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell], **changes}


def read(folder: Path, content: Any) -> Any:
    (folder / "n.ipynb").write_text(json.dumps(content))
    return declared_parameters(read_notebook(folder / "n.ipynb"))


CELL = {"cell_type": "code", "source": "", "metadata": {}}
for what, content, names in [
    ("format 3", notebook("", nbformat=3), "format 4"),
    ("format true", notebook("", nbformat=True), "format 4"),
    ("no cells", {"nbformat": 4}, "cells"),
    ("cells a mapping", notebook("", cells={}), "cells"),
    ("a cell that is text", notebook("", cells=["x = 1"]), "cell 0"),
    ("a cell without a type", notebook("", cells=[{"source": "x"}]), "cell 0"),
    ("source a number", notebook("", cells=[{**CELL, "source": 5}]), "cell 0"),
    ("lines that are numbers", notebook("", cells=[{**CELL, "source": [1, 2]}]), "cell 0"),
    ("metadata a list", notebook("", cells=[{**CELL, "metadata": []}]), "cell 0"),
    ("tags a text", notebook("", cells=[{**CELL, "metadata": {"tags": "parameters"}}]), "cell 0"),
    ("tags of numbers", notebook("", cells=[{**CELL, "metadata": {"tags": [1]}}]), "cell 0"),
    ("an import among the parameters", notebook("import os"), "line 1"),
    ("a call among the parameters", notebook("a = print(1)"), "line 1"),
    ("a walrus among the parameters", notebook("(a := 1)"), "line 1"),
    ("a loop among the parameters", notebook("for a in (1,): pass"), "line 1"),
    ("an f-string as default", notebook("a: str = f'{1}'"), "line 1"),
    ("no Python", notebook("a = ("), "line 1"),
    ("a NUL", notebook("a = 1\0"), "parameters"),
    ("nested too deep", notebook("a = " + "[" * 5000 + "]" * 5000), "parameters"),
    ("signs without end", notebook("a = " + "-" * 20_000 + "1"), "parameters"),
    ("a type that is no Python", notebook("a: 'list[' = []"), "line 1"),
    ("choices that are names", notebook("from typing import Literal\na: Literal[b] = 1"), "line 1"),
    ("choices that are calls", notebook("a: Literal[print(1)] = 1"), "line 1"),
]:
    CASES.add("notebook", what, lambda folder, content=content: read(folder, content), names)
CASES.each(
    "notebook",
    find_notebook,
    [
        ("a name that does not ship", "simulat", "simulate"),
        ("a path that climbs", "../../../etc/passwd", "simulate"),
        ("a shipped name behind a path", "x/simulate", "simulate"),
        ("a number", 5, "notebook"),
        ("a path with a NUL", "a\0b.ipynb", "NUL"),
    ],
)

# -- parameters --------------------------------------------------------------------------------------------------------

DECLARED = declared_parameters(
    notebook(
        "count: int = 3\nratio: float = 0.5\nname: str = 'x'\nflag: bool = False\nsteps: list[int] = [2, 6]\n"
        "pair: tuple[int, float] = (1, 2.0)\nextra: dict[str, float] = {}\nlimit: float | None = None\n"
        "mode: Literal['a', 'b'] = 'a'\nloose = None\n"
    )
)
knot: list[Any] = []
knot.append(knot)
CASES.each(
    "notebook parameter",
    lambda given: resolve(DECLARED, given),
    [
        ("unknown", {"cuont": 1}, "Did you mean 'count'"),
        ("name a number", {5: 1}, "unknown key"),
        ("text for int", {"count": "3"}, "int"),
        ("fraction for int", {"count": 3.5}, "int"),
        ("true for int", {"count": True}, "int"),
        ("None for int", {"count": None}, "int"),
        ("5000 digits for int", {"count": HUGE}, "128 bits"),
        ("5000 digits for float", {"ratio": HUGE}, "128 bits"),
        ("5000 digits in a list", {"steps": [HUGE]}, "128 bits"),
        ("text for float", {"ratio": "0.5"}, "float"),
        ("NaN", {"ratio": float("nan")}, "finite"),
        ("infinity in a list", {"loose": [float("inf")]}, "finite"),
        ("number for text", {"name": 5}, "str"),
        ("half a surrogate pair", {"name": "\ud800"}, "literal"),
        ("bytes", {"name": b"x"}, "literal"),
        ("number for bool", {"flag": 1}, "bool"),
        ("text for a list", {"steps": "2, 6"}, "list"),
        ("text in a list of int", {"steps": [2, "6"]}, "item 1"),
        ("three for a pair", {"pair": [1, 2.0, 3]}, "2 values"),
        ("a number as key", {"extra": {1: 2.0}}, "text as key"),
        ("not a choice", {"mode": "c"}, "Literal"),
        ("a list that holds itself", {"loose": knot}, "20 levels"),
        ("an object", {"loose": object()}, "literal"),
        ("a set", {"loose": {1, 2}}, "literal"),
        ("a function", {"loose": print}, "literal"),
        ("a complex number", {"loose": 1j}, "literal"),
    ],
)
CASES.add("notebook parameter", "given to a notebook that declares none", lambda f: resolve({}, {"x": 1}), "no cell")
CASES.add(
    "notebook parameter", "wrong before anything is written",
    lambda folder: plan("simulate", {"iterations": "many"}, folder=folder), "iterations",
)  # fmt: skip

BREAK_OUTS = {
    "ends its line": "x'\nimport os; os.system('touch ../outside/owned')\n'",
    "ends a long text": '"""\nimport os\n"""',
    "ends with a backslash": "x\\",
    "is a magic command": "%%bash\ntouch ../outside/owned",
    "is a shell command": "!touch ../outside/owned",
    "ends a comment": "x\r\nimport os\r\n#",
    "holds odd line ends": "x\u2028import os\u2029\x0b\x0c\x1c\x85import os",
    "is an f-string": "{__import__('os').system('touch ../outside/owned')}",
    "holds a NUL": "x\0y",
    "turns the writing direction": "x\u202e'; import os; '",
    "is Python": "__import__('os').system('touch ../outside/owned')",
}


def stays_text(text: str) -> bool:
    """Inject a text and run the cell: one assignment, the same text."""
    import ast

    source = injected_source(resolve(DECLARED, {"name": text, "extra": {text.encode().hex(): 1.0}, "loose": [text]}))
    tree = ast.parse(source)
    space: dict[str, Any] = {}
    exec(compile(tree, "cell", "exec"), space)  # noqa: S102 - of literals, as the line above has shown
    literal = all(isinstance(node, ast.Assign) for node in tree.body) and not any(
        isinstance(node, ast.Call) for node in ast.walk(tree)
    )
    lines = source.splitlines()
    return literal and space["name"] == text and space["loose"] == [text] and len(lines) == len(DECLARED) + 1


for what, text in BREAK_OUTS.items():
    CASES.add(
        "notebook parameter",
        f"a text that {what}",
        lambda folder, text=text: stays_text(text),
        skip="it arrives in the notebook as the same text, one literal on one line",
    )
for what, text in (
    ("is Python", BREAK_OUTS["is Python"]),
    ("has an object tag", "!!python/object/apply:os.system [ls]"),
):
    CASES.add(
        "notebook parameter",
        f"a word of the command line that {what}, for an int",
        lambda folder, text=text: resolve(DECLARED, {"count": from_text(text, DECLARED["count"])}),
        "int",
    )


def foreign_record(folder: Path, content: Any) -> bool:
    """Put a record of another kind into a run folder: the run counts as not done."""
    planned = plan("simulate", {}, folder=folder)
    write_json(planned.folder / "manifest.json", content)
    return finished(planned) is None and read_if_whole(planned.folder / "none.json") is None


for what, content in {
    "a list": [1],
    "complete, without the rest": {"status": "complete"},
    "of inputs that are a list": {"status": "complete", "inputs": [1], "notebook_sha256": "x"},
    "of another notebook": {"status": "complete", "inputs": {}, "notebook_sha256": 5},
}.items():
    CASES.add(
        "notebook parameter", f"a record of the run that is {what}",
        lambda folder, content=content: foreign_record(folder, content), skip="the run counts as not done, and is done again",
    )  # fmt: skip

# -- sweeps ------------------------------------------------------------------------------------------------------------

CASES.files(
    "sweep grid",
    "grid.yaml",
    load_grid,
    [
        (what, f"notebook: simulate\n{content}" if "notebook:" not in content else content, names)
        for what, content, names in [
            ("no notebook", "notebook:\n", "notebook"),
            ("notebook a list", "notebook: [simulate]\n", "notebook"),
            ("notebook that climbs", "notebook: ../../etc/passwd\n", "simulate"),
            ("unknown key", "gird: {iterations: [1]}\n", "Did you mean 'grid'"),
            ("unknown axis", "grid: {iteratoins: [1]}\n", "Did you mean 'iterations'"),
            ("axis one number", "grid: {iterations: 5}\n", "list of values"),
            ("axis empty", "grid: {iterations: []}\n", "list of values"),
            ("axis of text", "grid: {iterations: [many]}\n", "int"),
            ("grid a list", "grid: [1]\n", "mapping"),
            ("range without step", "grid: {iterations: {start: 1, stop: 3}}\n", "step"),
            ("range of no step", "grid: {iterations: {start: 1, stop: 3, step: 0}}\n", "step"),
            ("range away from its end", "grid: {iterations: {start: 1, stop: 3, step: -1}}\n", "sign"),
            ("range of 10^9", "grid: {iterations: {start: 1, stop: 1000000000, step: 1}}\n", "100000"),
            ("range beyond floats", "grid: {seed: {start: -1.7e308, stop: 1.7e308, step: 1}}\n", "finite"),
            ("range of a tiny step", "grid: {seed: {start: 0, stop: 1, step: 1e-320}}\n", "finite|step|at most"),
            ("range of 400 digits", f"grid: {{seed: {{start: 0, stop: {10**400}, step: 1}}}}\n", "finite"),
            ("range of text", "grid: {iterations: {start: a, stop: b, step: c}}\n", "start"),
            ("linspace of two", "grid: {iterations: {linspace: [1, 2]}}\n", "count"),
            ("linspace of 10^9", "grid: {iterations: {linspace: [1, 2, 1000000000]}}\n", "100000"),
            ("logspace from zero", "grid: {iterations: {logspace: [0, 2, 3]}}\n", "logspace"),
            (
                "10^10 runs",
                "grid: {iterations: {start: 1, stop: 99999, step: 1}, seed: {start: 1, stop: 99999, step: 1}}\n",
                "runs",
            ),
            ("a parameter in two places", "parameters: {seed: 1}\ngrid: {seed: [1]}\n", "elsewhere"),
            ("cases that are numbers", "cases: {a: 1}\n", "cases"),
            ("a case of unknown parameters", "cases: {a: {x: 1}}\n", "x"),
            ("exclude a mapping", "grid: {seed: [1]}\nexclude: {seed: 1}\n", "list"),
            ("exclude all", "grid: {seed: [1]}\nexclude: [{seed: 1}]\n", "exclude"),
            ("exclude an unknown name", "grid: {seed: [1]}\nexclude: [{sed: 1}]\n", "seed"),
            ("a condition that is text", "grid: {seed: {values: [1], when: x}}\n", "mapping"),
            ("a name that climbs", "name: ../../outside/owned\n", "name"),
            ("a name that is hidden", "name: .ssh\n", "name"),
            ("a name of 300 letters", f"name: {'x' * 300}\n", "name"),
            ("a table that climbs", "table: ../../outside/secret\n", "table"),
            ("a metric that is a list", "metric: [mean]\n", "metric"),
        ]
    ],
)

# -- finetuning settings -----------------------------------------------------------------------------------------------

CASES.each(
    "finetuning settings",
    CurriculumConfig.from_dict,
    [
        ("unknown key", {"learning_rat": 1}, "Did you mean 'learning_rate'"),
        ("a list for a mapping", [1], "mapping"),
        ("rate zero", {"learning_rate": 0}, "learning_rate"),
        ("rate as text", {"learning_rate": "fast"}, "learning_rate"),
        ("rate beyond floats", {"learning_rate": 10**400}, "learning_rate"),
        ("steps ascending", {"steps": [1, 2, 3]}, "descending"),
        ("steps twice", {"steps": [2, 2]}, "descending"),
        ("steps text", {"steps": "14"}, "list"),
        ("steps none", {"steps": []}, "descending"),
        ("batch zero", {"batch_size": 0}, "batch_size"),
        ("group that does not divide", {"batch_size": 10, "group_size": 3}, "multiple"),
        ("more parts than groups", {"batch_size": 4, "accumulation": 8}, "accumulation"),
        ("no loss", {"mse": 0}, "mse"),
        ("a loss negative", {"mse": -1}, "mse"),
        ("a paired loss without pairs", {"preference": 1}, "group_size"),
        ("unknown method", {"method": "lorra"}, "Did you mean 'lora'"),
        ("method a list", {"method": ["lora"]}, "method"),
        ("dropout of one", {"lora_dropout": 1}, "lora_dropout"),
        ("beta of one", {"beta1": 1.0}, "beta1"),
        ("a pattern that is none", {"lora_targets": "(["}, "regular expression"),
        ("a pattern that is a number", {"trainable": 5}, "trainable"),
        ("reward blank", {"reward": " "}, "reward"),
        ("reward a list", {"reward": ["pickscore"]}, "reward"),
        ("curriculum a number", {"curriculum": 2}, "curriculum"),
        ("seed negative", {"seed": -1}, "seed"),
        ("rank a fraction", {"lora_rank": 2.5}, "lora_rank"),
        ("tracker unknown", {"tracker": "mlflow"}, "tracker"),
    ],
)
