"""What a candidate costs, in TFLOPs or seconds, stage by stage, under an honest and under the published accounting."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ttsnap_lib.checks import MAX_IMAGES, Plain, choice, integer, real, text
from ttsnap_lib.errors import CostError
from ttsnap_lib.files import as_path, read_json, read_yaml, write_json
from ttsnap_lib.schedule import Draft, Schedule

AUTO = "auto"
# The last part of a model's name or path; turbo and lightning variants of SDXL run without guidance, at half the price.
_FAMILIES = {
    "flux": re.compile(r"flux(\.1.*)?", re.IGNORECASE),
    "sdxl": re.compile(r"sdxl(-base.*)?|stable-diffusion-xl.*|realvisxl_v\d\.\d", re.IGNORECASE),
    "flux2-dev": re.compile(r"flux\.2-dev", re.IGNORECASE),
    "flux2-klein-4b": re.compile(r"flux\.2-klein-4b", re.IGNORECASE),
    "flux2-klein-9b": re.compile(r"flux\.2-klein-9b", re.IGNORECASE),
    "flux3-klein-base": re.compile(r"flux-3-image-klein-base", re.IGNORECASE),
    "flux3-klein": re.compile(r"flux-3-image-klein", re.IGNORECASE),
    "qwen-image": re.compile(r"qwen-image(-2512)?", re.IGNORECASE),
    "z-image": re.compile(r"z-image", re.IGNORECASE),
    "z-image-turbo": re.compile(r"z-image-turbo", re.IGNORECASE),
    "sd3.5-large": re.compile(r"stable-diffusion-3\.5-large", re.IGNORECASE),
    "sd3.5-medium": re.compile(r"stable-diffusion-3\.5-medium", re.IGNORECASE),
    "sana": re.compile(r"sana(1\.5)?_1600m_.*", re.IGNORECASE),
    "lumina2": re.compile(r"lumina-image-2\.0", re.IGNORECASE),
    "chroma": re.compile(r"chroma1-(hd|base)", re.IGNORECASE),
    "pixart-sigma": re.compile(r"pixart-sigma-xl-2-.*", re.IGNORECASE),
    "hidream": re.compile(r"hidream-i1-full", re.IGNORECASE),
}
# TFLOPs of the score of one picture, its prompt encoded already. Source: tests/benchmarks/real_rewards.py.
VERIFY = {
    "image_reward": 0.138, "pickscore": 0.335, "hpsv2": 0.335, "mps": 0.397, "cyclereward": 0.157, "aesthetic": 0.162,
    "hpsv3": 12.5,
}  # fmt: skip
SAME_TOWER = {"hpsv2.1": "hpsv2", "clipscore": "aesthetic", "hpsv3.mean": "hpsv3", "hpsv3.sigma": "hpsv3"}
_TOLERANCE = 1e-9  # relative; a budget that is a multiple of the cost must buy that multiple despite rounding
_PARTS = ("step", "decode", "preview_decode", "verify")
MOST_AT_ONCE = 4096
"""Most candidates in a batch: a larger number is a mistake."""

Amount = float | Mapping[int, float] | tuple[tuple[int, float], ...]
"""A cost of one candidate: a number, or one for each measured batch size. Kept as a number or as sorted pairs."""


@dataclass(frozen=True)
class StageCost:
    """What one stage of a schedule costs for all candidates still in it, in the cost model's unit."""

    first_step: int
    last_step: int
    candidates: float
    denoise: float
    decode: float
    verify: float

    @property
    def total(self) -> float:
        """Denoising, decoding and scoring together."""
        return self.denoise + self.decode + self.verify


