"""Settings of a curriculum from YAML: files, and the configurations that come with the package."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ttsnap_lib._reading import as_path, read_yaml
from ttsnap_lib.checks import known_keys
from ttsnap_lib.errors import ConfigError

from .config import CurriculumConfig

__all__ = ["load_config", "shipped_configs"]

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def shipped_configs() -> list[str]:
    """Return the names of the configurations that come with the package."""
    return sorted(path.stem for path in _CONFIGS.glob("*.yaml"))


def load_config(source: str | Path, **changes: Any) -> CurriculumConfig:
    """Load settings from a YAML file or a shipped configuration, with changes on top.

    Parameters
    ----------
    source : str or Path
        A file, or one of :func:`shipped_configs`, such as ``"pocket-flux"`` or ``"flux-pickscore"``.
    **changes
        Fields that differ.

    Returns
    -------
    CurriculumConfig

    Raises
    ------
    ConfigError
        No such file or name, broken YAML, an unknown key, a bad value.
    """
    path = as_path("finetuning configuration", source)
    if not path.suffix and (_CONFIGS / f"{source}.yaml").is_file():
        path = _CONFIGS / f"{source}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(str(source), shipped_configs(), n=1)
        raise ConfigError(
            "finetuning configuration",
            value=str(source),
            bound=f"a YAML file or one of {shipped_configs()}",
            remedy=f"Did you mean {close[0]!r}?" if close else "Check the path.",
        )
    values = read_yaml(path, "finetuning configuration", remedy="Write lines of `name: value`.")
    known_keys("finetuning settings", changes, [field.name for field in fields(CurriculumConfig)])
    if not isinstance(values, Mapping):
        raise ConfigError(str(path), value=values, bound="a mapping of settings", remedy="Write lines `name: value`.")
    return CurriculumConfig.from_dict({**values, **changes}, str(path))
