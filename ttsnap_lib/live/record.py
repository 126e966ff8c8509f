"""What an online run leaves: every candidate's seed, scores and fate, the cost of each stage, the image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap_lib.checks import known_keys
from ttsnap_lib.errors import SearchError
from ttsnap_lib.files import atomic_write, failures_as, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

    from ttsnap_lib.costs import CostModel


_NOT_PLAIN = ("scores", "previews", "embeddings")
DRAFTED = -3
"""``pruned_at`` of a candidate that was drafted and no more."""


@dataclass
class StageRecord:
    """One stage as it ran: the forwards, decodes and scores that were done, and the seconds they took.

    What was done twice because memory ran out is counted twice. Of batches shared with other prompts the seconds are this
    prompt's share. `cost` is None without a cost model. The counts by batch say how many of them ran in batches of
    which size.
    """

    first_step: int
    last_step: int
    candidates: int
    variant: str
    forwards: int = 0
    decodes: int = 0
    scores: int = 0
    preview: bool = False
    denoise_s: float = 0.0
    decode_s: float = 0.0
    score_s: float = 0.0
    elapsed_s: float = 0.0
    cost: float | None = None
    forwards_by_batch: dict[int, int] = field(default_factory=dict)
    checks_by_batch: dict[int, int] = field(default_factory=dict)  # decodes, and as many scores

    def __post_init__(self) -> None:
        for name in ("forwards_by_batch", "checks_by_batch"):  # JSON has no keys but strings
            setattr(self, name, {int(size): count for size, count in getattr(self, name).items()})

    def denoised(self, n: int, size: int) -> None:
        """Count a step of `n` candidates, in a batch of `size`."""
        self.forwards += n
        self.forwards_by_batch[size] = self.forwards_by_batch.get(size, 0) + n

    def checked(self, n: int, size: int) -> None:
        """Count the decoding and scoring of `n` candidates, in a batch of `size`."""
        self.decodes += n
        self.scores += n
        self.checks_by_batch[size] = self.checks_by_batch.get(size, 0) + n

    def price(self, cost: CostModel) -> float:
        """Return, and note, what was done here in the unit of `cost`; an older record as if in full batches."""

        def spent(part: str, count: int, by_batch: dict[int, int]) -> float:
            if cost.batch_size is None or not by_batch:
                return count * cost.each(part, cost.batch_size or 1)
            return sum(n * cost.each(part, size) for size, n in by_batch.items())

        decode = "decode" if not self.preview or cost.preview_decode is None else "preview_decode"
        self.cost = (
            spent("step", self.forwards, self.forwards_by_batch)
            + spent(decode, self.decodes, self.checks_by_batch)
            + spent("verify", self.scores, self.checks_by_batch)
        )
        return self.cost


@dataclass
class SearchRecord:
    """Everything about a run but the pixels of the losers."""

    prompt: str
    method: str
    seed: int
    prompt_index: int
    seeds: list[int]
    rewards: list[str]
    schedule: dict[str, list]
    settings: dict[str, Any]
    checks: list[int]  # steps that were scored, the last one the clean image
    scores: np.ndarray  # float32 (candidate, check, reward), NaN where a candidate was not scored
    # per candidate its last step; -1 for those never pruned, -2 for those whose scoring failed, -3 for drafts alone
    pruned_at: list[int]
    combine: str
    weights: list[float] | None = None
    report: list[str] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=list)
    text_s: float = 0.0
    elapsed_s: float = 0.0
    winner: int = -1  # the best so far while the run goes on
    stopped: str = ""  # "deadline" or "interrupt" when cut short
    cost_model: dict[str, Any] | None = None  # it priced the stages
    together: list[int] = field(default_factory=list)  # indices of the prompts that shared its batches; empty alone
    keep: int = 1  # how many images were asked for
    diversity: float = 0.0  # what their difference weighed
    chosen: list[int] = field(default_factory=list)  # the set, the winner first; empty where one image was asked for
    distances: list[list[float]] = field(default_factory=list)  # between its images; empty without an image tower
    draft: SearchRecord | None = None  # the drafts of all candidates, where only the best ran in full
    facts: dict[str, Any] = field(default_factory=dict)  # model, scheduler, device, precision, decoder, versions
    # (candidate, step) to a small uint8 picture (H, W, 3); not saved
    previews: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)
    # (candidate, check) to what the image tower says (d,), float16, where a set was asked for; not saved
    embeddings: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def set(self) -> list[int]:
        """The chosen candidates, the winner first: of a search for one image the winner alone."""
        return self.chosen or [self.winner]

    def price(self, cost: CostModel) -> float:
        """Return what the run cost in the unit of `cost`, from the forwards, decodes and scores that were done."""
        drafts = [] if self.draft is None else self.draft.stages
        return cost.per_prompt + sum(stage.price(cost) for stage in [*drafts, *self.stages])

    def frame(self) -> pd.DataFrame:
        """Return one row per candidate: index, seed, fate, and a column per reward and check."""
        import pandas as pd

        rows: dict[str, Any] = {
            "candidate": np.arange(len(self.seeds)),
            "seed": self.seeds,
            "pruned_at": self.pruned_at,
            "winner": np.arange(len(self.seeds)) == self.winner,
        }
        if self.chosen:
            rows["place"] = [self.chosen.index(k) if k in self.chosen else -1 for k in range(len(self.seeds))]
        if self.draft is not None:
            rows |= {f"{name}_draft": self.draft.scores[:, -1, r] for r, name in enumerate(self.rewards)}
        for r, name in enumerate(self.rewards):
            for k, step in enumerate(self.checks):
                rows[f"{name}_s{step:02d}"] = self.scores[:, k, r]
        return pd.DataFrame(rows)

    def stage_frame(self) -> pd.DataFrame:
        """Return one row per stage, drafts first: what was done, what it cost and how long it took."""
        import pandas as pd

        drafts = [] if self.draft is None else self.draft.stages
        return pd.DataFrame([asdict(stage) for stage in [*drafts, *self.stages]])

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON content; NaN becomes null, pictures are left out."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _NOT_PLAIN}
        plain["stages"] = [asdict(stage) for stage in self.stages]
        values = self.scores.astype(float).astype(object)
        values[np.isnan(self.scores)] = None
        plain["scores"] = values.tolist()
        if self.draft is None:
            del plain["draft"]
        else:
            plain["draft"] = self.draft.to_dict()
        return plain

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SearchRecord:
        """Build from :meth:`to_dict`'s form; unknown keys are an error."""
        known_keys("search record", content, [one.name for one in fields(cls)], error=SearchError)
        scores = np.array(content["scores"], dtype=np.float32)  # None becomes NaN
        stages = [StageRecord(**stage) for stage in content["stages"]]
        draft = cls.from_dict(content["draft"]) if content.get("draft") else None
        return cls(**{**content, "scores": scores, "stages": stages, "draft": draft})

    @classmethod
    def load(cls, folder: str | Path) -> SearchRecord:
        """Read the record of a folder that :meth:`SearchResult.save` wrote; SearchError when it cannot be read."""
        path = Path(folder) / "record.json"
        remedy = "Check the folder, or search again."
        content = read_json(path, "search record", error=SearchError, remedy=remedy)
        with failures_as(SearchError, f"search record {path} cannot be read. {remedy}"):
            return cls.from_dict({key: value for key, value in content.items() if key not in ("cost", "complete")})