@dataclass(frozen=True)
class CostModel(Plain):
    """What denoising, decoding and scoring one candidate costs.

    FLOPs are the same for each candidate; seconds depend on how many run together. So a part may also be a table
    ``{batch size: seconds a candidate}`` with two sizes or more. A batch then takes size times seconds: linear in the
    size between measured sizes; below the smallest, as long as that one takes; above the largest, along the line
    through the last two (never falling). A stage runs in full batches of `batch_size` and the rest.

    Parameters
    ----------
    step : float or {int: float}
        One denoising step of one candidate (guidance included).
    verify : float or {int: float}
        Scoring one decoded image.
    decode : float or {int: float}
        Decoding one latent to pixels with the full VAE.
    n_steps : int
        Denoising steps of a whole trajectory.
    unit : str
        Unit of all costs and budgets, e.g. ``"TFLOPs"`` or ``"seconds"``.
    accounting : {"exact", "published"}
        ``"exact"`` charges every forward that runs, with whole survivors; a schedule without stages costs what
        Best-of-N costs. ``"published"`` is the released code's formula, kept for parity: a stage that prunes at
        step index ``s`` is charged ``s`` steps although ``s + 1`` forwards have run, survivors are fractions, and
        Best-of-N is charged all its steps.
    preview_decode : float or {int: float}, optional
        Decoding at a check with a smaller decoder (a tiny VAE); `decode` when not given.
    per_prompt : float
        Paid once per prompt (text encoding).
    batch_size : int, optional
        Candidates at once, with tables; by default the largest size at which every table was measured.
    prompts_together : int
        Prompts whose candidates share batches, with tables: all costs stay those of one prompt, its share.
        Without tables `batch_size` and `prompts_together` change nothing and are dropped.

    Raises
    ------
    CostError
        A negative or non-finite cost, a step that costs nothing, an unknown accounting, a table of fewer than two batch
        sizes, tables under published accounting, which knows no batches.

    Warns
    -----
    UserWarning
        `batch_size` is above the sizes of a table.
    """

    step: Amount
    verify: Amount
    decode: Amount = 0.0
    n_steps: int = 20
    unit: str = "TFLOPs"
    accounting: str = "exact"
    preview_decode: Amount | None = None
    per_prompt: float = 0.0
    batch_size: int | None = None
    prompts_together: int = 1
    _what = "cost model"
    _error = CostError

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in _PARTS:
            if name != "preview_decode" or self.preview_decode is not None:
                put(self, name, _amount(f"cost.{name}", getattr(self, name), open_low=name == "step"))
        put(self, "per_prompt", real("cost.per_prompt", self.per_prompt, 0, error=CostError))
        put(self, "n_steps", integer("cost.n_steps", self.n_steps, 1, error=CostError))
        text("cost.unit", self.unit, error=CostError)
        choice("cost.accounting", self.accounting, ("exact", "published"), error=CostError)
        together = integer("cost.prompts_together", self.prompts_together, 1, MAX_IMAGES, error=CostError)
        size = self.batch_size
        if size is not None:
            size = integer("cost.batch_size", size, 1, MOST_AT_ONCE, error=CostError)
        largest = {name: table[-1][0] for name in _PARTS if isinstance(table := getattr(self, name), tuple)}
        if not largest:
            size, together = None, 1
        elif self.accounting == "published":
            raise CostError(
                f"cost.accounting: got 'published' with a table of {next(iter(largest))} by batch size, expected 'exact': the "
                "released formula knows no batches. Set accounting='exact', or give numbers."
            )
        elif size is None:
            size = min(largest.values())
        elif above := {name: top for name, top in largest.items() if size > top}:
            warnings.warn(
                f"cost.batch_size {size} is above what was measured ({', '.join(f'{n} up to {b}' for n, b in above.items())}): "
                "larger batches are extrapolated from the last two sizes",
                stacklevel=3,
            )
        put(self, "batch_size", size)
        put(self, "prompts_together", together)

    def each(self, part: str, batch_size: int) -> float:
        """Return what `part` (``"step"``, ...) costs a candidate that runs in a batch of `batch_size`."""
        amount = getattr(self, choice("part", part, _PARTS, error=CostError))
        if not isinstance(amount, tuple):
            return amount
        size = integer("batch_size", batch_size, 1, error=CostError)
        return float(_batch_seconds(amount, np.array([size]))[0]) / size

    def stages(self, n: int, schedule: Schedule | None = None) -> tuple[StageCost, ...]:
        """Return the cost of each stage for `n` candidates; their totals and `per_prompt` add up to :meth:`total`.

        A stage ends with a check; the last ends with the scoring of the clean image.
        """
        n = integer("n", n, 0, error=CostError)
        return tuple(
            StageCost(first, last, count, *(self._spend(count, part) for part in parts))
            for count, (first, last, *parts) in zip(
                self._counts(n, schedule), _stages(self, None if schedule is None else schedule.steps), strict=True
            )
        )

    def total(self, n: int, schedule: Schedule | Draft | None = None) -> float:
        """Return the cost of `n` candidates of one prompt, in `unit`.

        With a :class:`Draft` all `n` pay its steps, a decode and a score, and the best ones the full run besides.
        ``None`` is Best-of-N. It is the same as ``Schedule()`` under exact accounting; under published accounting
        ``None`` is charged all steps, a schedule (also the empty one) one fewer, as released. With tables a few more
        candidates may cost less than a few fewer.
        """
        n = integer("n", n, 0, error=CostError)
        if isinstance(schedule, Draft):
            return self._drafting(schedule).total(n) + self.total(min(n, schedule.finish)) - self.per_prompt
        wholes = _stage_wholes(self, None if schedule is None else schedule.steps)
        counts = self._counts(n, schedule)
        return self.per_prompt + sum(self._spend(count, whole) for count, whole in zip(counts, wholes, strict=True))

    def totals(self, at_work: np.ndarray, schedule: Schedule | None = None) -> np.ndarray:
        """Return :meth:`total` for many: `at_work` (..., stage) are the candidates in each stage."""
        wholes = np.array(_stage_wholes(self, None if schedule is None else schedule.steps))
        if self.batch_size is None:
            return self.per_prompt + at_work @ wholes
        full, rest = np.divmod(at_work * self.prompts_together, self.batch_size)
        batches = full * wholes[:, -1] + wholes[np.arange(len(wholes)), rest]
        return self.per_prompt + batches.sum(-1) / self.prompts_together

    def candidates(self, budget: float, schedule: Schedule | Draft | None = None) -> int:
        """Return the largest n with ``total(n, schedule) <= budget * (1 + 1e-9)``; 0 when not even one fits.

        A :class:`Draft` takes as many candidates as it finishes, or more. With tables it is exact up to a million candidates; beyond, all batches count as full.
        """
        if isinstance(schedule, Draft):
            left = real("budget", budget, 0, error=CostError) - (self.total(schedule.finish) - self.per_prompt)
            n = self._drafting(schedule).candidates(max(0.0, left))
            return n if n >= schedule.finish else 0
        budget = real("budget", budget, 0, error=CostError) * (1 + _TOLERANCE)
        if self.batch_size is not None:
            size = 256
            while (n := int(np.searchsorted(_cheapest(self, schedule, size), budget, "right"))) == size:
                if size > MAX_IMAGES:
                    full: dict[str, Any] = {
                        name: self.each(name, self.batch_size) for name in _PARTS if getattr(self, name) is not None
                    }
                    return max(size, replace(self, **full).candidates(budget, schedule))
                size *= 4
            return n
        if self.total(1, schedule) > budget:
            return 0
        # No candidate costs less than its first stage (which may be free as released, but costs are linear there): that
        # bounds n, and total is monotone in n.
        first = _stage_wholes(self, None if schedule is None else schedule.steps)[0]
        least = first if self.accounting == "exact" else self.total(1, schedule) - self.per_prompt
        low, high = 1, max(1, math.floor((budget - self.per_prompt) / least) + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.total(middle, schedule) <= budget else (low, middle - 1)
        return low

    def _drafting(self, draft: Draft) -> CostModel:
        """Return the costs of a run of the draft's steps: each of them costs what a step of the full run does."""
        draft.check(self.n_steps)
        if self.accounting == "published":
            raise CostError(
                "cost.accounting: got 'published' with a draft, expected 'exact': the released formula knows no drafts. "
                "Set accounting='exact'."
            )
        return replace(self, n_steps=draft.steps)

    def beyond(self, schedule: Schedule | None = None) -> int:
        """Return k such that n + k candidates and more never cost less than n: 0 without tables."""
        if self.batch_size is None:
            return 0
        wholes = np.array(_stage_wholes(self, None if schedule is None else schedule.steps))
        # Full batches only grow with n, and what is not in them is at most the dearest batch of each stage: so many more
        # full batches in the first stage make up for it.
        batches = math.ceil(wholes.max(1).sum() / wholes[0, -1])
        return min(math.ceil(batches * len(wholes[0]) / self.prompts_together), MAX_IMAGES)

    def _spend(self, count: float, part: Any) -> float:
        """Return what `count` candidates cost: a number each, or by the seconds of batches of 0, 1, ... candidates."""
        if self.batch_size is None:
            return count * part
        full, rest = divmod(int(count) * self.prompts_together, self.batch_size)
        return float(full * part[-1] + part[rest]) / self.prompts_together

    def _counts(self, n: int, schedule: Schedule | None) -> tuple[float, ...]:
        """Return the candidates of each stage: whole ones, or fractions as released."""
        if not n or schedule is None:
            return (n,) * (1 if schedule is None else len(schedule) + 1)
        if self.accounting == "exact":
            return schedule.survivors(n)
        return tuple(itertools.accumulate(schedule.keep_ratios, operator.mul, initial=n))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CostModel:
        """Return a named preset of :data:`PRESETS`, with single fields changed by keyword.

        ``"published"``: 9.9 per step and 1.2 per check in the released accounting (source: the released simulation).
        ``"<model>-<size>[-tiny]+<reward>"``, e.g. ``"flux-512+hpsv2"``: TFLOPs of one forward at batch 1 with two
        operations per multiply-add, counted with torch's FLOP counter on the real architectures. FLUX.1-dev step
        with 512 text tokens: 21.5 at 512 px, 74.4 at 1024 px. SDXL step with guidance: 3.18 and 13.5. VAE decode:
        2.51 and 10.5 (``AutoencoderTiny`` 0.14 and 0.57: ``-tiny``, used at checks only). Scores: CLIP-H of PickScore
        and HPSv2 0.335, with the cross-attention of MPS 0.397; CLIP-L of the aesthetic predictor 0.162; BLIP of ImageReward
        0.138 and, with longer prompts, of CycleReward 0.157; Qwen2-VL-7B of HPSv3 12.5. The newer families, at their own guidance and with the encoding of a
        prompt as `per_prompt`, are counted by ``python -m tests.benchmarks presets``, which names configurations, text
        tokens and decoders. ``"pocket-flux[-tiny]+pocket-clip"`` and
        ``"pocket-sdxl[-tiny]+pocket-clip"``: GFLOPs of the shipped pocket models, counted by ``ttsnap cost``.
        ``"h100-flux-512[-compiled]"`` and ``"h100-sdxl-512[-compiled]"``: seconds by batch on one H100 80GB HBM3, the real
        architectures with random weights at 512 px in bf16 (torch 2.11, diffusers 0.39, 2026-11-27). Steps were measured
        at batches of 1, 2, 4, 8, 16 (SDXL, with guidance, also 32), eager and with ``compile_repeated_blocks``; the
        decoding, the score by a CLIP-H and the text, which no compiling touches, at batches of 1 and 8 (FLUX.1-dev) or 1
        and 16 (SDXL): these are the presets' `batch_size`.
        """
        choice("cost preset", name, PRESETS, error=CostError)
        return cls.from_dict({**PRESETS[name].to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; a table as a mapping. Without tables nothing is said of batches."""
        batches = ("batch_size", "prompts_together") if self.batch_size is None else ()
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in batches}
        return {name: dict(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def save(self, path: str | Path) -> Path:
        """Write the model as JSON and return the path."""
        write_json(path, self.to_dict())
        return Path(path)

    @classmethod
    def load(cls, source: str | Path) -> CostModel:
        """Return the preset named `source`, or the model in the JSON or YAML file `source`."""
        if isinstance(source, str) and source in PRESETS:
            return cls.preset(source)
        path = as_path("cost", source, error=CostError)
        if not path.suffix and not path.exists():  # a preset was meant; a file has an ending
            choice("cost preset", str(source), sorted(PRESETS), error=CostError)
        remedy = "Write it with CostModel.save() or `ttsnap cost`, or use a preset: `ttsnap cost --list` shows them."
        read = read_json if path.suffix == ".json" else read_yaml
        content = read(path, "cost file", error=CostError, remedy=remedy)
        # A file of `ttsnap cost` carries more than the model; the model stands under its own key there.
        if isinstance(content, Mapping) and isinstance(model := content.get("cost"), Mapping):
            by_batch = content.get("by_batch") if model == content.get("seconds") else None
            content = model if by_batch is None else {**model, **_measured(model, by_batch, path)}
        return cls.from_dict(content)


def preset_for(model: str, reward: str, size: int | None = None, *, tiny: bool = False) -> str:
    """Return the name of the preset for a diffusion model, pictures of `size` x `size` pixels and a reward.

    With `tiny` it is the one that charges a tiny decoder at the checks.

    Raises
    ------
    CostError
        There is none; the message names those that come near.
    """
    name = Path(model).name
    family = next((short for short, pattern in _FAMILIES.items() if pattern.fullmatch(name)), name)
    reward = SAME_TOWER.get(reward, reward)
    decoder = "-tiny" if tiny else ""
    for preset in (f"{family}{decoder}+{reward}", f"{family}-{size}{decoder}+{reward}"):
        if preset in PRESETS:
            return preset
    plain = [preset for preset in PRESETS if "+" in preset and "-tiny" not in preset]
    near = [preset for preset in plain if preset.startswith(f"{family}-")] or plain
    one_each = {
        preset.partition("+")[0]: preset for preset in reversed(near)
    }  # of rewards that are not known, the first
    near = [preset for preset in near if preset.endswith(f"+{reward}")] or list(one_each.values())[::-1]
    at = f"at {size} px" if size else "of a size that is not known"
    raise CostError(
        f"cost: got 'auto', and there is no preset for pictures of {model or 'an unknown model'!r} {at} with the reward "
        f"{reward!r}{' and a tiny decoder at the checks' if tiny else ''}. Name one ({', '.join(near)}), or a file that `ttsnap cost` measured."
    )


def priced(
    cost: str | Path, n_steps: int, model: str, reward: str, size: int | None = None, *, tiny: bool = False
) -> tuple[str, CostModel]:
    """Return the name of a cost model and the model: of a preset, of a file, or for ``"auto"`` of :func:`preset_for`.

    `model`, `reward`, `size` and `tiny` are those of :func:`preset_for`. A preset gets `n_steps` denoising steps, since what
    a step costs does not depend on how many there are.
    """
    name = preset_for(model, reward, size, tiny=tiny) if cost == AUTO else str(cost)
    found = CostModel.load(name)
    return name, replace(found, n_steps=integer("n_steps", n_steps, 1)) if name in PRESETS else found


def check_n_steps(cost: Any, n_steps: int) -> None:
    """Refuse what is no cost model, or one of another number of denoising steps."""
    if not isinstance(cost, CostModel):
        raise CostError(
            f"cost: got {cost!r}, expected a CostModel. Pass CostModel.preset('published') or one of yours."
        )
    if cost.n_steps != n_steps:
        raise CostError(
            f"cost.n_steps: got {cost.n_steps!r}, expected {n_steps}, the denoising steps to be priced. Use a cost model "
            f"with n_steps={n_steps} (dataclasses.replace changes one field)."
        )


@functools.lru_cache(maxsize=4096)
def _stages(cost: CostModel, steps: tuple[int, ...] | None) -> tuple[tuple[int, int, Any, Any, Any], ...]:
    """Return first and last step of each stage, and what denoising, decoding and scoring cost there.

    Of one candidate; with tables arrays instead, of a batch of 0, 1, ..., batch_size candidates.
    """
    pruning = Schedule() if steps is None else Schedule(steps, (1.0,) * len(steps))
    pruning.check(cost.n_steps)
    parts: list[Any] = [
        cost.step,
        cost.decode,
        cost.decode if cost.preview_decode is None else cost.preview_decode,
        cost.verify,
    ]
    if cost.batch_size is not None:
        sizes = np.arange(cost.batch_size + 1)
        parts = [_batch_seconds(part, sizes) if isinstance(part, tuple) else sizes * part for part in parts]
    step, decode, preview, verify = parts
    # The released formula counts from step 0 without the forward that reaches it, but Best-of-N in full.
    before = -1 if cost.accounting == "exact" or steps is None else 0
    stages = []
    for end in (*pruning.steps, cost.n_steps - 1):
        is_last = end == cost.n_steps - 1
        stages.append((before + 1, end, (end - before) * step, decode if is_last else preview, verify))
        before = end
    return tuple(stages)


@functools.lru_cache(maxsize=4096)
def _stage_wholes(cost: CostModel, steps: tuple[int, ...] | None) -> tuple[Any, ...]:
    """Return what each stage costs, its parts together, as in :func:`_stages`."""
    return tuple(denoise + decode + verify for _, _, denoise, decode, verify in _stages(cost, steps))


@functools.lru_cache(maxsize=64)
def _cheapest(cost: CostModel, schedule: Schedule | None, size: int) -> np.ndarray:
    """Return what n or more candidates cost at least, for n of 1 to `size`: ascending, unlike the totals."""
    n = np.arange(1, size + 1 + cost.beyond(schedule))
    at_work = n[:, None] if schedule is None else schedule.survivors_of(n)
    return np.minimum.accumulate(cost.totals(at_work, schedule)[::-1])[::-1][:size]


def _batch_seconds(table: tuple[tuple[int, float], ...], sizes: np.ndarray) -> np.ndarray:
    """Return what whole batches of `sizes` candidates take; nothing for a batch of none."""
    measured, each = np.array(table).T
    times = measured * each
    slope = max(0.0, (times[-1] - times[-2]) / (measured[-1] - measured[-2]))
    above = np.maximum(sizes - measured[-1], 0) * slope
    return np.where(sizes > 0, np.interp(sizes, measured, times) + above, 0.0)


def _amount(name: str, value: Any, *, open_low: bool) -> float | tuple[tuple[int, float], ...]:
    """Return a checked number, or a checked table as pairs of batch size and cost a candidate, ascending."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(one, tuple) and len(one) == 2 for one in pairs):
        return real(name, value, 0, open_low=open_low, error=CostError)
    table: dict[int, float] = {}
    for given, each in pairs:
        # JSON has no keys but strings
        size = int(given) if isinstance(given, str) and given.isdecimal() else given
        size = integer(f"batch size of {name}", size, 1, MOST_AT_ONCE, error=CostError)
        if size in table:
            raise CostError(f"{name}: got batch size {size} twice, expected each once. Leave one of them out.")
        table[size] = real(f"{name} at batch size {size}", each, 0, open_low=open_low, error=CostError)
    if len(table) < 2:
        raise CostError(
            f"{name}: got a table of {len(table)} batch sizes, {sorted(table)}, expected two or more. Measure more sizes with "
            "`ttsnap cost --batch-sizes`, or give a number."
        )
    return tuple(sorted(table.items()))


def _measured(model: Mapping[str, Any], by_batch: Any, path: Path) -> dict[str, dict[int, float]]:
    """Return tables for the parts that an older file of `ttsnap cost` gives as numbers beside what was measured by batch."""
    tables: dict[str, dict[int, float]] = {}
    try:
        for row in by_batch:
            tables.setdefault(row["part"], {})[row["batch_size"]] = row["seconds"]
    except (TypeError, KeyError) as error:
        raise CostError(
            f"cost file {path}: got a by_batch that cannot be read ({error!r}), expected rows of batch_size, part and seconds. "
            "Measure again with `ttsnap cost`."
        ) from error
    return {
        name: table for name, table in tables.items() if len(table) > 1 and isinstance(model.get(name), int | float)
    }


def _presets() -> dict[str, CostModel]:
    steps = {"flux-512": 21.5, "flux-1024": 74.4, "sdxl-512": 3.18, "sdxl-1024": 13.5}
    decodes = {"512": (2.51, 0.14), "1024": (10.5, 0.57)}
    presets = {"published": CostModel(step=9.9, verify=1.2, accounting="published")}
    for model, step in steps.items():
        full, tiny = decodes[model.split("-")[1]]
        for reward, verify in VERIFY.items():
            presets[f"{model}+{reward}"] = CostModel(step=step, verify=verify, decode=full)
            presets[f"{model}-tiny+{reward}"] = CostModel(step=step, verify=verify, decode=full, preview_decode=tiny)
    for model, (*by_size, encoding, (decode, previews)) in _COUNTED.items():
        for size, step, full, tiny in zip((512, 1024), by_size, decode, previews, strict=True):
            for reward, verify in VERIFY.items() if step else ():
                plain = CostModel(step=step, verify=verify, decode=full, per_prompt=encoding)
                presets[f"{model}-{size}+{reward}"] = plain
                if tiny:
                    presets[f"{model}-{size}-tiny+{reward}"] = replace(plain, preview_decode=tiny)
    for model, step, text_encoding in (("pocket-flux", 0.065237, 0.0059085), ("pocket-sdxl", 0.18998, 0.0056771)):
        pocket = CostModel(step=step, verify=0.028133, decode=0.12626, per_prompt=text_encoding, unit="GFLOPs")
        presets[f"{model}+pocket-clip"] = pocket
        presets[f"{model}-tiny+pocket-clip"] = replace(pocket, preview_decode=0.02551)
    for model, seconds in _H100_STEPS.items():
        presets[f"h100-{model}"] = CostModel(
            step={2**k: whole / 2**k for k, whole in enumerate(seconds)}, unit="seconds", **_H100[model[:4]]
        )
    return presets


# TFLOPs of a step at 512 and 1024 px, of a prompt's encoding, and of decoding with the tiny decoder that diffusers has for
# these latents, if any. Source: tests/benchmarks/bench_presets.py.
_KL, _FLUX2, _QWEN, _DC = (
    ((2.51, 10.5), (0.14, 0.57)), ((2.52, 10.5), (None, None)), ((2.84, 11.7), (None, None)), ((2.09, 8.37), (None, None)),
)  # fmt: skip
_COUNTED: dict[str, tuple[Any, ...]] = {
    "flux2-dev": (87.8, 283, 23.6, _FLUX2),
    "flux2-klein-4b": (10.2, 34.8, 4.27, _FLUX2),  # the distilled ones, without guidance
    "flux2-klein-9b": (22.7, 75.5, 7.90, _FLUX2),
    "flux3-klein-base": (19.2, 83.0, 1.29, _FLUX2),
    "flux3-klein": (9.60, 41.5, 0.647, _FLUX2),
    "qwen-image": (31.4, 139, 2.78, _QWEN),
    "z-image": (25.8, 111, 7.75, _KL),
    "z-image-turbo": (12.9, 55.6, 3.88, _KL),
    "sd3.5-large": (16.0, 62.2, 5.02, _KL),
    "sd3.5-medium": (4.89, 22.5, 5.02, _KL),
    "sana": (1.67, 5.93, 3.35, _DC),
    "lumina2": (12.0, 47.7, 2.10, _KL),
    "chroma": (43.4, 149, 9.69, _KL),
    "pixart-sigma": (2.58, 13.3, 5.63, _KL),
    "hidream": (None, 156, 6.62, _KL),  # of the full model, which makes no small pictures
}

# Seconds of a step of a whole batch of 1, 2, 4, 8, ...; the rest by candidate. Source: CostModel.preset.
_H100_STEPS = {
    "flux-512": (0.08969, 0.11911, 0.22468, 0.43578, 0.86032),
    "flux-512-compiled": (0.04449, 0.08441, 0.16173, 0.31536, 0.62163),
    "sdxl-512": (0.06720, 0.06872, 0.06069, 0.07700, 0.13848, 0.26530),
    "sdxl-512-compiled": (0.08739, 0.08183, 0.07753, 0.06622, 0.12486, 0.23697),
}
_H100: dict[str, dict[str, Any]] = {
    "flux": {"decode": {1: 0.03354, 8: 0.01639}, "verify": {1: 0.04575, 8: 0.00637}, "per_prompt": 0.0775},
    "sdxl": {"decode": {1: 0.03061, 16: 0.01505}, "verify": {1: 0.04395, 16: 0.00339}, "per_prompt": 0.0645},
}


PRESETS: dict[str, CostModel] = _presets()
"""Named cost models; sources in :meth:`CostModel.preset`."""

COUNTERPARTS = {f"h100-{name}": f"{name.removesuffix('-compiled')}+pickscore" for name in _H100_STEPS}
"""Presets in seconds -> the preset in FLOPs of the same model, size and reward, which was a CLIP-H."""
