"""What the explorer writes: its table of numbers, and the state as parameters, YAML or a command line."""

from __future__ import annotations

import html
import shlex
from collections.abc import Mapping
from typing import Any

from ._explore_state import Change, Curve, Result
from .plots import METHOD_LABELS, reward_label
from .schedule import Schedule

__all__ = ["COPY_FORMATS", "SEARCH", "STYLE", "copy_text", "message_html", "numbers_html"]

SEARCH = "command that runs it"
COPY_FORMATS = (SEARCH, "schedule YAML", "papermill parameters", "command line")
_COMMAND = "ttsnap run explore"

STYLE = """<style>
.ttsnap-numbers table {border-collapse: collapse; font-size: 13px; line-height: 1.45}
.ttsnap-numbers th, .ttsnap-numbers td {padding: 1px 14px 1px 0; text-align: right; white-space: nowrap}
.ttsnap-numbers th:first-child, .ttsnap-numbers td:first-child {text-align: left; white-space: normal}
.ttsnap-numbers thead th {border-bottom: 1px solid #999; font-weight: 600}
.ttsnap-numbers p {margin: 4px 0; font-size: 13px; line-height: 1.45; white-space: normal}
.ttsnap-note {color: #595959}
.ttsnap-message {border-left: 4px solid #d55e00; padding: 4px 10px; font-size: 13px; line-height: 1.4;
  white-space: normal}
.ttsnap-stale {opacity: 0.35}
.ttsnap-head {font-weight: 600; font-size: 13px; border-bottom: 1px solid #ccc; line-height: 1.6}
</style>"""


def numbers_html(result: Result, candidate_cost: float) -> str:
    """Return the numbers at the chosen budget as a small table, and what follows from them in words."""
    state = result.state
    unit = html.escape(state.cost.unit)
    rows = [("this schedule", result.at["current"]), ("Best-of-N", result.at["best_of_n"])]
    if result.pinned is not None:
        rows.insert(1, ("pinned schedule", result.at["pinned"]))
    body = "".join(_row(name, curve) for name, curve in rows)
    head = f"<tr><th>at {_number(state.budget)} {unit} ({state.budget / candidate_cost:.3g} &times; one image)</th>"
    head += f"<th>candidates</th><th>spent ({unit})</th><th>mean {html.escape(reward_label(state.shown))}</th>"
    head += "<th>95% interval</th></tr>"
    lines = [f"<b>Over Best-of-N</b> at this budget: {_change(result.over_best, '.3f')}"]
    if result.over_pinned is not None:
        lines[0] += f"; <b>over the pinned schedule</b>: {_change(result.over_pinned, '.3f')} (paired)."
    if result.gain is not None:
        low, high = state.budgets[0], state.budgets[-1]
        words = f"<b>Relative gain</b> over {_number(low)} to {_number(high)} {unit}: {_change(result.gain, '.1f')} %"
        if result.gain_change is not None:
            words += f"; against the pinned schedule {_change(result.gain_change, '.1f')} points"
        lines.append(words + ".")
    else:
        lines.append("<b>Relative gain</b>: not defined over these budgets.")
    lines.append(f"<b>Pinned</b>: {_plan(state.pinned_method, state.pinned_plan)}.")
    done = f"{result.iterations} of {result.iterations_wanted} random subsets per prompt"
    lines.append(
        f"<span class='ttsnap-note'>{done}{'' if result.complete else ': a preview, the rest follows'}. "
        + " ".join(html.escape(note) for note in result.notes)
        + "</span>"
    )
    paragraphs = "".join(f"<p>{line}</p>" for line in lines)
    return f"<div class='ttsnap-numbers'><table><thead>{head}</thead><tbody>{body}</tbody></table>{paragraphs}</div>"


def message_html(text: str) -> str:
    """Return a plain message that screen readers announce; nothing for an empty one."""
    return f"<div class='ttsnap-message' role='status'>{html.escape(text)}</div>" if text else ""


def copy_text(kind: str, parameters: Mapping[str, Any], method: str, schedule: Schedule) -> str:
    """Return the state in one of :data:`COPY_FORMATS` but :data:`SEARCH`, which needs the tensor's model.

    Parameters
    ----------
    kind : str
    parameters : mapping
        Of the notebook ``explore``.
    method, schedule
        As set.
    """
    import yaml

    if kind == "schedule YAML":
        return f"# {METHOD_LABELS[method]}\n{schedule.to_yaml()}"
    if kind == "command line":
        given = " ".join(f"-p {name} {shlex.quote(_value(value))}" for name, value in parameters.items())
        return f"{_COMMAND} {given}"
    content = yaml.safe_dump(dict(parameters), sort_keys=False, default_flow_style=None, width=1000)
    return f"# papermill notebooks/explore.ipynb out.ipynb -f this-file.yaml\n{content}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _plan(method: str, plan: Schedule) -> str:
    return html.escape(f"{METHOD_LABELS[method]}, {plan}" if method != "best_of_n" else METHOD_LABELS[method])


def _row(name: str, curve: Curve) -> str:
    interval = f"{curve.low[0]:.3f} to {curve.high[0]:.3f}"
    cells = f"<td>{curve.n[0]}</td><td>{_number(curve.spent[0])}</td><td>{curve.mean[0]:.3f}</td><td>{interval}</td>"
    return f"<tr><td>{name}</td>{cells}</tr>"


def _change(change: Change, form: str) -> str:
    return f"{change.value:+{form}} [{change.low:+{form}}, {change.high:+{form}}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"
