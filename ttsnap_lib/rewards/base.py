"""Several rewards over one image set."""

from __future__ import annotations

import contextlib
import importlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ttsnap_lib.checks import MAX_PIXELS, as_device, choice, default_device, integer, memory_errors
from ttsnap_lib.errors import CheckpointError, ConfigError, RewardError
from ttsnap_lib.files import failures_as
from ttsnap_lib.rewards.checkpoints import sampled_digest
from ttsnap_lib.rewards.pixels import Preprocessing

if TYPE_CHECKING:
    from ttsnap_lib.rewards.checkpoints import StepSeries


_CACHED_PROMPTS = 4096  # at most 16 MB for the largest text tower


_ENCODED_AT_ONCE = 256


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
        if len(self) == n:
            return self
        if len(self) != 1:
            raise RewardError(
                f"prompts and images differ in number: got {len(self)} prompts, {n} images, expected one prompt per "
                "image, or one for all. Pass a list of prompts as long as the images."
            )
        return TextBatch({name: tensor.expand(n, *tensor.shape[1:]) for name, tensor in self.tensors.items()})


class TextCache:
    """Rows of encoded prompts, kept as long as what decides them stays the same."""

    def __init__(self) -> None:
        self._rows: OrderedDict[str, TextBatch] = OrderedDict()
        self._valid_for: Hashable = None

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()

    def rows(
        self, prompts: Sequence[str], encode: Callable[[Sequence[str]], TextBatch], valid_for: Hashable
    ) -> TextBatch:
        """Return one row per prompt; only those not seen since `valid_for` changed are encoded."""
        if self._valid_for != valid_for:
            self._rows.clear()
            self._valid_for = valid_for
        distinct = list(dict.fromkeys(prompts))
        missing = [prompt for prompt in distinct if prompt not in self._rows]
        for start in range(0, len(missing), _ENCODED_AT_ONCE):
            part = missing[start : start + _ENCODED_AT_ONCE]
            encoded = encode(part)
            for row, prompt in enumerate(part):
                self._rows[prompt] = encoded[row : row + 1]
        if len(distinct) == 1:
            self._rows.move_to_end(distinct[0])
            text = self._rows[distinct[0]].expand(len(prompts))
        else:
            rows = [self._rows[prompt] for prompt in prompts]
            text = TextBatch({key: torch.cat([row.tensors[key] for row in rows]) for key in rows[0].tensors})
        while len(self._rows) > _CACHED_PROMPTS:
            self._rows.popitem(last=False)
        return text


_FORMATS = ("PNG", "WEBP", "JPEG", "BMP", "TIFF", "GIF")  # the parsers of the others never see a file


_SLACK = 0.01  # decoders overshoot a little


Images = Sequence[Image.Image | str | Path] | Image.Image | torch.Tensor


def as_list(images: Any) -> list:
    """Return images as a list; one image is a list of one.

    Raises
    ------
    RewardError
        Something that is no picture and no list of them.
    """
    if isinstance(images, Image.Image | str | Path):
        return [images]
    if not hasattr(images, "__iter__"):
        raise RewardError(
            f"images: got {type(images).__name__!r}, expected images or a list of them. Pass PIL images or paths."
        )
    return list(images)


def open_image(image: Any) -> Image.Image:
    """Return a PIL image, opening a path.

    Raises
    ------
    RewardError
        No picture, or one that cannot be read.
    """
    if isinstance(image, Image.Image):
        _check_pixels(image, "given in memory")
        return image
    if isinstance(image, str | Path):
        remedy = "Generate it again, or save it as PNG."
        bound = f"a whole image file, one of {', '.join(_FORMATS)}"
        with failures_as(RewardError, f"image cannot be read: got {image}, expected {bound}. {remedy}"):
            if not Path(image).is_file():
                raise RewardError(f"image: got {image}, expected an existing image file. {remedy}")
            with Image.open(image, formats=_FORMATS) as file:
                _check_pixels(file, str(image))
                file.load()
                return file
    raise RewardError(
        f"images: got {type(image).__name__!r}, expected PIL images, paths or a float tensor (n, 3, H, W). Convert "
        "arrays with PIL.Image.fromarray."
    )


