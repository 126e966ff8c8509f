"""Scores while images are generated: nothing but the rewards is kept, and pictures never leave the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ttsnap_lib.checks import choice, integer
from ttsnap_lib.errors import CheckpointError, ConfigError, DeviceError, RewardError, TrajectoryError, TTSnapError
from ttsnap_lib.files import parse_shard, write_json
from ttsnap_lib.rewards.base import Reward
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.scoring.store import RewardPlan, RewardStore, open_store
from ttsnap_lib.trajectories.prompts import read_prompts
from ttsnap_lib.trajectories.read import Trajectories


@dataclass(frozen=True)
class Call:
    """One variant of one reward and the steps it has to score."""

    reward: Reward
    variant: str
    steps: frozenset[int]


@dataclass(frozen=True)
class Work:
    """One pass over pictures of one prompt: step by step, image by image."""

    prompt: int
    slots: tuple[tuple[int, int], ...]
    """(step, image)."""
    calls: tuple[Call, ...]


@dataclass
class Portion:
    """A batch of pictures of one work, prepared for each reward."""

    work: Work
    slots: list[tuple[int, int]]
    prepared: list[dict[Any, Any]]
    failed: dict[int, TrajectoryError]
    """Position in the batch -> why it could not be read."""
    last: bool

    def inputs(self, reward: Reward, rows: Sequence[int]) -> Any:
        """Return the given rows as what `reward` takes."""
        values = [self.prepared[row][reward.preprocessing] for row in rows]
        return torch.stack(values) if reward.preprocessing is not None else values


def plan_work(store: RewardStore, rewards: Sequence[Reward], steps: Sequence[int], n_images: int) -> list[Work]:
    """Return what is left of this shard, chunk by chunk.

    Adapters are switched within a batch. Full weights are slow to switch: each of their steps gets a pass of its own
    over a chunk.
    """
    works: list[Work] = []
    for chunk in store.chunks:
        later: dict[tuple[int, int], list[Work]] = {}
        for prompt in chunk:
            calls = []
            for number, reward in enumerate(rewards):
                base, aware = store.todo(reward.name, prompt, steps, n_images)
                if base:
                    calls.append(Call(reward, "base", frozenset(base)))
                aware = [step for step in aware if step in reward.adapter_steps]
                if aware and reward.series_kind == "lora":
                    calls.append(Call(reward, "noise_aware", frozenset(aware)))
                elif aware:
                    for step in aware:
                        call = Call(reward, "noise_aware", frozenset([step]))
                        later.setdefault((number, step), []).append(_work(prompt, (call,), steps, n_images))
            store.settle(prompt)  # a process may have ended between the values and the status
            if calls:
                works.append(_work(prompt, tuple(calls), steps, n_images))
        for key in sorted(later):
            works += later[key]
    return works


def _work(prompt: int, calls: tuple[Call, ...], steps: Sequence[int], n_images: int) -> Work:
    needed = frozenset().union(*(call.steps for call in calls))
    slots = tuple((step, image) for step in steps if step in needed for image in range(n_images))
    return Work(prompt, slots, calls)


def read_ahead(
    found: Trajectories, works: Sequence[Work], batch_size: int, *, workers: int, prefetch: int
) -> Iterator[Portion]:
    """Yield the pictures of `works` in batches, read and preprocessed by threads ahead of use.

    A batch holds pictures of one prompt, and which ones depends on the work alone.
    """
    blank = np.zeros((*found.manifest.size, 3), np.uint8)

    def load(work: Work, step: int, image: int) -> tuple[dict[Any, Any], TrajectoryError | None]:
        from PIL import Image

        failure = None
        try:
            pixels = found.read(work.prompt, image, step)
        except TrajectoryError as error:
            pixels, failure = blank, error  # keeps its place, so that the others' batch is what it would have been
        picture = Image.fromarray(pixels)
        kinds = {call.reward.preprocessing for call in work.calls if step in call.steps}
        return {kind: picture if kind is None else kind.image(picture) for kind in kinds}, failure

    def jobs() -> Iterator[tuple[Work, list[tuple[int, int]], bool]]:
        for work in works:
            for start in range(0, len(work.slots), batch_size):
                last = start + batch_size >= len(work.slots)
                yield work, list(work.slots[start : start + batch_size]), last

    with ThreadPoolExecutor(workers, thread_name_prefix="ttsnap-score") as pool:
        ahead: deque[tuple[Work, list[tuple[int, int]], bool, list[Future]]] = deque()
        todo = jobs()
        try:
            while True:
                while len(ahead) <= prefetch:
                    job = next(todo, None)
                    if job is None:
                        break
                    ahead.append((*job, [pool.submit(load, job[0], *slot) for slot in job[1]]))
                if not ahead:
                    return
                work, slots, last, futures = ahead.popleft()
                results = [future.result() for future in futures]
                failed = {row: error for row, (_, error) in enumerate(results) if error is not None}
                yield Portion(work, slots, [prepared for prepared, _ in results], failed, last)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Skipped:
    """A score that was left NaN, and why."""

    prompt: int
    image: int
    step: int
    reward: str
    variant: str
    reason: str


@dataclass
class ScoreReport:
    """What a call of :func:`score` did."""

    path: Path
    pictures: int = 0
    """Pictures read now; each is scored by every reward and variant that lacks it."""
    scores: int = 0
    elapsed_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the time of the main thread went: wait (for reading), model, write."""
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def images_per_s(self) -> float:
        """Pictures per second, all of it counted."""
        return self.pictures / self.elapsed_s if self.elapsed_s else 0.0

    def __str__(self) -> str:
        if not self.pictures:
            return f"{self.path}: nothing left to score"
        text = f"{self.path}: {self.pictures} pictures, {self.scores} scores, {self.images_per_s:.1f} images/s"
        if self.skipped:
            text += f", {len(self.skipped)} scores skipped"
        return text


