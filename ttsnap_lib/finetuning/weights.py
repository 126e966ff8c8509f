"""Series from elsewhere and to elsewhere: the authors' full checkpoints, the hub, a folder."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from ttsnap_lib.checks import choice, integer
from ttsnap_lib.errors import CheckpointError, CurriculumError, RewardError
from ttsnap_lib.files import as_path, atomic_folder, atomic_write, failures_as, reason, write_json
from ttsnap_lib.finetuning.config import CurriculumConfig
from ttsnap_lib.rewards.base import Reward
from ttsnap_lib.rewards.checkpoints import (
    check_keys,
    is_local,
    keep_base_exact,
    read_curriculum,
    read_state,
    step_folders,
)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class RewardModule(torch.nn.Module):
    """A reward's forward as a module, so that accelerate can wrap it."""

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.module = reward.module
        self._reward = [reward]  # in a list: the reward is no module

    def forward(self, pixels: torch.Tensor, text: Any) -> torch.Tensor:
        """Return the rewards (n,)."""
        return self._reward[0].forward(pixels, text)


def trainable_module(reward: Reward) -> torch.nn.Module:
    """Return the module of a base reward.

    Raises
    ------
    CurriculumError
        A reward without weights, or with noise-aware ones already.
    """
    if reward.module is None:
        raise CurriculumError(
            f"reward {reward.name} has no weights to train: got {reward.name!r}, expected a reward with weights. "
            "Finetune a model reward, not a function."
        )
    if reward.adapter_steps:
        raise CurriculumError(
            f"reward {reward.name} has noise-aware weights already: got {reward.adapter_steps!r}, expected a base "
            "reward. Load it without adapters."
        )
    if any("lora_" in name for name, _ in reward.module.named_parameters()):
        raise CurriculumError(
            f"reward {reward.name} has adapters in its module already: got 'lora', expected a base reward. Load it "
            "again: its scores would be wrong as targets."
        )
    return reward.module


