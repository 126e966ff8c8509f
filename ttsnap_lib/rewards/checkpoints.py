"""Weights of rewards: files of the hub and of the disk, and noise-aware series, switched on one base model."""

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

from ttsnap_lib.errors import CheckpointError, RewardError
from ttsnap_lib.files import as_path, failures_as, read_json, reason, write_json

CURRICULUM = "curriculum.json"
"""What a run folder says about itself: its reward, its steps, how each came out."""
ADAPTER, FULL = "adapter_model.safetensors", "model.safetensors"
"""The weights in a step's folder: a LoRA adapter, or the model's own."""
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


class StepSeries:
    """The checkpoints of one run folder, attached to a base module.

    LoRA adapters (``adapter_model.safetensors`` with ``adapter_config.json``) all live in the module and are switched;
    they are injected into it in place, and its own weights stop requiring gradients. Full weights
    (``model.safetensors``: all keys of the module, or those that were trained) are copied in on a switch and the base
    values kept on the CPU. `reward_name` is refused when ``curriculum.json`` names another reward.
    """

    def __init__(self, module: torch.nn.Module, folder: str | Path, *, reward_name: str | None = None) -> None:
        self.folder = Path(folder)
        trained = read_curriculum(folder).get("reward")
        if reward_name is not None and isinstance(trained, str) and trained != reward_name:
            raise CheckpointError(
                f"checkpoints of {folder} belong to another reward: got {trained!r}, expected {reward_name}. Load the "
                f"reward {trained} with these adapters, or name the folder of {reward_name}."
            )
        self._folders = step_folders(folder)
        kinds = {(path / ADAPTER).is_file() for path in self._folders.values()}
        if len(kinds) != 1:
            raise CheckpointError(
                f"{'no' if not kinds else 'two kinds of'} checkpoints: got {folder}, expected folders step_NN, all with "
                f"{ADAPTER} or all with {FULL}. Finish at least one step of ttsnap finetune, and keep runs apart."
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
        with open(self._folders[step] / (ADAPTER if self.kind == "lora" else FULL), "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()

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
            self._peft.set_adapter(f"step_{step}", inference_mode=True)
        self._active = step

    def _attach_adapters(self) -> None:
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import safe_open

        device = next(self._module.parameters()).device
        layers = [name for name, _ in self._module.named_modules() if name]
        for step, path in self._folders.items():
            name = f"step_{step}"
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
                with safe_open(place / ADAPTER, framework="pt") as file:
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

    def _load_full(self, step: int | None) -> None:
        from safetensors.torch import load_file

        own = self._module.state_dict()
        state: dict[str, torch.Tensor] = {}
        if step is not None:
            path = self._folders[step] / FULL
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


def read_curriculum(folder: str | Path) -> dict[str, Any]:
    """Return ``curriculum.json`` of a run folder."""
    path = as_path("run folder", folder, error=CheckpointError) / CURRICULUM
    remedy = "Check the path; a run folder of `ttsnap finetune` holds step_14 and its like, and curriculum.json."
    return read_json(path, "curriculum", error=CheckpointError, remedy=remedy)


def step_folders(folder: str | Path) -> dict[int, Path]:
    """Return step -> checkpoint folder, ascending; folders without weights (a run cut short) are left out."""
    found: dict[int, Path] = {}
    for path in Path(folder).glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and ((path / ADAPTER).is_file() or (path / FULL).is_file()):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _check_adapter(folder: Path) -> None:
    """Refuse what is no plain LoRA adapter: some kinds change the base weights as they are attached."""
    path = folder / "adapter_config.json"
    remedy = "Use adapters of ttsnap finetune, or plain LoRA adapters of peft."
    about = read_json(path, "adapter configuration", error=CheckpointError, remedy=remedy)
    plain: dict[str, list] = {
        "peft_type": ["LORA"],
        "init_lora_weights": [None, True, False, "gaussian"],
        "modules_to_save": [None, []],
    }
    for key, values in plain.items():
        if about.get(key) not in values:
            raise CheckpointError(f"{path}: {key}: got {about.get(key)!r}, expected one of {values}. {remedy}")


@contextlib.contextmanager
def _adapter_of_today(folder: Path, layers: list[str]) -> Iterator[Path]:
    """Give the folder of an adapter; one under the image-reward package's names is rewritten into a folder for now.

    `layers` are the base model's. The configuration tells by a pattern, or by ends of names, which of them have
    adapters: read with the package's names it gives the layers that the file has to bring.
    """
    from safetensors.torch import load_file, save_file

    state = load_file(folder / ADAPTER)
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
        save_file(renamed, Path(scratch) / ADAPTER, metadata={"format": "pt"})
        yield Path(scratch)


def _targeted(layer: str, targets: Any) -> bool:
    """Whether peft puts an adapter on a layer: a pattern fits its whole name, or one of a list ends it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(layer == end or layer.endswith(f".{end}") for end in targets or ())


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


# Files of weights


def is_local(source: str | os.PathLike) -> bool:
    """Whether `source` names something on disk rather than a hub repository."""
    text = os.fspath(source)
    return Path(text).exists() or text.startswith((".", "/", "~")) or text.count("/") > 1


def fetch(repo: str, filename: str, *, revision: str | None = None) -> Path:
    """Return the local path of a file of a hub repository, downloading it when it is not in the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, filename, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise offline_error(repo, "weights", error, revision, filename) from error


def fetch_weights(repo: str, *, revision: str | None = None) -> Path:
    """Return the local path of the one file of weights in a hub repository, whatever its name."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    endings = ("*.safetensors", "*.pth", "*.pt", "*.bin")
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(endings)))
        found = next((sorted(folder.glob(ending)) for ending in endings if any(folder.glob(ending))), [])
        if len(found) != 1:
            raise FileNotFoundError(f"{len(found)} files of weights")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise offline_error(repo, "weights", error, revision) from error
    return found[0]


def offline_error(
    repo: str, what: str, error: Exception, revision: str | None = None, filename: str | None = None
) -> RewardError:
    """Return the error for something of the hub that cannot be had."""
    from huggingface_hub import constants

    command = f"hf download {repo}{f' {filename}' if filename else ''}{f' --revision {revision}' if revision else ''}"
    return RewardError(
        f"{what} of {repo} cannot be had ({reason(error)}): expected a repository of the hub, in the cache "
        f"{constants.HF_HUB_CACHE} or reachable, or a local path. Run `{command}` where there is a network and copy the "
        "cache (HF_HOME), or pass the local path."
    )


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Return name -> tensor, on the CPU, of a safetensors file or a `torch.save` file of plain tensors.

    A mapping under the key ``state_dict`` (open_clip's checkpoint format) is taken out; leading ``module.`` of a
    wrapped model is dropped, and names of the image-reward package become those of today (:func:`todays_names`).
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


def load_strict(
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    source: str,
    constants: Iterable[str] = (),
    assign: bool = False,
) -> None:
    """Load `state` into `module`; every key and shape must fit, but for the buffers that match a pattern.

    With `assign` its tensors become the parameters, as for a module built without memory.
    """
    own = module.state_dict()
    check_fit(own, state, source=source, constants=constants)
    module.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False, assign=assign)


def check_fit(
    own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], *, source: str, constants: Iterable[str] = ()
) -> None:
    """Raise when `given` has other keys than `own`, but for the buffers that match a pattern, or another shape."""
    refuse_keys(own.keys() - given.keys(), given.keys() - own.keys(), source=source, constants=constants)
    for key in own.keys() & given.keys():
        if own[key].shape != given[key].shape:
            raise RewardError(
                f"weights of {source}: {key}: got {tuple(given[key].shape)}, expected shape {tuple(own[key].shape)}. "
                "Use the checkpoint that belongs to this reward."
            )


def refuse_keys(
    missing: Iterable[str], unexpected: Iterable[str], *, source: str, constants: Iterable[str] = ()
) -> None:
    """Raise when keys are missing or left over, but for those that match a pattern."""
    missing, unexpected = (
        sorted(key for key in keys if not any(re.fullmatch(pattern, key) for pattern in constants))
        for keys in (missing, unexpected)
    )
    if missing or unexpected:
        raise RewardError(
            f"weights of {source} do not fit the model: {len(missing)} missing and {len(unexpected)} unexpected keys: "
            f"got {(missing + unexpected)[:6]!r}, expected the model's own keys. Use the checkpoint that belongs to "
            "this reward."
        )


def sampled_digest(about: str, state: Mapping[str, torch.Tensor]) -> str:
    """Return a short digest of a text and of at most 511 values of each tensor; no security measure."""
    digest = hashlib.blake2b(about.encode(), digest_size=8)
    for key, value in sorted(state.items()):
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)].float().cpu().numpy()
        digest.update(f"{key} {tuple(value.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
