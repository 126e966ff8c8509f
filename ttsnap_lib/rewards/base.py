"""`Reward`, the one interface of all reward models; functions as rewards; images and prompts as rewards take them."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import itertools
import math
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ttsnap_lib.checks import (
    FINITE_VAE,
    as_bytes,
    as_device,
    choice,
    default_device,
    integer,
    memory_errors,
    or_eager,
)
from ttsnap_lib.errors import CheckpointError, RewardError, TTSnapError
from ttsnap_lib.files import cores, failures_as, prefetch, reason
from ttsnap_lib.rewards.checkpoints import StepSeries, sampled_digest
from ttsnap_lib.rewards.pictures import as_rgb, open_picture
from ttsnap_lib.rewards.pixels import Preprocessing

Images = Sequence[Image.Image | str | Path] | Image.Image | torch.Tensor
Metadata = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
"""What is known about the prompt of all images, or about that of each, beside its words."""

_SLACK = 0.01  # decoders overshoot a little
_CACHED_PROMPTS, _CACHED_BYTES = 4096, 256 << 20


class Reward:
    """A reward model.

    Families fill in :meth:`encode_text` and :meth:`forward`, or :meth:`forward_embedding` where an image tower gives an
    embedding beside the reward; everything else is shared. A family that looks at images alone says ``reads_prompt = False``
    and needs no :meth:`encode_text`; one that gives several numbers an image names them in `outputs`.

    Attributes
    ----------
    name : str
        The name under which scores are kept.
    outputs : tuple of str
        Names of the numbers that one forward gives each image, such as ``("composition", "colour")``; each is a reward
        of the tensor by its own name, see :attr:`names`. Empty: one number.
    reads_prompt : bool
        False: prompts are not encoded, and `forward` gets None for the text.
    reads_metadata : bool
        True: `score` wants the metadata of the prompts, which :meth:`_score_batch` gets.
    settings : str
        What decides the scores beside the weights, such as a family's question; it is part of the fingerprint.
    module : torch.nn.Module or None
        What holds the weights, and what peft adapts; None when there is nothing to train.
    default_lora_targets : str or None
        Regular expression for ``peft.LoraConfig(target_modules=...)``: the linear layers of the image tower (and of
        the cross-attention, where the text looks at the image). Noise is in the image, so the text towers stay.
    preprocessing : Preprocessing or None
        How images become model input.
    device : torch.device
        Where the weights are.
    dtype : torch.dtype
        Type of weights and activations; scores are always float32.
    step : int or None
        The denoising step whose noise-aware weights are active; None is the base model.
    failures : dict of int to str
        Why images of the last call of :meth:`score` have no score, by their place, where the reward told.
    batch_size : int
        Images per forward of :meth:`score` unless the call says otherwise.
    """

    outputs: tuple[str, ...] = ()
    reads_prompt: bool = True
    reads_metadata: bool = False
    settings: str = ""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module | None = None,
        *,
        preprocessing: Preprocessing | None = None,
        default_lora_targets: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        self.name, self.module, self.preprocessing = name, module, preprocessing
        self.default_lora_targets = default_lora_targets
        self.device = as_device(device) if device is not None else default_device()
        self.dtype = dtype
        self.batch_size = integer("batch_size", batch_size, 1)
        self.step: int | None = None
        self.failures: dict[int, str] = {}
        self._failed: dict[int, str] = {}  # of the batch at work
        self._series: StepSeries | None = None
        self._texts = TextCache()
        self._compiled: Any = None
        self._embeddings: list[torch.Tensor] | None = None  # where they go while somebody gathers them

    # What a family fills in

    def encode_text(self, prompts: Sequence[str]) -> TextBatch:
        """Return the encoded prompts, one row each, on the device; gradients flow where the family has a text tower."""
        raise NotImplementedError

    def forward(self, pixels: torch.Tensor, text: Any) -> torch.Tensor:
        """Return the rewards of preprocessed images, with gradients to weights and pixels.

        Parameters
        ----------
        pixels : Tensor (n, 3, size, size)
            What :meth:`preprocess` returns.
        text : TextBatch or list of str
            What :meth:`encode_text` returns, with n rows or one row for all images; or the prompts themselves. None
            for a reward that reads no prompt.

        Returns
        -------
        Tensor (n,), or (n, outputs) where `outputs` names several
            float32.
        """
        return self.forward_embedding(pixels, text)[0]

    def forward_embedding(
        self, pixels: torch.Tensor, text: TextBatch | Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rewards (n,), as :meth:`forward`, and what the image tower says of each image, (n, d) of length 1."""
        raise NotImplementedError

    @property
    def embeds(self) -> bool:
        """Whether scoring also gives an embedding of each image, see :meth:`embeddings`."""
        own = type(self)
        return own.forward is Reward.forward and own.forward_embedding is not Reward.forward_embedding

    # Scoring

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its rewards in a tensor: ``judge``, or one for each of its outputs, ``judge.composition``."""
        return tuple(f"{self.name}.{output}" for output in self.outputs) or (self.name,)

    def preprocess(self, images: Images, *, differentiable: bool = False) -> torch.Tensor:
        """Return images as model input, float32 (n, 3, size, size) on the reward's device.

        PIL images (or paths of image files) go through the published preprocessing to the pixel; float tensors
        (n, 3, H, W) in [0, 1] stay on their device, see :meth:`Preprocessing.tensor` for the tolerance.
        """
        if self.preprocessing is None:
            raise RewardError(
                f"reward {self.name} takes images as they are, expected one with preprocessing. Call score() instead."
            )
        if isinstance(images, torch.Tensor):
            return self.preprocessing.tensor(check_tensor(images).to(self.device), differentiable=differentiable)
        return self.preprocessing.batch(list(self._opened(as_list(images), ahead=cores())), self.device)

    def score(
        self,
        prompts: str | Sequence[str],
        images: Images,
        *,
        metadata: Metadata = None,
        batch_size: int | None = None,
        check: bool = True,
    ) -> np.ndarray:
        """Return the reward of each image.

        Parameters
        ----------
        prompts : str or list of str
            One prompt for all images, or one each. Each distinct prompt is encoded once and kept while the weights
            stay the same. What a reward that reads no prompt is given does not matter.
        images : list of PIL images or paths, one PIL image, or Tensor (n, 3, H, W)
            A picture is scored as it is looked at: upright, over white where it is transparent; files are opened and
            resized ahead of the model, by as many threads as there are cores. Tensors are float in
            [0, 1] and never leave their device; they are rounded to 256 levels as a PNG is.
        metadata : mapping, or list of mappings, optional
            What is known about the prompt beside its words, for rewards that read it: one for all images, or one each.
            ``read_prompts(file).metadata`` has that of a prompt file.
        batch_size : int, optional
            Images per forward.
        check : bool
            Refuse scores that are not finite; False returns them as they are.

        Returns
        -------
        ndarray (n,), or (n, outputs) where `outputs` names several
            float32.

        Raises
        ------
        RewardError
            Prompts or metadata that do not match the images, metadata that is read and not given, an image that cannot
            be used, a score that is not finite.
        DeviceError
            When the device runs out of memory.
        """
        if not isinstance(images, torch.Tensor):
            images = as_list(images)
        n = len(images)
        rows, more = prompt_list(prompts, n), self._metadata(metadata, n)
        size = self.batch_size if batch_size is None else integer("batch_size", batch_size, 1)
        self.failures, parts = {}, []
        with self._scoring(min(n, size)):
            for k, batch in zip(range(0, n, size), self._batches(images, size), strict=True):
                self._failed = {}
                parts.append(self._score_batch(rows[k : k + size], batch, more[k : k + size]))
                self.failures |= {k + row: why for row, why in self._failed.items()}
            scores = torch.cat(parts).cpu().numpy() if parts else np.empty(self._shape(0), np.float32)
        if check and not np.isfinite(scores).all():
            bad = np.flatnonzero(~np.isfinite(scores.reshape(n, -1)).all(1))
            if why := self.failures.get(int(bad[0])):
                others = f" and {len(bad) - 1} others" if len(bad) > 1 else ""
                raise RewardError(
                    f"reward {self.name} gave no score for image {bad[0]} (prompt {rows[bad[0]]!r}){others}: {why}. "
                    "check=False leaves such scores out."
                )
            raise RewardError(
                f"reward {self.name} gave a score that is not finite for image {bad[0]} (prompt {rows[bad[0]]!r}): got "
                f"{scores[bad[:8]].tolist()!r}, expected finite numbers. Look at the image and the weights; "
                "in bfloat16 or float16 try float32."
            )
        return scores

    def _opened(self, images: list, *, ahead: int) -> Iterator[Any]:
        """Yield pictures as the preprocessing's batches take them, opened and resized by threads ahead of use."""

        def prepare(image: Any) -> Any:
            opened = image if isinstance(image, Image.Image) else open_image(image)
            return opened if self.preprocessing is None else self.preprocessing.resized(opened)

        # Images in memory are read by one thread: Pillow may load them only now, and one may stand in the list twice.
        given = (open_image(image) if isinstance(image, Image.Image) else image for image in images)
        return prefetch(prepare, given, workers=cores(), ahead=ahead)

    def _batches(self, images: Any, size: int) -> Iterator[Any]:
        """Yield images in batches of `size`: preprocessed, opened, or a part of the tensor."""
        if isinstance(images, torch.Tensor):
            for start in range(0, len(images), size):
                rows = images[start : start + size]
                yield rows if self.preprocessing is None else self.preprocess(rows)
            return
        opened = self._opened(images, ahead=2 * size)
        while part := list(itertools.islice(opened, size)):
            yield part if self.preprocessing is None else self.preprocessing.batch(part, self.device)

    def score_pixels(
        self, prompts: str | Sequence[str], pixels: torch.Tensor, metadata: Metadata = None
    ) -> torch.Tensor:
        """Return the scores of images that are preprocessed already, as :meth:`score`, without checks of the values.

        They are float32 on the reward's device, which may still be at work on them: a caller that copies them to the
        host later lets it go on.
        """
        rows, more = prompt_list(prompts, len(pixels)), self._metadata(metadata, len(pixels))
        with self._scoring(len(rows)):
            return self._score_batch(rows, pixels.to(self.device), more)

    def _score_batch(self, prompts: list[str], images: Any, metadata: list[dict[str, Any]]) -> torch.Tensor:
        """Score one of :meth:`_batches`; an accelerator is not waited for."""
        # In-place updates (an optimizer's step, load_state_dict) raise a parameter's version: no stale rows.
        versions = sum(p._version for p in self.module.parameters()) if self.module is not None else 0
        text = self._texts.rows(prompts, self.encode_text, (self.step, versions)) if self.reads_prompt else None
        found = (self._compiled or self._forward)(images, text)
        if self._embeddings is not None:
            self._embeddings.append(found[1])
        scores = found[0] if self.embeds else found
        return self._one_each(scores.float(), len(images))

    def _shape(self, n: int) -> tuple[int, ...]:
        """Return the shape of the scores of `n` images."""
        return (n, len(self.outputs)) if self.outputs else (n,)

    def _one_each(self, scores: torch.Tensor, n: int) -> torch.Tensor:
        if scores.shape != self._shape(n):
            numbers = f"the numbers {self.outputs}" if self.outputs else "one number"
            raise RewardError(
                f"reward {self.name} gave scores of the wrong shape: got {tuple(scores.shape)}, expected {self._shape(n)}. "
                f"Return {numbers} per image."
            )
        return scores

    def _metadata(self, given: Metadata, n: int) -> list[dict[str, Any]]:
        """Return metadata for each of `n` images; empty ones to a reward that reads none."""
        rows = [given] * n if given is None or isinstance(given, Mapping) else list(given)
        if self.reads_metadata and (given is None or len(rows) != n):
            got = "none" if given is None else f"{len(rows)} of them for {n} images"
            raise RewardError(
                f"reward {self.name} reads the metadata of prompts: got {got}, expected a mapping for all images, or one "
                "each. Pass metadata={...}, or read_prompts(file).metadata."
            )
        return [dict(row or {}) for row in rows] if self.reads_metadata else [{}] * n

    @property
    def _forward(self) -> Callable[..., Any]:
        return self.forward_embedding if self.embeds else self.forward

    @contextlib.contextmanager
    def embeddings(self) -> Iterator[list[torch.Tensor]]:
        """Gather the embeddings of the images that are scored inside the block: one (n, d) for each forward, in order.

        They come from the pass of the image tower that gives the scores, and cost nothing more.

        Raises
        ------
        RewardError
            When the reward has no image tower that gives one.
        """
        if not self.embeds:
            raise RewardError(
                f"reward {self.name} gives no embeddings, expected one with an image tower. Distances between images "
                "need a CLIP reward (pocket-clip, pickscore, clipscore, hpsv2) or image_reward."
            )
        before, self._embeddings = self._embeddings, []
        try:
            yield self._embeddings
        finally:
            self._embeddings = before

    def embedding_width(self) -> int:
        """Return how many numbers an embedding has, from the score of a grey picture."""
        with self.embeddings() as found:
            self.score("", Image.new("RGB", (32, 32), "gray"), check=False)
        return found[0].shape[1]

    @contextlib.contextmanager
    def _scoring(self, n: int) -> Iterator[None]:
        """For `n` images at once: no gradients, no dropout; training mode comes back afterwards."""
        training = [part for part in self.module.modules() if part.training] if self.module is not None else []
        doing = f" while scoring with {self.name} on {self.device}"
        try:
            for part in training:
                part.training = False
            with torch.no_grad(), memory_errors(n, doing=doing, remedy="Use a smaller batch_size, or dtype bfloat16."):
                yield
        finally:
            for part in training:
                part.training = True

    def compile(self) -> Reward:
        """Compile the forward pass with `torch.compile` on its first use, where that can be done; return self."""

        def failed(reason: str) -> None:
            self._compiled = None
            warnings.warn(f"reward {self.name} runs without being compiled: {reason}", stacklevel=2)

        self._compiled = or_eager(torch.compile(self._forward), self._forward, failed)
        return self

    def clear_cache(self) -> None:
        """Forget encoded prompts. Needed only after weights were replaced without an in-place update."""
        self._texts = TextCache()

    # Noise-aware weights

    def attach_steps(self, folder: str | Path) -> Reward:
        """Add the noise-aware weights of a run folder (``step_14/ ... curriculum.json``); return self."""
        if self.module is None:
            raise RewardError(
                f"reward {self.name} has no weights to adapt, expected a model. Attach checkpoints to a model reward."
            )
        self.use_step(None)
        self._series = StepSeries(self.module, folder, reward_name=self.name)
        return self

    def use_step(self, step: int | None) -> Reward:
        """Switch to the noise-aware weights of a denoising step, or to the base model with None; return self.

        Raises
        ------
        CheckpointError
            When there are no weights for `step`.
        """
        if self._series is not None:
            self._series.use(step)
        elif step is not None:
            raise CheckpointError(
                f"reward {self.name} has no noise-aware weights: got step {step!r}, expected None. Load it with "
                "adapters=<run folder of ttsnap finetune>."
            )
        self.step = step
        return self

    @contextlib.contextmanager
    def at(self, step: int | None) -> Iterator[Reward]:
        """Score inside the block with the noise-aware weights of `step` (None: the base); what was active comes back.

        Raises
        ------
        CheckpointError
            When there are no weights for `step`.
        """
        before = self.step
        try:
            yield self.use_step(step)
        finally:
            self.use_step(before)

    @property
    def adapter_steps(self) -> tuple[int, ...]:
        """Steps that have noise-aware weights, ascending; empty for a base reward."""
        return self._series.steps if self._series is not None else ()

    @property
    def series_kind(self) -> str | None:
        """Kind of the noise-aware weights: ``"lora"`` is fast to switch, ``"full"`` slow; None without any."""
        return self._series.kind if self._series is not None else None

    # Fingerprints: scores of one model are told from those of another when a tensor is resumed

    def fingerprint(self) -> str:
        """Return a short digest of what decides the base scores: architecture, weights (sampled), type, settings."""
        state = self.module.state_dict() if self.module is not None else {}
        state = {key: value for key, value in state.items() if value.is_floating_point()}
        if self._series is not None:
            state |= self._series.base_state()
        if self.series_kind == "lora":  # the adapters wrap the base weights, and are not among them
            state = {key.replace(".base_layer", ""): value for key, value in state.items() if ".lora_" not in key}
        settings = (
            f"scale={getattr(self, 'scale', None)} standardize={getattr(self, 'standardize', None)}{self.settings}"
        )
        return sampled_digest(f"{type(self).__name__} {self.preprocessing} {self.dtype} {settings}", state)

    def step_fingerprint(self, step: int) -> str:
        """Return a digest of the noise-aware weights of `step`, one of :attr:`adapter_steps`."""
        if self._series is None:
            raise CheckpointError(f"reward {self.name} has no noise-aware weights. Attach a series that has them.")
        return self._series.fingerprint(step)

    def __repr__(self) -> str:
        steps = f", adapter_steps={self.adapter_steps}" if self.adapter_steps else ""
        return f"{type(self).__name__}({self.name!r}, device={str(self.device)!r}, dtype={self.dtype}{steps})"


