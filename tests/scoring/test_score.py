"""Trajectories into reward tensors: values, resume, shards, added rewards, noise-aware series, bad input."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from tests import worlds
from tests.launch import environment, launcher
from tests.worlds import IDENTITY, PICTURE, Looks, brightness, fill, make_images, prompts_of, save_clip, write_adapters
from ttsnap_lib import Schedule, open_rewards, simulate
from ttsnap_lib.diffusion.denoise import Settings
from ttsnap_lib.errors import CheckpointError, ConfigError, DiskError, RewardError, TensorError, TrajectoryError
from ttsnap_lib.rewards.loading import load_reward
from ttsnap_lib.scoring.score import InlineScorer, generate_scores, open_scorer, score
from ttsnap_lib.simulation.simulate import TinyChecksWarning
from ttsnap_lib.tensors.spread import SpreadWarning
from ttsnap_lib.tensors.tensor import drop_missing
from ttsnap_lib.trajectories.generate import BatchMaker, generate
from ttsnap_lib.trajectories.read import Trajectories

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Trajectories of 3 prompts x 3 images x 4 steps."""
    return fill(tmp_path_factory.mktemp("trajectories") / "set")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a tiny CLIP reward."""
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="module")
def adapters(clip, tmp_path_factory):
    """Run folder with LoRA adapters for steps 2 and 1."""
    return write_adapters(clip, tmp_path_factory.mktemp("run"), steps=(2, 1))


def store_hash(path) -> str:
    """Digest of every file of a store, with its name."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return digest.hexdigest()


def expected(folder, reward, step_of=None):
    """Scores by `Reward.score`, one picture at a time."""
    found = Trajectories(folder)
    out = np.empty((len(found.prompts), found.images_per_prompt, found.n_steps), np.float32)
    for prompt, image, step in np.ndindex(out.shape):
        reward.use_step(step if step_of and step in step_of else None)
        picture = Image.fromarray(found.read(prompt, image, step))
        out[prompt, image, step] = reward.score(found.prompts[prompt], picture)[0]
    reward.use_step(None)
    return out


