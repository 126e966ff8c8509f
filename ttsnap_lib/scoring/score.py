"""Pictures and rewards in, a reward tensor out: of a trajectory folder, or of images as they are generated.

Both are sources of one :class:`Scorer`, which takes pictures in batches and writes a prompt when its last one is through.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttsnap_lib.checks import choice, integer
from ttsnap_lib.errors import CheckpointError, ConfigError, DeviceError, RewardError, TrajectoryError, TTSnapError
from ttsnap_lib.files import cores, digest, parse_shard, prefetch, write_json
from ttsnap_lib.provenance import Clock
from ttsnap_lib.rewards.base import Reward, require_metadata
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.schedule import Draft
from ttsnap_lib.scoring.store import RewardPlan, RewardStore, open_store
from ttsnap_lib.tensors.spread import flat, tell_flat
from ttsnap_lib.trajectories.layout import start_of
from ttsnap_lib.trajectories.prompts import PromptList, read_prompts
from ttsnap_lib.trajectories.read import Trajectories

Rewards = str | Path | Reward | Callable | Sequence[str | Path | Reward | Callable]
"""What :func:`ttsnap_lib.load_reward` takes, or several of them."""
NoiseAware = str | Path | Mapping[str, str | Path] | None
"""One run folder of noise-aware checkpoints when there is one reward, else reward name -> folder."""


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
    """Pictures taken now; each is scored by every reward and variant that lacks it."""
    scores: int = 0
    elapsed_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the time of the main thread went: wait (for reading), model, write."""
    skipped: list[Skipped] = field(default_factory=list)
    embedding_bytes: int = 0
    """Bytes of all embeddings of the tensor, before compression."""

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
        if self.embedding_bytes:
            text += f", embeddings of {self.embedding_bytes / 1e6:.3g} MB in all, uncompressed"
        return text


