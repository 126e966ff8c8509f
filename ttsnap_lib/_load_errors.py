"""What the many errors of loading a model mean, and what to do about them."""

from __future__ import annotations

import difflib
from pathlib import Path

from .errors import PipelineError

__all__ = ["KNOWN_IDS", "POCKET_MODELS", "explain"]

POCKET_MODELS = ("pocket-flux", "pocket-sdxl")

KNOWN_IDS = (
    *POCKET_MODELS,
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.1-schnell",
    "SG161222/RealVisXL_V4.0",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "stabilityai/stable-diffusion-3.5-medium",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
)
"""Names that a misspelt one is compared with."""


def explain(source: str, is_folder: bool, error: Exception) -> PipelineError:
    """Return the error that says what `error`, raised by ``from_pretrained(source)``, means and what to do."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    names = {cls.__name__ for one in chain for cls in type(one).__mro__}
    text = " ".join(str(one) for one in chain)
    if is_folder:
        what = (
            "no model_index.json"
            if not (Path(source) / "model_index.json").exists()
            else "files that are missing or broken"
        )
        return PipelineError(
            f"folder {source} cannot be loaded: {what} ({type(error).__name__}: {_first_line(error)})",
            bound="a whole folder written by save_pretrained",
            value=source,
            remedy="Save the pipeline again, or download it whole.",
        )
    if "GatedRepoError" in names or "gated" in text.lower():
        return PipelineError(
            f"{source} is gated: its owner wants a licence accepted first",
            value=source,
            bound="a model that you may download",
            remedy=f"Log in and accept the licence at https://huggingface.co/{source}, make an access token, and set it as HF_TOKEN "
            "(or run `hf auth login`).",
        )
    if {"RepositoryNotFoundError", "RevisionNotFoundError"} & names or "not a valid model identifier" in text:
        close = difflib.get_close_matches(source, KNOWN_IDS, n=1, cutoff=0.5)
        hint = (
            f"Did you mean {close[0]!r}?"
            if close and close[0] != source
            else "Check the spelling of name and revision."
        )
        return PipelineError(
            f"the hub has no {source}, or not that revision",
            bound="an existing model",
            value=source,
            remedy=f"{hint} A private model needs HF_TOKEN.",
        )
    offline = {
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectionError",
        "ConnectTimeout",
        "Timeout",
        "HTTPError",
    }
    if offline & names or "connect" in text.lower() or "offline" in text.lower():
        return PipelineError(
            f"{source} is not on this machine and cannot be downloaded",
            value=source,
            bound="a model in the cache, a folder, or a network",
            remedy=f"Where there is a network, run `hf download {source}`, and give the folder it prints as the model, or "
            "copy the cache (HF_HOME). The pocket models need no download.",
        )
    return PipelineError(
        f"{source} cannot be loaded ({type(error).__name__}: {_first_line(error)})",
        value=source,
        bound="a whole model of the diffusers library",
        remedy="See the error above this one; `hf download` it again if a file is broken.",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