class CallableReward(Reward):
    """``function(prompts, images) -> n numbers`` as a reward.

    Parameters
    ----------
    function : callable
        Takes a list of prompts and as many images; returns numbers, an array or a tensor of shape (n,) or (n, 1), or a
        list of tensors of one number each, on any device. A function with a third argument named ``metadata`` gets a
        list of mappings as well: what the prompt file tells about each prompt beside its words. In a list, an exception
        in the place of a number says why that picture has none.
    name : str, optional
        The function's name when not given.
    outputs : sequence of str, optional
        Names of several numbers an image; the function then returns an array of shape (n, outputs). By default what
        the function's own attribute ``outputs`` says, if it has one.
    takes : {"pil", "tensor"}
        Whether the function gets RGB PIL images or a float tensor (n, 3, H, W) in [0, 1] on `device`. With ``"pil"``
        tensors are rounded to 256 levels, as a PNG is.
    device, batch_size
        As :class:`Reward` takes them.
    """

    def __init__(
        self,
        function: Callable[[list[str], Any], Any],
        name: str | None = None,
        *,
        outputs: Sequence[str] | None = None,
        takes: str = "pil",
        device: torch.device | str | None = None,
        batch_size: int = 32,
    ) -> None:
        if not callable(function):
            raise RewardError(f"reward function: got {function!r}, expected a callable. Pass a function.")
        arguments = _arguments(function)
        _refuse_swapped(function, arguments)
        name = str(name or getattr(function, "__name__", type(function).__name__))
        super().__init__(name, device=device or "cpu", batch_size=batch_size)
        self.function = function
        self.takes = choice("takes", takes, ("pil", "tensor"), error=RewardError)
        self.reads_metadata = "metadata" in arguments
        self.outputs = check_outputs(name, getattr(function, "outputs", ()) if outputs is None else outputs)

    def _score_batch(self, prompts: list[str], images: Any, metadata: list[dict[str, Any]]) -> torch.Tensor:
        # Copies, all of it: a function may change what it is given, such as normalise pixels in place.
        given = self._as_tensor(images) if self.takes == "tensor" else [picture.copy() for picture in as_pil(images)]
        more = {"metadata": copy.deepcopy(metadata)} if self.reads_metadata else {}
        scores = self.function(list(prompts), given, **more)
        if isinstance(scores, list | tuple) and any(isinstance(one, Exception) for one in scores):
            self._failed = {
                row: str(one) if isinstance(one, TTSnapError) else f"{type(one).__name__}: {one}"
                for row, one in enumerate(scores)
                if isinstance(one, Exception)
            }
            blank = [math.nan] * len(self.outputs) or math.nan
            scores = [blank if isinstance(one, Exception) else one for one in scores]
        try:
            scores = torch.tensor(np.asarray(_plain(scores), dtype=np.float32))
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward {self.name} gave something that is not numbers: got {scores!r}, expected {len(prompts)} "
                "numbers. Return one number per image."
            ) from error
        if scores.shape[1:] == (1,) and not self.outputs:
            scores = scores[:, 0]
        return self._one_each(scores, len(prompts))

    def _as_tensor(self, images: Any) -> torch.Tensor:
        if isinstance(images, torch.Tensor):
            return check_tensor(images).to(self.device, copy=True)
        arrays = [np.array(open_image(image)) for image in images]
        if len({array.shape for array in arrays}) > 1:
            raise RewardError(
                f"images differ in size: got {sorted({array.shape[:2] for array in arrays})}, expected one size in a "
                'batch. Use takes="pil" or batch_size=1.'
            )
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(self.device, torch.float32) / 255