def score(
    folder: str | Path,
    rewards: Rewards,
    out: str | Path,
    *,
    steps: Sequence[int] | None = None,
    batch_size: int = 32,
    shard: tuple[int, int] | str | None = None,
    on_error: str = "raise",
    noise_aware: NoiseAware = None,
    embeddings: bool = False,
    device: Any = None,
    dtype: Any = "float32",
    compile: bool = False,
    workers: int | None = None,
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
        What :func:`ttsnap_lib.load_reward` takes. Several are scored in one pass over the files.
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
    embeddings : bool
        Also keep what the image tower of the first reward that has one says of each picture, by its base weights: the
        variable ``embedding``, float16 (prompt, image, step, feature), for sets of images
        (:func:`ttsnap_lib.simulation.sets.simulate_sets`). Two bytes a feature: 200 prompts x 200 images x 20 steps of CLIP-H
        (1024 features) are 1.6 GB.
    device, dtype, compile
        For rewards that are loaded here, see :func:`ttsnap_lib.load_reward`.
    workers : int, optional
        Threads that read and resize pictures ahead of the model; one for each core when not given.
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
    DiskError, DeviceError
        The disk is full or the shard is taken; the device is out of memory.
    """
    choice("on_error", on_error, ("raise", "skip"))
    batch_size = integer("batch_size", batch_size, 1)
    workers = integer("workers", cores() if workers is None else workers, 1, 256)
    part, found = parse_shard(shard), Trajectories(folder)
    chosen, n_images = chosen_steps(steps, found.n_steps), found.images_per_prompt
    models = load_rewards(
        rewards, noise_aware, steps=found.n_steps, device=device, dtype=dtype, compile=compile, batch_size=batch_size
    )
    scoring = open_scorer(
        out, models, found.prompts, n_images, chosen, found.manifest.identity,
        source="ttsnap score", shard=part, where=found.path, skip=on_error == "skip", embeddings=embeddings,
    )  # fmt: skip
    with scoring as scorer:
        report, works = scorer.report, scorer.works
        if on_error == "raise":
            for prompt in dict.fromkeys(work.prompt for work in works):
                found.require_whole(prompt, range(n_images))
        begin, total = time.perf_counter(), sum(len(work) for work in works)
        if progress is not None:
            progress(0, total)
        portions = read_portions(found, works, batch_size, workers)
        while True:
            with scorer.clock("wait"):
                portion = next(portions, None)
            if portion is None:
                break
            scorer.take(portion)
            if progress is not None:
                progress(report.pictures, total)
        report.elapsed_s = time.perf_counter() - begin
    suffix = "" if part[1] == 1 else f"-{part[0]}of{part[1]}"
    listed = report.path.parent / f"{report.path.name}.skipped{suffix}.json"
    if report.skipped:
        write_json(listed, [vars(entry) for entry in report.skipped])
    else:
        listed.unlink(missing_ok=True)
    return report


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
    shard: tuple[int, int] | str | None = None,
    noise_aware: NoiseAware = None,
    embeddings: bool = False,
    decoder: Any = None,
    **generate_options: Any,
) -> ScoreReport:
    """Generate trajectories and keep their rewards alone (``ttsnap generate --score``).

    Arguments are those of :func:`ttsnap_lib.generate`, without a folder, and of :func:`ttsnap_lib.score`. With a tiny
    `decoder` the scores before the last step are those that a search with it sees; the tensor's attribute ``decoder``
    names it. The tensor is
    that of the two after each other, up to the last bits: pictures are rounded to 8 bits as files are, and only the
    composition of the reward's batches differs.
    """
    from ttsnap_lib.diffusion.denoise import Denoiser
    from ttsnap_lib.diffusion.pipelines import load_decoder
    from ttsnap_lib.trajectories.generate import generate
    from ttsnap_lib.trajectories.identity import decoder_digest, embeds_digests, identity_of

    if "folder" in generate_options:
        raise ConfigError("folder: images are not kept here. Generate into a folder first and score the folder.")
    prompts, part = read_prompts(prompts), parse_shard(shard)
    denoiser = Denoiser(pipeline, settings)
    decoder = load_decoder(decoder, denoiser.pipeline)
    n_steps = denoiser.settings.n_steps
    chosen, models = chosen_steps(steps, n_steps), load_rewards(rewards, noise_aware, steps=n_steps)
    identity = {**identity_of(denoiser), "seed": seed, "negtome": None if negtome is None else negtome.to_dict()}
    if decoder is not None:
        identity["decoder"] = decoder_digest(decoder)
    embeds = generate_options.get("prompt_embeds")
    if embeds is not None:
        identity["prompt_embeds"] = embeds_digests(denoiser.given(embeds, len(prompts)))
    begin = time.perf_counter()
    scoring = open_scorer(
        out, models, prompts, images_per_prompt, chosen, identity,
        source="ttsnap generate --score", shard=part, where="prompt {}, image {}, step {}".format, embeddings=embeddings,
    )  # fmt: skip
    with scoring as scorer:
        inline = InlineScorer(scorer)
        generate(
            pipeline, prompts, on_batch=inline, only=inline.only, steps=chosen, shard=(0, 1), decoder=decoder,
            images_per_prompt=images_per_prompt, settings=settings, seed=seed, negtome=negtome, **generate_options,
        )  # fmt: skip
    scorer.report.elapsed_s = time.perf_counter() - begin
    return scorer.report


def draft_scores(
    pipeline: Any,
    prompts: str | Path | Sequence[str],
    out: str | Path,
    rewards: Rewards,
    draft: int,
    *,
    settings: Any = None,
    **options: Any,
) -> ScoreReport:
    """Score the drafts that ``search(..., draft=...)`` makes: `draft` steps from the seeds of the full run, whose `settings` they have.

    `options` are those of :func:`generate_scores`. With the tensor of the full run :class:`ttsnap_lib.simulation.draft.Drafts`
    tells what drafts would give (``ttsnap generate --draft``).
    """
    from ttsnap_lib.diffusion.denoise import as_settings
    from ttsnap_lib.diffusion.schedulers import spaced_for_drafts

    whole = as_settings(settings)
    Draft(draft, 1).check(whole.n_steps)
    with spaced_for_drafts(pipeline):
        few = replace(whole, n_steps=draft)
        return generate_scores(pipeline, prompts, out, rewards, settings=few, steps=[-1], **options)


class InlineScorer:
    """What ``generate(on_batch=...)`` hands its pictures to, which never leave the device.

    Their scores come to the host once in a batch, so that the device goes on to the next step. A prompt is written when
    all its images have come. What a process that is killed leaves is a tensor of whole prompts; :attr:`only` names the
    images of the others, for ``generate(only=...)``.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._works: dict[int, Work] = {}
        for work in scorer.works:  # one pass for all of a prompt: the pictures come once
            self._works.setdefault(work.prompt, Work(work.prompt, [], work.n_images)).calls.extend(work.calls)

    @property
    def only(self) -> list[tuple[int, int]]:
        """The (prompt, image) pairs that are still to be generated."""
        return [(prompt, image) for prompt, work in self._works.items() for image in range(work.n_images)]

    def __call__(self, prompt: int, images: list[int], step: int, pixels: torch.Tensor) -> None:
        """Score the pictures ``pixels`` (n, 3, height, width) of one prompt at one step."""
        work = self._works.get(prompt)
        if work is None or step not in work.steps:
            return
        prepared: dict[Any, torch.Tensor] = {}

        def inputs(reward: Reward, rows: list[int]) -> torch.Tensor:
            found = pixels
            if reward.preprocessing is not None:
                key = (reward.preprocessing, reward.device)
                if key not in prepared:  # rewards with equal preprocessing share the pixels
                    prepared[key] = reward.preprocessing.tensor(pixels.to(reward.device))
                found = prepared[key]
            return found if len(rows) == len(found) else found[rows]  # an index would wait for the device

        if self._scorer.take(Portion(work, [(step, image) for image in images], inputs)):
            del self._works[prompt]
        elif step == work.steps[-1]:
            self._scorer.settle(work)


def load_rewards(rewards: Rewards, noise_aware: NoiseAware = None, *, steps: int | None = None, **options: Any) -> list:
    """Load one or several rewards (with `options`: device and so on) and attach their noise-aware series.

    A series for later steps than the `steps` of the trajectories is refused.
    """
    given: list[Any] = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    if not given:
        raise ConfigError(f'rewards: got {given!r}, expected one or more. Name one, for example "pocket-clip".')
    models = [entry if isinstance(entry, Reward) else load_reward(entry, **options) for entry in given]
    every = [name for model in models for name in model.names]
    if len(set(every)) != len(every):
        raise ConfigError(f"rewards: got {every!r}, expected distinct names. Load one with another name=.")
    names = [model.name for model in models]
    if noise_aware is not None and not isinstance(noise_aware, Mapping):
        if len(models) > 1:
            example = f"{names[0]}={noise_aware}"
            raise ConfigError(f"noise_aware: got {noise_aware}, expected reward=folder. Write for example {example}.")
        noise_aware = {names[0]: noise_aware}
    for name, folder in (noise_aware or {}).items():
        models[names.index(choice("noise_aware", name, names))].attach_steps(folder)
    for model in models:
        if steps is not None and any(step >= steps for step in model.adapter_steps):
            raise CheckpointError(
                f"noise-aware weights of {model.name} are for other trajectories: got {model.adapter_steps!r}, "
                f"expected steps below {steps}. Use another series."
            )
    return models


def chosen_steps(given: Sequence[int] | None, n: int) -> list[int]:
    """Return steps as ascending indices; all `n` when None, negative ones from the end."""
    if given is None:
        return list(range(n))
    chosen = sorted({integer("steps", step, -n, n - 1) % n for step in given})
    if not chosen:
        raise ConfigError(f"steps: got {given!r}, expected one or more. Leave it out to score all steps.")
    return chosen


# What there is to score


@dataclass(frozen=True)
class Call:
    """One variant of one reward and the steps it has to score."""

    reward: Reward
    variant: str
    steps: frozenset[int]
    embeds: bool = False
    """Whether embeddings are kept beside the scores."""


@dataclass(eq=False)
class Work:
    """What pictures of one prompt are to be scored by in one pass, and the scores so far."""

    prompt: int
    calls: list[Call]
    n_images: int
    values: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    embedding: np.ndarray | None = None
    """(image, step, feature)."""
    scored: list[Scored] = field(default_factory=list)
    done: int = 0
    """Pictures that are through."""

    @property
    def steps(self) -> list[int]:
        """Steps that some call needs."""
        return sorted(frozenset().union(*(call.steps for call in self.calls)))

    def __len__(self) -> int:
        return len(self.steps) * self.n_images


@dataclass
class Scored:
    """Scores that a call gave, where they were computed: copying them to the host would wait for the device."""

    call: Call
    slots: list[tuple[int, int]]
    """(step, image)."""
    scores: torch.Tensor
    reasons: dict[int, str]
    """Place in `slots` -> why there is no score."""
    embeddings: tuple[list[int], list[torch.Tensor]] = ([], [])
    """Places in `slots`, and what the image tower says of the pictures there."""


@dataclass
class Portion:
    """Some pictures of a work."""

    work: Work
    slots: list[tuple[int, int]]
    """(step, image)."""
    inputs: Callable[[Reward, list[int]], Any]
    """Gives some rows as a reward takes them."""
    failed: dict[int, TrajectoryError] = field(default_factory=dict)
    """Row -> why it could not be read."""


def plan_work(
    store: RewardStore, rewards: Sequence[Reward], steps: Sequence[int], n_images: int, eye: Reward | None = None
) -> list[Work]:
    """Return what is left of this shard, chunk by chunk; `eye` is the reward whose embeddings are wanted too.

    Adapters are switched within a batch. Full weights are slow to switch: each of their steps gets a pass of its own
    over a chunk.
    """
    works: list[Work] = []
    for chunk in store.chunks:
        later: dict[tuple[int, int], list[Work]] = {}
        for prompt in chunk:
            calls = []
            for number, reward in enumerate(rewards):
                left = [store.todo(name, prompt, steps, n_images) for name in reward.names]
                base = {step for open_base, _ in left for step in open_base}
                if reward is eye:
                    base.update(store.without_embedding(prompt, steps, n_images))
                if base:
                    calls.append(Call(reward, "base", frozenset(base), reward is eye))
                aware = sorted({step for _, open_aware in left for step in open_aware if step in reward.adapter_steps})
                if aware and reward.series_kind == "lora":
                    calls.append(Call(reward, "noise_aware", frozenset(aware)))
                elif aware:
                    for step in aware:
                        work = Work(prompt, [Call(reward, "noise_aware", frozenset([step]))], n_images)
                        later.setdefault((number, step), []).append(work)
            store.settle(prompt)  # a process may have ended between the values and the status
            if calls:
                works.append(Work(prompt, calls, n_images))
        for key in sorted(later):
            works += later[key]
    return works


def read_portions(found: Trajectories, works: Sequence[Work], batch_size: int, workers: int) -> Iterator[Portion]:
    """Yield the pictures of `works` in batches, read and resized by threads up to two batches ahead of use.

    A batch holds pictures of one prompt, and which ones depends on the work alone.
    """
    from PIL import Image

    blank = np.zeros((*found.manifest.size, 3), np.uint8)

    def load(slot: tuple[Work, int, int]) -> tuple[dict[Any, Any], TrajectoryError | None]:
        (work, step, image), failure = slot, None
        try:
            pixels = found.read(work.prompt, image, step)
        except TrajectoryError as error:  # keeps its place, so that the others' batch is as it would have been
            pixels, failure = blank, error
        picture = Image.fromarray(pixels)
        kinds = {call.reward.preprocessing for call in work.calls if step in call.steps}
        return {kind: picture if kind is None else kind.resized(picture) for kind in kinds}, failure

    def portion(work: Work, slots: list[tuple[int, int]]) -> Portion:
        loaded = list(itertools.islice(pictures, len(slots)))

        def inputs(reward: Reward, rows: list[int]) -> Any:
            values = [loaded[row][0][reward.preprocessing] for row in rows]
            return values if reward.preprocessing is None else reward.preprocessing.batch(values, reward.device)

        failed = {row: failure for row, (_, failure) in enumerate(loaded) if failure is not None}
        return Portion(work, slots, inputs, failed)

    def slots(work: Work) -> Iterator[tuple[int, int]]:
        return itertools.product(work.steps, range(work.n_images))

    in_order = ((work, *slot) for work in works for slot in slots(work))
    pictures = prefetch(load, in_order, workers=workers, ahead=2 * batch_size)
    for work in works:
        left = slots(work)
        while part := list(itertools.islice(left, batch_size)):
            yield portion(work, part)


# Scoring it


@contextlib.contextmanager
def open_scorer(
    out: str | Path,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    n_images: int,
    steps: Sequence[int],
    identity: Mapping[str, Any],
    *,
    source: str,
    shard: tuple[int, int],
    where: Callable[[int, int, int], object],
    skip: bool = False,
    embeddings: bool = False,
) -> Iterator[Scorer]:
    """Open the tensor at `out`, and plan what is left to score of trajectories of an `identity`."""
    prompts = read_prompts(prompts)
    require_metadata(rewards, prompts.metadata)
    plans = []
    for reward in rewards:
        reward.use_step(None)
        series = {step: reward.step_fingerprint(step) for step in reward.adapter_steps if step in steps}
        plans += [RewardPlan(name, reward.fingerprint(), series) for name in reward.names]
    attributes: dict[str, Any] = {
        "model": str(identity.get("model", "")), "source": source, "trajectories": digest(identity),
        "made_with": start_of(identity),
    }  # fmt: skip
    if identity.get("height") == identity.get("width") is not None:
        attributes["size"] = int(identity["width"])  # with the model it says what a picture costs
    if identity.get("decoder"):
        attributes["decoder"] = identity["decoder"]  # what all pictures but the last step's were decoded by
    eye, embedding = next((reward for reward in rewards if embeddings and reward.embeds), None), None
    if eye is not None:
        embedding = {"reward": eye.name, "weights": eye.fingerprint(), "features": eye.embedding_width()}
    elif embeddings:
        raise RewardError(
            f"embeddings: got {[reward.name for reward in rewards]}, expected a reward with an image tower among them. Add a "
            "CLIP reward or image_reward, or leave embeddings out."
        )
    options: dict[str, Any] = {"shard": shard, "attributes": attributes, "embedding": embedding}
    with open_store(out, plans, prompts, n_images, steps, **options) as store:
        scorer = Scorer(store, plan_work(store, rewards, steps, n_images, eye), prompts, where, skip)
        scorer.report.embedding_bytes = 0 if eye is None else store.embedding_bytes
        yield scorer
        tell_flat(scorer.flat, stacklevel=4)


class Scorer:
    """Scores pictures as they come, and writes the scores of a work when its last picture is through.

    `where(prompt, image, step)` names a picture in errors. With `skip`, what cannot be read or scored stays NaN and is
    listed in the report.
    """

    def __init__(
        self,
        store: RewardStore,
        works: list[Work],
        prompts: PromptList,
        where: Callable[[int, int, int], object],
        skip: bool,
    ) -> None:
        self.store, self.works, self.prompts, self.where, self.skip = store, works, prompts, where, skip
        self.clock = Clock()
        self.report = ScoreReport(store.path, seconds=self.clock.seconds)
        self._column = {step: k for k, step in enumerate(store.steps)}
        self.flat: dict[str, tuple[int, int]] = {}
        """By reward: prompts whose pictures all have the same score, or none, at the last step scored; of how many."""

    def take(self, portion: Portion) -> bool:
        """Score some pictures by every call of their work; return whether the work is through."""
        work = portion.work
        if portion.failed and not self.skip:
            raise next(iter(portion.failed.values()))
        with self.clock("model"):
            for call in work.calls:
                rows = [row for row, (step, _) in enumerate(portion.slots) if step in call.steps]
                if call.variant == "base":
                    self._call(portion, call, rows, None)
                    continue
                for at in sorted({portion.slots[row][0] for row in rows}):
                    self._call(portion, call, [row for row in rows if portion.slots[row][0] == at], at)
        self.report.pictures += len(portion.slots)
        work.done += len(portion.slots)
        if work.done < len(work):
            return False
        self.settle(work)
        self._look(work)
        with self.clock("write"):
            self.store.write(work.prompt, work.values, work.embedding)
        work.values, work.embedding = {}, None
        return True

    def _call(self, portion: Portion, call: Call, rows: list[int], at: int | None) -> None:
        """Score some rows with the weights of step `at`."""
        if not rows:
            return
        gathering: Any = call.reward.embeddings() if call.embeds else contextlib.nullcontext([])
        with call.reward.at(at), gathering as seen:
            scores, reasons = self._scores(portion, call, rows)
        places = [k for k in range(len(rows)) if k not in reasons] if seen else []
        reasons |= {k: str(portion.failed[row]) for k, row in enumerate(rows) if row in portion.failed}
        portion.work.scored.append(Scored(call, [portion.slots[row] for row in rows], scores, reasons, (places, seen)))

    def settle(self, work: Work) -> None:
        """Bring the scores of a work so far to the host, and look at them."""
        with self.clock("model"):
            found = [(one, one.scores.cpu().numpy()) for one in work.scored]
        work.scored = []
        for one, scores in found:
            self._keep_embeddings(work, one)
            for name, values in zip(one.call.reward.names, scores.reshape(len(one.slots), -1).T, strict=True):
                self._keep(work, one, name, values)

    def _keep_embeddings(self, work: Work, one: Scored) -> None:
        """Put what the image tower says of some pictures into the table of their work."""
        places, parts = one.embeddings
        if not places:
            return
        rows = torch.cat(parts).half().cpu().numpy()
        if work.embedding is None:
            shape = (self.store.n_images, len(self.store.steps), rows.shape[1])
            work.embedding = np.full(shape, np.nan, np.float16)
        for k, row in zip(places, rows, strict=True):
            step, image = one.slots[k]
            if k not in one.reasons:
                work.embedding[image, self._column[step]] = row

    def _look(self, work: Work) -> None:
        """Note whether the base rewards say anything within the prompt."""
        for call in work.calls if work.n_images > 1 else ():
            for name in call.reward.names if call.variant == "base" else ():
                last = work.values[name, "base"][: work.n_images, self._column[max(call.steps)]]
                n, of = self.flat.get(name, (0, 0))
                self.flat[name] = n + int(flat(last)), of + 1

    def _keep(self, work: Work, one: Scored, name: str, values: np.ndarray) -> None:
        """Put one reward's scores of some pictures into the table of their work; a missing one is listed, or raised."""
        table = work.values.setdefault(
            (name, one.call.variant), np.full((self.store.n_images, len(self.store.steps)), np.nan, np.float32)
        )
        for k, ((step, image), value) in enumerate(zip(one.slots, values, strict=True)):
            if k not in one.reasons and np.isfinite(value):
                table[image, self._column[step]] = value
                self.report.scores += 1
                continue
            if not self.skip:
                raise RewardError(
                    f"reward {name} gave {value}, not finite for {self.where(work.prompt, image, step)}. Look at the "
                    "picture and the weights; --on-error skip leaves such scores out."
                )
            reason = one.reasons.get(k, f"score {value}")
            self.report.skipped.append(Skipped(work.prompt, image, step, name, one.call.variant, reason))

    def _scores(self, portion: Portion, call: Call, rows: list[int]) -> tuple[torch.Tensor, dict[int, str]]:
        """Return the scores of some rows and, by place among them, why there is none."""
        reward, text = call.reward, self.prompts[portion.work.prompt]
        metadata = self.prompts.metadata[portion.work.prompt]

        def forward(rows: list[int]) -> torch.Tensor:
            inputs = portion.inputs(reward, rows)
            if reward.preprocessing is None:
                found = reward.score(text, inputs, metadata=metadata, batch_size=len(rows), check=False)
                return torch.from_numpy(found)
            return reward.score_pixels(text, inputs, metadata)

        try:
            scores = forward(rows)
        except DeviceError:
            raise
        except Exception as error:  # a function given as a reward may raise anything
            if not self.skip:
                step, image = portion.slots[rows[0]]
                detail = str(error) if isinstance(error, TTSnapError) else f"{type(error).__name__}: {error}"
                raise RewardError(
                    f"reward {reward.name} failed on {self.where(portion.work.prompt, image, step)} and the "
                    f"{len(rows) - 1} after it ({detail}). Mend the reward; the same command goes on from here."
                ) from error
        else:
            failures = dict(reward.failures) if reward.preprocessing is None else {}
            if failures and not self.skip:
                k = min(failures)
                step, image = portion.slots[rows[k]]
                raise RewardError(
                    f"reward {reward.name} gave no score for {self.where(portion.work.prompt, image, step)}: {failures[k]}. "
                    "The same command goes on from here; --on-error skip leaves such scores out."
                )
            return scores, failures
        scores, reasons = torch.full((len(rows), len(reward.names)), torch.nan), {}
        for k, row in enumerate(rows):  # find the pictures that it cannot score
            try:
                scores[k] = forward([row])[0]
            except Exception as error:  # noqa: BLE001
                reasons[k] = f"{type(error).__name__}: {error}"
        return scores, reasons
