"""`load_reward`: a reward by its name, folder, hub id or function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ttsnap_lib.checks import as_dtype, choice, known_keys
from ttsnap_lib.errors import CheckpointError, RewardError
from ttsnap_lib.files import as_path
from ttsnap_lib.pocket import pocket_folder
from ttsnap_lib.rewards.aesthetic import load_aesthetic
from ttsnap_lib.rewards.base import CallableReward, Reward, import_function
from ttsnap_lib.rewards.checkpoints import CURRICULUM, is_local, read_curriculum
from ttsnap_lib.rewards.image_reward import load_cycle_reward, load_image_reward
from ttsnap_lib.rewards.mps import load_mps
from ttsnap_lib.rewards.towers import HPS_FILES, load_clip, load_hpsv2
from ttsnap_lib.rewards.vlm import load_hpsv3, load_vqascore

_CLIP_OPTIONS = ("processor", "weights", "revision", "scale")
REWARDS = {
    "image_reward": ("weights", "med_config", "tokenizer", "standardize", "revision"),
    "pickscore": _CLIP_OPTIONS,
    "hpsv2": ("weights", "revision", "scale"),
    "hpsv2.1": ("weights", "revision", "scale"),
    "clipscore": _CLIP_OPTIONS,
    "mps": ("weights", "model", "condition", "revision"),
    "cyclereward": ("weights", "tokenizer", "revision"),
    "aesthetic": ("weights", "model", "revision"),
    "hpsv3": ("weights", "model", "sigma", "revision"),
    "vqascore": ("model", "question", "revision"),
    "pocket-clip": _CLIP_OPTIONS,
}
"""Names that :func:`load_reward` knows, each with the options it takes."""


_LOADERS: dict[str, Callable[..., Reward]] = {
    "image_reward": load_image_reward,
    "mps": load_mps,
    "cyclereward": load_cycle_reward,
    "aesthetic": load_aesthetic,
    "hpsv3": load_hpsv3,
    "vqascore": load_vqascore,
}


def load_reward(
    source: str | Path | Reward | Callable,
    *,
    name: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float32,
    compile: bool = False,
    adapters: str | Path | None = None,
    batch_size: int = 32,
    **options: Any,
) -> Reward:
    """Load a reward model.

    Parameters
    ----------
    source : str, Path, callable or Reward
        - ``"image_reward"``: raw head output; ``standardize=True`` gives the package's score. Options `weights`,
          `med_config`, `tokenizer` take local files instead of the hub's.
        - ``"pickscore"``: ``logit_scale.exp()`` times cosine (about 20), `yuvalkirstain/PickScore_v1`.
        - ``"hpsv2"``, ``"hpsv2.1"``: cosine (about 0.2 to 0.3), checkpoints of `xswu/HPSv2`, or `weights`.
        - ``"clipscore"``: cosine of `openai/clip-vit-large-patch14` (the image-reward package's CLIPScore);
          ``scale=2.5`` gives the published CLIPScore where the cosine is positive.
        - ``"mps"``: logit scale times cosine after cross-attention to the words near `condition`.
        - ``"cyclereward"``: raw head output, `carolineec/CycleReward-Combo`.
        - ``"aesthetic"``: the LAION aesthetic predictor, about 1 to 10; reads no prompt.
        - ``"hpsv3"``: the mean of HPSv3, `MizzenAI/HPSv3`; ``sigma=True`` gives its deviation as a second number.
        - ``"vqascore"``: the probability of "Yes" to `question` by a vision-language model, option `model` (a folder or
          hub id, Qwen2.5-VL-7B when not given).
        - ``"pocket-clip"``: the reward that ships with this project.
        - a folder or hub id of a `transformers.CLIPModel` with its processor;
        - a run folder of noise-aware checkpoints, whose ``curriculum.json`` names its base under ``reward``;
        - ``"package.module:function"``, ``"./file.py:function"`` or a Python function, see :class:`CallableReward`;
        - a YAML file of a judge over HTTP, see :class:`ttsnap_lib.rewards.judge.Judge`.
    name : str, optional
        Name under which scores are kept; the source's when not given.
    device : str or torch.device, optional
        The accelerator when there is one, else the CPU.
    dtype : torch.dtype or str
        ``"float32"`` (default), ``"bfloat16"`` or ``"float16"``. Scores are float32 always.
    compile : bool
        Compile the forward pass with `torch.compile`.
    adapters : str or Path, optional
        Run folder of noise-aware checkpoints, see :meth:`Reward.use_step`.
    batch_size : int
        Images per forward of :meth:`Reward.score`.
    **options
        What the family takes, see :data:`REWARDS`.

    Returns
    -------
    Reward

    Raises
    ------
    RewardError
        An unknown name, weights that cannot be had or do not fit.
    CheckpointError
        Adapters that do not fit.
    ConfigError
        An option that this reward does not take.
    """
    common = {"device": device, "dtype": as_dtype(dtype), "batch_size": batch_size}
    if isinstance(source, Reward):
        known_keys("reward object", options, ())
        reward = source
        reward.name = name or reward.name
    elif not isinstance(source, str | Path) or _is_function(str(source)):
        known_keys("reward function", options, ("takes", "outputs"))
        function: Any = import_function(source) if isinstance(source, str) else source
        reward = CallableReward(function, name, device=device, batch_size=batch_size, **options)
    elif Path(source).suffix in (".yaml", ".yml"):
        from ttsnap_lib.rewards.judge import load_judge

        known_keys(f"reward {source}", options, ())
        reward = load_judge(source, name, batch_size=batch_size)
    elif str(source) in REWARDS:
        known_keys(f"reward {source}", options, REWARDS[str(source)])
        reward = _named(str(source), name or str(source), {**common, **options})
    elif (as_path("reward", source, error=RewardError) / CURRICULUM).is_file():
        reward = _from_run(Path(source), name, {**common, **options})
        adapters = source if adapters is None else adapters
    else:
        known_keys(f"reward {source}", options, _CLIP_OPTIONS)
        reward = _clip(str(source), name, {**common, **options})
    if adapters is not None:
        reward.attach_steps(adapters)
    return reward.compile() if compile else reward


def _is_function(source: str) -> bool:
    module, colon, attribute = source.rpartition(":")
    names = [] if module.endswith(".py") else module.split(".")
    return bool(colon) and all(part.isidentifier() for part in (*names, *attribute.split(".")))


def _named(source: str, name: str, options: dict[str, Any]) -> Reward:
    if source in _LOADERS:
        return _LOADERS[source](name, **options)
    if source in HPS_FILES:
        return load_hpsv2(name, version=source, **options)
    if source == "pickscore":
        # The model card takes the processor of the model that PickScore was trained from.
        options = {"processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", **options}
        return load_clip(name, "yuvalkirstain/PickScore_v1", **options)
    if source == "clipscore":
        return load_clip(name, "openai/clip-vit-large-patch14", **{"scale": 1.0, **options})
    return load_clip(name, pocket_folder("pocket-clip"), **options)


def _clip(source: str, name: str | None, options: dict[str, Any]) -> Reward:
    path = Path(source)
    if path.suffix == ".py":
        raise RewardError(
            f'reward: got {source!r}, a file of Python, expected the function in it as well. Write "{source}:function".'
        )
    if path.is_file():
        raise RewardError(
            f"a weights file alone does not say which model it belongs to: got {source!r}, expected the reward's "
            'name with weights=<file>. Write for example load_reward("hpsv2", weights=file).'
        )
    looks_like_hub_id = source.count("/") == 1 and not is_local(source)
    if not path.name or not (path.is_dir() or looks_like_hub_id):
        choice("reward", source, [*REWARDS, "a folder", "a hub id", "module:function"], error=RewardError)
    return load_clip(name or path.name, source, **options)


def _from_run(folder: Path, name: str | None, options: dict[str, Any]) -> Reward:
    base = read_curriculum(folder).get("reward")
    # A file must not name code to import, nor a run folder, which could name itself.
    code = isinstance(base, str) and (_is_function(base) or Path(base).suffix in (".yaml", ".yml"))
    if not isinstance(base, str) or code or (Path(base) / CURRICULUM).exists():
        raise RewardError(
            f"curriculum.json of {folder} does not name its base reward: got {base!r}, expected a model under "
            f'"reward": one of {list(REWARDS)}, a folder of a model, or a hub id. Load the base by name with '
            "adapters=<this folder>."
        )
    return load_reward(base, name=name, **options)


def find_adapters(source: str | Path | None, model: str = "") -> Path | None:
    """Return the run folder of noise-aware weights that `source` names; empty or None gives None.

    ``"pocket"`` is what ships for pocket-clip on the pocket model `model`, and None for other models. Anything else is
    a folder of ``ttsnap finetune``; one that is not there raises CheckpointError.
    """
    if not source:
        return None
    if str(source) == "pocket":
        name = str(model).removeprefix("pocket-")  # of another model it may be a path
        shipped = pocket_folder("pocket-clip").with_name("pocket-clip-noise-aware") / Path(name).name
        return shipped if Path(name).name == name and shipped.is_dir() else None
    folder = Path(source)
    if folder.is_dir():
        return folder
    raise CheckpointError(
        f"noise-aware weights: got {source}, expected a run folder of ttsnap finetune. Check the path."
    )