def check_outputs(name: str, outputs: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a reward's numbers, or raise a RewardError."""
    found = () if isinstance(outputs, str) else tuple(outputs)
    if (
        (outputs and not found)
        or len(set(found)) < len(found)
        or not all(isinstance(one, str) and one for one in found)
    ):
        raise RewardError(
            f'outputs of reward {name}: got {outputs!r}, expected distinct names, such as ("composition", "colour").'
        )
    return found


def _arguments(function: Callable) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # no signature: calling it will tell
        return []


def _refuse_swapped(function: Callable, arguments: list[str]) -> None:
    """Refuse a function whose arguments are named images and prompts, in this order: it would get each for the other."""
    first, second = [*(name.lower().rstrip("s") for name in arguments[:2]), "", ""][:2]
    if first in ("image", "img", "picture", "pixel") and second in ("prompt", "text", "caption"):
        raise RewardError(
            f"reward function: got {getattr(function, '__name__', function)}({first}s, {second}s), expected prompts before "
            "images: def reward(prompts: list[str], images: list[Image]) -> list[float]. Swap its arguments, or wrap it: "
            "lambda prompts, images: reward(images, prompts)."
        )


def _plain(scores: Any) -> Any:
    """Return scores without tensors (numpy takes none from another device, in bfloat16 or with gradients) and masks."""
    if isinstance(scores, torch.Tensor):
        return scores.detach().float().cpu().numpy()
    if isinstance(scores, np.ma.MaskedArray):
        return np.ma.filled(scores.astype(float), np.nan)
    return [_plain(one) for one in scores] if isinstance(scores, list | tuple) else scores


def import_function(source: str) -> Callable[[Sequence[str], Any], Any]:
    """Return the function that ``"package.module:function"`` or ``"./file.py:function"`` names.

    A module is looked for in the working folder too, where the script ``ttsnap`` would not find it.
    """
    module, _, attribute = source.rpartition(":")
    try:
        found: Any = _file_module(Path(module)) if module.endswith(".py") else _module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # the file is anyone's
        raise RewardError(
            f'reward function cannot be imported ({reason(error)}): got {source!r}, expected "package.module:function" or '
            '"./file.py:function". Check the name; the module has to be importable from here.'
        ) from error
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0] or str(Path.cwd()) in sys.path:
            raise
        sys.path.append(str(Path.cwd()))  # last: a file there hides no installed package
        importlib.invalidate_caches()
        return importlib.import_module(name)


