"""Scores while images are generated: nothing but the rewards is kept, and pictures never leave the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ._plan import parse_shard
from ._score_run import ScoreReport
from .errors import ConfigError, RewardError
from .prompts import read_prompts
from .reward_store import open_store
from .score import Rewards, chosen_steps, identity_digest, load_rewards, reward_plan

if TYPE_CHECKING:
    import torch

__all__ = ["InlineScorer", "generate_scores"]


class InlineScorer:
    """What ``generate(on_batch=...)`` hands its pictures to; use it as a context manager.

    A prompt is written when all its images have come. What a process that is killed leaves is a tensor of whole
    prompts; :attr:`only` names the images of the others.

    Parameters
    ----------
    out : str or Path
        The tensor, a Zarr store: created, or gone on with.
    rewards, noise_aware
        As for :func:`ttsnap_lib.score.score`.
    prompts : sequence of str
        All prompts of the set.
    images_per_prompt, n_steps : int
        As given to `generate`.
    steps : sequence of int, optional
        Steps to score; pass :attr:`steps` to `generate`, so that it decodes no others.
    shard : (int, int) or str, optional
        Prompts in whole chunks of 25 for each shard. Run `generate` itself unsharded, with ``only=scorer.only``.
    attributes : mapping, optional
        Kept with the tensor: ``model``, ``source``, and ``trajectories``, a digest that tells other settings apart.
    options : Any
        Of rewards that are loaded here: device, dtype, compile and their own.
    """

    def __init__(
        self,
        out: str | Path,
        rewards: Rewards,
        prompts: Sequence[str],
        images_per_prompt: int,
        n_steps: int,
        *,
        steps: Sequence[int] | None = None,
        shard: tuple[int, int] | str | None = None,
        noise_aware: str | Path | Mapping[str, str | Path] | None = None,
        attributes: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.steps = chosen_steps(steps, n_steps)
        self.rewards = load_rewards(rewards, noise_aware, steps=n_steps, **options)
        self.report = ScoreReport(Path(out))
        self._prompts, self._n_images = list(prompts), images_per_prompt
        self._shard, self._attributes = parse_shard(shard), dict(attributes or {})
        self._stack = ExitStack()
        self._values: dict[int, dict[tuple[str, str], np.ndarray]] = {}
        self._seen: dict[int, set[tuple[int, int]]] = {}

    def __enter__(self) -> Self:
        plans = [reward_plan(reward, self.steps) for reward in self.rewards]
        self._store = self._stack.enter_context(
            open_store(
                self.report.path,
                plans,
                self._prompts,
                self._n_images,
                self.steps,
                shard=self._shard,
                attributes=self._attributes,
            )
        )
        self._column = {step: k for k, step in enumerate(self._store.steps)}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def only(self) -> list[tuple[int, int]]:
        """The (prompt, image) pairs that are still to be generated, for ``generate(only=...)``."""
        wanted = []
        for prompt in (prompt for chunk in self._store.chunks for prompt in chunk):
            self._store.settle(prompt)
            if any(any(self._store.todo(r.name, prompt, self.steps, self._n_images)) for r in self.rewards):
                wanted += [(prompt, image) for image in range(self._n_images)]
        return wanted

    def __call__(self, prompt: int, images: list[int], step: int, pixels: torch.Tensor) -> None:
        """Score the pictures ``pixels`` (n, 3, height, width) of one prompt at one step."""
        if step not in self._column:
            return
        values = self._values.setdefault(prompt, {})
        shared: dict[Any, Any] = {}
        for reward in self.rewards:
            self._score(reward.use_step(None), "base", prompt, images, step, pixels, values, shared)
            if step in reward.adapter_steps:
                self._score(reward.use_step(step), "noise_aware", prompt, images, step, pixels, values, shared)
                reward.use_step(None)
        self.report.pictures += len(images)
        seen = self._seen.setdefault(prompt, set())
        seen.update((image, step) for image in images)
        if len(seen) == self._n_images * len(self.steps):
            self._store.write(prompt, values)
            del self._values[prompt], self._seen[prompt]

    def _score(self, reward, variant, prompt, images, step, pixels, values, shared) -> None:
        text = self._prompts[prompt]
        if reward.preprocessing is None:
            scores = reward.score(text, pixels, check=False)
        else:
            key = (reward.preprocessing, reward.device)
            if key not in shared:  # rewards with equal preprocessing share the pixels
                shared[key] = reward.preprocess(pixels)
            scores = reward.score_pixels(text, shared[key])
        if not np.isfinite(scores).all():
            image = images[int(np.argmin(np.isfinite(scores)))]
            raise RewardError(
                f"reward {reward.name} gave a score that is not finite for prompt {prompt}, image {image}, step {step}",
                value=[float(score) for score in scores],
                bound="finite numbers",
                remedy="Look at the image (generate it into a folder) and the weights; prompts that are written stay.",
            )
        table = values.setdefault(
            (reward.name, variant), np.full((self._store.n_images, len(self._store.steps)), np.nan, np.float32)
        )
        table[images, self._column[step]] = scores
        self.report.scores += len(images)


def generate_scores(
    pipeline: Any,
    prompts: str | Path | Sequence[str],
    out: str | Path,
    rewards: Rewards,
    *,
    images_per_prompt: int = 8,
    settings: Any = None,
    steps: Sequence[int] | None = None,
    seed: int = 0,
    negtome: Any = None,
    decoder: Any = None,
    shard: tuple[int, int] | str | None = None,
    noise_aware: str | Path | Mapping[str, str | Path] | None = None,
    reward_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **generate_options: Any,
) -> ScoreReport:
    """Generate trajectories and keep their rewards alone (``ttsnap generate --score``).

    The tensor is that of `generate` into a folder and `score` of the folder, up to the last bits: pictures are
    rounded to 8 bits as files are, and only the composition of the reward's batches differs.

    Parameters
    ----------
    pipeline, prompts, images_per_prompt, settings, seed, negtome, decoder, generate_options
        As for :func:`ttsnap_lib.generate.generate`.
    out, rewards, steps, shard, noise_aware
        As for :func:`ttsnap_lib.score.score`.
    reward_options : mapping, optional
        Device, dtype and so on of rewards that are loaded here.
    progress : callable, optional
        ``progress(done, total)`` in images.

    Returns
    -------
    ScoreReport

    Raises
    ------
    ConfigError
        A folder among `generate_options`: images are not kept.
    """
    import time

    from .denoise import Denoiser
    from .generate import generate

    if "folder" in generate_options:
        raise ConfigError(
            "folder",
            value=generate_options["folder"],
            bound="no folder: images that are scored as they are made are not kept",
            remedy="To keep the images, generate first and score the folder.",
        )
    prompts = read_prompts(prompts)
    denoiser = Denoiser(pipeline, settings)
    identity = {**_identity(denoiser), "seed": seed, "negtome": None if negtome is None else negtome.to_dict()}
    attributes = {
        "model": str(identity.get("model", type(pipeline).__name__)),
        "source": "ttsnap generate --score",
        "trajectories": identity_digest(identity),
    }
    scorer = InlineScorer(
        out,
        rewards,
        prompts,
        images_per_prompt,
        denoiser.settings.n_steps,
        steps=steps,
        shard=shard,
        noise_aware=noise_aware,
        attributes=attributes,
        **(reward_options or {}),
    )
    begin = time.perf_counter()
    with scorer:
        generate(
            pipeline,
            prompts,
            on_batch=scorer,
            only=scorer.only,
            images_per_prompt=images_per_prompt,
            settings=settings,
            steps=scorer.steps,
            seed=seed,
            negtome=negtome,
            decoder=decoder,
            shard=(0, 1),
            progress=progress,
            **generate_options,
        )
    scorer.report.elapsed_s = time.perf_counter() - begin
    return scorer.report


def _identity(denoiser: Any) -> dict[str, Any]:
    from ._identity import identity

    return identity(denoiser)
