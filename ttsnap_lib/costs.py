"""What a candidate costs, in TFLOPs or seconds, stage by stage, under an honest and under the published accounting."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ttsnap_lib.checks import Plain, choice, integer, real, text
from ttsnap_lib.errors import CostError
from ttsnap_lib.files import as_path, read_json, read_yaml, write_json
from ttsnap_lib.schedule import Schedule

_TOLERANCE = 1e-9  # relative; a budget that is a multiple of the cost must buy that multiple despite rounding


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

    Parameters
    ----------
    step : float
        One denoising step of one candidate (guidance included).
    verify : float
        Scoring one decoded image.
    decode : float
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
    preview_decode : float, optional
        Decoding at a check with a smaller decoder (a tiny VAE); `decode` when not given.
    per_prompt : float
        Paid once per prompt (text encoding).

    Raises
    ------
    CostError
        A negative or non-finite cost, a step that costs nothing, an unknown accounting.
    """

    step: float
    verify: float
    decode: float = 0.0
    n_steps: int = 20
    unit: str = "TFLOPs"
    accounting: str = "exact"
    preview_decode: float | None = None
    per_prompt: float = 0.0
    _what = "cost model"
    _error = CostError

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "step", real("cost.step", self.step, 0, open_low=True, error=CostError))
        for name in ("verify", "decode", "per_prompt"):
            put(self, name, real(f"cost.{name}", getattr(self, name), 0, error=CostError))
        if self.preview_decode is not None:
            put(self, "preview_decode", real("cost.preview_decode", self.preview_decode, 0, error=CostError))
        put(self, "n_steps", integer("cost.n_steps", self.n_steps, 1, error=CostError))
        text("cost.unit", self.unit, error=CostError)
        choice("cost.accounting", self.accounting, ("exact", "published"), error=CostError)

    def stages(self, n: int, schedule: Schedule | None = None) -> tuple[StageCost, ...]:
        """Return the cost of each stage for `n` candidates; their totals and `per_prompt` add up to :meth:`total`.

        A stage ends with a check; the last ends with the scoring of the clean image.
        """
        n = integer("n", n, 0, error=CostError)
        units = _stage_units(self, schedule)
        return tuple(
            StageCost(first, last, count, count * denoise, count * decode, count * self.verify)
            for count, (first, last, denoise, decode) in zip(self._counts(n, schedule), units, strict=True)
        )

    def total(self, n: int, schedule: Schedule | None = None) -> float:
        """Return the cost of `n` candidates of one prompt, in `unit`.

        ``None`` is Best-of-N. It is the same as ``Schedule()`` under exact accounting; under published accounting
        ``None`` is charged all steps, a schedule (also the empty one) one fewer, as released.
        """
        n = integer("n", n, 0, error=CostError)
        units = _stage_units(self, schedule)
        counts = self._counts(n, schedule)
        return self.per_prompt + sum(
            count * (denoise + decode + self.verify)
            for count, (_, _, denoise, decode) in zip(counts, units, strict=True)
        )

    def candidates(self, budget: float, schedule: Schedule | None = None) -> int:
        """Return the largest n with ``total(n, schedule) <= budget * (1 + 1e-9)``; 0 when not even one fits."""
        budget = real("budget", budget, 0, error=CostError) * (1 + _TOLERANCE)
        if self.total(1, schedule) > budget:
            return 0
        # No candidate costs less than its first stage: that bounds n, and total is monotone in n.
        _, _, denoise, decode = _stage_units(self, schedule)[0]
        low, high = 1, max(1, math.floor((budget - self.per_prompt) / (denoise + decode + self.verify)) + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.total(middle, schedule) <= budget else (low, middle - 1)
        return low

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
        2.51 and 10.5 (``AutoencoderTiny`` 0.14 and 0.57: ``-tiny``, used at checks only). Image towers: CLIP-H of PickScore
        and HPSv2 0.335, BLIP of ImageReward 0.138. ``"pocket-flux[-tiny]+pocket-clip"`` and
        ``"pocket-sdxl[-tiny]+pocket-clip"``: GFLOPs of the shipped pocket models, counted by ``ttsnap cost``.
        """
        choice("cost preset", name, PRESETS, error=CostError)
        return cls.from_dict({**PRESETS[name].to_dict(), **changes})

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
        remedy = f"Write it with CostModel.save(), or use one of {sorted(PRESETS)}."
        read = read_json if path.suffix == ".json" else read_yaml
        content = read(path, "cost file", error=CostError, remedy=remedy)
        # A file of `ttsnap cost` carries more than the model; the model stands under its own key there.
        if isinstance(content, Mapping) and isinstance(content.get("cost"), Mapping):
            content = content["cost"]
        return cls.from_dict(content)


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
def _stage_units(cost: CostModel, schedule: Schedule | None) -> tuple[tuple[int, int, float, float], ...]:
    """Return first step, last step, denoising and decoding cost of one candidate in each stage."""
    pruning = Schedule() if schedule is None else schedule
    pruning.check(cost.n_steps)
    preview = cost.decode if cost.preview_decode is None else cost.preview_decode
    # The released formula counts from step 0 without the forward that reaches it, but Best-of-N in full.
    before = -1 if cost.accounting == "exact" or schedule is None else 0
    units = []
    for end in (*pruning.steps, cost.n_steps - 1):
        is_last = end == cost.n_steps - 1
        units.append((before + 1, end, (end - before) * cost.step, cost.decode if is_last else preview))
        before = end
    return tuple(units)


def _presets() -> dict[str, CostModel]:
    steps = {"flux-512": 21.5, "flux-1024": 74.4, "sdxl-512": 3.18, "sdxl-1024": 13.5}
    decodes = {"512": (2.51, 0.14), "1024": (10.5, 0.57)}
    rewards = {"image_reward": 0.138, "pickscore": 0.335, "hpsv2": 0.335}
    presets = {"published": CostModel(step=9.9, verify=1.2, accounting="published")}
    for model, step in steps.items():
        full, tiny = decodes[model.split("-")[1]]
        for reward, verify in rewards.items():
            presets[f"{model}+{reward}"] = CostModel(step=step, verify=verify, decode=full)
            presets[f"{model}-tiny+{reward}"] = CostModel(step=step, verify=verify, decode=full, preview_decode=tiny)
    for model, step, text_encoding in (("pocket-flux", 0.065237, 0.0059085), ("pocket-sdxl", 0.18998, 0.0056771)):
        pocket = CostModel(step=step, verify=0.028133, decode=0.12626, per_prompt=text_encoding, unit="GFLOPs")
        presets[f"{model}+pocket-clip"] = pocket
        presets[f"{model}-tiny+pocket-clip"] = replace(pocket, preview_decode=0.02551)
    return presets


PRESETS: dict[str, CostModel] = _presets()
"""Named cost models; sources in :meth:`CostModel.preset`."""
