"""A sweep's YAML: lists, ranges, named cases and conditions, expanded into the parameter sets to run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._reading import as_path, read_yaml
from .checks import integer, known_keys, plain_name, real
from .errors import ConfigError
from .parameters import Parameter, declared_parameters, parameter_hash, read_notebook, resolve
from .runner import find_notebook

__all__ = ["GridSpec", "axis_values", "expand", "load_grid", "parse_grid"]

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
        raise ConfigError(str(path), value=content, bound="a mapping", remedy="Write notebook: and grid: lines.")
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
            "sweep: notebook",
            value=content.get("notebook"),
            bound="the name or path of a notebook",
            remedy="Write for example `notebook: simulate`.",
        )
    for key in ("name", "metric", "table"):
        if key in content and not (isinstance(content[key], str) and content[key].strip()):
            raise ConfigError(f"sweep: {key}", value=content[key], bound="text", remedy=f"Write `{key}: some_name`.")
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
            raise ConfigError(f"sweep: {key}", value=value, bound="a mapping", remedy="Write `name: value` lines.")
    constants, grid, cases = parts.values()
    exclude = content.get("exclude") or []
    if not isinstance(exclude, list):
        raise ConfigError(
            "sweep: exclude", value=exclude, bound="a list of mappings", remedy="Write `- {name: value}`."
        )
    resolve(declared, constants, name)
    if cases and "case" in declared:
        raise ConfigError(
            "sweep: cases",
            value="case",
            bound="a notebook without a parameter of that name",
            remedy="Use grid instead.",
        )
    for case, overlay in cases.items():
        if not isinstance(case, str) or not isinstance(overlay, dict):
            raise ConfigError("sweep: cases", value=case, bound="a name and a mapping", remedy="Write `name: {x: 1}`.")
        known_keys(f"case {case}", overlay, declared)
        resolve(declared, overlay, name)
    known_keys("sweep: grid", grid, declared)
    twice = next((key for part in (constants, *cases.values()) for key in part if key in grid), None)
    if twice is not None:
        raise ConfigError(
            "sweep: a parameter under grid stands elsewhere too",
            value=twice,
            bound="each parameter under one of grid, parameters and cases (a case may change a constant)",
            remedy="Keep one of the two.",
        )
    axes = {key: axis_values(f"grid.{key}", axis) for key, axis in grid.items()}
    names = [*declared, *(["case"] if cases else [])]
    for where, condition in [
        *((f"grid.{key}", when) for key, (when, _) in axes.items()),
        *(("exclude", x) for x in exclude),
    ]:
        if not isinstance(condition, dict):
            raise ConfigError(f"sweep: {where}", value=condition, bound="a mapping", remedy="Write `{name: value}`.")
        known_keys(f"sweep: {where}", condition, names)
    size = math.prod(len(values) for _, values in axes.values()) * max(1, len(cases))
    integer("number of runs in the sweep", size, 1, _MOST_RUNS)

    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for case, overlay in cases.items() or [("", {})]:
        for point in _points({**constants, **overlay}, axes, declared, case, name):
            if not any(_matches(rule, point, case) for rule in exclude):
                found.setdefault(parameter_hash(point), (case, point))
    if not found:
        raise ConfigError("sweep: exclude", value=exclude, bound="rules that leave a run", remedy="Remove a rule.")
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
            label,
            value=axis,
            bound="a list of values, {start, stop, step}, {linspace: [first, last, count]}, {logspace: ...} or "
            "{values: [...], when: {...}}",
            remedy="Put a value that does not vary under parameters.",
        )
    return {}, axis


def _range_values(label: str, axis: dict[str, Any]) -> list[Any]:
    if "linspace" in axis or "logspace" in axis:
        known_keys(label, axis, ("linspace",) if "linspace" in axis else ("logspace",))
        ((kind, ends),) = axis.items()
        if not isinstance(ends, list) or len(ends) != 3:
            raise ConfigError(f"{label}.{kind}", value=ends, bound="[first, last, count]", remedy="Give three numbers.")
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
        raise ConfigError(label, value=axis, bound=f"{missing[0]} as well", remedy="Give start, stop and step.")
    start, stop, step = (real(f"{label}.{key}", axis[key]) for key in ("start", "stop", "step"))
    if step == 0 or (stop - start) / step < 0:
        raise ConfigError(
            f"{label}.step", value=step, bound="a step from start towards stop", remedy="Change its sign."
        )
    count = math.floor(real(f"{label}: number of values", (stop - start) / step + 1, 1, _MOST_RUNS) + 1e-9)
    if all(isinstance(axis[key], int) for key in axis):
        return [axis["start"] + k * axis["step"] for k in range(count)]
    return [float(f"{start + k * step:.12g}") for k in range(count)]
