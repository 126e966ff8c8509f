"""``ttsnap optimize`` and ``compare``: the best schedule for a tensor, a cost and budgets, and how others do there."""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Register the commands with argparse's subparsers."""
    _add_compare(commands)
    parser = commands.add_parser(
        "optimize",
        help="find the best pruning schedule for your costs and budgets",
        description="Tune a schedule on some prompts of a reward tensor and tell what it gains on the others.",
    )
    parser.add_argument(
        "tensor", help="Zarr folder of `ttsnap score` or `ttsnap import-published`; pocket-flux for the shipped one"
    )
    parser.add_argument(
        "--reward", action="append", metavar="NAME", help="reward that selects; may stand several times (default: all)"
    )
    parser.add_argument("--report", action="append", metavar="NAME", help="reward that is measured but never selects")
    parser.add_argument(
        "--cost", default="auto", metavar="PRESET_OR_FILE",
        help="flux-512+pickscore, or a file of `ttsnap cost` (default: the preset of the tensor's model, size and reward)",
    )  # fmt: skip
    parser.add_argument(
        "--budgets", default="2:20", metavar="LIST",
        help="multiples of one Best-of-N image: 2:20, 2:20:3, 4 or 2,4,8 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=("ttsnap", "ttsp"), default="ttsnap",
        help="prune by the noise-aware reward, or by the base one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--objective", choices=("area", "single", "frontier"),
        help="one schedule for all budgets, for one, or one for each (default: area, single for one budget)",
    )  # fmt: skip
    parser.add_argument(
        "--combine", choices=("rank_sum", "z_score"), default="rank_sum", help="how several rewards choose"
    )
    parser.add_argument("--max-stages", type=int, default=4, metavar="N", help="pruning steps at most (default: 4)")
    parser.add_argument("--trials", type=int, metavar="N", help="schedules to try (default: 3000, frontier 10000)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop with the best so far")
    parser.add_argument("--seed", type=int, default=0, help="of the search (default: 0)")
    parser.add_argument("--tune", metavar="LIST", help="prompts to tune on, 0:100 or 0,2,4 (default: even positions)")
    parser.add_argument("--test", metavar="LIST", help="prompts to report on (default: the rest)")
    parser.add_argument(
        "--copied-steps", action="store_true", help="also prune where the noise-aware reward is a copy of the base one"
    )
    parser.add_argument("--distinct", action="store_true", help="drop repeated images of the pool first")
    parser.add_argument("--out", type=Path, metavar="FILE.yaml", help="write the schedule (frontier: one per budget)")
    parser.add_argument("--trials-out", type=Path, metavar="FILE.csv", help="write every schedule that was tried")
    parser.add_argument(
        "--flatness", type=int, metavar="N", help="tell which of the N best schedules are as good, on the test prompts"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(func=_optimize)


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="set pruning schedules side by side on a reward tensor",
        description="Tell what each schedule gains over Best-of-N at equal compute, and by how much it trails the best, on "
        "the same prompts and seeds. A schedule that was tuned on these prompts looks a little better than it is.",
    )
    parser.add_argument(
        "schedules", nargs="+", metavar="SCHEDULE",
        help="YAML of `ttsnap optimize`, or '{steps: [2, 6], keep_ratios: [0.4, 0.5]}'; several",
    )  # fmt: skip
    parser.add_argument(
        "--tensor", required=True, help="reward tensor: a Zarr folder, or pocket-flux for the shipped one"
    )
    parser.add_argument("--cost", default="auto", metavar="PRESET_OR_FILE", help="as of `ttsnap optimize`")
    parser.add_argument(
        "--budgets", default="2:20", metavar="LIST", help="as of `ttsnap optimize` (default: %(default)s)"
    )
    parser.add_argument(
        "--method", choices=("ttsnap", "ttsp"), default="ttsnap",
        help="prune by the noise-aware reward, or by the base one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--reward", action="append", metavar="NAME", help="reward that selects; may stand several times (default: all)"
    )
    parser.add_argument(
        "--combine", choices=("rank_sum", "z_score"), default="rank_sum", help="how several rewards choose"
    )
    parser.add_argument("--prompts", metavar="LIST", help="prompts to compare on, 1:199:2 or 0,2,4 (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random subsets (default: 0)")
    parser.add_argument("--distinct", action="store_true", help="drop repeated images of the pool first")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="gets compared.csv and compared.png")
    parser.set_defaults(func=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from ttsnap_lib.files import atomic_write
    from ttsnap_lib.schedule import Schedule
    from ttsnap_lib.simulation.plots import flatness_table, forest
    from ttsnap_lib.tensors.pricing import cost_for
    from ttsnap_lib.tensors.tensor import open_rewards, select_rewards
    from ttsnap_lib.tuning.optimize import compare_schedules

    words = list(dict.fromkeys(arguments.schedules))
    given = [Schedule.from_yaml(word if word.lstrip().startswith("{") else Path(word)) for word in words]
    dataset = select_rewards(open_rewards(arguments.tensor), list(dict.fromkeys(arguments.reward or [])))
    name, cost = cost_for(dataset, arguments.cost)
    budgets = [multiple * cost.total(1) for multiple in parse_range("--budgets", arguments.budgets, float)]
    shared: dict[str, Any] = {
        "prompts": parse_range("--prompts", arguments.prompts, int) if arguments.prompts else None,
        "seed": arguments.seed, "combine": arguments.combine, "distinct": arguments.distinct,
    }  # fmt: skip
    table = compare_schedules(dataset, cost, budgets, given, arguments.method, best_first=True, **shared)
    labels = [words[k] if not words[k].lstrip().startswith("{") else str(given[k]) for k in table.index]
    print(f"cost {name}, budgets {arguments.budgets} finished images\n")
    shown = flatness_table(table)
    shown.insert(
        0, "file", ["" if word == str(plan) else word for word, plan in zip(labels, table["schedule"], strict=True)]
    )
    print(shown.to_string(index=False))
    if arguments.out:
        with atomic_write(arguments.out / "compared.csv", "w") as file:
            table.assign(file=shown["file"]).to_csv(file, index=False)
        with atomic_write(arguments.out / "compared.png") as file:
            forest(table, labels).savefig(file, format="png", dpi=150)
        print(f"\n{arguments.out}: compared.csv, compared.png")
    return 0


def _optimize(arguments: argparse.Namespace) -> int:
    import numpy as np

    from ttsnap_lib.files import atomic_write
    from ttsnap_lib.schedule import Schedule
    from ttsnap_lib.simulation.metrics import AS_GOOD
    from ttsnap_lib.simulation.plots import flatness_table, headline, search_command
    from ttsnap_lib.simulation.simulate import curves
    from ttsnap_lib.style import progress_bar
    from ttsnap_lib.tensors.pricing import cost_for
    from ttsnap_lib.tensors.tensor import open_rewards, select_rewards
    from ttsnap_lib.tuning.optimize import optimize_schedule

    dataset = open_rewards(arguments.tensor)
    multiples = parse_range("--budgets", arguments.budgets, float)
    known = [str(name) for name in dataset["reward"].values]
    report = arguments.report or []
    names = arguments.reward or [name for name in known if name not in report]
    dataset = select_rewards(dataset, list(dict.fromkeys([*names, *report])))
    cost_name, cost = cost_for(dataset, arguments.cost)
    objective = arguments.objective or ("area" if len(multiples) > 1 else "single")
    result = optimize_schedule(
        dataset,
        cost,
        np.array(multiples) * cost.total(1),
        arguments.method,
        tune=parse_range("--tune", arguments.tune, int) if arguments.tune else None,
        test=parse_range("--test", arguments.test, int) if arguments.test else None,
        objective=objective,
        n_trials=arguments.trials,
        time_limit_s=arguments.time_limit,
        seed=arguments.seed,
        max_stages=arguments.max_stages,
        combine=arguments.combine,
        report=report,
        copied_steps=arguments.copied_steps,
        distinct=arguments.distinct,
        progress=progress_bar("schedules", quiet=arguments.quiet),
    )
    shared: dict[str, Any] = {"combine": arguments.combine, "report": report, "distinct": arguments.distinct}
    if result.objective != "frontier":
        budgets = [multiple * cost.total(1) for multiple in multiples]
        rows = dataset.isel(prompt=list(result.test))
        with warnings.catch_warnings(action="ignore"):  # said by the optimiser
            told = curves(rows, [arguments.method], budgets, cost, result.schedule, rng=arguments.seed, **shared)
        print(f"On the test prompts: {headline(told, cost, arguments.method, names[0])}\n")
    print(_summary(result, multiples, cost.unit))
    if arguments.flatness is not None:
        tried = result.flatness(dataset, top=arguments.flatness, seed=arguments.seed, **shared)
        count = int((tried["as_good"] == "yes").sum())
        print(
            f"\n{count} of {len(tried)} schedules are as good as the chosen one: they trail it by less than {AS_GOOD} points"
        )
        print(f"\n{flatness_table(tried).to_string(index=False)}")
    if arguments.trials_out:
        with atomic_write(arguments.trials_out, "w") as file:
            result.trials.to_csv(file, index=False)
    if arguments.out:
        with atomic_write(arguments.out, "w") as file:
            file.write(_as_yaml(result))
        print(f"\nschedule: {arguments.out}")
    steps, ratios = (list(part) for part in (result.schedule.steps, result.schedule.keep_ratios))
    print(
        f'next: ttsnap run simulate -p tensor {arguments.tensor} -p cost {cost_name} -p rewards "{names}" '
        f'-p steps "{steps}" -p keep_ratios "{ratios}"'
    )
    last = result.frontier.iloc[-1]
    found, n = Schedule(last["steps"], last["keep_ratios"]), int(last["n"])
    model = dataset.attrs.get("model", "MODEL")
    print(
        "for real, at the highest budget:",
        search_command(model, names, cost_name, n, found, arguments.method, n_steps=cost.n_steps),
    )
    return 0


def _summary(result: Any, multiples: list[float], unit: str) -> str:
    def line(what: str, gain: float, interval: tuple[float, float] | None = None) -> str:
        return f"  {what:<42}{gain:>8.1f}" + (f"   {interval[0]:.1f} to {interval[1]:.1f}" if interval else "")

    lines = [f"{result.schedule}", "", f"{'gain over Best-of-N at equal compute':<44}{'percent':>8}   95% interval"]
    what = "best schedule at every budget" if result.objective == "frontier" else "this schedule"
    lines.append(line(f"{what}, {len(result.test)} test prompts", result.test_gain, result.test_interval))
    lines.append(line(f"{len(result.tune)} tune prompts", result.tuned_gain))
    if result.published_gain is not None:
        lines.append(line("published schedule, test prompts", result.published_gain))
        lines.append(line("points over it", result.over_published, result.over_published_interval))
    table = result.frontier.assign(images=multiples).round(4)
    columns = ["images", "budget", "n", "mean", "best_of_n", "gain", "low", "high"]
    if result.objective == "frontier":
        columns += ["steps", "keep_ratios"]
    lines += ["", f"budget in {unit}; images: the same as a number of Best-of-N images", ""]
    lines.append(table[columns].to_string(index=False))
    tried = f"{len(result.trials)} schedules in {result.elapsed_s:.0f} s"
    lines.append(f"\n{tried}" + ("" if result.complete else ", cut short: the best so far"))
    return "\n".join(lines)


def _as_yaml(result: Any) -> str:
    if result.objective != "frontier":
        return result.schedule.to_yaml()
    import yaml

    rows = [{"budget": float(row.budget), **row.schedule.to_dict()} for row in result.frontier.itertuples()]
    return yaml.safe_dump(
        {"schedule": result.schedule.to_dict(), "frontier": rows}, sort_keys=False, default_flow_style=None
    )


def parse_range(name: str, text: str, kind: type) -> list:
    """Read ``2:20`` (with the end), ``2:20:3`` or ``2,4,8``."""
    from ttsnap_lib.errors import ConfigError

    found: list = []
    try:
        for part in text.split(","):
            numbers = [kind(number) for number in part.split(":")]
            if not all(math.isfinite(number) for number in numbers):
                raise ValueError(part)
            if len(numbers) == 1:
                found += numbers
                continue
            start, stop, step = numbers if len(numbers) == 3 else (*numbers, 1)
            if step <= 0 or stop < start or (stop - start) / step > 100_000:
                raise ValueError(part)
            found += [start + k * step for k in range(int((stop - start) / step + 1e-9) + 1)]
    except ValueError:
        raise ConfigError(f"{name}: got {text!r}, expected 2:20, 2:20:3 or 2,4,8. Write {name} 2:20.") from None
    return found
