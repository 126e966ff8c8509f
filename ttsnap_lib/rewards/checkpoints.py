"""Noise-aware weights, one set per denoising step, on one base model: switched, not reloaded."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ttsnap_lib.checks import choice, integer
from ttsnap_lib.errors import CheckpointError, RewardError
from ttsnap_lib.files import as_path, failures_as, read_json, reason, write_json


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
        f"{what} of {repo}{'/' + filename if filename else ''} cannot be had ({reason(error)}): got {repo!r}, expected "
        f"a repository of the hub, in the cache {cache} or reachable, or a local path. Run `{command}` where there is "
        "a network and copy the cache (HF_HOME), or pass the local path."
    )


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict from safetensors or from a `torch.save` file of plain tensors.

    A mapping under the key ``state_dict`` (open_clip's checkpoint format) is taken out; leading ``module.`` of a
    wrapped model is dropped, and names of the image-reward package become those of today (:func:`todays_names`).

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
            f"weights file: got {path}, expected an existing file. Check the path, or download the weights."
        )
    with failures_as(
        RewardError,
        f"weights file cannot be read: got {path}, expected safetensors, or a torch file of tensors and plain values. "
        "Download it again, or save the state dict alone as safetensors.",
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
        raise RewardError(f"weights file: got {path}, expected a mapping from names to tensors. Save a state dict.")
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return todays_names(state)


# The image-reward package names its vision transformer as timm does; transformers, whose classes we use, otherwise.
# Pairs of old and new, each read after `blip.visual_encoder`; the text tower has the same names in both.
_BLIP_NAMES = (
    (".blocks.", ".encoder.layers."),
    (".attn.qkv", ".self_attn.qkv"),
    (".attn.proj", ".self_attn.projection"),
    (".norm1", ".layer_norm1"),
    (".norm2", ".layer_norm2"),
    (".patch_embed.proj", ".embeddings.patch_embedding"),
    (".cls_token", ".embeddings.class_embedding"),
    (".pos_embed", ".embeddings.position_embedding"),
    (".norm", ".post_layernorm"),
)


_BLIP_TOWER = "blip.visual_encoder"


# In the package's files, and read by no score: projections of BLIP's pretraining, and a constant.
_BLIP_UNUSED = re.compile(r"(.*\.)?blip\.((vision|text)_proj\..*|text_encoder\.embeddings\.position_ids)")


def todays_name(name: str) -> str:
    """Return the name of a layer or a weight in this library; only what the image-reward package names changes."""
    before, tower, rest = name.partition(_BLIP_TOWER)
    for old, new in _BLIP_NAMES:
        rest = rest.replace(old, new)
    return before + tower + rest


def package_name(name: str) -> str:
    """Return the name that the image-reward package has for a layer or a weight; the inverse of `todays_name`."""
    before, tower, rest = name.partition(_BLIP_TOWER)
    for old, new in reversed(_BLIP_NAMES):
        rest = rest.replace(new, old)
    return before + tower + rest


def todays_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict under the names of today, without what no score reads."""
    return {todays_name(key): value for key, value in state.items() if not _BLIP_UNUSED.fullmatch(key)}


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
            f"weights of {source} do not fit the model: {' and '.join(parts)} keys: got "
            f"{(missing + unexpected)[:6]!r}, expected the model's own keys. Use the checkpoint that belongs to this "
            "reward."
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
                f"weights of {source}: {key}: got {tuple(value.shape)!r}, expected shape {tuple(own[key].shape)}. Use "
                "the checkpoint that belongs to this reward."
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


def keep_base_exact(module: torch.nn.Module) -> None:
    """Make peft's adapters of ``torch.nn.MultiheadAttention`` (open_clip's attention) exact, in place.

    peft adds such an adapter to the base weights at every forward and takes it off again. The sums round, so the base
    would drift with every picture: a killed run would not end with the same weights, and the base reward in bfloat16
    would be off by a thousandth. peft 0.21 also adds the adapter of the output projection twice.
    """
    from peft.tuners.lora.layer import MultiheadAttention

    for part in module.modules():
        if type(part) is MultiheadAttention:
            part.__class__ = _exact_class()


@functools.cache
def _exact_class() -> type:
    from peft.tuners.lora.layer import MultiheadAttention

    class ExactAttention(MultiheadAttention):
        _kept: Any = None

        def merge(self, *args: Any, **kwargs: Any) -> None:
            base: Any = self.get_base_layer()
            projection = base.out_proj.get_base_layer()
            if not self.merged:
                self._kept = (base.in_proj_weight.data, projection.weight.data)
            super().merge(*args, **kwargs)
            if self.merged:
                weight = self._kept[1]
                for name in self.merged_adapters:
                    weight = weight + base.out_proj.get_delta_weight(name).to(weight.dtype)
                del projection.weight
                projection.weight = weight  # no parameter: gradients go to the adapter

        def unmerge(self) -> None:
            super().unmerge()
            if self._kept is not None:
                base: Any = self.get_base_layer()
                base.in_proj_weight.data, base.out_proj.get_base_layer().weight.data = self._kept
                self._kept = None

    return ExactAttention


