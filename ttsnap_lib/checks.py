"""Argument checks and limits: each check returns the value in its plain type, or raises with value, bound and remedy."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ttsnap_lib.errors import ConfigError, DeviceError, TTSnapError, shown

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 2**26
"""Images above this are not opened: a small file can claim a huge picture."""
MAX_IMAGES = 1_000_000
"""Most images per prompt: beyond, a number is a mistake, and lists of it would fill the memory."""
MAX_STEPS = 10_000
"""Most steps per image, likewise."""
_LISTED = 40  # names that an error lists; of more it tells those that come near


def integer(
    name: str, value: Any, low: int | None = None, high: int | None = None, *, error: type[TTSnapError] = ConfigError
) -> int:
    """Return `value` as an int within [low, high]; booleans and fractions are refused."""
    bound = "an integer" + _range(low, high)
    try:
        whole = isinstance(value, numbers.Integral) or (isinstance(value, numbers.Real) and float(value).is_integer())
    except OverflowError:  # a fraction beyond the largest float
        whole = False
    if isinstance(value, bool) or not whole or _outside(int(value), low, high):
        raise error(f"{name}: got {shown(value)}, expected {bound}. Set {name} to {bound}.")
    return int(value)


def real(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    open_low: bool = False,
    error: type[TTSnapError] = ConfigError,
) -> float:
    """Return `value` as a finite float within [low, high] ((low, high] if `open_low`)."""
    bound = "a finite number" + _range(low, high, open_low)
    try:
        good = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        good = False
    if not good or _outside(value, low, high) or (open_low and value == low):
        raise error(f"{name}: got {shown(value)}, expected {bound}. Set {name} to {bound}.")
    return float(value)


def choice(name: str, value: Any, options: Iterable[Any], *, error: type[TTSnapError] = ConfigError) -> Any:
    """Return `value` when it is one of `options`; suggest the closest one otherwise."""
    options = list(options)
    try:
        known = value in options
    except ValueError:  # an array compares element by element
        known = False
    if not known:
        told = f"{options}"
        if len(options) > _LISTED:
            told = (
                f"{len(options)} names, such as {difflib.get_close_matches(str(value)[:200], map(str, options), 5, 0)}"
            )
        raise error(f"{name}: got {shown(value)}, expected one of {told}. {_suggest(value, options)}")
    return value


def text(name: str, value: Any, *, error: type[TTSnapError] = ConfigError) -> str:
    """Return `value` when it is a string with something in it."""
    if not isinstance(value, str) or not value.strip() or not is_unicode(value):
        raise error(f"{name}: got {shown(value)}, expected a non-empty string in Unicode. Give {name} as text.")
    return value


def is_unicode(value: str) -> bool:
    """Tell whether a string is whole Unicode: bytes of another encoding on a command line give one that is not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain_name(name: str, value: Any, *, error: type[TTSnapError] = ConfigError) -> str:
    """Return `value` when it can be part of a file name: it climbs out of no folder, on no system."""
    if not isinstance(value, str) or re.fullmatch(r"\w[\w .+=,@()-]{0,98}", value) is None or value[-1] in " .":
        raise error(
            f"{name}: got {shown(value)}, expected a plain name: up to 99 letters, digits, spaces and _ . + - = , @ ( ), a "
            "letter or digit first. Use letters, digits and _; folders have an option of their own."
        )
    return value


def known_keys(
    what: str, given: Iterable[Any], known: Iterable[str], *, error: type[TTSnapError] = ConfigError
) -> None:
    """Refuse keys of `given` that are not in `known`; an unknown key is never ignored."""
    known = list(known)
    for key in given:
        if key not in known:
            raise error(f"{what}: unknown key: got {shown(key)}, expected one of {known}. {_suggest(key, known)}")