class ScoreRun:
    """Scores batches and writes each work's values when its last batch is through."""

    def __init__(self, store: RewardStore, found: Trajectories, on_error: str, report: ScoreReport) -> None:
        self.store, self.found, self.skip, self.report = store, found, on_error == "skip", report
        self._values: dict[tuple[str, str], np.ndarray] = {}
        self._column = {step: k for k, step in enumerate(store.steps)}

    def spent(self, part: str, since: float) -> None:
        self.report.seconds[part] = self.report.seconds.get(part, 0.0) + time.perf_counter() - since

    def batch(self, portion: Portion) -> None:
        """Score one batch by every call of its work."""
        for row, error in portion.failed.items():
            if not self.skip:
                raise error
            step, image = portion.slots[row]
            for call in portion.work.calls:
                if step in call.steps:
                    self._skip(portion.work, call, step, image, str(error))
        begin = time.perf_counter()
        for call in portion.work.calls:
            if call.variant == "base":
                rows = [row for row, (step, _) in enumerate(portion.slots) if step in call.steps]
                self._call(portion, call, rows, None)
                continue
            for step in sorted({step for step, _ in portion.slots} & call.steps):
                self._call(portion, call, [row for row, slot in enumerate(portion.slots) if slot[0] == step], step)
        self.spent("model", begin)
        if portion.last:
            begin = time.perf_counter()
            self.store.write(portion.work.prompt, self._values)
            self._values = {}
            self.spent("write", begin)

    def _call(self, portion: Portion, call: Call, rows: list[int], step: int | None) -> None:
        if not rows:
            return
        call.reward.use_step(step)
        try:
            scores, reasons = self._score(portion, call, rows)
        finally:
            call.reward.use_step(None)
        table = self._values.setdefault(
            (call.reward.name, call.variant),
            np.full((self.store.n_images, len(self.store.steps)), np.nan, np.float32),
        )
        for k, row in enumerate(rows):
            at, image = portion.slots[row]
            if row in portion.failed:
                continue
            if np.isfinite(scores[k]):
                table[image, self._column[at]] = scores[k]
                self.report.scores += 1
                continue
            if not self.skip:
                raise RewardError(
                    f"reward {call.reward.name} gave a score that is not finite for "
                    f"{self.found.path(portion.work.prompt, image, at)}: got {float(scores[k])!r}, expected a finite "
                    "number. Look at the picture and the weights; --on-error skip leaves such scores out."
                )
            self._skip(portion.work, call, at, image, reasons.get(k, f"score {scores[k]}"))

    def _score(self, portion: Portion, call: Call, rows: list[int]) -> tuple[np.ndarray, dict[int, str]]:
        """Return the scores of some rows and, where there is none, why."""
        text = self.found.prompts[portion.work.prompt]
        try:
            return _forward(call.reward, text, portion.inputs(call.reward, rows)), {}
        except DeviceError:
            raise
        except Exception as error:  # a function given as a reward may raise anything
            if not self.skip:
                raise self._named(portion, call, rows, error) from error
        scores, reasons = np.full(len(rows), np.nan, np.float32), {}
        for k, row in enumerate(rows):  # find the pictures that it cannot score
            try:
                scores[k] = _forward(call.reward, text, portion.inputs(call.reward, [row]))[0]
            except Exception as error:  # noqa: BLE001
                reasons[k] = f"{type(error).__name__}: {error}"
        return scores, reasons

    def _named(self, portion: Portion, call: Call, rows: list[int], error: Exception) -> RewardError:
        step, image = portion.slots[rows[0]]
        first = self.found.path(portion.work.prompt, image, step)
        detail = str(error) if isinstance(error, TTSnapError) else f"{type(error).__name__}: {error}"
        return RewardError(
            f"reward {call.reward.name} failed on {first} and the {len(rows) - 1} after it in the batch ({detail}): "
            f"got {first}, expected a picture that the reward can score. Mend the reward; scores that are written "
            "stay, and the same command goes on."
        )

    def _skip(self, work: Work, call: Call, step: int, image: int, reason: str) -> None:
        self.report.skipped.append(Skipped(work.prompt, image, step, call.reward.name, call.variant, reason))