class Weights:
    """The trained parameters of a reward.

    Parameters
    ----------
    reward : Reward
        A base reward. LoRA layers are put into its module; parameters that are not trained stop requiring gradients.
    config : CurriculumConfig
    lent : bool
        Remember what :meth:`release` needs to give the reward back as it was.

    Raises
    ------
    CurriculumError
        A reward without weights, or with noise-aware ones already; targets that match nothing.
    """

    def __init__(self, reward: Reward, config: CurriculumConfig, *, lent: bool = False) -> None:
        module = trainable_module(reward)
        self.reward, self.config, self.module = reward, config, module
        self._peft: Any = None
        self._required = {name: p.requires_grad for name, p in module.named_parameters()}
        if config.method == "lora":
            self._inject()
        else:
            self._choose()
        self._base = self.state() if lent and self._peft is None else {}
        # Dropout of the base stays off: the target is what the base says without it.
        module.eval()
        for name, part in module.named_modules():
            if "lora_dropout" in name:
                part.train()
        if config.gradient_checkpointing:
            checkpoint_blocks(module)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, torch.Tensor]:
        """Return a copy of the trained values, on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put trained values back."""
        own = self.parameters
        if {name: p.shape for name, p in own.items()} != {name: value.shape for name, value in state.items()}:
            raise CheckpointError(
                f"saved state of another model: got {sorted(state.keys() ^ own.keys())[:4] or 'other shapes'!r}, "
                "expected the parameters that this configuration trains. Resume with the reward and the settings that "
                "it was made with, or use another folder."
            )
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(state[name])

    def save_step(self, folder: Path) -> None:
        """Write the weights as the checkpoint of a step into `folder`, readable by peft and by `attach_steps`."""
        from safetensors.torch import save_file

        dtype = _DTYPES[self.config.save_dtype]
        if self._peft is not None:
            from peft import get_peft_model_state_dict

            about = self._peft.peft_config["default"]
            about.base_model_name_or_path = None  # else peft asks the hub about it whenever it is loaded
            inference, about.inference_mode = about.inference_mode, True
            about.save_pretrained(str(folder))
            about.inference_mode = inference
            state, name = (
                get_peft_model_state_dict(self._peft, save_embedding_layers=False),
                "adapter_model.safetensors",
            )
        else:
            state, name = self.parameters, "model.safetensors"
        out = {key: value.detach().to("cpu", dtype, copy=True).contiguous() for key, value in state.items()}
        save_file(out, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)

    def release(self) -> None:
        """Give a lent reward back as it was taken: without adapters, with the base's values."""
        if self._peft is not None:
            self._peft.unload()
        elif self._base:
            self.load(self._base)
        for part in self.module.modules():
            if hasattr(vars(part).get("forward"), "__wrapped__"):  # what checkpoint_blocks put there
                del part.forward
        for name, p in self.module.named_parameters():
            p.requires_grad_(self._required[name])
        self.reward.clear_cache()

    # -- inside -------------------------------------------------------------------------------------------------

    def _inject(self) -> None:
        from peft import LoraConfig, get_peft_model

        targets = self.config.lora_targets or self.reward.default_lora_targets
        names = [name for name, _ in self.module.named_modules() if name]
        matched = [name for name in names if targets and re.fullmatch(targets, name)]
        if not matched:
            raise CurriculumError(
                f"LoRA targets match no layer of {self.reward.name}: got {targets!r}, expected a regular expression "
                f"that matches whole names of layers. Layers are called for example {_examples(self.module)}."
            )
        about = LoraConfig(
            r=self.config.lora_rank,
            lora_alpha=self.config.lora_alpha,  # type: ignore[arg-type]  # any number works
            lora_dropout=self.config.lora_dropout,
            target_modules=targets,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers 5 renamed
            torch.manual_seed(self.config.seed)
            try:
                self._peft = get_peft_model(self.module, about)
            except ValueError as error:
                raise CurriculumError(
                    f"LoRA cannot be put into {self.reward.name} ({str(error)[:200]}): got {targets!r}, expected names "
                    "of linear, convolution or attention layers. Layers are called for example "
                    f"{_examples(self.module)}."
                ) from error
        keep_base_exact(self.module)

    def _choose(self) -> None:
        chosen = 0
        for name, parameter in self.module.named_parameters():
            wanted = self.config.trainable is None or re.fullmatch(self.config.trainable, name) is not None
            parameter.requires_grad_(wanted and parameter.is_floating_point())
            chosen += wanted
        if not chosen:
            raise CurriculumError(
                f"trainable matches no parameter of {self.reward.name}: got {self.config.trainable!r}, expected a "
                "regular expression that matches whole names of parameters. They are called for example "
                f"{[n for n, _ in self.module.named_parameters()][:3]}."
            )


def _examples(module: torch.nn.Module) -> list[str]:
    found = [name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    return found[:: max(1, len(found) // 3)][:3]


def checkpoint_blocks(module: torch.nn.Module) -> int:
    """Make every block of every stack of blocks compute its activations again in the backward pass.

    Works alike for all families, in training and in evaluation mode.

    Returns
    -------
    int
        How many blocks.
    """
    stacks = [
        (name, part)
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.ModuleList | torch.nn.Sequential) and len(part) > 1
    ]
    outer = [part for name, part in stacks if not any(name.startswith(f"{other}.") for other, _ in stacks)]
    blocks = [block for stack in outer for block in stack if sum(1 for _ in block.children()) > 1]
    for block in blocks:
        block.forward = _recomputed(block.forward)
    return len(blocks)


def _recomputed(forward: Any) -> Any:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


@contextmanager
def own_randomness(seed: tuple[int, ...], device: torch.device) -> Iterator[None]:
    """Seed dropout by counters, and leave the global generators as they were: a resumed run draws the same."""
    import numpy as np

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
        yield


STATE, CURRICULUM = "state.pt", "curriculum.json"


# These change how a run is carried out, not what comes of it.
_FREE = ("trajectories", "validation", "save_every", "tracker", "accumulation", "gradient_checkpointing")


def identity(config: CurriculumConfig, **digests: Any) -> dict[str, Any]:
    """Return what decides a run's result: settings, weights, pictures and targets."""
    kept = {name: value for name, value in config.to_dict().items() if name not in _FREE}
    return json.loads(json.dumps({"config": kept, **digests}))


def array_digest(array: np.ndarray | None) -> str | None:
    """Return a digest of an array's content."""
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def open_run(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``curriculum.json`` of an earlier sitting of the same run, or None in a new folder.

    Raises
    ------
    CurriculumError
        When the folder holds another run; every difference is shown.
    """
    path = folder / CURRICULUM
    if not path.is_file():
        if any(folder.glob("step_*")):
            raise CurriculumError(
                f"{folder} holds checkpoints without {CURRICULUM}: got {folder}, expected an empty folder, or one of "
                "an earlier sitting. Choose another folder for this run."
            )
        return None
    from ttsnap_lib.rewards.checkpoints import read_curriculum

    found = read_curriculum(folder)
    known = found.get("identity")
    if known != wanted:
        flat = [_flat(known if isinstance(known, Mapping) else {}), _flat(wanted)]
        keys = sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))
        raise CurriculumError(
            f"{folder} holds another run: got "
            f"{'; '.join(f'{key}: {flat[0].get(key)!r} there, {flat[1].get(key)!r} now' for key in keys[:6])!r}, "
            "expected the same settings, weights, pictures and targets. Choose another folder, or pass overwrite=True "
            "(--overwrite) to begin anew."
        )
    return found


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    config = values.get("config") or {}
    return {**{key: value for key, value in values.items() if key != "config"}, **config}


def write_state_file(folder: Path, state: dict[str, Any]) -> None:
    """Write the state beside the old one, then put it in its place."""
    with atomic_write(folder / STATE) as file:
        torch.save(state, file)


def read_state_file(folder: Path) -> dict[str, Any] | None:
    """Return the saved state, or None when there is none.

    Raises
    ------
    CheckpointError
        A file that is not whole or not ours.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    with failures_as(
        CheckpointError,
        f"saved state cannot be read: got {path}, expected a whole file of ttsnap finetune. Delete it: the run begins "
        "anew, and checkpoints of finished steps are made again.",
    ):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["identity"]
        return state


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def write_curriculum(
    folder: Path, reward: str, config: CurriculumConfig, who: Mapping[str, Any], rows: list[dict], about: Mapping
) -> None:
    """Write ``curriculum.json``: what the series is, and how each step came out."""
    content = {
        "schema": 1,
        "reward": reward,
        "method": config.method,
        "steps": sorted({row["step"] for row in rows}),
        "identity": dict(who),
        "metrics": [{name: None if _is_nan(value) else value for name, value in row.items()} for row in rows],
        **about,
    }
    write_json(folder / CURRICULUM, content)


_FILE = re.compile(r"(?:ct|step_?|s)(\d+)\.(?:pt|pth|bin|safetensors)", re.IGNORECASE)


_PREFIXES = ("", "module.", "_orig_mod.", "model.")


_KNOWN_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
                    f"two checkpoints for step {step}: got {[found[step].name, path.name]!r}, expected one file per "
                    "step. Move one of them away."
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

    kept = _KNOWN_DTYPES[choice("dtype", dtype, _KNOWN_DTYPES)]
    files = dict(checkpoints) if isinstance(checkpoints, Mapping) else find_checkpoints(checkpoints)
    if not files:
        raise CheckpointError(
            f"no checkpoints to import: got {checkpoints}, expected files like Ct14.pt. Check the folder."
        )
    if reward.module is None or reward.adapter_steps:
        raise CheckpointError(
            f"reward {reward.name}: got {reward.adapter_steps!r}, expected a base model reward. Load it without "
            "adapters."
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
            f"run folder to write: got {folder}, expected a new or an empty folder: steps of two series must not mix. "
            "Choose another folder, or delete this one."
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
        raise CheckpointError(
            f"checkpoint of step {step}: {error}"
        ) from error  # fmt: skip
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
            f"checkpoint of step {step} is of another model: {error} Name the reward that it was made from."
        ) from error  # fmt: skip
    for key in state.keys() & own.keys():
        if state[key].shape != own[key].shape:
            raise CheckpointError(
                f"checkpoint of step {step} is of another model: {key}: got {tuple(state[key].shape)!r}, expected "
                f"shape {tuple(own[key].shape)}. Name the reward that it was made from."
            )
    kept = {key: value for key, value in state.items() if key in own and value.is_floating_point()}
    bad = [key for key, value in kept.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(
            f"checkpoint of step {step} holds weights that are not finite: got {bad[:4]!r}, expected finite numbers. "
            "Get the file again, or leave this step out."
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
            f"series {repo} cannot be had ({type(error).__name__}): got {repo!r}, expected a run folder, or a hub "
            f"repository in the cache {cache or constants.HF_HUB_CACHE} or reachable. Run `hf download {repo}` where "
            "there is a network and copy the cache (HF_HOME), or name a folder."
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
            f"no checkpoints to upload: got {folder}, expected folders step_NN with weights. Finish at least one step."
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
            f"series cannot be uploaded to {repo} ({reason(error)}): got {repo!r}, expected owner/name of a repository "
            "that you may write to, and a network. Log in with `hf auth login`, check the name, then upload again."
        ) from error