def test_values_and_layout(folder, clip, tmp_path):
    seen = []
    report = score(
        folder, [clip, brightness], tmp_path / "r.zarr", device="cpu", batch_size=5,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    tensor = open_rewards(tmp_path / "r.zarr")
    assert tensor["base"].dims == ("reward", "prompt", "image", "step")
    assert list(tensor["reward"].values) == ["tiny-clip", "brightness"]
    assert list(tensor["prompt_text"].values) == prompts_of(3)
    assert tensor.attrs["model"] == "tiny"
    base = tensor["base"].values
    np.testing.assert_allclose(base[0], expected(folder, load_reward(clip, device="cpu")), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(base[1], expected(folder, load_reward(brightness)), rtol=1e-6)
    assert np.array_equal(tensor["noise_aware"].values, base)
    assert set(tensor["noise_aware_source"].values.ravel()) == {"copied_from_base"}
    assert set(tensor["status"].values) == {"scored"}
    assert report.pictures == 36 and report.scores == 72 and report.images_per_s > 0 and not report.skipped
    assert seen[0] == (0, 36) and seen[-1] == (36, 36) and len(seen) > 5
    again = score(folder, [clip, brightness], tmp_path / "r.zarr", device="cpu", batch_size=5)
    assert again.pictures == 0


def test_some_steps_then_the_others(folder, clip, tmp_path):
    score(folder, clip, tmp_path / "parts.zarr", device="cpu", steps=[-1, 1], batch_size=3)
    tensor = open_rewards(tmp_path / "parts.zarr")
    assert tensor["step"].values.tolist() == [1, 3] and set(tensor["status"].values) == {"scored"}
    report = score(folder, clip, tmp_path / "parts.zarr", device="cpu", batch_size=3)
    assert report.pictures == 18  # the other two steps
    score(folder, clip, tmp_path / "whole.zarr", device="cpu", batch_size=3)
    one, other = open_rewards(tmp_path / "parts.zarr"), open_rewards(tmp_path / "whole.zarr")
    np.testing.assert_allclose(one["base"].values, other["base"].values, rtol=1e-5)


def test_rewards_are_added_to_a_tensor(folder, clip, tmp_path):
    out = tmp_path / "r.zarr"
    score(folder, clip, out, device="cpu")
    before = open_rewards(out)["base"].values[0]
    report = score(folder, [brightness, clip], out, device="cpu")
    tensor = open_rewards(out)
    assert list(tensor["reward"].values) == ["tiny-clip", "brightness"]
    assert np.array_equal(tensor["base"].values[0], before)
    assert report.scores == 36 and set(tensor["status"].values) == {"scored"}


def wanted(prompts, images, metadata):
    """Return the count that was asked for, and the brightness."""
    return [[row["count"], np.asarray(image).mean()] for row, image in zip(metadata, images, strict=True)]


wanted.outputs = ("count", "brightness")


def test_several_numbers_without_a_prompt_and_with_its_metadata(tmp_path):
    counts = [{"count": k} for k in (3, 1, 2)]
    folder, out = fill(tmp_path / "set", metadata=counts), tmp_path / "r.zarr"
    calls = []
    looks = Looks()
    looks.module.register_forward_hook(lambda module, given, found: calls.append(len(found)))
    report = score(folder, [looks, wanted], out, device="cpu", batch_size=5)
    tensor = open_rewards(out)
    names = ["looks.mean", "looks.sigma", "wanted.count", "wanted.brightness"]
    assert list(tensor["reward"].values) == names and report.scores == 4 * 36 and sum(calls) == 36
    base = tensor["base"]
    assert (base.sel(reward="wanted.count") == np.array([3, 1, 2])[:, None, None]).all()
    np.testing.assert_allclose(base[3].values, expected(folder, load_reward(brightness)), rtol=1e-6)
    picture = Image.fromarray(Trajectories(folder).read(1, 2, 3))
    np.testing.assert_allclose(base[:2, 1, 2, 3].values, looks.score("", picture)[0], rtol=1e-5)
    assert score(folder, [looks, wanted], out).pictures == 0


def test_one_of_several_numbers_may_be_missing(folder, tmp_path):
    def half(prompts, images):
        return [[1.0, float("nan") if np.asarray(image).mean() > 128 else 2.0] for image in images]

    with pytest.raises(RewardError, match=r"half\.second gave nan"):
        score(folder, load_reward(half, outputs=("first", "second")), tmp_path / "r.zarr")
    report = score(folder, load_reward(half, outputs=("first", "second")), tmp_path / "r.zarr", on_error="skip")
    base = open_rewards(tmp_path / "r.zarr")["base"].values
    assert (base[0] == 1).all() and 0 < np.isnan(base[1]).sum() == len(report.skipped) < base[1].size
    assert {entry.reward for entry in report.skipped} == {"half.second"}


def test_a_reward_that_says_nothing_within_prompts_is_told(folder, tmp_path):
    def by_prompt(prompts, images):
        return [
            float(len(prompt)) if "cat" in prompt[:8] else np.asarray(image).mean()
            for prompt, image in zip(prompts, images, strict=True)
        ]

    with pytest.warns(SpreadWarning, match=r"say nothing there: by_prompt in 1 of 3 prompts") as told:
        score(folder, [by_prompt, brightness], tmp_path / "r.zarr", steps=[0, 2])
    assert len(told) == 1


def test_metadata_that_is_read_and_not_there_is_told_before_any_work(folder, tmp_path):
    with pytest.raises(RewardError, match=r"wanted reads the metadata of prompts: got prompts without any"):
        score(folder, wanted, tmp_path / "r.zarr")
    assert not (tmp_path / "r.zarr").exists()


@pytest.mark.parametrize("order", ["together", "later"])
def test_noise_aware_series(folder, clip, adapters, tmp_path, order):
    out = tmp_path / "r.zarr"
    if order == "later":
        score(folder, clip, out, device="cpu")
    score(folder, clip, out, device="cpu", noise_aware=adapters, batch_size=5)
    tensor = open_rewards(out)
    reward = load_reward(clip, device="cpu", adapters=adapters)
    base, aware = expected(folder, reward), expected(folder, reward, step_of=(1, 2))
    np.testing.assert_allclose(tensor["base"].values[0], base, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tensor["noise_aware"].values[0], aware, rtol=1e-4, atol=1e-4)
    assert np.abs(aware - base)[..., 1:3].max() > 0.1
    assert tensor["noise_aware_source"].values[0].tolist() == [
        "copied_from_base", "finetuned", "finetuned", "copied_from_base",
    ]  # fmt: skip
    assert np.array_equal(tensor["noise_aware"].values[..., [0, 3]], tensor["base"].values[..., [0, 3]])
    assert set(tensor["status"].values) == {"scored"}
    assert score(folder, clip, out, device="cpu", noise_aware=adapters).pictures == 0


def test_full_weights_series(folder, clip, tmp_path):
    from safetensors.torch import save_file

    source = load_reward(clip, device="cpu")
    state = {key: value.clone() * 1.1 for key, value in source.module.state_dict().items() if "vision_model" in key}
    (tmp_path / "run" / "step_2").mkdir(parents=True)
    save_file(state, tmp_path / "run" / "step_2" / "model.safetensors")
    (tmp_path / "run" / "curriculum.json").write_text("{}")
    score(folder, clip, tmp_path / "r.zarr", device="cpu", noise_aware={"tiny-clip": tmp_path / "run"})
    reward = load_reward(clip, device="cpu", adapters=tmp_path / "run")
    aware = open_rewards(tmp_path / "r.zarr")["noise_aware"].values[0]
    np.testing.assert_allclose(aware, expected(folder, reward, step_of=(2,)), rtol=1e-4, atol=1e-4)


def test_a_folder_that_grows(clip, tmp_path):
    grown = fill(tmp_path / "set", n_prompts=2, n_images=2)
    score(grown, brightness, tmp_path / "r.zarr")
    before = open_rewards(tmp_path / "r.zarr")["base"].values
    done = {(prompt, image) for prompt in range(2) for image in range(2)}
    fill(grown, n_prompts=3, n_images=3, done=done)
    report = score(grown, brightness, tmp_path / "r.zarr")
    tensor = open_rewards(tmp_path / "r.zarr")
    assert tensor["base"].shape == (1, 3, 3, 4) and not np.isnan(tensor["base"].values).any()
    assert np.array_equal(tensor["base"].values[:, :2, :2], before)
    assert report.pictures == 36 and list(tensor["prompt_text"].values) == prompts_of(3)


# -- several processes -------------------------------------------------------------------------------------------------


REWARD = "tests.worlds:brightness"


def child(folder, out, shard: str, *, pause_s: float) -> subprocess.Popen:
    """Start a process that scores, and pauses after each batch."""
    code = (
        "import sys, time\nfrom ttsnap_lib.scoring.score import score\n"
        "folder, reward, out, shard, pause = sys.argv[1:]\n"
        "def progress(done, total):\n"
        "    print(done, flush=True)\n"
        "    time.sleep(float(pause))\n"
        "score(folder, reward, out, batch_size=7, shard=shard, progress=progress)\n"
    )
    arguments = [folder, REWARD, out, shard, pause_s]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """Trajectories of 60 prompts: three chunks."""
    return fill(tmp_path_factory.mktemp("trajectories") / "long", n_prompts=60, n_images=2)


def test_shards_equal_one_process(long_folder, clip, tmp_path):
    score(long_folder, clip, tmp_path / "one.zarr", device="cpu", batch_size=7)
    for shard in ("1/2", "0/2"):
        score(long_folder, clip, tmp_path / "two.zarr", device="cpu", batch_size=7, shard=shard)
    assert store_hash(tmp_path / "two.zarr") == store_hash(tmp_path / "one.zarr")
    pending = score(long_folder, clip, tmp_path / "half.zarr", device="cpu", batch_size=7, shard="1/2")
    assert pending.pictures == 25 * 2 * 4
    status = open_rewards(tmp_path / "half.zarr")["status"].values
    assert (status[25:50] == "scored").all() and (status[:25] == "pending").all()


def test_two_processes_do_not_share_a_shard(long_folder, tmp_path):
    out = tmp_path / "r.zarr"
    process = child(long_folder, out, "0/2", pause_s=60)
    try:
        process.stdout.readline()
        with pytest.raises(DiskError, match="another process"):
            score(long_folder, REWARD, out, shard="0/2")
        with pytest.raises(TensorError, match="while other shards write"):
            score(long_folder, [REWARD, load_reward(brightness, name="again")], out, shard="1/2")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_accelerate_launch_equals_one_process(long_folder, clip, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\ntorch.set_num_threads(1)\nfrom ttsnap_lib.scoring.score import score\n"
        "score(*sys.argv[1:4], device='cpu', batch_size=7)\n"
    )
    command = [*launcher(2), str(script), str(long_folder), str(clip), str(tmp_path / "two.zarr")]
    subprocess.run(command, check=True, env=environment())
    locks = tmp_path / ".two.zarr" / ".ttsnap" / "locks"
    assert len(list(locks.glob("shard-*-of-2.lock"))) == 2  # there were two processes indeed
    score(long_folder, clip, tmp_path / "one.zarr", device="cpu", batch_size=7)
    assert store_hash(tmp_path / "two.zarr") == store_hash(tmp_path / "one.zarr")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    """Trajectories with a damaged picture in prompt 1."""
    broken = fill(tmp_path / "broken")
    path = broken / "p0001" / "id001" / "s02.png"
    path.write_bytes(path.read_bytes()[:-40])
    return broken


def test_a_damaged_picture(broken, tmp_path):
    out = tmp_path / "r.zarr"
    with pytest.raises(TrajectoryError, match=r"p0001/id001/s02\.png is damaged"):
        score(broken, brightness, out, batch_size=4)
    assert open_rewards(out)["status"].values.tolist() == ["scored", "pending", "pending"]
    report = score(broken, brightness, out, batch_size=4, on_error="skip")
    tensor = open_rewards(out)
    assert np.argwhere(np.isnan(tensor["base"].values)).tolist() == [[0, 1, 1, 2]]
    assert tensor["status"].values.tolist() == ["scored", "partial", "scored"]
    (skipped,) = report.skipped
    assert (skipped.prompt, skipped.image, skipped.step, skipped.reward) == (1, 1, 2, "brightness")
    listed = json.loads((tmp_path / "r.zarr.skipped.json").read_text())
    assert listed[0]["image"] == 1 and "truncated" in listed[0]["reason"]
    # Mended, the same command fills the gap.
    make_images(1, PICTURE[1], PICTURE[0])[0].save(broken / "p0001" / "id001" / "s02.png")
    assert not score(broken, brightness, out, batch_size=4, on_error="skip").skipped
    assert not np.isnan(open_rewards(out)["base"].values).any()
    assert not (tmp_path / "r.zarr.skipped.json").exists()


def test_what_was_skipped_is_listed_by_the_simulation_or_dropped_on_demand(broken, tmp_path):
    score(broken, brightness, tmp_path / "r.zarr", on_error="skip")
    tensor = open_rewards(tmp_path / "r.zarr")
    schedule = Schedule((2,), (0.5,))
    with pytest.raises(TensorError, match=r"brightness: prompt 1, image 1, step 2.*drop_missing"):
        simulate(tensor, "ttsp", n=2, schedule=schedule)
    kept = drop_missing(tensor)
    assert kept["image"].values.tolist() == [0, 2]
    assert np.isfinite(simulate(kept, "ttsp", n=2, schedule=schedule).mean).all()


def test_skipping_changes_no_other_score(broken, folder, clip, tmp_path):
    score(broken, clip, tmp_path / "gap.zarr", device="cpu", batch_size=5, on_error="skip")
    score(folder, clip, tmp_path / "whole.zarr", device="cpu", batch_size=5)
    gap, whole = (open_rewards(tmp_path / name)["base"].values for name in ("gap.zarr", "whole.zarr"))
    same = ~np.isnan(gap)
    assert np.array_equal(gap[same], whole[same]) and same.sum() == 35


def test_a_missing_picture_stops_before_any_work(broken, tmp_path):
    os.unlink(broken / "p0002" / "id002" / "s01.png")
    calls = []
    with pytest.raises(TrajectoryError, match=r"p0002/id002/s01\.png is missing"):
        score(broken, lambda prompts, images: calls.append(1), tmp_path / "r.zarr")
    assert not calls
    report = score(broken, brightness, tmp_path / "s.zarr", on_error="skip")
    assert {(s.prompt, s.image, s.step) for s in report.skipped} == {(1, 1, 2), (2, 2, 1)}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, images: [float("nan")] * len(images), r"not finite for .*p0000/id000/s00\.png"),
        (lambda prompts, images: [0.0], r"failed on .*p0000/id000/s00\.png .*wrong shape"),
        (lambda prompts, images: 1 / 0, r"failed on .*p0000/id000/s00\.png .*ZeroDivisionError"),
    ],
)
def test_rewards_that_fail(folder, function, message, tmp_path):
    with pytest.raises(RewardError, match=message):
        score(folder, load_reward(function, name="bad"), tmp_path / "r.zarr")
    report = score(folder, [load_reward(function, name="bad"), brightness], tmp_path / "s.zarr", on_error="skip")
    tensor = open_rewards(tmp_path / "s.zarr")
    assert np.isnan(tensor["base"].values[0]).all() == (message.find("wrong shape") < 0)
    assert not np.isnan(tensor["base"].values[1]).any()
    assert {skipped.reward for skipped in report.skipped} <= {"bad"}


