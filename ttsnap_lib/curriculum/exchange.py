"""Series from elsewhere and to elsewhere: the authors' full checkpoints, the hub, a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ttsnap_lib._reading import as_path, reason
from ttsnap_lib.checks import choice, integer
from ttsnap_lib.errors import CheckpointError, RewardError
from ttsnap_lib.paths import atomic_folder, write_json
from ttsnap_lib.rewards.base import Reward
from ttsnap_lib.rewards.steps import read_curriculum, step_folders
from ttsnap_lib.rewards.weights import check_keys, is_local, read_state

from .state import CURRICULUM

__all__ = ["find_checkpoints", "import_series", "load_series", "push_series"]

_FILE = re.compile(r"(?:ct|step_?|s)(\d+)\.(?:pt|pth|bin|safetensors)", re.IGNORECASE)
_PREFIXES = ("", "module.", "_orig_mod.", "model.")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CONSTANT = (r"(.*\.)?position_ids", r"(.*\.)?attn_mask")


def find_checkpoints(folder: str | Path) -> dict[int, Path]:
    """Return step -> file of a folder of full checkpoints, ``Ct14.pt`` and its like, in descending order of steps.

    Raises
    ------
    CheckpointError
        Two files for one step.
    """
    found: dict[int, Path] = {}
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []:
        match = _FILE.fullmatch(path.name)
        if match:
            step = int(match[1])
            if step in found:
                raise CheckpointError(
                    f"two checkpoints for step {step}",
                    value=[found[step].name, path.name],
                    bound="one file per step",
                    remedy="Move one of them away.",
                )
            found[step] = path
    return dict(sorted(found.items(), reverse=True))


def import_series(
    checkpoints: str | Path | Mapping[int, str | Path],
    folder: str | Path,
    reward: Reward,
    *,
    dtype: str = "float32",
) -> Path:
    """Turn full state dicts, one per step, into a series that every reward and command takes.

    Parameters
    ----------
    checkpoints : str, Path or mapping
        A folder of ``Ct14.pt`` and so on (the authors' names), or step -> file. Pickled code is never run: the files
        are read as plain tensors.
    folder : str or Path
        The run folder to write, whole or not at all: ``step_14/model.safetensors`` and ``curriculum.json``.
    reward : Reward
        The base reward that they belong to; every key and shape must fit it.
    dtype : {"float32", "float16", "bfloat16"}
        Type to keep them in.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    CheckpointError
        No checkpoints, one that cannot be read, or one of another model; a folder that holds something already.
    """
    from safetensors.torch import save_file

    kept = _DTYPES[choice("dtype", dtype, _DTYPES)]
    files = dict(checkpoints) if isinstance(checkpoints, Mapping) else find_checkpoints(checkpoints)
    if not files:
        raise CheckpointError(
            "no checkpoints to import", value=str(checkpoints), bound="files like Ct14.pt", remedy="Check the folder."
        )
    if reward.module is None or reward.adapter_steps:
        raise CheckpointError(
            f"reward {reward.name}",
            bound="a base model reward",
            value=reward.adapter_steps,
            remedy="Load it without adapters.",
        )
    sources = {
        integer("step of a checkpoint", step, 0, error=CheckpointError): as_path(
            "checkpoint", path, error=CheckpointError
        )
        for step, path in files.items()
    }
    folder, own = as_path("run folder", folder, error=CheckpointError), reward.module.state_dict()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            "run folder to write",
            value=str(folder),
            bound="a new or an empty folder: steps of two series must not mix",
            remedy="Choose another folder, or delete this one.",
        )
    with atomic_folder(folder) as part:
        for step, path in sources.items():
            state = _fitted(step, path, own)
            out = {key: value.to(kept).contiguous().clone() for key, value in state.items()}
            place = part / f"step_{step:02d}"
            place.mkdir()
            save_file(out, place / "model.safetensors", metadata={"format": "pt"})
            (place / "model.safetensors").chmod(0o644)
        about = {"schema": 1, "reward": reward.name, "method": "full", "steps": sorted(sources)}
        write_json(part / CURRICULUM, {**about, "imported_from": [path.name for path in sources.values()]})
    return folder


def _fitted(step: int, path: Path, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read a state dict and bring its keys to the model's own."""
    try:
        given = read_state(path)
    except RewardError as error:
        raise CheckpointError(f"checkpoint of step {step}: {error.problem}", value=str(path),
                              bound=error.bound, remedy=error.remedy) from error  # fmt: skip
    best = max(_PREFIXES, key=lambda prefix: len({k.removeprefix(prefix) for k in given} & own.keys()))
    state = {key.removeprefix(best): value for key, value in given.items()}
    try:
        check_keys(
            own.keys() - state.keys(),
            state.keys() - own.keys(),
            source=path.name,
            may_miss=_CONSTANT,
            may_have=_CONSTANT,
        )
    except RewardError as error:
        raise CheckpointError(
            f"checkpoint of step {step} is of another model", value=error.value, bound=error.bound,
            remedy="Name the reward that it was made from.",
        ) from error  # fmt: skip
    for key in state.keys() & own.keys():
        if state[key].shape != own[key].shape:
            raise CheckpointError(
                f"checkpoint of step {step} is of another model: {key}",
                value=tuple(state[key].shape),
                bound=f"shape {tuple(own[key].shape)}",
                remedy="Name the reward that it was made from.",
            )
    kept = {key: value for key, value in state.items() if key in own and value.is_floating_point()}
    bad = [key for key, value in kept.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"checkpoint of step {step} holds weights that are not finite",
            value=bad[:4],
            bound="finite numbers",
            remedy="Get the file again, or leave this step out.",
        )
    return kept


def load_series(
    reward: Reward, source: str | Path, *, revision: str | None = None, cache: str | Path | None = None
) -> Reward:
    """Attach a series from a run folder or from a hub repository; return the reward.

    Parameters
    ----------
    reward : Reward
        The base reward; the series is attached to it.
    source : str or Path
        A run folder, or a hub id such as ``"someone/pickscore-noise-aware-flux"``.
    revision : str, optional
        Commit, branch or tag of the hub repository.
    cache : str or Path, optional
        Folder of the hub's cache.

    Returns
    -------
    Reward
        The same reward, with the series attached.
    """
    if not is_local(source):
        source = _download(str(source), revision, cache)
    return reward.attach_steps(source)


def _download(repo: str, revision: str | None, cache: str | Path | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["step_*", CURRICULUM, "metrics.*", "config.json"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, cache_dir=cache))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"series {repo} cannot be had ({type(error).__name__})",
            value=repo,
            bound=f"a run folder, or a hub repository in the cache {cache or constants.HF_HUB_CACHE} or reachable",
            remedy=f"Run `hf download {repo}` where there is a network and copy the cache (HF_HOME), or name a folder.",
        ) from error


def push_series(folder: str | Path, repo: str, *, private: bool = True, token: str | None = None) -> Any:
    """Upload a run folder's checkpoints to a hub repository with the hub library's own call; return its answer.

    The state for going on with the run stays at home.

    Parameters
    ----------
    folder : str or Path
        The run folder.
    repo : str
        Owner and name on the hub; made when it is not there.
    private : bool
        Of a repository that is made.
    token : str, optional
        The one that the hub library has stored when not given.

    Returns
    -------
    huggingface_hub.CommitInfo

    Raises
    ------
    CheckpointError
        A folder without checkpoints; a hub that cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    about = read_curriculum(folder)
    if not step_folders(folder):
        raise CheckpointError(
            "no checkpoints to upload",
            value=str(folder),
            bound="folders step_NN with weights",
            remedy="Finish at least one step.",
        )
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=["step_*/*", CURRICULUM, "metrics.*", "config.json"],
            commit_message=f"Noise-aware {about.get('reward')}, steps {about.get('steps')}",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"series cannot be uploaded to {repo} ({reason(error)})",
            value=repo,
            bound="owner/name of a repository that you may write to, and a network",
            remedy="Log in with `hf auth login`, check the name, then upload again.",
        ) from error