def _file_module(path: Path) -> Any:
    """Import a Python file; what stands beside it can be imported from it."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_metadata(rewards: Sequence[Reward], metadata: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rewards that read the metadata of prompts, where no prompt has any."""
    reading = [reward.name for reward in rewards if reward.reads_metadata]
    if reading and not any(metadata):
        raise RewardError(
            f"{' and '.join(reading)} read{'s' if len(reading) == 1 else ''} the metadata of prompts: got prompts without "
            "any, expected keys or columns beside the prompt. Give a prompt file that has them (.jsonl, .csv), or metadata= for a "
            "single prompt; the same `ttsnap generate` with such a file adds them to a folder."
        )


# Encoded prompts


@dataclass
class TextBatch:
    """Encoded prompts: named tensors with one row per prompt, whatever the family needs."""

    tensors: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Any) -> TextBatch:
        """Return the given rows (an index tensor, a slice or a list of integers)."""
        return TextBatch({name: tensor[rows] for name, tensor in self.tensors.items()})

    def expand(self, n: int) -> TextBatch:
        """Return `n` rows: one row is repeated without copying."""
        return TextBatch({name: tensor.expand(n, *tensor.shape[1:]) for name, tensor in self.tensors.items()})


class TextCache:
    """Rows of encoded prompts, `at_once` at a time, kept as long as what decides them stays the same."""

    def __init__(self, at_once: int = 256) -> None:
        self._rows: OrderedDict[str, TextBatch] = OrderedDict()
        self._valid_for: Hashable = None
        self._at_once = at_once

    def rows(
        self, prompts: Sequence[str], encode: Callable[[Sequence[str]], TextBatch], valid_for: Hashable
    ) -> TextBatch:
        """Return one row per prompt; only those not seen since `valid_for` changed are encoded."""
        if self._valid_for != valid_for:
            self._rows.clear()
            self._valid_for = valid_for
        distinct = list(dict.fromkeys(prompts))
        missing = [prompt for prompt in distinct if prompt not in self._rows]
        for start in range(0, len(missing), self._at_once):
            part = missing[start : start + self._at_once]
            encoded = encode(part)
            self._rows.update((prompt, encoded[row : row + 1]) for row, prompt in enumerate(part))
        if len(distinct) == 1:
            self._rows.move_to_end(distinct[0])
            text = self._rows[distinct[0]].expand(len(prompts))
        else:
            rows = [self._rows[prompt] for prompt in prompts]
            text = TextBatch({key: torch.cat([row.tensors[key] for row in rows]) for key in rows[0].tensors})
        one = sum(tensor[:1].nbytes for tensor in text.tensors.values())
        while len(self._rows) > min(_CACHED_PROMPTS, _CACHED_BYTES // one):
            self._rows.popitem(last=False)
        return text


# Images and prompts, as a caller gives them


def as_list(images: Any) -> list:
    """Return images as a list; one image is a list of one."""
    if isinstance(images, Image.Image | str | Path):
        return [images]
    if not hasattr(images, "__iter__"):
        raise RewardError(
            f"images: got {type(images).__name__!r}, expected images or a list of them. Pass PIL images or paths."
        )
    return list(images)


def open_image(image: Any) -> Image.Image:
    """Return a PIL image, or the picture at a path, as upright RGB: see :func:`ttsnap_lib.rewards.pictures.as_rgb`."""
    if isinstance(image, Image.Image):
        with failures_as(RewardError, "image given in memory cannot be read. Save it again as an 8-bit PNG."):
            return as_rgb(image, "given in memory")
    if not isinstance(image, str | Path):
        raise RewardError(
            f"images: got {type(image).__name__!r}, expected PIL images, paths or a float tensor (n, 3, H, W). Convert "
            "arrays with PIL.Image.fromarray."
        )
    remedy = "Generate it again, or save it as PNG."
    if not Path(image).is_file():
        raise RewardError(f"image: got {image}, expected an existing image file. {remedy}")
    return open_picture(image, str(image), remedy=remedy)


def as_pil(images: Any) -> list[Image.Image]:
    """Return images as upright RGB PIL images; tensors are rounded to 256 levels, as a PNG is."""
    if isinstance(images, torch.Tensor):
        return [Image.fromarray(array) for array in as_bytes(check_tensor(images)).cpu().numpy()]
    return [open_image(image) for image in images]


def check_tensor(images: torch.Tensor) -> torch.Tensor:
    """Return a batch of float images (n, 3, H, W) in [0, 1], or raise."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape[2:]:
        raise RewardError(
            f"image tensor: got {images.dtype} {tuple(images.shape)}, expected a float tensor (n, 3, height, width) in "
            "[0, 1]. Scale 8-bit images by 1/255 and put the channels second."
        )
    if len(images):
        low, high = torch.stack(torch.aminmax(images.detach())).tolist()  # one wait for the device
        if not (low >= -_SLACK and high <= 1 + _SLACK):  # NaN fails too
            scale = "Scale 8-bit images by 1/255, and [-1, 1] by x / 2 + 0.5."
            remedy = scale if math.isfinite(low) and math.isfinite(high) else FINITE_VAE
            raise RewardError(f"values of the image tensor: got {low} to {high}, expected all in [0, 1]. {remedy}")
    return images


def prompt_list(prompts: str | Sequence[str], n: int) -> list[str]:
    """Return one prompt for each of `n` images."""
    rows: list[Any] = [prompts] if isinstance(prompts, str) or not hasattr(prompts, "__iter__") else list(prompts)
    if any(not isinstance(prompt, str) for prompt in rows):
        raise RewardError(f"prompts: got {prompts!r}, expected text, or a list of texts. Pass strings.")
    if len(rows) not in (1, n):
        raise RewardError(
            f"prompts and images differ in number: got {len(rows)} prompts, {n} images, expected one prompt per image, "
            "or one for all. Pass a list of prompts as long as the images."
        )
    return rows * n if len(rows) == 1 else rows