def _check_pixels(image: Image.Image, name: str) -> None:
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise RewardError(
            f"image {name}: got {image.width} x {image.height} pixels, expected at least one pixel and at most "
            f"{MAX_PIXELS}. Check where the file comes from."
        )


def check_tensor(images: torch.Tensor) -> torch.Tensor:
    """Return a batch of images (n, 3, H, W), or raise with its shape and type, or with values out of [0, 1].

    Raises
    ------
    RewardError
        Another shape or type, or values outside [0, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape[2:]:
        raise RewardError(
            f"image tensor: got {images.dtype} {tuple(images.shape)}, expected a float tensor (n, 3, height, width) in "
            "[0, 1]. Scale 8-bit images by 1/255 and put the channels second."
        )
    if len(images):
        low, high = (float(value) for value in torch.aminmax(images.detach()))
        if not (low >= -_SLACK and high <= 1 + _SLACK):  # NaN fails too
            raise RewardError(
                f"values of the image tensor: got {(low, high)!r}, expected all in [0, 1]. Scale 8-bit images by "
                "1/255, and [-1, 1] by x / 2 + 0.5."
            )
    return images


def prompt_list(prompts: str | Sequence[str], n: int) -> list[str]:
    """Return one prompt per image.

    Raises
    ------
    RewardError
        Another number of prompts, or a prompt that is no text.
    """
    if isinstance(prompts, str):
        return [prompts] * n
    if not isinstance(prompts, Sequence) and not hasattr(prompts, "__iter__"):
        raise RewardError(f"prompts: got {prompts!r}, expected text, or a list of texts. Pass strings.")
    rows = list(prompts)
    if any(not isinstance(prompt, str) for prompt in rows):
        raise RewardError(f"prompts: got {rows!r}, expected text, or a list of texts. Pass strings.")
    if len(rows) == 1:
        return rows * n
    if len(rows) != n:
        raise RewardError(
            f"prompts and images differ in number: got {len(rows)} prompts, {n} images, expected one prompt per image, "
            "or one for all. Pass a list of prompts as long as the images."
        )
    return rows


class Reward:
    """A reward model.

    Families fill in :meth:`encode_text` and :meth:`forward`; everything else is shared.

    Attributes
    ----------
    name : str
        The name under which scores are kept.
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
    batch_size : int
        Images per forward of :meth:`score` unless the call says otherwise.
    """

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
        self._series: StepSeries | None = None
        self._texts = TextCache()
        self._compiled: Any = None

    # -- what a family fills in ---------------------------------------------------------------------------------

    def encode_text(self, prompts: Sequence[str]) -> TextBatch:
        """Return the encoded prompts, one row each, on the device; gradients flow where the family has a text tower."""
        raise NotImplementedError

    def forward(self, pixels: torch.Tensor, text: TextBatch | Sequence[str]) -> torch.Tensor:
        """Return the rewards of preprocessed images, with gradients to weights and pixels.

        Parameters
        ----------
        pixels : Tensor (n, 3, size, size)
            What :meth:`preprocess` returns.
        text : TextBatch or list of str
            What :meth:`encode_text` returns, with n rows or one row for all images; or the prompts themselves.

        Returns
        -------
        Tensor (n,)
            float32.
        """
        raise NotImplementedError

    # -- shared -------------------------------------------------------------------------------------------------

    def preprocess(self, images: Images, *, differentiable: bool = False) -> torch.Tensor:
        """Return images as model input, float32 (n, 3, size, size) on the reward's device.

        PIL images (or paths of image files) go through the published preprocessing to the pixel; float tensors
        (n, 3, H, W) in [0, 1] stay on their device, see :meth:`Preprocessing.tensor` for the tolerance.
        """
        if self.preprocessing is None:
            raise RewardError(
                f"reward {self.name} has no preprocessing of its own: got {self.name!r}, expected a reward with "
                "preprocessing. Call score() with images instead."
            )
        if isinstance(images, torch.Tensor):
            return self.preprocessing.tensor(check_tensor(images).to(self.device), differentiable=differentiable)
        opened = [open_image(image) for image in as_list(images)]
        if not opened:
            return torch.empty(0, 3, self.preprocessing.size, self.preprocessing.size, device=self.device)
        return torch.stack([self.preprocessing.image(image) for image in opened]).to(self.device)

    def score(
        self,
        prompts: str | Sequence[str],
        images: Images,
        *,
        batch_size: int | None = None,
        check: bool = True,
    ) -> np.ndarray:
        """Return the reward of each image.

        Parameters
        ----------
        prompts : str or list of str
            One prompt for all images, or one each. Each distinct prompt is encoded once and kept while the weights
            stay the same.
        images : list of PIL images or paths, one PIL image, or Tensor (n, 3, H, W)
            Tensors are float in [0, 1] and never leave their device; they are rounded to 256 levels as a PNG is.
        batch_size : int, optional
            Images per forward.
        check : bool
            Refuse scores that are not finite; False returns them as they are.

        Returns
        -------
        ndarray (n,)
            float32.

        Raises
        ------
        RewardError
            Prompts that do not match the images, an image that cannot be used, a score that is not finite.
        DeviceError
            When the device runs out of memory.
        """
        if not isinstance(images, torch.Tensor):
            images = as_list(images)
        n = len(images)
        rows = prompt_list(prompts, n)
        size = self.batch_size if batch_size is None else integer("batch_size", batch_size, 1)
        parts = []
        with self._scoring(min(n, size)):
            for start in range(0, n, size):
                part = images[start : start + size]
                parts.append(self._score_batch(rows[start : start + size], part))
        scores = np.concatenate(parts) if parts else np.empty(0, np.float32)
        if check and not np.isfinite(scores).all():
            bad = np.flatnonzero(~np.isfinite(scores))
            raise RewardError(
                f"reward {self.name} gave a score that is not finite for image {bad[0]} (prompt {rows[bad[0]]!r}): got "
                f"{[float(scores[i]) for i in bad[:8]]!r}, expected finite numbers. Look at the image and the weights; "
                "in bfloat16 or float16 try float32."
            )
        return scores

    def score_pixels(self, prompts: str | Sequence[str], pixels: torch.Tensor) -> np.ndarray:
        """Return the scores (n,) of images that are preprocessed already, without checks of the values."""
        rows = prompt_list(prompts, len(pixels))
        with self._scoring(len(rows)):
            return self._score_batch(rows, pixels, ready=True)

    def use_step(self, step: int | None) -> Reward:
        """Switch to the noise-aware weights of a denoising step, or to the base model with None; return self.

        Raises
        ------
        CheckpointError
            When there are no weights for `step`.
        """
        if step is not None or self._series is not None:
            if self._series is None:
                raise CheckpointError(
                    f"reward {self.name} has no noise-aware weights: got {step!r}, expected None. Load it with "
                    "adapters=<run folder of ttsnap finetune>."
                )
            self._series.use(step)
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

    def step_fingerprint(self, step: int) -> str:
        """Return a digest of the noise-aware weights of `step`."""
        if self._series is None or step not in self.adapter_steps:
            raise CheckpointError(
                f"reward {self.name} has no noise-aware weights for step {step}: got {step!r}, expected one of "
                f"{list(self.adapter_steps)}. Attach a series that has them."
            )
        return self._series.fingerprint(step)

    def attach_steps(self, folder: str | Path) -> Reward:
        """Add the noise-aware weights of a run folder (``step_14/ ... curriculum.json``); return self."""
        from ttsnap_lib.rewards.checkpoints import StepSeries

        if self.module is None:
            raise RewardError(
                f"reward {self.name} has no weights to adapt: got {self.name!r}, expected a reward with weights. "
                "Attach checkpoints to a model reward."
            )
        if self._series is not None:
            self.use_step(None)
        self._series = StepSeries(self.module, folder, reward_name=self.name)
        return self

    def compile(self) -> Reward:
        """Compile the forward pass with `torch.compile` on its first use; return self."""
        self._compiled = torch.compile(self.forward)
        return self

    def fingerprint(self) -> str:
        """Return a short digest of what decides the base scores: architecture, weights (sampled), type, settings.

        It tells scores of one model from those of another when a tensor is resumed; it is no security measure.
        """
        about = f"{type(self).__name__} {self.preprocessing} {self.dtype} {self._settings()}"
        state = self._base_state()
        if self.series_kind == "lora":  # the adapters wrap the base weights, and are not among them
            state = {key.replace(".base_layer", ""): value for key, value in state.items() if ".lora_" not in key}
        return sampled_digest(about, state)

    def _settings(self) -> str:
        """Return the settings of the family that change the scores."""
        return f"scale={getattr(self, 'scale', None)} standardize={getattr(self, 'standardize', None)}"

    def _base_state(self) -> dict[str, torch.Tensor]:
        if self.module is None:
            return {}
        own = {key: value for key, value in self.module.state_dict().items() if value.is_floating_point()}
        return {**own, **(self._series.base_state() if self._series is not None else {})}

    def clear_cache(self) -> None:
        """Forget encoded prompts. Needed only after weights were replaced without an in-place update."""
        self._texts.clear()

    def __call__(self, prompts: str | Sequence[str], images: Images, **options: Any) -> np.ndarray:
        """Score images; the same as :meth:`score`."""
        return self.score(prompts, images, **options)

    def __repr__(self) -> str:
        steps = f", adapter_steps={self.adapter_steps}" if self.adapter_steps else ""
        return f"{type(self).__name__}({self.name!r}, device={str(self.device)!r}, dtype={self.dtype}{steps})"

    # -- inside -------------------------------------------------------------------------------------------------

    def _score_batch(self, prompts: list[str], images: Any, *, ready: bool = False) -> np.ndarray:
        pixels = images.to(self.device) if ready else self.preprocess(images)
        text = self._cached_text(prompts)
        forward = self._compiled or self.forward
        scores = forward(pixels, text)
        if scores.shape != (len(images),):
            raise RewardError(
                f"reward {self.name} gave scores of the wrong shape: got {tuple(scores.shape)!r}, expected "
                f"({len(images)},). Return one number per image."
            )
        return scores.float().cpu().numpy()

    def _cached_text(self, prompts: list[str]) -> TextBatch:
        # In-place updates (an optimizer's step, load_state_dict) raise a parameter's version: no stale rows.
        versions = sum(p._version for p in self.module.parameters()) if self.module is not None else 0
        return self._texts.rows(prompts, self.encode_text, (self.step, versions))

    @contextlib.contextmanager
    def _scoring(self, n: int) -> Iterator[None]:
        """For `n` images at once: no gradients, no dropout; training mode comes back afterwards."""
        training = [part for part in self.module.modules() if part.training] if self.module is not None else []
        remedy = "Use a smaller batch_size, or dtype bfloat16."
        try:
            for part in training:
                part.training = False
            with (
                torch.no_grad(),
                memory_errors(n, doing=f" while scoring with {self.name} on {self.device}", remedy=remedy),
            ):
                yield
        finally:
            for part in training:
                part.training = True


class CallableReward(Reward):
    """``function(prompts, images) -> n numbers`` as a reward.

    Parameters
    ----------
    function : callable
        Takes a list of prompts and as many images; returns numbers, an array or a tensor of shape (n,).
    name : str, optional
        The function's name when not given.
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
        takes: str = "pil",
        device: torch.device | str | None = None,
        batch_size: int = 32,
    ) -> None:
        if not callable(function):
            raise RewardError(f"reward function: got {function!r}, expected a callable. Pass a function.")
        super().__init__(
            str(name or getattr(function, "__name__", type(function).__name__)),
            device=device or "cpu",
            batch_size=batch_size,
        )
        self.function = function
        self.takes = choice("takes", takes, ("pil", "tensor"), error=RewardError)

    def _score_batch(self, prompts: list[str], images: Any, *, ready: bool = False) -> np.ndarray:
        given = self._as_tensor(images) if self.takes == "tensor" else self._as_pil(images)
        scores = self.function(prompts, given)
        if isinstance(scores, torch.Tensor):
            scores = scores.detach().float().cpu().numpy()
        try:
            scores = np.asarray(scores, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward {self.name} gave something that is not numbers: got {scores!r}, expected {len(prompts)} "
                "numbers. Return one number per image."
            ) from error
        if scores.shape != (len(prompts),):
            raise RewardError(
                f"reward {self.name} gave scores of the wrong shape: got {scores.shape!r}, expected ({len(prompts)},). "
                "Return one number per image."
            )
        return scores

    def _as_pil(self, images: Any) -> list[Image.Image]:
        if isinstance(images, torch.Tensor):
            levels = (check_tensor(images).float().clamp(0, 1) * 255).round().to(torch.uint8)
            return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]
        return [open_image(image).convert("RGB") for image in images]

    def _as_tensor(self, images: Any) -> torch.Tensor:
        if isinstance(images, torch.Tensor):
            return check_tensor(images).to(self.device)
        arrays = [np.array(open_image(image).convert("RGB")) for image in images]
        if len({array.shape for array in arrays}) > 1:
            raise RewardError(
                f"images differ in size: got {sorted({array.shape[:2] for array in arrays})!r}, expected one size in a "
                'batch. Use takes="pil" or batch_size=1.'
            )
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(self.device, torch.float32) / 255


