"""What an online run leaves: every candidate's seed, scores and fate, the cost of each stage, the image."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .paths import atomic_write, write_json

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

__all__ = ["SearchRecord", "SearchResult", "StageRecord"]


@dataclass
class StageRecord:
    """One stage as it ran: the forwards, decodes and scores that were done, and the seconds they took."""

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


@dataclass
class SearchRecord:
    """Everything about a run but the pixels of the losers.

    Attributes
    ----------
    checks : list of int
        Steps that were scored, the last one the clean image.
    scores : float32 (candidate, check, reward)
        NaN where a candidate was not scored.
    pruned_at : list of int
        Per candidate the step at which it was pruned, -1 for finalists, -2 for those whose scoring failed.
    """

    prompt: str
    method: str
    seed: int
    prompt_index: int
    seeds: list[int]
    rewards: list[str]
    schedule: dict[str, list]
    settings: dict[str, Any]
    checks: list[int]
    scores: np.ndarray
    pruned_at: list[int]
    combine: str
    weights: list[float] | None = None
    report: list[str] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=list)
    text_s: float = 0.0
    elapsed_s: float = 0.0
    winner: int = -1
    previews: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def frame(self) -> pd.DataFrame:
        """Return one row per candidate: index, seed, fate, and a column per reward and check."""
        import pandas as pd

        rows: dict[str, Any] = {
            "candidate": np.arange(len(self.seeds)),
            "seed": self.seeds,
            "pruned_at": self.pruned_at,
            "winner": np.arange(len(self.seeds)) == self.winner,
        }
        for r, name in enumerate(self.rewards):
            for k, step in enumerate(self.checks):
                rows[f"{name}_s{step:02d}"] = self.scores[:, k, r]
        return pd.DataFrame(rows)

    def stage_frame(self) -> pd.DataFrame:
        """Return one row per stage: what was done and how long it took."""
        import pandas as pd

        return pd.DataFrame([asdict(stage) for stage in self.stages])

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON content; NaN becomes null."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("scores", "previews")}
        plain["stages"] = [asdict(stage) for stage in self.stages]
        values = self.scores.astype(float)
        plain["scores"] = np.where(np.isnan(values), None, values.astype(object)).tolist()
        return plain


@dataclass(frozen=True)
class SearchResult:
    """What a search gives.

    Attributes
    ----------
    image : PIL.Image.Image
        The chosen image; on an interrupted run without a finished candidate, the best estimate so far.
    winner : int
        Its candidate index.
    record : SearchRecord
    cost : float
        What the run cost by the cost model, counted from the work that was done; NaN without a model.
    complete : bool
        False when the run was cut short by a deadline or by Ctrl-C.
    """

    image: Image
    winner: int
    record: SearchRecord
    cost: float
    complete: bool

    @property
    def scores(self) -> dict[str, float]:
        """Rewards of the winner at the last check it reached."""
        seen = ~np.isnan(self.record.scores[self.winner]).any(-1)
        last = int(np.flatnonzero(seen)[-1])
        return {name: float(self.record.scores[self.winner, last, r]) for r, name in enumerate(self.record.rewards)}

    def summary(self) -> dict[str, Any]:
        """Return the run in one flat row: prompt, method, winner, seed, scores, candidates, cost, seconds."""
        record = self.record
        return {
            "prompt_index": record.prompt_index,
            "prompt": record.prompt,
            "method": record.method,
            "winner": self.winner,
            "seed": record.seeds[self.winner],
            **self.scores,
            "candidates": len(record.seeds),
            "cost": self.cost,
            "elapsed_s": record.elapsed_s,
            "complete": self.complete,
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``image.png`` (seed, schedule and rewards in its metadata), ``candidates.parquet`` and ``record.json``.

        ``record.json`` comes last: a folder that has it is whole.
        """
        from PIL.PngImagePlugin import PngInfo

        folder = Path(folder)
        notes = PngInfo()
        facts = {**self.summary(), "schedule": self.record.schedule, "settings": self.record.settings}
        for key, value in facts.items():
            notes.add_itxt(f"ttsnap:{key}", value if isinstance(value, str) else json.dumps(value))
        with atomic_write(folder / "image.png") as file:
            self.image.save(file, format="PNG", pnginfo=notes)
        buffer = io.BytesIO()
        self.record.frame().to_parquet(buffer)
        with atomic_write(folder / "candidates.parquet") as file:
            file.write(buffer.getvalue())
        cost = None if np.isnan(self.cost) else self.cost
        write_json(folder / "record.json", {**self.record.to_dict(), "cost": cost, "complete": self.complete})
        return folder