def test_other_prompts_trajectories_or_weights_are_refused(folder, clip, adapters, tmp_path):
    out = tmp_path / "r.zarr"
    score(folder, clip, out, device="cpu", noise_aware=adapters)
    before = store_hash(out)
    other = fill(tmp_path / "other", identity={**IDENTITY, "seed": 1})
    with pytest.raises(TensorError, match="other trajectories"):
        score(other, clip, out, device="cpu")
    stranger = save_clip(tmp_path / "x" / "tiny-clip", seed=7)
    with pytest.raises(TensorError, match="by other weights"):
        score(folder, stranger, out, device="cpu")
    series = write_adapters(stranger, tmp_path / "run", steps=(1,))
    weights = (series / "step_1" / "adapter_model.safetensors").read_bytes()
    (series / "step_1" / "adapter_model.safetensors").write_bytes(weights[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(TensorError, match="step 1 by other weights"):
        score(folder, clip, out, device="cpu", noise_aware=series)
    changed = fill(tmp_path / "changed")
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["prompts"][1] = "something else"
    (changed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TensorError, match="prompt 1 is another one"):
        score(changed, clip, out, device="cpu")
    assert store_hash(out) == before


def test_rewards_and_series_that_do_not_fit(folder, clip, adapters, tmp_path):
    out = tmp_path / "r.zarr"
    with pytest.raises(ConfigError, match="distinct names"):
        score(folder, [brightness, brightness], out)
    with pytest.raises(ConfigError, match="reward=folder"):
        score(folder, [clip, brightness], out, device="cpu", noise_aware=adapters)
    late = write_adapters(clip, tmp_path / "late", steps=(14,))
    with pytest.raises(CheckpointError, match="for other trajectories"):
        score(folder, clip, out, device="cpu", noise_aware=late)
    with pytest.raises(ConfigError, match="steps"):
        score(folder, clip, out, device="cpu", steps=[])
    assert not out.exists()


# -- while images are generated: the values of generating into a folder and scoring that ------------------------------


TEXTS = ["a red circle", "the cat", "a blue square"]
OPTIONS = {
    "settings": Settings(n_steps=3, height=32, width=32),
    "images_per_prompt": 3,
    "batch_size": 4,
    "seed": 7,
    "cpu_threads": 1,
}


@pytest.fixture(scope="module")
def pipeline():
    """Tiny SDXL pipeline."""
    return worlds.build("sdxl")


@pytest.fixture(scope="module")
def scored_folder(pipeline, clip, tmp_path_factory):
    """Tensor scored from a folder, with a noise-aware series at step 1."""
    root = tmp_path_factory.mktemp("scored")
    generate(pipeline, TEXTS, root / "set", **OPTIONS)
    series = write_adapters(clip, root / "run", steps=(1,))
    rewards = [load_reward(clip, device="cpu", adapters=series), brightness]
    score(root / "set", rewards, root / "r.zarr")
    return root


def test_inline_scores_equal_scoring_the_folder(pipeline, clip, scored_folder, tmp_path):
    rewards = [load_reward(clip, device="cpu", adapters=scored_folder / "run"), brightness]
    report = generate_scores(pipeline, TEXTS, tmp_path / "r.zarr", rewards, **OPTIONS)
    assert report.pictures == 27 and report.scores == 27 * 2 + 9
    ours, theirs = open_rewards(tmp_path / "r.zarr"), open_rewards(scored_folder / "r.zarr")
    for variable in ("base", "noise_aware"):
        values, expected = ours[variable].values, theirs[variable].values
        np.testing.assert_allclose(values[0], expected[0], rtol=1e-4, atol=1e-4)  # batches differ
        assert np.array_equal(values[1], expected[1])  # the very same pixels
    assert np.array_equal(ours["noise_aware_source"].values, theirs["noise_aware_source"].values)
    assert set(ours["status"].values) == {"scored"}
    assert not list(tmp_path.rglob("*.png"))


def test_metadata_reaches_rewards_while_images_are_generated(pipeline, tmp_path):
    given = [{"prompt": text, "count": k} for k, text in enumerate(TEXTS)]
    generate_scores(pipeline, given, tmp_path / "r.zarr", [Looks(), wanted], steps=[-1], **OPTIONS)
    base = open_rewards(tmp_path / "r.zarr")["base"].isel(step=0)
    assert (base.sel(reward="wanted.count") == np.arange(3)[:, None]).all() and np.isfinite(base.values).all()


def test_inline_scoring_goes_on_by_whole_prompts(pipeline, tmp_path):
    out = tmp_path / "r.zarr"

    def stop(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_scores(pipeline, TEXTS, out, brightness, progress=stop, **OPTIONS)
    left = open_rewards(out)["status"].values.tolist()
    assert left.count("scored") in (1, 2) and "pending" in left
    again = generate_scores(pipeline, TEXTS, out, brightness, **OPTIONS)
    assert again.pictures == 9 * left.count("pending")
    quiet = tmp_path / "quiet.zarr"
    generate_scores(pipeline, TEXTS, quiet, brightness, **OPTIONS)
    assert np.array_equal(open_rewards(out)["base"].values, open_rewards(quiet)["base"].values)
    assert generate_scores(pipeline, TEXTS, out, brightness, **OPTIONS).pictures == 0


def test_inline_scoring_waits_for_the_device_at_the_end_of_a_batch_alone(pipeline, clip, tmp_path, monkeypatch):
    waits: dict[int, list[int]] = {0: [], 1: [], 2: []}
    reads, hand_over, to_host = [], BatchMaker._hand_over, torch.Tensor.cpu
    waiting = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.index.Tensor}  # a float; rows by a list

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reads.extend({func} & waiting)
            return func(*args, **(kwargs or {}))

    def counted(maker, rows, places, at, step, images):
        reads.clear()
        with Reads():
            hand_over(maker, rows, places, at, step, images)
        waits[step].append(len(reads))

    monkeypatch.setattr(BatchMaker, "_hand_over", counted)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (reads.append("cpu"), to_host(self))[1])
    reward = load_reward(clip, device="cpu")
    reward.preprocessing = replace(reward.preprocessing, levels=False)  # a CPU resizes levels by Pillow, on the host
    assert generate_scores(pipeline, TEXTS, tmp_path / "r.zarr", reward, **OPTIONS).scores == 27
    assert waits[1] == [0, 0, 0] and min(waits[2]) > 0  # the first step encodes the batch's prompt


def test_inline_scoring_of_some_steps_decodes_no_others(pipeline, tmp_path):
    report = generate_scores(pipeline, TEXTS, tmp_path / "r.zarr", brightness, steps=[-1], **OPTIONS)
    assert report.pictures == 9 and open_rewards(tmp_path / "r.zarr")["step"].values.tolist() == [2]


def test_a_tiny_decoder_records_what_a_search_with_it_sees(pipeline, clip, scored_folder, tmp_path):
    from ttsnap_lib import CostModel, search

    reward, tiny = load_reward(clip, device="cpu"), worlds.tiny_decoder()
    generate_scores(pipeline, TEXTS[:1], tmp_path / "r.zarr", reward, decoder=tiny, **OPTIONS)
    generate(pipeline, TEXTS[:1], tmp_path / "set", decoder=tiny, **OPTIONS)
    score(tmp_path / "set", reward, tmp_path / "after.zarr")
    ours, after = open_rewards(tmp_path / "r.zarr"), open_rewards(tmp_path / "after.zarr")
    assert ours.attrs["decoder"] == after.attrs["decoder"] and ours.attrs["decoder"].startswith("AutoencoderTiny ")
    np.testing.assert_allclose(ours["base"].values, after["base"].values, rtol=1e-4, atol=1e-4)
    full = open_rewards(scored_folder / "r.zarr")["base"].values[0, 0]
    np.testing.assert_allclose(ours["base"].values[0, 0, :, -1], full[:, -1], rtol=1e-3, atol=1e-3)
    schedule = Schedule((1,), (0.67,))
    live = search(
        pipeline, TEXTS[0], reward, schedule, candidates=3, seed=7, settings=OPTIONS["settings"], decoder=tiny
    ).record
    seen = ours["base"].values[0, 0, :, 1]
    np.testing.assert_allclose(live.scores[:, 0, 0], seen, rtol=1e-3, atol=1e-3)
    assert np.abs(full[:, 1] - seen).max() > 0.01  # so the line before says something

    cost = CostModel(step=1.0, verify=0.1, decode=0.5, preview_decode=0.1, n_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(ours, "ttsp", n=3, cost=cost, schedule=schedule, iterations=2)
    with pytest.warns(TinyChecksWarning, match="made through AutoencoderTiny .*charges the full decoder"):
        simulate(ours, "ttsp", n=3, cost=replace(cost, preview_decode=None), schedule=schedule, iterations=2)
    with pytest.raises(TensorError, match="other trajectories"):
        generate_scores(pipeline, TEXTS[:1], tmp_path / "r.zarr", reward, **OPTIONS)


def test_inline_scoring_refuses(pipeline, tmp_path):
    out = tmp_path / "r.zarr"
    with pytest.raises(ConfigError, match="score the folder"):
        generate_scores(pipeline, TEXTS, out, brightness, folder=tmp_path, **OPTIONS)
    bad = load_reward(lambda prompts, images: [float("nan")] * len(images), name="bad")
    with pytest.raises(RewardError, match="prompt 0, image 0, step 0"):
        generate_scores(pipeline, TEXTS, out, bad, **OPTIONS)
    generate_scores(pipeline, TEXTS, tmp_path / "s.zarr", brightness, **OPTIONS)
    with pytest.raises(TensorError, match="other trajectories"):
        generate_scores(pipeline, TEXTS, tmp_path / "s.zarr", brightness, **{**OPTIONS, "seed": 8})


def test_shards_of_inline_scoring_take_whole_chunks(tmp_path):
    prompts = [f"prompt {k}" for k in range(30)]
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    where = "{} {} {}".format
    for shard, expected in (((0, 2), range(25)), ((1, 2), range(25, 30))):
        with open_scorer(
            tmp_path / "r.zarr", [load_reward(brightness)], prompts, 2, [0], {}, source="", shard=shard, where=where
        ) as scorer:
            inline = InlineScorer(scorer)
            assert inline.only == [(prompt, image) for prompt in expected for image in range(2)]
            for prompt in expected:
                inline(prompt, [0, 1], 0, pixels)
            assert inline.only == []
    assert set(open_rewards(tmp_path / "r.zarr")["status"].values) == {"scored"}


# Embeddings beside the scores


def looks(folder, reward) -> np.ndarray:
    """Return what the image tower says of each picture, one at a time, (prompt, image, step, feature)."""
    found = Trajectories(folder)
    out = []
    for place in np.ndindex(len(found.prompts), found.images_per_prompt, found.n_steps):
        with reward.embeddings() as seen:
            reward.score("a red circle", Image.fromarray(found.read(*place)))
        out.append(seen[0][0].numpy())
    return np.reshape(out, (len(found.prompts), found.images_per_prompt, found.n_steps, -1))


def test_embeddings_are_kept_beside_the_scores(folder, clip, adapters, tmp_path):
    """All at once, in parts, or added to a tensor that has the scores: the same bytes, and no score is touched."""
    plain, options = tmp_path / "plain.zarr", {"device": "cpu", "batch_size": 5}
    score(folder, [brightness, clip], plain, **options)
    report = score(folder, [brightness, clip], tmp_path / "one.zarr", embeddings=True, **options)
    assert report.embedding_bytes == 3 * 3 * 4 * 64 * 2 and "embeddings of 0.00461 MB" in str(report)
    for steps in ([3, 1], None):
        score(folder, [brightness, clip], tmp_path / "parts.zarr", embeddings=True, steps=steps, **options)
    before = open_rewards(plain)["base"].values
    assert score(folder, [brightness, clip], plain, embeddings=True, **options).pictures == 36
    tensors = [open_rewards(tmp_path / f"{name}.zarr").load() for name in ("one", "parts", "plain")]
    expected = looks(folder, load_reward(clip, device="cpu"))
    for tensor in tensors:
        found = tensor["embedding"]
        assert found.dims == ("prompt", "image", "step", "feature") and found.dtype == np.float16
        np.testing.assert_allclose(found.values, expected, atol=2e-3)  # float16 near 1 has steps of 0.001
        assert tensor.attrs["embedding"]["reward"] == "tiny-clip"
    assert np.array_equal(tensors[2]["base"].values, before) and np.array_equal(tensors[0]["base"].values, before)
    again = score(folder, [brightness, clip], plain, embeddings=True, noise_aware={"tiny-clip": adapters}, **options)
    assert again.pictures == 2 * 9  # the two steps of the series; its embeddings are there, by the base weights
    np.testing.assert_array_equal(open_rewards(plain)["embedding"].values, tensors[2]["embedding"].values)
    assert score(folder, clip, plain, embeddings=True, **options).pictures == 0


def test_embeddings_of_a_folder_that_grows_and_of_bad_pictures(clip, broken, tmp_path):
    grown, out = fill(tmp_path / "set", n_prompts=2, n_images=2), tmp_path / "r.zarr"
    score(grown, clip, out, device="cpu", embeddings=True)
    before = open_rewards(out)["embedding"].values
    done = {(prompt, image) for prompt in range(2) for image in range(2)}
    fill(grown, n_prompts=3, n_images=3, done=done)
    score(grown, clip, out, device="cpu")  # without them: those that are there stay
    tensor = open_rewards(out)["embedding"].values
    assert np.array_equal(tensor[:2, :2], before) and np.isnan(tensor[2]).all() and np.isnan(tensor[:, 2]).all()
    score(grown, clip, out, device="cpu", embeddings=True)
    tensor = open_rewards(out)["embedding"].values
    assert np.array_equal(tensor[:2, :2], before) and not np.isnan(tensor).any()

    score(broken, clip, tmp_path / "b.zarr", device="cpu", embeddings=True, on_error="skip")
    gaps = np.argwhere(np.isnan(open_rewards(tmp_path / "b.zarr")["embedding"].values).any(-1))
    assert gaps.tolist() == [[1, 1, 2]]
    other = save_clip(tmp_path / "other", seed=5)
    with pytest.raises(TensorError, match="has other embeddings: .*'tiny-clip'"):
        score(grown, other, out, device="cpu", embeddings=True)
    with pytest.raises(RewardError, match="expected a reward with an image tower"):
        score(grown, brightness, out, embeddings=True)
