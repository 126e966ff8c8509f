from __future__ import annotations

import errno
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import worlds
from tests.launch import environment, launcher
from ttsnap_lib.diffusion.denoise import Denoiser, Settings, image_seed
from ttsnap_lib.diffusion.negtome import NegToMe
from ttsnap_lib.errors import ConfigError, DiskError, PipelineError, PromptError, TrajectoryError
from ttsnap_lib.files import shard_lock
from ttsnap_lib.trajectories import write
from ttsnap_lib.trajectories.generate import Blocks, blocks_for, generate, repair, wanted_rows
from ttsnap_lib.trajectories.layout import MANIFEST, Manifest
from ttsnap_lib.trajectories.read import Trajectories, verify

PROMPTS = ["a red fox", "two cats", "a blue dog"]
SETTINGS = Settings(n_steps=3, height=32, width=32)
OPTIONS = {"settings": SETTINGS, "images_per_prompt": 3, "batch_size": 4, "cpu_threads": 1, "seed": 7}
N_IMAGES = len(PROMPTS) * OPTIONS["images_per_prompt"]


def settings_of(name):
    tokens = {"max_sequence_length": worlds.TOKENS} if name in ("flux", "sd3") else {}
    return Settings(n_steps=3, height=32, width=32, **tokens)


@pytest.fixture(scope="module")
def pipeline():
    return worlds.build("sdxl")


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """Return a folder made in one go; tests only read it."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    generate(pipeline, PROMPTS, folder, **OPTIONS)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "set"))


def digests(folder):
    files = sorted(path for path in folder.glob("p*/**/*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# -- prompts as embeddings ------------------------------------------------------------------------------------


@pytest.fixture
def without_text(pipeline):
    """Return the pipeline without its text encoders, and the embeddings of the prompts."""
    embeds = dict(Denoiser(pipeline, SETTINGS).encode(PROMPTS).embeds)
    parts = {name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2")}
    pipeline.register_modules(**dict.fromkeys(parts))
    yield pipeline, embeds
    pipeline.register_modules(**parts)


def test_embeddings_give_the_pictures_of_their_prompts(whole, without_text, tmp_path):
    pipeline, embeds = without_text
    assert generate(pipeline, PROMPTS, tmp_path, prompt_embeds=embeds, **OPTIONS).made == N_IMAGES
    for prompt in range(len(PROMPTS)):  # encoded in batches of another size: the last bit
        found, expected = (Trajectories(one).pictures(prompt).astype(int) for one in (tmp_path, whole))
        assert abs(found - expected).max() <= 1
    made = digests(tmp_path)
    (tmp_path / "p0001" / "id000" / "s01.png").unlink()
    assert repair(pipeline, tmp_path, prompt_embeds=embeds).ok and digests(tmp_path) == made


def test_embeddings_are_in_the_identity_and_more_may_come(whole, without_text, tmp_path):
    pipeline, embeds = without_text
    options = {**OPTIONS, "batch_size": 3}
    two = {name: value[:2] for name, value in embeds.items()}
    generate(pipeline, PROMPTS[:2], tmp_path, prompt_embeds=two, **options)
    turned = {name: value[[0, 2, 1]] for name, value in embeds.items()}
    with pytest.raises(TrajectoryError, match="prompt_embeds"):
        generate(pipeline, PROMPTS, tmp_path, prompt_embeds=turned, **options)
    report = generate(pipeline, PROMPTS, tmp_path, prompt_embeds=embeds, **options)
    assert (report.made, report.found) == (3, 6)
    assert len(Manifest.read(tmp_path).identity["prompt_embeds"]) == 3
    assert generate(pipeline, PROMPTS[:2], tmp_path, prompt_embeds=two, **options).found == 6
    with pytest.raises(TrajectoryError, match="prompt_embeds"):
        generate(pipeline, PROMPTS, tmp_path, prompt_embeds=turned, **options)


def test_a_pipeline_without_text_encoders_makes_no_folder(without_text, tmp_path):
    with pytest.raises(PipelineError, match="has no text_encoder and text_encoder_2.*give prompt_embeds"):
        generate(without_text[0], PROMPTS, tmp_path / "set", **OPTIONS)
    assert not (tmp_path / "set").exists()


# -- composition ----------------------------------------------------------------------------------------------


def test_blocks_cover_every_image_once_and_never_change_a_place():
    for size, n_prompts, n_images in ((8, 3, 8), (8, 5, 3), (8, 1, 5), (6, 4, 7), (1, 2, 2), (32, 3, 8)):
        blocks = blocks_for(size, {"size": 8}, n_prompts, n_images)
        rows = [row for start in blocks.starts(n_prompts, n_images) for row in blocks.rows(start)]
        assert len(set(rows)) == len(rows)
        assert {(p, i) for p in range(n_prompts) for i in range(n_images)} <= set(rows)
        wider = [row for start in blocks.starts(n_prompts + 1, n_images + 5) for row in blocks.rows(start)]
        places = {row: place % size for place, row in enumerate(wider)}
        assert all(places[row] == place % size for place, row in enumerate(rows))


def test_blocks_waste_little():
    assert blocks_for(8, {"size": 8}, 4, 8) == Blocks(8, 8)
    assert blocks_for(32, {"size": 8}, 4, 8) == Blocks(32, 8)
    assert blocks_for(8, {"size": 8}, 16, 3) == Blocks(8, 1)
    assert blocks_for(8, {"size": 8}, 1, 5) == Blocks(8, 8)
    assert blocks_for(None, {"size": 16, "images": 2}, 1, 5) == Blocks(16, 2)
    assert blocks_for(8, {"size": 8}, 16, 3, group=4).images == 4
    with pytest.raises(ConfigError, match="multiple of 3"):
        blocks_for(8, {"size": 8}, 16, 3, group=3)


def test_only_selects_rows_and_a_mapping_their_steps():
    blocks = Blocks(8, 8)

    def plan(only):
        return wanted_rows(blocks, list(blocks.starts(2, 3)), 2, 3, 3, only)

    assert plan(None) == {row: [0, 1, 2] for row in itertools.product(range(2), range(3))}
    assert plan([(1, 2), (0, 0)]) == {(0, 0): [0, 1, 2], (1, 2): [0, 1, 2]}
    assert plan({(1, 2): [2]}) == {(1, 2): [2]}


# -- what is made ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_last_step_is_what_the_stock_pipeline_makes(name, tmp_path):
    pipe = worlds.build(name)
    settings = settings_of(name)
    report = generate(pipe, PROMPTS[:1], tmp_path, images_per_prompt=4, batch_size=4, seed=7, settings=settings)
    found = Trajectories(tmp_path)
    generators = [torch.Generator().manual_seed(image_seed(7, 0, image)) for image in range(4)]
    options = {"num_inference_steps": 3, "height": 32, "width": 32, "num_images_per_prompt": 4, "output_type": "np"}
    if name == "flux":
        options["max_sequence_length"] = worlds.TOKENS
    stock = pipe(PROMPTS[0], generator=generators, **options).images
    made = np.stack([found.read(0, image, -1) for image in range(4)])
    # One level of 255 for fp32 rounding: the stock call encodes its prompt in a batch of another shape.
    assert np.abs(made.astype(int) - (stock * 255).round().astype(int)).max() <= 1
    assert report.made == 4
    assert report.bytes_written == sum(path.stat().st_size for path in tmp_path.glob("p*/id*/*.png"))
    assert {"encode", "denoise", "decode", "hand_over", "finish"} <= set(report.seconds)
    assert sum(report.seconds.values()) <= report.elapsed_s * 1.01
    assert len({found.read(0, 0, step).tobytes() for step in range(3)}) == 3


def test_the_folder_is_as_promised(whole):
    manifest = Manifest.read(whole)
    assert sorted(path.name for path in whole.iterdir()) == [".ttsnap", MANIFEST, "p0000", "p0001", "p0002"]
    assert sorted(path.name for path in (whole / "p0002" / "id002").iterdir()) == ["s00.png", "s01.png", "s02.png"]
    identity = manifest.identity
    for key in ("model", "revision", "weights", "pipeline", "scheduler", "sigmas", "guidance", "height", "seed_rule"):
        assert key in identity, key
    assert manifest.prompts == tuple(PROMPTS)
    assert torch.__version__.startswith(manifest.provenance[0]["versions"]["torch"])
    assert verify(whole).ok


def test_the_batch_and_the_callback_see_the_same_pictures(whole, pipeline):
    seen = {}

    def take(prompt, images, step, pictures):
        assert pictures.shape == (len(images), 3, 32, 32)
        for image, picture in zip(images, pictures, strict=True):
            seen[prompt, image, step] = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()

    report = generate(pipeline, PROMPTS, on_batch=take, steps=[0, 2], **OPTIONS)
    assert report.made == N_IMAGES
    assert {step for _, _, step in seen} == {0, 2}
    found = Trajectories(whole)
    assert len(seen) == 2 * N_IMAGES
    for key, picture in seen.items():
        np.testing.assert_array_equal(picture, found.read(*key))


def test_a_small_decoder_makes_the_estimates_and_not_the_final_image(whole, pipeline, tmp_path):
    generate(pipeline, PROMPTS[:1], tmp_path, decoder=worlds.tiny_decoder(), **{**OPTIONS, "images_per_prompt": 1})
    small, full = Trajectories(tmp_path), Trajectories(whole)
    assert (small.read(0, 0, 0) != full.read(0, 0, 0)).any()
    # Another composition of the batch: one level of 255.
    assert np.abs(small.read(0, 0, -1).astype(int) - full.read(0, 0, -1).astype(int)).max() <= 1
    assert small.manifest.identity["decoder"].startswith("AutoencoderTiny")


# -- same bytes however it is done ----------------------------------------------------------------------------


def test_shards_make_the_same_bytes(whole, pipeline, tmp_path):
    reports = [generate(pipeline, PROMPTS, tmp_path, shard=f"{k}/3", **OPTIONS) for k in (2, 0, 1)]
    assert sum(report.made for report in reports) == N_IMAGES
    assert digests(tmp_path) == digests(whole)


def test_more_prompts_and_more_images_keep_what_is_there(whole, pipeline, tmp_path):
    small = {**OPTIONS, "images_per_prompt": 2}
    generate(pipeline, PROMPTS[:2], tmp_path, **small)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("p*/id*/*")}
    report = generate(pipeline, PROMPTS, tmp_path, **OPTIONS)
    assert report.made == N_IMAGES - 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = tmp_path.parent / "again"
    generate(pipeline, PROMPTS[:2], again, **small)  # fewer, once more: the composition is the folder's
    assert generate(pipeline, PROMPTS[:2], tmp_path, **small).made == 0
    assert digests(again).items() <= digests(tmp_path).items()
    assert Manifest.read(tmp_path).images_per_prompt == 3


def test_an_interrupt_keeps_whole_images_and_the_next_run_goes_on(whole, pipeline, tmp_path):
    def stop(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, PROMPTS, tmp_path, progress=stop, **OPTIONS)
    assert not list(tmp_path.glob("p*/.*"))
    calls = []
    report = generate(pipeline, PROMPTS, tmp_path, progress=lambda *call: calls.append(call), **OPTIONS)
    assert report.found + report.made == N_IMAGES
    assert (calls[0], calls[-1]) == ((report.found, N_IMAGES), (N_IMAGES, N_IMAGES))
    assert digests(tmp_path) == digests(whole)


@pytest.mark.slow
def test_accelerate_launch_gives_the_same_bytes(tmp_path):
    model = worlds.save("sdxl", tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["--model", model, "--prompts", tmp_path / "prompts.txt", "--images", 3, "--steps", 3, "--size", 32]
    arguments = [
        str(part) for part in (*arguments, "--batch-size", 4, "--seed", 7, "--device", "cpu", "--quiet", "--out")
    ]
    for kind, head in (("one", [sys.executable]), ("two", launcher(2))):
        command = [*head, "-m", "ttsnap_lib", "generate", *arguments, str(tmp_path / kind)]
        subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment())
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert len(digests(tmp_path / "one")) == N_IMAGES * 3
    assert len(list((tmp_path / "two" / ".ttsnap" / "checksums").iterdir())) == 2


# -- repair ---------------------------------------------------------------------------------------------------


def test_repair_makes_only_what_is_wrong(whole, copy, pipeline):
    shutil.rmtree(copy / "p0000" / "id001")
    shutil.rmtree(copy / "p0002")
    (copy / "p0001" / "id000" / "s01.png").write_bytes(b"")
    Image.new("RGB", (5, 5)).save(copy / "p0001" / "id002" / "s02.png")
    shutil.copy(copy / "p0001" / "id001" / "s00.png", copy / "p0001" / "id001" / "s02.png")
    (copy / "p0001" / "id001" / "mine.txt").write_text("mine")
    (copy / "p0001" / ".id002.x.part").mkdir()
    good = {
        path: path.stat().st_mtime_ns
        for path in copy.glob("p*/id*/*.png")
        if str(path.relative_to(copy)) not in {f.path for f in verify(copy).findings}
    }
    after = repair(pipeline, copy)
    assert [finding.kind for finding in after.findings] == ["foreign"]
    assert (copy / "p0001" / "id001" / "mine.txt").read_text() == "mine"
    (copy / "p0001" / "id001" / "mine.txt").unlink()
    assert digests(copy) == digests(whole)
    assert {path: path.stat().st_mtime_ns for path in good} == good
    assert repair(pipeline, copy).ok


def test_a_step_that_is_missing_is_made_again_by_generate_too(whole, copy, pipeline):
    (copy / "p0000" / "id001" / "s01.png").unlink()
    assert generate(pipeline, PROMPTS, copy, **OPTIONS).made == 1
    assert digests(copy) == digests(whole)


def test_negtome_groups_stay_together(pipeline, tmp_path):
    negtome = NegToMe(group_size=2, min_features=1, threshold=-1.0, start=1000, end=0)
    options = {**OPTIONS, "images_per_prompt": 4, "negtome": negtome}
    plain = {**OPTIONS, "images_per_prompt": 4}
    generate(pipeline, PROMPTS, tmp_path / "plain", **plain)
    generate(pipeline, PROMPTS, tmp_path / "one", **options)
    one = Trajectories(tmp_path / "one")
    assert one.manifest.identity["negtome"]["group_size"] == 2
    for image, moved in ((0, False), (1, True), (2, False), (3, True)):  # the first of a group is the reference
        same = (one.read(1, image, -1) == Trajectories(tmp_path / "plain").read(1, image, -1)).all()
        assert same != moved
    # An image that is made again alone has its group beside it; so has one at the end of an odd number.
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "p0001" / "id003")
    (tmp_path / "two" / "p0002" / "id001" / "s02.png").write_bytes(b"")
    assert repair(pipeline, tmp_path / "two").ok
    generate(pipeline, PROMPTS, tmp_path / "three", **{**options, "images_per_prompt": 3})
    generate(pipeline, PROMPTS, tmp_path / "three", **options)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "three")
    with pytest.raises(TrajectoryError, match="negtome"):
        generate(pipeline, PROMPTS, tmp_path / "one", **plain)
    with pytest.raises(ConfigError, match="multiple of 3"):
        generate(pipeline, PROMPTS, tmp_path / "four", **{**options, "negtome": NegToMe(group_size=3)})


# -- pictures that are none -----------------------------------------------------------------------------------


def test_a_vae_that_overflows_in_fp16_is_told_and_nothing_black_is_written(tmp_path):
    pipe = worlds.build("sdxl")
    pipe.vae.register_to_config(force_upcast=False)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight *= 1e5
    generate(pipe, PROMPTS, tmp_path / "fp32", **OPTIONS)  # the same weights are fine in fp32
    pipe.vae.half()
    with pytest.raises(PipelineError, match=r"got NaN, .*VAE in fp32 .*sdxl-vae-fp16-fix"):
        generate(pipe, PROMPTS, tmp_path / "fp16", **OPTIONS)
    with pytest.raises(PipelineError, match="prompt 0, step 2: got NaN"):
        generate(pipe, PROMPTS, on_batch=lambda *given: pytest.fail("handed over"), steps=[2], **OPTIONS)
    assert verify(tmp_path / "fp32").ok
    assert not digests(tmp_path / "fp16")


def test_what_was_whole_before_a_picture_of_infinity_stays(tmp_path):
    pipe = worlds.build("sdxl")
    options = {**OPTIONS, "batch_size": 3}  # a prompt a batch
    generate(pipe, PROMPTS, tmp_path / "whole", **options)
    calls = itertools.count()

    def spoil(decoder, given, pixels):
        if next(calls) >= 4:  # step 1 of the second prompt
            pixels[2, 0, 5, 7] = torch.inf  # clipped it would be one red pixel
        return pixels

    hook = pipe.vae.decoder.register_forward_hook(spoil)
    with pytest.raises(PipelineError, match="prompt 1, image 2, step 1: got NaN"):
        generate(pipe, PROMPTS, tmp_path / "set", **options)
    hook.remove()
    there = digests(tmp_path / "set")
    assert {f"p0000/id00{image}/s0{step}.png" for image in range(3) for step in range(3)} <= there.keys()
    assert "p0001/id002/s01.png" not in there and there.items() <= digests(tmp_path / "whole").items()
    generate(pipe, PROMPTS, tmp_path / "set", **options)
    assert digests(tmp_path / "set") == digests(tmp_path / "whole")


# -- bad input: a clear error, and nothing that is there is lost ----------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"images_per_prompt": 0}, ConfigError, "images_per_prompt"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"shard": "2/2"}, ConfigError, "shard"),
        ({"steps": [3]}, ConfigError, "steps"),
        ({"only": [(9, 0)]}, ConfigError, "only"),
        ({"settings": Settings(n_steps=3, height=30, width=32)}, ConfigError, "multiple of"),
        ({"settings": Settings(n_steps=4, height=32, width=32)}, TrajectoryError, r"n_steps: 3 there, 4 now"),
        ({"seed": 8}, TrajectoryError, "seed: 7 there, 8 now"),
        ({"batch_size": 8}, TrajectoryError, r"batch\.size: 4 there, 8 now"),
        ({"image_format": "webp"}, TrajectoryError, "'png' there, 'webp' now"),
        ({"prompts": "none.txt"}, PromptError, "cannot be read"),
        ({"prompts": ["a red fox", "two dogs"]}, TrajectoryError, "prompt 1 differs"),
        ({"pipeline": object()}, PipelineError, "object"),
        ({"pipeline": worlds.build("sdxl", seed=3)}, TrajectoryError, "weights"),
        ({"pipeline": worlds.build("sd")}, TrajectoryError, "pipeline: 'StableDiffusionXLPipeline' there"),
    ],
)
def test_bad_arguments_change_nothing(whole, pipeline, change, error, says):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if ".ttsnap" not in path.parts}
    call = {"pipeline": pipeline, "prompts": PROMPTS, "folder": whole, **OPTIONS, **change}
    with pytest.raises(error, match=says):
        generate(**call)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("stray", ["p0001/id001/mine.txt", "p0001/mine.txt", "p0001/id1/s00.png"])
def test_a_stray_file_stops_it_before_anything_is_written(copy, pipeline, stray):
    shutil.rmtree(copy / "p0001" / "id002")
    (copy / stray).parent.mkdir(exist_ok=True)
    (copy / stray).write_text("mine")
    with pytest.raises(TrajectoryError, match="does not belong"):
        generate(pipeline, PROMPTS, copy, **OPTIONS)
    assert (copy / stray).read_text() == "mine"
    assert not (copy / "p0001" / "id002").exists()


def test_a_file_where_the_folder_should_be(pipeline, tmp_path):
    (tmp_path / "set").write_text("mine")
    for folder in (tmp_path / "set", tmp_path / "set" / "deeper"):
        with pytest.raises(DiskError, match="cannot write"):
            generate(pipeline, PROMPTS, folder, **OPTIONS)
    assert (tmp_path / "set").read_text() == "mine"


def test_a_disk_that_is_too_small_is_told_before_the_start(pipeline, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(DiskError, match=r"not enough disk for 27 images of about 1\.7 kB"):
        generate(pipeline, PROMPTS, tmp_path, **OPTIONS)
    assert not list(tmp_path.glob("p*"))


def test_a_disk_that_fills_up_keeps_whole_images(whole, pipeline, tmp_path, monkeypatch):
    count = iter(range(1000))

    def full(path, mode):
        if next(count) >= 14:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode)

    monkeypatch.setattr(write, "open", full, raising=False)
    with pytest.raises(DiskError, match="disk full"):
        generate(pipeline, PROMPTS, tmp_path, **OPTIONS)
    assert not list(tmp_path.glob("p*/.*"))
    there = digests(tmp_path)
    assert there
    assert len(there) % SETTINGS.n_steps == 0
    monkeypatch.undo()
    generate(pipeline, PROMPTS, tmp_path, **OPTIONS)
    assert digests(tmp_path) == digests(whole)
    assert there.items() <= digests(whole).items()


def test_two_processes_on_one_shard_are_refused(pipeline, copy):
    shutil.rmtree(copy / "p0001")
    with shard_lock(copy, (0, 2)) as held:
        pass
    with held:
        with pytest.raises(DiskError, match="another process is filling"):
            generate(pipeline, PROMPTS, copy, shard=(0, 2), **OPTIONS)
        with pytest.raises(DiskError, match="another process is filling"):
            generate(pipeline, PROMPTS, copy, **OPTIONS)  # other shards, which overlap
        generate(pipeline, PROMPTS, copy, shard=(1, 2), **OPTIONS)
    generate(pipeline, PROMPTS, copy, shard=(0, 2), **OPTIONS)
    assert verify(copy).ok
