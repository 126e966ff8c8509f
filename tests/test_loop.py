"""The whole loop on every family at tiny size: load, generate, score, finetune one step, search with what came of it."""

from __future__ import annotations

import numpy as np
import pytest

from tests import worlds
from tests.families import FAMILIES
from tests.worlds import CAPTIONS, PROMPT, load_clip, save_clip, settings, small_config
from ttsnap_lib import Schedule, open_rewards
from ttsnap_lib.diffusion.pipelines import load_pipeline
from ttsnap_lib.finetuning.train import finetune
from ttsnap_lib.live.run import search
from ttsnap_lib.scoring.score import score
from ttsnap_lib.trajectories.generate import generate

QUICK = "z-image"
N_STEPS = 4

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_the_whole_loop(name, tmp_path):
    FAMILIES[name].build().save_pretrained(str(tmp_path / "model"))
    pipeline = load_pipeline(tmp_path / "model", device="cpu")
    if name == "hidream":  # not kept in the folder
        pipeline.default_sample_size = worlds.SIZE // 4
    if name == "qwen-image":
        pipeline.prompt_template_encode_start_idx = 12
    options = {"images_per_prompt": 2, "settings": settings(n_steps=N_STEPS), "batch_size": 4, "cpu_threads": 1}
    folder, tensor = tmp_path / "pool", tmp_path / "rewards.zarr"
    assert generate(pipeline, CAPTIONS[:2], folder, **options).made == 4
    # one more prompt, and again: what is there keeps its bytes, and is found
    kept = (folder / "p0000" / "id001" / "s02.png").read_bytes()
    again = generate(pipeline, CAPTIONS, folder, **options)
    assert (again.made, again.found) == (2, 4) and (folder / "p0000" / "id001" / "s02.png").read_bytes() == kept
    clip = save_clip(tmp_path / "clip")
    score(folder, load_clip(clip), tensor)
    base = open_rewards(tensor)["base"].values
    assert base.shape == (1, len(CAPTIONS), 2, N_STEPS) and np.isfinite(base).all() and base[..., -1].std() > 0
    config = small_config(clip, steps=(1,), batch_size=4, group_size=2)
    table = finetune(folder, tmp_path / "naft", config, device="cpu").table
    assert table["step"].tolist() == [1] and (table["updates"] > 0).all()
    aware = load_clip(clip, adapters=tmp_path / "naft")
    found = search(
        pipeline, PROMPT, aware, Schedule((1,), (0.5,)), candidates=4, batch_size=3, settings=settings(n_steps=N_STEPS)
    )
    assert found.complete and found.record.method == "ttsnap"
    assert np.asarray(found.image).shape == (worlds.SIZE, worlds.SIZE, 3)
    assert worlds.pruned_winner(found.record) == found.winner
