"""Trajectories x rewards -> reward tensor: resumable, sharded, reading ahead of the model.

>>> report = score("data_cache/trajectories", "pocket-clip", "data_cache/rewards.zarr")
>>> report = score("data_cache/trajectories", "pocket-clip", "data_cache/rewards.zarr", noise_aware="data_cache/run")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._plan import parse_shard
from ._score_run import ScoreReport, ScoreRun, Skipped
from ._score_work import Work, plan_work, read_ahead
from .checks import choice, integer
from .errors import CheckpointError, ConfigError, TrajectoryError
from .paths import write_json
from .reward_store import RewardPlan, open_store
from .rewards.base import Reward
from .rewards.loading import load_reward
from .trajectories import Trajectories

__all__ = [
    "Rewards",
    "ScoreReport",
    "Skipped",
    "chosen_steps",
    "identity_digest",
    "load_rewards",
    "reward_plan",
    "score",
]

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
        raise ConfigError("rewards", value=given, bound="one or more", remedy='Name one, for example "pocket-clip".')
    models = [entry if isinstance(entry, Reward) else load_reward(entry, **options) for entry in given]
    names = [model.name for model in models]
    if len(set(names)) != len(names):
        raise ConfigError("rewards", value=names, bound="distinct names", remedy="Load one with another name=.")
    if noise_aware is not None:
        if not isinstance(noise_aware, Mapping):
            if len(models) > 1:
                raise ConfigError(
                    "noise_aware",
                    value=str(noise_aware),
                    bound="reward=folder for each of several rewards",
                    remedy=f"Write for example {names[0]}={noise_aware}.",
                )
            noise_aware = {names[0]: noise_aware}
        for name, folder in noise_aware.items():
            models[names.index(choice("noise_aware", name, names))].attach_steps(folder)
    for model in models:
        if steps is not None and any(step >= steps for step in model.adapter_steps):
            raise CheckpointError(
                f"noise-aware weights of {model.name} are for other trajectories",
                value=model.adapter_steps,
                bound=f"steps below {steps}",
                remedy="Use a series that was trained on trajectories of as many steps.",
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
        raise ConfigError("steps", value=given, bound="one or more", remedy="Leave it out to score all steps.")
    return chosen


def _check_whole(found: Trajectories, works: Sequence[Work]) -> None:
    """Refuse missing files before anything is scored."""
    for prompt in dict.fromkeys(work.prompt for work in works):
        state = found.state(prompt)
        missing = [image for image in range(found.images_per_prompt) if image not in state.whole]
        if missing:
            gone = state.incomplete.get(missing[0], [0])
            raise TrajectoryError(
                f"{found.path(prompt, missing[0], gone[0])} is missing",
                value=f"{len(missing)} of {found.images_per_prompt} images of prompt {prompt} are not whole",
                bound="every image, with all its steps in files and folders of its own",
                remedy="Run the same `ttsnap generate` again: it goes on where it stopped. --on-error skip scores the rest.",
            )


def _list_skipped(report: ScoreReport, shard: tuple[int, int]) -> None:
    suffix = "" if shard[1] == 1 else f"-{shard[0]}of{shard[1]}"
    path = report.path.parent / f"{report.path.name}.skipped{suffix}.json"
    if report.skipped:
        write_json(path, [vars(entry) for entry in report.skipped])
    else:
        path.unlink(missing_ok=True)
