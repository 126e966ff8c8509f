"""What a search takes beside pipeline and reward: a small decoder for the checks, noise-aware weights by name."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._reading import failures_as
from .errors import CheckpointError, PipelineError

__all__ = ["find_adapters", "load_decoder"]

_OWN_ENTRY = re.compile(r"\{'block_out_channels': [\[(][^\])]*[\])]\} were passed to AutoencoderTiny")


@contextlib.contextmanager
def _without_false_alarm() -> Iterator[None]:
    """Keep diffusers quiet about the entry that it writes itself into every saved AutoencoderTiny."""
    log = logging.getLogger("diffusers.configuration_utils")

    def other(record: logging.LogRecord) -> bool:
        return not _OWN_ENTRY.search(record.getMessage())

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def load_decoder(source: Any, pipeline: Any) -> Any:
    """Return the decoder that `source` names, on the device and in the precision of the pipeline's VAE.

    Parameters
    ----------
    source : None, str, Path or module
        None gives None; ``"pocket-tiny"``, a folder or a hub id is loaded; a module is taken as it is.
    pipeline : diffusers pipeline
        Whose latents are decoded.

    Raises
    ------
    PipelineError
        A source that cannot be loaded, or a decoder of other latents.
    """
    if source is None:
        return None
    decoder = source
    if isinstance(source, str | Path):
        from diffusers import AutoencoderTiny

        from .pocket import POCKET_MODELS, pocket_folder

        place = pocket_folder(str(source)) if str(source) in POCKET_MODELS else source
        with failures_as(
            PipelineError, "tiny decoder cannot be loaded", value=str(source),
            bound="a folder or hub id of an AutoencoderTiny",
            remedy="pocket-tiny for the pocket models, madebyollin/taef1 for FLUX, madebyollin/taesdxl for SDXL.",
        ), _without_false_alarm():  # fmt: skip
            decoder = AutoencoderTiny.from_pretrained(place, torch_dtype=pipeline.vae.dtype)
        decoder = decoder.to(pipeline._execution_device).eval()
    channels = [getattr(getattr(one, "config", None), "latent_channels", None) for one in (decoder, pipeline.vae)]
    if channels[0] != channels[1]:
        raise PipelineError(
            "decoder of other latents", value=channels[0], bound=f"{channels[1]} latent channels, as the pipeline has",
            remedy="Use the tiny decoder that was made for this model.",
        )  # fmt: skip
    return decoder


def find_adapters(source: str | Path | None, model: str = "") -> Path | None:
    """Return the run folder of noise-aware weights that `source` names.

    Parameters
    ----------
    source : str, Path or None
        Empty or None gives None. ``"pocket"`` is what ships for pocket-clip on the pocket model `model`, and None for
        other models. Anything else is a folder of ``ttsnap finetune``.
    model : str
        Name of the pipeline.

    Raises
    ------
    CheckpointError
        A folder that is not there.
    """
    if not source:
        return None
    from .pocket import pocket_folder

    shipped = pocket_folder("pocket-clip").with_name("pocket-clip-noise-aware") / str(model).removeprefix("pocket-")
    folder = shipped if str(source) == "pocket" else Path(source)
    if folder.is_dir():
        return folder
    if str(source) == "pocket":
        return None
    raise CheckpointError(
        "noise-aware weights", value=str(source), bound="a run folder of ttsnap finetune", remedy="Check the path."
    )
