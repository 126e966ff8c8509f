"""The manifest of a trajectory folder: what decides its bytes, its prompts, and who wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._layout import is_prompt_name
from .checks import integer
from .errors import TrajectoryError
from .paths import write_json

__all__ = ["MANIFEST", "Manifest", "extend"]

MANIFEST = "manifest.json"
_SCHEMA = 1
_IDENTITY_KEYS = ("n_steps", "height", "width", "image_format", "seed")
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
        return self.identity["n_steps"]

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
        path = Path(folder) / MANIFEST
        remedy = "Name a folder that `ttsnap generate` wrote."
        try:
            content = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise TrajectoryError(
                "no trajectory folder", value=str(folder), bound=f"a {MANIFEST} in it", remedy=remedy
            ) from error
        except (OSError, ValueError) as error:
            raise TrajectoryError(f"{path} cannot be read", value=str(error), bound="JSON", remedy=remedy) from error
        try:
            if content["schema"] != _SCHEMA:
                raise TrajectoryError(
                    f"{path} has another schema", value=content["schema"], bound=str(_SCHEMA), remedy="Update ttsnap."
                )
            manifest = cls(
                content["identity"],
                tuple(content["prompts"]),
                integer("images_per_prompt", content["images_per_prompt"], 1, error=TrajectoryError),
                tuple(content["provenance"]),
            )
            missing = [key for key in _IDENTITY_KEYS if key not in manifest.identity]
        except (KeyError, TypeError, AttributeError) as error:
            raise TrajectoryError(f"{path} lacks {error}", remedy=remedy) from error
        if missing:
            raise TrajectoryError(f"{path} lacks {missing[0]} in its identity", remedy=remedy)
        return manifest

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
            remedy="Choose another output folder; these images cannot be told apart from others.",
        )
    manifest = Manifest(identity, tuple(prompts), images_per_prompt, (entry,) if entry else ())
    manifest.write(folder)
    return manifest


def _same_writer(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    keys = ({*one} | {*other}) - {"time"}
    return all(one.get(key) == other.get(key) for key in keys)
