"""The manifest of a trajectory folder: what decides its bytes, its prompts, and who wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._images import IMAGE_FORMATS, MAX_PIXELS
from ._layout import is_prompt_name
from ._reading import as_path, read_json
from .checks import choice, integer
from .errors import PromptError, TrajectoryError
from .paths import write_json
from .prompts import check_prompts

__all__ = ["MANIFEST", "MAX_IMAGES", "MAX_STEPS", "Manifest", "extend"]

MANIFEST = "manifest.json"
_SCHEMA = 1
MAX_IMAGES = 1_000_000
"""Most images per prompt: beyond, a number is a mistake, and lists of it would fill the memory."""
MAX_STEPS = 10_000
"""Most steps per image, likewise."""
_IDENTITY_BOUNDS = {"n_steps": MAX_STEPS, "height": None, "width": None, "seed": None}
_PROVENANCE_KEPT = 100


@dataclass(frozen=True)
class Manifest:
    """What a trajectory folder holds.

    Parameters
    ----------
    identity : mapping
        What decides the bytes: model, scheduler, sigmas, guidance, size, seed rule, NegToMe, batch, format.
        At least ``n_steps``, ``height``, ``width``, ``image_format`` and ``seed``.
    prompts : sequence of str
        The position is the prompt's index.
    images_per_prompt : int
    provenance : sequence of mappings
        Who wrote: versions, commit, host, device; one entry per distinct writer.
    """

    identity: Mapping[str, Any]
    prompts: tuple[str, ...]
    images_per_prompt: int
    provenance: tuple[Mapping[str, Any], ...] = ()

    @property
    def n_steps(self) -> int:
        """Number of denoising steps, and of files per image."""
        return int(self.identity["n_steps"])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image."""
        return self.identity["height"], self.identity["width"]

    @property
    def image_format(self) -> str:
        """``"png"`` or ``"webp"``."""
        return self.identity["image_format"]

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into `folder`, atomically."""
        write_json(
            folder / MANIFEST,
            {
                "schema": _SCHEMA,
                "identity": dict(self.identity),
                "prompts": list(self.prompts),
                "images_per_prompt": self.images_per_prompt,
                "provenance": [dict(entry) for entry in self.provenance],
            },
        )

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read ``manifest.json`` of `folder`.

        Raises
        ------
        TrajectoryError
            When there is none, or it is broken or of a newer schema.
        """
        path = as_path("trajectory folder", folder, error=TrajectoryError) / MANIFEST
        remedy = "Name a folder that `ttsnap generate` wrote."
        if not path.exists():
            raise TrajectoryError("no trajectory folder", value=str(folder), bound=f"a {MANIFEST} in it", remedy=remedy)
        content = read_json(path, "manifest", error=TrajectoryError, remedy=remedy)
        if content.get("schema") != _SCHEMA:
            raise TrajectoryError(
                f"{path} has another schema", value=content.get("schema"), bound=str(_SCHEMA), remedy="Update ttsnap."
            )
        for key, kind in (("identity", dict), ("prompts", list), ("provenance", list)):
            if not isinstance(content.get(key), kind):
                raise TrajectoryError(
                    f"{path}: {key}", value=content.get(key), bound=f"a {kind.__name__}", remedy=remedy
                )
        identity = content["identity"]
        for key, high in _IDENTITY_BOUNDS.items():
            integer(f"{path}: {key}", identity.get(key), 0 if key == "seed" else 1, high, error=TrajectoryError)
        integer(f"{path}: height x width", identity["height"] * identity["width"], 1, MAX_PIXELS, error=TrajectoryError)
        choice(f"{path}: image_format", identity.get("image_format"), IMAGE_FORMATS, error=TrajectoryError)
        batch = identity.get("batch", {"size": 1})
        sizes = list(batch.values()) if isinstance(batch, dict) and "size" in batch else [None]
        for size in sizes:
            integer(f"{path}: batch", size, 1, MAX_IMAGES, error=TrajectoryError)
        if not all(isinstance(entry, dict) for entry in content["provenance"]):
            raise TrajectoryError(
                f"{path}: provenance", value=content["provenance"], bound="a list of mappings", remedy=remedy
            )
        try:
            prompts = check_prompts(content["prompts"], f"{path}: prompts")
        except PromptError as error:
            raise TrajectoryError(error.problem, value=error.value, bound=error.bound, remedy=remedy) from error
        images = integer(
            f"{path}: images_per_prompt", content.get("images_per_prompt"), 1, MAX_IMAGES, error=TrajectoryError
        )
        return cls(identity, tuple(prompts), images, tuple(content["provenance"]))

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """Return one line per setting in which `identity` differs from this one's.

        The model's name does not count when the digests of the weights are known and equal; an unknown digest
        (weights that are not in memory) is not compared.
        """
        old, new = _flat(self.identity), _flat(identity)
        skip = set()
        if old.get("weights") is None or new.get("weights") is None:
            skip = {"weights"}
        elif old["weights"] == new["weights"]:
            skip = {"model", "revision"}
        return [
            f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
            for key in sorted({*old, *new} - skip)
            if old.get(key) != new.get(key)
        ]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def extend(
    folder: str | Path,
    identity: Mapping[str, Any],
    prompts: Sequence[str],
    images_per_prompt: int,
    provenance: Mapping[str, Any] | None = None,
) -> Manifest:
    """Create the manifest of `folder`, or widen the one that is there to more prompts or images.

    Counts only ever grow: asking for fewer leaves the manifest as it is. Call it under a lock when several
    processes may start at once.

    Returns
    -------
    Manifest
        As it is now.

    Raises
    ------
    TrajectoryError
        When the folder holds images of other settings or other prompts; each difference is shown.
    """
    folder = Path(folder)
    identity = json.loads(json.dumps(identity, allow_nan=False))  # as it will be read back
    entry = dict(provenance or {})
    if (folder / MANIFEST).exists():
        old = Manifest.read(folder)
        different = old.differences(identity)
        if different:
            raise TrajectoryError(
                f"{folder} was made with other settings ({'; '.join(different)})",
                value=str(folder),
                bound="the settings of what is there already",
                remedy="Choose another output folder, or give the settings that it was made with.",
            )
        both = min(len(old.prompts), len(prompts))
        changed = next((i for i in range(both) if old.prompts[i] != prompts[i]), None)
        if changed is not None:
            raise TrajectoryError(
                f"{folder} was made with other prompts: prompt {changed} differs",
                value=prompts[changed],
                bound=repr(old.prompts[changed]),
                remedy="Choose another output folder. Prompts may be added at the end, not changed.",
            )
        entries = old.provenance
        if entry and not any(_same_writer(entry, known) for known in entries):
            entries = (*entries, entry)[-_PROVENANCE_KEPT:]
        manifest = Manifest(
            old.identity,
            max(old.prompts, tuple(prompts), key=len),
            max(old.images_per_prompt, images_per_prompt),
            entries,
        )
        if manifest != old:
            manifest.write(folder)
        return manifest
    if folder.is_dir() and any(is_prompt_name(path.name) for path in folder.iterdir()):
        raise TrajectoryError(
            f"{folder} holds images but no {MANIFEST}",
            bound="a folder of `ttsnap generate`, or an empty one",
            value=str(folder),
            remedy="Choose another output folder; these images cannot be told apart from others.",
        )
    manifest = Manifest(identity, tuple(prompts), images_per_prompt, (entry,) if entry else ())
    manifest.write(folder)
    return manifest


def _same_writer(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    keys = ({*one} | {*other}) - {"time"}
    return all(one.get(key) == other.get(key) for key in keys)