_ADAPTER = "adapter_model.safetensors"


_FULL = "model.safetensors"


_MOST_RANK = 1024  # memory is allocated for what the configuration says, before the weights are looked at


def read_curriculum(folder: str | Path) -> dict[str, Any]:
    """Return ``curriculum.json`` of a run folder.

    Raises
    ------
    CheckpointError
        When the folder or the file is missing or broken.
    """
    path = as_path("run folder", folder, error=CheckpointError) / "curriculum.json"
    remedy = "Check the path; a run folder of `ttsnap finetune` holds step_14 and its like, and curriculum.json."
    return read_json(path, "curriculum", error=CheckpointError, remedy=remedy)


def step_folders(folder: str | Path) -> dict[int, Path]:
    """Return step -> checkpoint folder, ascending; folders without weights (a run cut short) are left out."""
    found: dict[int, Path] = {}
    for path in sorted(Path(folder).glob("step_*")):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and ((path / _ADAPTER).is_file() or (path / _FULL).is_file()):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


class StepSeries:
    """The checkpoints of one run folder, attached to a base module.

    LoRA adapters (``adapter_model.safetensors`` with ``adapter_config.json``) all live in the module and are switched;
    full weights (``model.safetensors``: all keys of the module, or those that were trained) are copied in on a switch
    and the base values kept on the CPU.

    Parameters
    ----------
    module : torch.nn.Module
        The base model. Adapters are injected into it in place; its own weights stop requiring gradients then.
    folder : str or Path
        The run folder.
    reward_name : str, optional
        Refused when ``curriculum.json`` names another reward under ``reward``.

    Raises
    ------
    CheckpointError
        A folder without checkpoints, of another reward, or whose weights do not fit.
    """

    def __init__(self, module: torch.nn.Module, folder: str | Path, *, reward_name: str | None = None) -> None:
        self.folder = Path(folder)
        self.curriculum = read_curriculum(folder)
        trained = self.curriculum.get("reward")
        if reward_name is not None and isinstance(trained, str) and trained != reward_name:
            raise CheckpointError(
                f"checkpoints of {folder} belong to another reward: got {trained!r}, expected {reward_name}. Load the "
                f"reward {trained} with these adapters, or name the folder of {reward_name}."
            )
        self._folders = step_folders(folder)
        if not self._folders:
            raise CheckpointError(
                f"no checkpoints: got {folder}, expected folders step_NN with adapter_model.safetensors or "
                "model.safetensors. Finish at least one step of ttsnap finetune."
            )
        kinds = {(path / _ADAPTER).is_file() for path in self._folders.values()}
        if len(kinds) > 1:
            raise CheckpointError(
                f"checkpoints of {folder} are of two kinds: got {[path.name for path in self._folders.values()]!r}, "
                "expected adapters in all of them, or full weights in all of them. Keep the two runs in folders of "
                "their own."
            )
        self.kind = "lora" if kinds == {True} else "full"
        self._module = module
        self._active: int | None = None
        self._peft: Any = None
        self._base: dict[str, torch.Tensor] = {}
        if self.kind == "lora":
            self._attach_adapters()

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps with weights, ascending."""
        return tuple(self._folders)

    def fingerprint(self, step: int) -> str:
        """Return a digest of the weights file of `step`."""
        path = self._folders[step]
        file = path / (_ADAPTER if self.kind == "lora" else _FULL)
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=8)).hexdigest()

    def base_state(self) -> dict[str, torch.Tensor]:
        """Return the base values of the weights that full checkpoints have replaced so far."""
        return self._base

    def use(self, step: int | None) -> None:
        """Make the weights of `step` (None: the base) the active ones."""
        if step is not None and step not in self._folders:
            raise CheckpointError(
                f"no noise-aware weights for step {step} in {self.folder}: got {step!r}, expected one of "
                f"{list(self._folders)} or None. Use one of those steps, or finetune this one."
            )
        if step == self._active:
            return
        if self.kind == "full":
            self._load_full(step)
        elif step is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            if self._active is None:
                self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(_name(step), inference_mode=True)
        self._active = step

    # -- adapters -----------------------------------------------------------------------------------------------

    def _attach_adapters(self) -> None:
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import safe_open

        device = next(self._module.parameters()).device
        layers = [name for name, _ in self._module.named_modules() if name]
        for step, path in self._folders.items():
            name = _name(step)
            _check_adapter(path)
            with (
                failures_as(
                    CheckpointError,
                    f"adapter cannot be attached: got {path}, expected a LoRA adapter of this base model. Use the base "
                    "model it was trained on, or train it again.",
                ),
                _adapter_of_today(path, layers) as place,
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers 5 renamed
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(self._module, str(place), adapter_name=name)
                else:
                    self._peft.load_adapter(str(place), adapter_name=name, torch_device=str(device))
                with safe_open(place / _ADAPTER, framework="pt") as file:
                    stored = set(file.keys())
            wanted = set(get_peft_model_state_dict(self._peft, adapter_name=name))
            if stored != wanted:
                raise CheckpointError(
                    f"adapter of step {step} does not fit: {len(wanted - stored)} missing and {len(stored - wanted)} "
                    f"unexpected keys: got {sorted(stored ^ wanted)[:4]!r}, expected the keys of its own "
                    "adapter_config.json on this base model. Use the base model it was trained on, or train it again."
                )
        keep_base_exact(self._module)
        self._peft.eval()
        self._peft.base_model.disable_adapter_layers()

    # -- full weights -------------------------------------------------------------------------------------------

    def _load_full(self, step: int | None) -> None:
        from safetensors.torch import load_file

        own = self._module.state_dict()
        state: dict[str, torch.Tensor] = {}
        if step is not None:
            path = self._folders[step] / _FULL
            with failures_as(
                CheckpointError,
                f"checkpoint cannot be read: got {path}, expected a whole safetensors file. Train this step again, or "
                "remove its folder.",
            ):
                state = todays_names(load_file(path))
            bad = [key for key, value in state.items() if key not in own or own[key].shape != value.shape]
            if bad or not state:
                raise CheckpointError(
                    f"checkpoint of step {step} does not fit the base model: got {bad[:4] or 'no weights'!r}, expected "
                    "names and shapes of the base model. Use the base model it was trained on, or train it again."
                )
        for key in state.keys() - self._base.keys():  # touched for the first time: remember the base
            self._base[key] = own[key].detach().to("cpu", copy=True)
        # What this step does not bring comes back from the base, not from the step before.
        self._module.load_state_dict({**self._base, **state}, strict=False)


def _check_adapter(folder: Path) -> None:
    """Refuse an adapter_config.json that is no plain LoRA: some kinds change the base weights as they are attached."""
    path = folder / "adapter_config.json"
    remedy = "Use adapters of ttsnap finetune, or plain LoRA adapters of peft."
    about = read_json(path, "adapter configuration", error=CheckpointError, remedy=remedy)
    choice(f"{path}: peft_type", about.get("peft_type"), ("LORA",), error=CheckpointError)
    integer(f"{path}: r", about.get("r"), 1, _MOST_RANK, error=CheckpointError)
    starts = about.get("init_lora_weights", True)
    choice(f"{path}: init_lora_weights", starts, (True, False, "gaussian"), error=CheckpointError)
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "loftq_config"):
        if about.get(key):
            raise CheckpointError(f"{path}: {key}: got {about[key]!r}, expected none. {remedy}")


@contextlib.contextmanager
def _adapter_of_today(folder: Path, layers: list[str]) -> Iterator[Path]:
    """Give the folder of an adapter; one under the image-reward package's names is rewritten into a folder for now.

    `layers` are the base model's. The configuration tells by a pattern, or by ends of names, which of them have
    adapters: read with the package's names it gives the layers that the file has to bring.
    """
    from safetensors.torch import load_file, save_file

    state = load_file(folder / _ADAPTER)
    renamed = todays_names(state)
    about = read_json(folder / "adapter_config.json", "adapter configuration", error=CheckpointError, remedy="")
    targets = about.get("target_modules")
    now, then = ({layer for layer in layers if _targeted(named(layer), targets)} for named in (str, package_name))
    # A weight that has its name of today already was not trained on the package's model.
    new_already = any(package_name(key) != key for key in state)
    if new_already or (renamed.keys() == state.keys() and now == then):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        if then:
            about["target_modules"] = sorted(then)
        write_json(Path(scratch) / "adapter_config.json", about)
        save_file(renamed, Path(scratch) / _ADAPTER, metadata={"format": "pt"})
        yield Path(scratch)


def _targeted(layer: str, targets: Any) -> bool:
    """Whether peft puts an adapter on a layer: a pattern fits its whole name, or one of a list ends it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(layer == end or layer.endswith(f".{end}") for end in targets or ())


def _name(step: int) -> str:
    return f"step_{step}"