def _forward(reward: Reward, text: str, inputs: Any) -> np.ndarray:
    if reward.preprocessing is None:
        return reward.score(text, inputs, batch_size=len(inputs), check=False)
    return reward.score_pixels(text, inputs)


Rewards = str | Path | Reward | Callable | Sequence[str | Path | Reward | Callable]


def score(
    folder: str | Path,
    rewards: Rewards,
    out: str | Path,
    *,
    steps: Sequence[int] | None = None,
    batch_size: int = 32,
    shard: tuple[int, int] | str | None = None,
    on_error: str = "raise",
    noise_aware: str | Path | Mapping[str, str | Path] | None = None,
    device: Any = None,
    dtype: Any = "float32",
    compile: bool = False,
    workers: int = 4,
    prefetch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> ScoreReport:
    """Score the pictures of a trajectory folder into a reward tensor.

    The tensor is created, or the one at `out` goes on: what it has is not scored again, other rewards, prompts,
    images and steps are added. Scores are written prompt by prompt, so a process that is killed loses one prompt.
    The bytes of the tensor do not depend on how the work was split or stopped.

    Parameters
    ----------
    folder : str or Path
        A trajectory folder.
    rewards : str, Reward, function, or list of them
        What :func:`ttsnap_lib.rewards.load_reward` takes. Several are scored in one pass over the files.
    out : str or Path
        The tensor, a Zarr store.
    steps : sequence of int, optional
        Steps to score, all of them when not given; negative ones count from the end.
    batch_size : int
        Pictures per forward pass.
    shard : (int, int) or str, optional
        Index and count, such as ``"0/2"``; shards own whole chunks of 25 prompts. By default the place in an
        ``accelerate launch``, else everything.
    on_error : {"raise", "skip"}
        What to do about a picture that is missing or damaged, or a score that is not finite: stop (scores that are
        written stay), or leave NaN, list it in the report and in ``<out>.skipped.json``, and go on.
    noise_aware : str, Path or mapping, optional
        Run folder of noise-aware checkpoints, or reward name -> folder. Its steps fill ``noise_aware``; elsewhere the
        base value is copied, and ``noise_aware_source`` says so. A reward that comes with adapters uses them.
    device, dtype, compile
        For rewards that are loaded here, see :func:`ttsnap_lib.rewards.load_reward`.
    workers, prefetch : int
        Threads that read and preprocess, and batches that they are ahead.
    progress : callable, optional
        ``progress(done, total)`` in pictures of this shard.

    Returns
    -------
    ScoreReport

    Raises
    ------
    TrajectoryError
        No trajectory folder; a picture that is missing or damaged.
    RewardError
        A reward that cannot be loaded, raises, or gives a score that is not finite; file and index are named.
    CheckpointError
        Noise-aware weights that do not fit.
    TensorError
        A tensor at `out` of other prompts, trajectories or weights.
    """
    integer("batch_size", batch_size, 1)
    choice("on_error", on_error, ("raise", "skip"))
    workers, prefetch = integer("workers", workers, 1, 256), integer("prefetch", prefetch, 0)
    part = parse_shard(shard)
    found = Trajectories(folder)
    chosen = chosen_steps(steps, found.n_steps)
    models = load_rewards(
        rewards, noise_aware, device=device, dtype=dtype, compile=compile, batch_size=batch_size, steps=found.n_steps
    )
    plans = [reward_plan(model, chosen) for model in models]
    report = ScoreReport(Path(out))
    attributes = {"model": str(found.manifest.identity.get("model", "")), "source": "ttsnap score"}
    attributes["trajectories"] = identity_digest(found.manifest.identity)
    n_images = found.images_per_prompt
    with open_store(out, plans, found.prompts, n_images, chosen, shard=part, attributes=attributes) as store:
        works = plan_work(store, models, chosen, n_images)
        if on_error == "raise":
            _check_whole(found, works)
        begin = time.perf_counter()
        total = sum(len(work.slots) for work in works)
        if progress is not None:
            progress(0, total)
        run = ScoreRun(store, found, on_error, report)
        reader = read_ahead(found, works, batch_size, workers=workers, prefetch=prefetch)
        waited = time.perf_counter()
        for portion in reader:
            run.spent("wait", waited)
            run.batch(portion)
            report.pictures += len(portion.slots)
            if progress is not None:
                progress(report.pictures, total)
            waited = time.perf_counter()
        report.elapsed_s = time.perf_counter() - begin
    _list_skipped(report, part)
    return report


def load_rewards(
    rewards: Rewards,
    noise_aware: str | Path | Mapping[str, str | Path] | None = None,
    *,
    steps: int | None = None,
    **options: Any,
) -> list[Reward]:
    """Load one or several rewards and attach their noise-aware series.

    Parameters
    ----------
    rewards : str, path, Reward, callable, or a list of them
        As :func:`ttsnap_lib.rewards.load_reward` takes them.
    noise_aware : str, Path or mapping, optional
        One run folder when there is one reward, else reward name -> folder.
    steps : int, optional
        Number of steps of the trajectories; a series for later steps is refused.
    options : Any
        Device, dtype and so on, for what is loaded here.

    Returns
    -------
    list of Reward

    Raises
    ------
    ConfigError, CheckpointError
        No reward, two of one name, or a series that does not fit the rewards or the steps.
    """
    given: list[Any] = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    if not given:
        raise ConfigError(f'rewards: got {given!r}, expected one or more. Name one, for example "pocket-clip".')
    models = [entry if isinstance(entry, Reward) else load_reward(entry, **options) for entry in given]
    names = [model.name for model in models]
    if len(set(names)) != len(names):
        raise ConfigError(f"rewards: got {names!r}, expected distinct names. Load one with another name=.")
    if noise_aware is not None:
        if not isinstance(noise_aware, Mapping):
            if len(models) > 1:
                raise ConfigError(
                    f"noise_aware: got {noise_aware}, expected reward=folder for each of several rewards. Write for "
                    f"example {names[0]}={noise_aware}."
                )
            noise_aware = {names[0]: noise_aware}
        for name, folder in noise_aware.items():
            models[names.index(choice("noise_aware", name, names))].attach_steps(folder)
    for model in models:
        if steps is not None and any(step >= steps for step in model.adapter_steps):
            raise CheckpointError(
                f"noise-aware weights of {model.name} are for other trajectories: got {model.adapter_steps!r}, "
                f"expected steps below {steps}. Use a series that was trained on trajectories of as many steps."
            )
    return models


def reward_plan(reward: Reward, steps: Sequence[int]) -> RewardPlan:
    """Return what a tensor keeps to tell this reward from another one of the same name."""
    reward.use_step(None)
    series = {step: reward.step_fingerprint(step) for step in reward.adapter_steps if step in steps}
    return RewardPlan(reward.name, reward.fingerprint(), series)


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Return a digest of a manifest's identity: what decides the pictures."""
    import hashlib
    import json

    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def chosen_steps(given: Sequence[int] | None, n: int) -> list[int]:
    """Return steps as ascending indices; all `n` when None, negative ones from the end.

    Raises
    ------
    ConfigError
        A step that is not there, or none.
    """
    if given is None:
        return list(range(n))
    chosen = sorted({integer("steps", step, -n, n - 1) % n for step in given})
    if not chosen:
        raise ConfigError(f"steps: got {given!r}, expected one or more. Leave it out to score all steps.")
    return chosen


def _check_whole(found: Trajectories, works: Sequence[Work]) -> None:
    """Refuse missing files before anything is scored."""
    for prompt in dict.fromkeys(work.prompt for work in works):
        state = found.state(prompt)
        missing = [image for image in range(found.images_per_prompt) if image not in state.whole]
        if missing:
            gone = state.incomplete.get(missing[0], [0])
            raise TrajectoryError(
                f"{found.path(prompt, missing[0], gone[0])} is missing: got {len(missing)} of "
                f"{found.images_per_prompt} images of prompt {prompt} are not whole, expected every image, with all "
                "its steps in files and folders of its own. Run the same `ttsnap generate` again: it goes on where it "
                "stopped. --on-error skip scores the rest."
            )


def _list_skipped(report: ScoreReport, shard: tuple[int, int]) -> None:
    suffix = "" if shard[1] == 1 else f"-{shard[0]}of{shard[1]}"
    path = report.path.parent / f"{report.path.name}.skipped{suffix}.json"
    if report.skipped:
        write_json(path, [vars(entry) for entry in report.skipped])
    else:
        path.unlink(missing_ok=True)


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
                f"reward {reward.name} gave a score that is not finite for prompt {prompt}, image {image}, step "
                f"{step}: got {[float(score) for score in scores]!r}, expected finite numbers. Look at the image "
                "(generate it into a folder) and the weights; prompts that are written stay."
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

    from ttsnap_lib.diffusion.denoise import Denoiser
    from ttsnap_lib.trajectories.generate import generate

    if "folder" in generate_options:
        raise ConfigError(
            f"folder: got {generate_options['folder']!r}, expected no folder: images that are scored as they are made "
            "are not kept. To keep the images, generate first and score the folder."
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
    from ttsnap_lib.trajectories.generate import identity_of

    return identity_of(denoiser)
