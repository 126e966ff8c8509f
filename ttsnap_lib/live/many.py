"""Searches over a prompt file: one folder a prompt, resumable, sharded, one table at the end."""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap_lib.checks import choice
from ttsnap_lib.costs import AUTO, CostModel
from ttsnap_lib.diffusion.denoise import Denoiser, as_settings
from ttsnap_lib.diffusion.pipelines import load_decoder, tell_outside
from ttsnap_lib.errors import SearchError
from ttsnap_lib.files import (
    HIDDEN,
    atomic_write,
    lock,
    parse_shard,
    read_if_whole,
    read_json,
    refuse_other,
    shard_lock,
    write_json,
)
from ttsnap_lib.live.record import SearchResult
from ttsnap_lib.live.run import Searcher
from ttsnap_lib.rewards.base import require_metadata
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.simulation.metrics import Estimate
from ttsnap_lib.trajectories.identity import (
    decoder_digest,
    embeds_digests,
    identity_of,
    run_time_changes,
    vae_scaling,
)
from ttsnap_lib.trajectories.prompts import read_prompts

if TYPE_CHECKING:
    import pandas as pd

_NOT_IDENTITY = ("on_check", "progress", "batch_size")  # these do not decide the results


def search_many(
    pipeline: Any,
    prompts: str | Path | Sequence[str],
    reward: Any,
    folder: str | Path | None,
    *,
    together: int = 1,
    shard: tuple[int, int] | str | None = None,
    prompt_embeds: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Search every prompt and return one row each; prompts that are done already are not searched again.

    Parameters
    ----------
    pipeline, reward, options
        As in :func:`ttsnap_lib.search`; rewards are loaded once, and a deadline holds for each prompt.
    prompts : str, Path or sequence of str
        Prompts, or what :func:`ttsnap_lib.trajectories.prompts.read_prompts` reads; their places give the seeds.
    folder : path or None
        Gets ``p0000/image.png``, ``record.json``, ``candidates.parquet`` and ``summary.json`` per prompt, and the
        returned table, see :func:`collect`; with `keep`, also ``image_0.png`` and so on. None keeps nothing but the table of this shard.
    together : int
        How many prompts run through the stages together: survivors of different prompts share batches, each prompt is
        pruned by itself. Winners are those of one prompt at a time up to rounding. Not with NegToMe. Prompts that run
        together share their deadlines: four of them have four times `deadline_s`.
    shard : (int, int) or "0/2", optional
        Which of how many processes this is; prompts are dealt out in turn. By default the place in an
        ``accelerate launch``, else all prompts.
    prompt_embeds : mapping of str to tensor, optional
        The prompts as embeddings, as in :func:`ttsnap_lib.generate`. A prompt with other embeddings is searched again.
    progress : callable, optional
        Called with (prompts done, prompts of this shard).

    Raises
    ------
    SearchError
        The folder holds results of other settings; or some prompts failed, after all others are done.
    DiskError
        A full disk, a folder that cannot be written, or another process at the same shard. What is done stays.
    KeyboardInterrupt
        Ctrl-C; the best so far of the prompts at work is saved, and they are searched again next time.
    """
    import pandas as pd

    index, of = parse_shard(shard)
    prompts = read_prompts(prompts)
    options |= {
        "decoder": load_decoder(options.get("decoder"), pipeline), "settings": as_settings(options.get("settings")),
    }  # fmt: skip
    rewards = [load_reward(one) for one in (reward if isinstance(reward, list | tuple) else [reward])]
    searcher = Searcher(pipeline, rewards, together=together, **options)
    if options.get("cost") == AUTO:
        options["cost"] = searcher.cost
    require_metadata(rewards, prompts.metadata)
    mine = range(index, len(prompts), of)
    tell_outside(searcher.denoiser.pipeline, prompts)
    given = None if prompt_embeds is None else searcher.denoiser.given(prompt_embeds, len(prompts))
    if given is None:
        searcher.denoiser.require_text()
    told = embeds_digests(given) or [""] * len(prompts)
    if any(one.reads_metadata for one in rewards):
        told = [before + json.dumps(more, sort_keys=True) for before, more in zip(told, prompts.metadata, strict=True)]
    digests = {number: hashlib.sha256((prompts[number] + told[number]).encode()).hexdigest() for number in mine}
    failed: dict[int, SearchError] = {}
    rows: list[dict[str, Any]] = []
    ticks = itertools.count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(ticks), len(mine))

    def keep(number: int, result: SearchResult | SearchError) -> None:
        if isinstance(result, SearchError):
            failed[number] = result
            warnings.warn(f"prompt {number}: {result}", stacklevel=3)
        else:
            rows.append(result.summary())
            if folder is not None:
                target = Path(folder) / f"p{number:04d}"
                result.save(target)
                write_json(target / "summary.json", {**result.summary(), "prompt_sha256": digests[number]})
        tick()

    def work() -> None:
        left = []
        for number in mine:
            before = None if folder is None else read_if_whole(Path(folder) / f"p{number:04d}" / "summary.json")
            if before and before.get("stopped") != "interrupt" and before.get("prompt_sha256") == digests[number]:
                tick()
            else:
                left.append(number)
        for start in range(0, len(left), together):
            group = left[start : start + together]
            embeds = None if given is None else given.take(group)
            texts = {number: prompts[number] for number in group}
            more = {number: prompts.metadata[number] for number in group}
            if searcher.run(texts, keep, given=embeds, metadata=more) == "interrupt":
                raise KeyboardInterrupt

    if folder is None:
        work()
        frame = pd.DataFrame(rows)
    else:
        with shard_lock(Path(folder), (index, of)) as held:
            # By seconds by batch, batch_size and together decide what a budget buys.
            decided = {} if searcher.cost is None or searcher.cost.batch_size is None else {"candidates": searcher.n}
            _claim(Path(folder), _identity(searcher.denoiser, rewards, {**options, **decided}))
        with held:
            try:
                work()
            finally:
                frame = collect(folder)
    if failed:
        raise SearchError(
            f"{len(failed)} of {len(mine)} prompts failed: {list(failed)}. The others are done; run again for these. The "
            f"first said: {next(iter(failed.values()))}"
        )
    return frame


def collect(folder: str | Path) -> pd.DataFrame:
    """Return the results found in `folder`, one row per prompt, and write them as ``results.csv`` and Parquet.

    Prompts that were interrupted are left out; those that a deadline ended are told by ``stopped``.
    """
    import pandas as pd

    folder = Path(folder)
    remedy = "Remove that folder and search again: the other prompts stay."
    with lock(folder / HIDDEN / "locks" / "table.lock", wait=True):  # else a shard could write an older table last
        rows = [
            read_json(path, "summary of a prompt", error=SearchError, remedy=remedy)
            for path in sorted(folder.glob("p*/summary.json"))
        ]
        rows = [row for row in rows if row.get("stopped") != "interrupt"]
        frame = pd.DataFrame(rows).drop(columns="prompt_sha256", errors="ignore")
        if len(frame):
            frame = frame.sort_values("prompt_index", ignore_index=True)
            with atomic_write(folder / "results.csv") as file:
                frame.to_csv(file, index=False)
            with atomic_write(folder / "results.parquet") as file:
                frame.to_parquet(file)
    return frame


def compare(
    frames: Mapping[str, pd.DataFrame], reward: str, baseline: str = "best_of_n", seed: int = 0
) -> pd.DataFrame:
    """Return one row per method: mean reward, cost and seconds, and the paired difference to the baseline.

    `frames` maps a method to the table of :func:`search_many` over the same prompts, `reward` is the column compared;
    ``low`` and ``high`` are the 95% interval of the difference, by a bootstrap over prompts from `seed`.
    """
    import pandas as pd

    choice("baseline", baseline, frames)
    ours = {name: frame.set_index("prompt_index") for name, frame in frames.items()}
    rows = []
    for name, frame in ours.items():
        shared = frame.index.intersection(ours[baseline].index)
        difference = (frame.loc[shared, reward] - ours[baseline].loc[shared, reward]).to_numpy(float)
        told = Estimate.over_prompts(difference, seed, resamples=2000)
        rows.append(
            {
                "method": name, "prompts": len(shared), "candidates": frame["candidates"].mean(),
                "cost": frame["cost"].astype(float).mean(), "elapsed_s": frame["elapsed_s"].mean(),
                reward: frame[reward].mean(), "difference": difference.mean(), "low": told.low, "high": told.high,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _identity(denoiser: Denoiser, rewards: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the results, as plain values: models by their weights, options by their content."""
    pipeline, known = denoiser.pipeline, identity_of(denoiser)
    usual = {"keep": 1, "diversity": 0}  # folders of before sets say nothing of them
    plain = {k: v for k, v in options.items() if k not in _NOT_IDENTITY and (k not in usual or v != usual[k])}
    if isinstance(plain.get("cost"), str | Path):
        plain["cost"] = CostModel.load(plain["cost"])
    plain = {key: value.to_dict() if hasattr(value, "to_dict") else value for key, value in plain.items()}
    return {
        **plain,
        "pipeline": [type(pipeline).__name__, type(pipeline.scheduler).__name__, known["weights"]],
        **{key: known[key] for key in ("scheduler", "sigmas", "dtype")},
        "vae": vae_scaling(pipeline.vae),
        **run_time_changes(pipeline),
        "decoder": decoder_digest(options["decoder"]),
        "rewards": {one.name: one.fingerprint() for one in rewards},
        "noise_aware": {
            one.name: {str(step): one.step_fingerprint(step) for step in one.adapter_steps} for one in rewards
        },
    }


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Note in a new folder what decides its results; refuse one that was filled with other settings."""
    path, plain = folder / "search.json", json.loads(json.dumps(identity, default=str))
    remedy = "Choose another output folder, or the same settings."
    if not path.exists():
        write_json(path, plain)
    else:
        before = read_json(path, "record of an earlier search", error=SearchError, remedy=remedy)
        before = {
            key: plain[key] for key in ("scheduler", "sigmas", "dtype", "vae")
        } | before  # an older one lacks them
        refuse_other(folder, before, plain, SearchError, remedy)
