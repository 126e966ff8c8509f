"""Weights from files and from the hub: no pickle, no silent gaps."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ttsnap_lib._reading import as_path, failures_as, reason
from ttsnap_lib.errors import RewardError

__all__ = ["check_keys", "fetch", "load_strict", "read_state", "sampled_digest"]


def fetch(repo: str, filename: str, *, revision: str | None = None, what: str = "weights") -> Path:
    """Return the local path of a file of a hub repository, downloading it when it is not in the cache.

    Raises
    ------
    RewardError
        When it is neither in the cache nor to be had; the message says what to download and where it is looked for.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, filename, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise offline_error(repo, filename, constants.HF_HUB_CACHE, what, error, revision) from error


def offline_error(
    repo: str, filename: str | None, cache: str, what: str, error: Exception, revision: str | None = None
) -> RewardError:
    """Return the error for something of the hub that cannot be had."""
    command = " ".join(["hf", "download", repo, *([filename] if filename else [])])
    if revision:
        command += f" --revision {revision}"
    return RewardError(
        f"{what} of {repo}{'/' + filename if filename else ''} cannot be had ({reason(error)})",
        value=repo,
        bound=f"a repository of the hub, in the cache {cache} or reachable, or a local path",
        remedy=f"Run `{command}` where there is a network and copy the cache (HF_HOME), or pass the local path.",
    )


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict from safetensors or from a `torch.save` file of plain tensors.

    A mapping under the key ``state_dict`` (open_clip's checkpoint format) is taken out; leading ``module.`` of a
    wrapped model is dropped.

    Returns
    -------
    dict
        Name -> tensor, on the CPU.

    Raises
    ------
    RewardError
        A missing or broken file, or one that holds more than tensors and plain values.
    """
    path = as_path("weights file", path, error=RewardError)
    if not path.is_file():
        raise RewardError(
            "weights file", value=str(path), bound="an existing file", remedy="Check the path, or download the weights."
        )
    with failures_as(
        RewardError,
        "weights file cannot be read",
        value=str(path),
        bound="safetensors, or a torch file of tensors and plain values",
        remedy="Download it again, or save the state dict alone as safetensors.",
    ):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise RewardError(
            "weights file", value=str(path), bound="a mapping from names to tensors", remedy="Save a state dict."
        )
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def check_keys(
    missing: Iterable[str],
    unexpected: Iterable[str],
    *,
    source: str,
    may_miss: Iterable[str] = (),
    may_have: Iterable[str] = (),
) -> None:
    """Raise when keys are missing or left over, except those that match a pattern of the short lists.

    Raises
    ------
    RewardError
        With the first of them.
    """

    def rest(keys: Iterable[str], patterns: Iterable[str]) -> list[str]:
        patterns = list(patterns)
        return [key for key in keys if not any(re.fullmatch(pattern, key) for pattern in patterns)]

    missing, unexpected = rest(missing, may_miss), rest(unexpected, may_have)
    if missing or unexpected:
        parts = [f"{len(keys)} {kind}" for keys, kind in ((missing, "missing"), (unexpected, "unexpected")) if keys]
        raise RewardError(
            f"weights of {source} do not fit the model: {' and '.join(parts)} keys",
            value=(missing + unexpected)[:6],
            bound="the model's own keys",
            remedy="Use the checkpoint that belongs to this reward.",
        )


def load_strict(
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    source: str,
    may_miss: Iterable[str] = (),
    may_have: Iterable[str] = (),
) -> None:
    """Load `state` into `module`; every key and shape must fit, but for the short lists of patterns.

    Raises
    ------
    RewardError
        A key is missing or left over, or has another shape.
    """
    own = module.state_dict()
    check_keys(
        own.keys() - state.keys(), state.keys() - own.keys(), source=source, may_miss=may_miss, may_have=may_have
    )
    for key, value in state.items():
        if key in own and own[key].shape != value.shape:
            raise RewardError(
                f"weights of {source}: {key}",
                value=tuple(value.shape),
                bound=f"shape {tuple(own[key].shape)}",
                remedy="Use the checkpoint that belongs to this reward.",
            )
    module.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)


def sampled_digest(about: str, state: Mapping[str, torch.Tensor]) -> str:
    """Return a short digest of a text and of at most 511 values of each tensor; no security measure."""
    digest = hashlib.blake2b(about.encode(), digest_size=8)
    for key, value in sorted(state.items()):
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)].float().cpu().numpy()
        digest.update(f"{key} {tuple(value.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()


def is_local(source: str | os.PathLike) -> bool:
    """Whether `source` names something on disk rather than a hub repository."""
    text = os.fspath(source)
    return Path(text).exists() or text.startswith((".", "/", "~")) or text.count("/") > 1