class Plain:
    """A dataclass that goes to a mapping of plain values and comes back; an unknown key is an error."""

    _what: ClassVar[str] = "settings"
    _error: ClassVar[type[TTSnapError]] = ConfigError

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON and YAML."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build from :meth:`to_dict`'s form; unknown and missing keys are an error."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        names = [field.name for field in fields]
        if not isinstance(content, Mapping):
            raise cls._error(f"{cls._what}: got {shown(content)}, expected a mapping. Write `name: value` for {names}.")
        known_keys(cls._what, content, names, error=cls._error)
        for field in fields:
            if field.name not in content and field.default is field.default_factory is dataclasses.MISSING:
                raise cls._error(f"{cls._what}: got {shown(dict(content))}, without {field.name}. Add it.")
        return cls(**content)


def _outside(value: float, low: float | None, high: float | None) -> bool:
    return (low is not None and value < low) or (high is not None and value > high)


def _range(low: float | None, high: float | None, open_low: bool = False) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f" {'above' if open_low else 'of at least'} {low}"
    if low is None:
        return f" of at most {high}"
    return f" in {'(' if open_low else '['}{low}, {high}]"


def _suggest(value: Any, options: list[Any]) -> str:
    known = [str(option) for option in options]
    close = difflib.get_close_matches(value[:200], known, n=1) if isinstance(value, str) else []
    return f"Did you mean {close[0]!r}?" if close else "Use one of those."


def as_device(name: Any) -> torch.device:
    """Return the torch device `name`; ``"auto"`` is cuda, else mps, else cpu.

    Raises
    ------
    DeviceError
        No such device, or one that this machine lacks.
    """
    import torch

    if isinstance(name, str) and name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    remedy = "Use 'auto' or 'cpu', or one that this machine has."
    try:
        place = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(
            f"device: got {name!r}, expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'. {remedy}"
        ) from error
    there: dict[str, Callable[[], bool]] = {
        "cpu": lambda: True,
        "cuda": lambda: torch.cuda.is_available() and (place.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available,
    }
    if not there.get(place.type, lambda: False)():
        raise DeviceError(f"device {place} is not there: got {place}, expected a device of this machine. {remedy}")
    return place


def as_dtype(name: Any) -> torch.dtype:
    """Return the torch type `name`: ``"bf16"``, ``"bfloat16"`` and their like, or one of these types itself."""
    import torch

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    kinds |= {str(kind).removeprefix("torch."): kind for kind in kinds.values()}
    return name if name in kinds.values() else kinds[choice("dtype", name, kinds)]


def default_device() -> torch.device:
    """Return the accelerator when there is one (this process's own under a launcher), else the CPU."""
    import torch

    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextlib.contextmanager
def memory_errors(n: int, *, doing: str = "", remedy: str) -> Iterator[None]:
    """Turn torch's "out of memory" into a DeviceError that says how many images were at once."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"out of memory with {n} images at once{doing}. {remedy}") from error


def or_eager(
    compiled: Callable[..., Any], eager: Callable[..., Any], failed: Callable[[str], None]
) -> Callable[..., Any]:
    """Return a function that runs `compiled`; where torch cannot compile, it tells `failed` why and runs `eager`."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            cause = getattr(error, "inner_exception", error)
            why = f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')[:200]}"
        failed(why)  # outside the except block, whose traceback keeps the tensors alive
        return eager(*args, **kwargs)

    return call


FINITE_VAE = (
    "Decode with the VAE in fp32 (pipeline.vae.float()), or with one that is fixed for fp16, such as "
    "madebyollin/sdxl-vae-fp16-fix; when the latents are not finite either, load the pipeline in bf16 or fp32."
)
"""What to do about decoded pictures that hold NaN: in fp16 the VAE of SDXL overflows."""


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    """Return images (..., 3, height, width) in [0, 1] as uint8 (..., height, width, 3), rounded as a PNG is."""
    return (images.float().clamp(0, 1) * 255).round().byte().movedim(-3, -1)