@dataclass(frozen=True)
class SearchResult:
    """What a search gives.

    Attributes
    ----------
    image : PIL.Image.Image
        The chosen image; on a run that was cut short without a finished candidate, the best estimate so far.
    winner : int, its candidate index
    record : SearchRecord
    cost : float, counted from the work that was done; NaN without a cost model
    complete : bool, False when cut short by a deadline or by Ctrl-C (``record.stopped`` says which)
    images : tuple of PIL.Image.Image
        The set, the chosen image first; that image alone unless more were asked for.
    """

    image: Image
    winner: int
    record: SearchRecord
    cost: float
    complete: bool
    images: tuple[Image, ...] = ()

    def __post_init__(self) -> None:
        if not self.images:
            object.__setattr__(self, "images", (self.image,))

    @property
    def scores(self) -> dict[str, float]:
        """Rewards of the winner at the last check it reached; NaN when it reached none."""
        return self._scores_of(self.winner)

    def _scores_of(self, candidate: int) -> dict[str, float]:
        record = self.record
        if record.draft is not None and np.isnan(record.scores[candidate]).all():  # cut short before a full run
            record = record.draft
        seen = np.flatnonzero(~np.isnan(record.scores[candidate]).all(-1))
        row = record.scores[candidate, seen[-1] if len(seen) else 0]
        return {name: float(row[r]) for r, name in enumerate(self.record.rewards)}

    def set_frame(self) -> pd.DataFrame:
        """Return one row per image of the set, the winner first: candidate, seed, rewards, mean distance to the others."""
        import pandas as pd

        record, others = self.record, len(self.record.distances) - 1
        frame = pd.DataFrame(
            [{"candidate": one, "seed": record.seeds[one], **self._scores_of(one)} for one in record.set]
        )
        return frame.assign(distance=np.sum(record.distances, axis=1) / others if others > 0 else np.nan)

    def summary(self) -> dict[str, Any]:
        """Return the run in one flat row of JSON values; None where there is no number."""
        record, drafted = self.record, {}
        if record.draft is not None:
            finished = int((~np.isnan(record.scores)).any((1, 2)).sum())
            drafted = {"draft_steps": record.draft.settings["n_steps"], "finished": finished}
        row = {
            "prompt_index": record.prompt_index,
            "prompt": record.prompt,
            "method": record.method,
            "winner": self.winner,
            "seed": record.seeds[self.winner],
            **self.scores,
            "candidates": len(record.seeds),
            **drafted,
            "cost": self.cost,
            "elapsed_s": record.elapsed_s,
            "complete": self.complete,
            "stopped": record.stopped,
        }
        if record.chosen:
            table = self.set_frame()
            row["set"] = " ".join(map(str, record.chosen))
            row |= {f"set_{name}": float(table[name].mean()) for name in record.rewards}
            row["set_distance"] = float(table["distance"].mean())
        missing = [key for key, value in row.items() if isinstance(value, float) and np.isnan(value)]
        return {**row, **dict.fromkeys(missing)}  # NaN is not JSON

    def save(self, folder: str | Path) -> Path:
        """Write ``image.png`` (seed, schedule and rewards in its metadata), ``candidates.parquet`` and ``record.json``.

        A set comes as ``image_0.png``, which is the same, ``image_1.png`` and so on. A picture of less than 128 pixels also
        comes enlarged, pixel by pixel, as ``image_large.png``. ``record.json`` comes last: a folder that has it is whole.
        """
        from PIL.Image import Resampling
        from PIL.PngImagePlugin import PngInfo

        folder, record = Path(folder), self.record
        facts = {
            **self.summary(), "rewards": record.rewards, "schedule": record.schedule, "settings": record.settings,
            "base_seed": record.seed, **record.facts,
        }  # fmt: skip
        wanted = {"image.png": (self.image, facts)}
        for place, (image, candidate) in enumerate(zip(self.images, record.chosen, strict=False)):
            own = {"candidate": candidate, "seed": record.seeds[candidate], **self._scores_of(candidate)}
            wanted[f"image_{place}.png"] = (image, {**facts, **own})
        for left in folder.glob("image_[0-9]*.png"):  # of a larger set before
            if left.name not in wanted:
                left.unlink()
        for name, (image, told) in wanted.items():
            notes = PngInfo()
            for key, value in told.items():
                notes.add_itxt(f"ttsnap:{key}", value if isinstance(value, str) else json.dumps(value))
            with atomic_write(folder / name) as file:
                image.save(file, format="PNG", pnginfo=notes)
        if max(self.image.size) < 128:
            factor = 512 // max(self.image.size)
            large = self.image.resize((self.image.width * factor, self.image.height * factor), Resampling.NEAREST)
            with atomic_write(folder / "image_large.png") as file:
                large.save(file, format="PNG")
        with atomic_write(folder / "candidates.parquet") as file:
            record.frame().to_parquet(file)
        cost = None if np.isnan(self.cost) else self.cost
        write_json(folder / "record.json", {**record.to_dict(), "cost": cost, "complete": self.complete})
        return folder
