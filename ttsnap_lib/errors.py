"""The errors of this package. A message is one sentence or two: the value, the bound and the remedy."""

from __future__ import annotations

import reprlib
from pathlib import Path

_short = reprlib.Repr()  # its limits are attributes: Python 3.11 takes no keywords here
_short.maxstring, _short.maxother, _short.maxlist, _short.maxtuple, _short.maxdict = 200, 200, 8, 8, 8
_short.maxlevel = 3  # with eight items a level, each level more makes a message eight times as long
_LONGEST = 1200  # characters of a message: it is read in a terminal


def shown(value: object) -> str:
    """Return a short ``repr`` of any value, also of one whose own fails."""
    try:
        return _short.repr(value)
    except Exception:  # noqa: BLE001 - an integer of too many digits, an object whose own __repr__ fails
        return f"a value of {type(value).__name__} that cannot be shown"


class TTSnapError(Exception):
    """Base of every error that this package raises on purpose."""

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:  # the remedy stands at the end
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        super().__init__(message)


class ConfigError(TTSnapError, ValueError):
    """A parameter, key or option has a bad name or a bad value."""


class ScheduleError(ConfigError):
    """Pruning steps or keep ratios that cannot be."""


class CostError(ConfigError):
    """A cost model, or a file of one, that cannot be."""


class BudgetError(ConfigError):
    """A budget that buys no candidate, or more candidates than the pool holds."""


class TensorError(TTSnapError):
    """A reward tensor, or a file it is read from, that is not whole or not right."""


class PromptError(TTSnapError):
    """A prompt file that cannot be used."""


class TrajectoryError(TTSnapError):
    """A trajectory folder that is foreign, broken or of other settings."""


class PipelineError(TTSnapError):
    """A diffusers pipeline that cannot be loaded or driven."""


class RewardError(TTSnapError):
    """A reward model that cannot be loaded, or that gave a bad score."""


class CheckpointError(TTSnapError):
    """A checkpoint that is missing, broken or of another model."""


class CurriculumError(TTSnapError):
    """Finetuning that cannot start or go on."""


class SearchError(TTSnapError):
    """An online run that cannot start or go on."""


class RunError(TTSnapError):
    """A notebook run or sweep that failed.

    Attributes
    ----------
    cell, last_line : str
        Which cell failed and the last line of its error; empty when the run failed in another way.
    folder : Path or None
        The run folder.
    """

    cell: str = ""
    last_line: str = ""
    folder: Path | None = None


class DeviceError(TTSnapError):
    """A device that is missing or out of memory."""


class DiskError(TTSnapError, OSError):
    """Not enough disk, or a folder that cannot be written."""

    __str__ = Exception.__str__  # OSError's own __str__ prefers errno, which is not set here


class MissingExtraError(TTSnapError, ImportError):
    """A package that an extra of the installation brings is not there."""


_EXTRAS = {
    "models": (
        "accelerate", "diffusers", "httpx", "huggingface_hub", "open_clip", "peft", "safetensors", "sentencepiece",
        "tokenizers", "torch", "torchvision", "transformers",
    ),
    "notebooks": (
        "IPython", "ipykernel", "ipywidgets", "jupyter_client", "jupyterlab", "nbclient", "nbconvert", "nbformat",
        "papermill", "traitlets", "voila",
    ),
    "sweeps": ("dask", "distributed"),
}  # fmt: skip


def missing_extra(failure: BaseException) -> MissingExtraError | None:
    """Return the error that says what to install when an import failed for want of an extra, else None."""
    link: BaseException | None = failure
    while link is not None:
        package = str(getattr(link, "name", None) or "").partition(".")[0]
        for extra, packages in _EXTRAS.items():
            if isinstance(link, ModuleNotFoundError) and package in packages:
                return MissingExtraError(
                    f"this needs {package}, which is not installed: got an installation without the extra {extra!r}, "
                    f"expected one with it. Run `pip install 'ttsnap[{extra}]'`."
                )
        link = link.__cause__ or link.__context__
    return None