def import_function(source: str) -> Callable[[Sequence[str], Any], Any]:
    """Return the function that ``"package.module:function"`` names.

    Raises
    ------
    RewardError
        No such module or function, or something that cannot be called.
    """
    module, _, attribute = source.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise RewardError(
            f'reward function cannot be imported ({error}): got {source!r}, expected "package.module:function". '
            "Check the name; the module has to be importable from here."
        ) from error
    return found


def score_many(
    rewards: Sequence[Reward], prompts: str | Sequence[str], images: Images, *, batch_size: int | None = None
) -> dict[str, np.ndarray]:
    """Score one image set with several rewards in one pass over the images.

    Files are opened once, and rewards with equal preprocessing share the pixels.

    Parameters
    ----------
    rewards : sequence of Reward
    prompts : str or sequence of str
        One for all images, or one each.
    images
        As :meth:`Reward.score` takes them.
    batch_size : int, optional
        Images per forward; each reward's own when not given.

    Returns
    -------
    dict
        Reward name -> float32 (n,).

    Raises
    ------
    ConfigError
        Two rewards of one name.
    """
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):
        raise ConfigError(f"rewards: got {names!r}, expected distinct names. Give one of them another name with name=.")
    if not isinstance(images, torch.Tensor):
        images = as_list(images)
    rows = prompt_list(prompts, len(images))
    size = batch_size or min((reward.batch_size for reward in rewards), default=1)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for start in range(0, len(images), size):
        part = images[start : start + size]
        if not isinstance(part, torch.Tensor):
            part = [open_image(image) for image in part]
        prepared: dict[tuple, torch.Tensor] = {}
        for reward in rewards:
            if reward.preprocessing is None:
                scores = reward.score(rows[start : start + size], part, batch_size=size)
            else:
                key = (reward.preprocessing, reward.device)
                if key not in prepared:
                    prepared[key] = reward.preprocess(part)
                scores = reward.score_pixels(rows[start : start + size], prepared[key])
            parts[reward.name].append(scores)
    return {name: np.concatenate(values) if values else np.empty(0, np.float32) for name, values in parts.items()}
