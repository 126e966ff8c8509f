"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

from tests.reference_data import MISSING, reference_folder

ROOT = Path(__file__).resolve().parent.parent

# Machines that run the tests are shared: how long an example takes says nothing.
hypothesis.settings.register_profile("shared", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("shared")

# They come first, the longest at the head: with two files at a time both workers then end together.
LONGEST = (
    "faults/test_drill.py", "runs/test_sweep.py", "test_readme.py", "runs/test_run.py", "simulation/test_plots.py",
    "finetuning/test_report.py", "finetuning/test_train.py", "benchmarks/test_device.py", "live/test_run.py",
    "diffusion/test_families.py", "trajectories/test_generate.py", "commands/test_search.py", "live/test_many.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Put the longest files first."""
    order = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="module")
def one_thread():
    """One thread for torch: several test processes share few cores, and sums come out the same."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """Let the test compute into a data cache of its own."""
    monkeypatch.setenv("TTSNAP_DATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of the published reward tensors and golden results; tests that need it skip without it."""
    folder = reference_folder()
    if folder is None:
        pytest.skip(MISSING)
    return folder


@pytest.fixture(scope="session")
def pools(reference, tmp_path_factory):
    """Return the published reward tensors by model, in memory, repeats kept; one test process imports for all."""
    from ttsnap_lib import import_published, open_rewards, save_rewards

    base = tmp_path_factory.getbasetemp()
    kept = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pools"
    with FileLock(f"{kept}.lock"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the SDXL pool repeats itself
        for model in ("flux", "sdxl"):
            if not (kept / model).exists():
                save_rewards(import_published(reference / "values", model), kept / model)
        return {model: open_rewards(kept / model).load() for model in ("flux", "sdxl")}


@pytest.fixture
def images():
    """Seven images of 40 x 30 pixels."""
    from tests.worlds import make_images

    return make_images(7)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """Folder of a tiny CLIPModel with its processor."""
    from tests.worlds import save_clip

    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    """Folder of a small BERT tokenizer named as the image-reward package looks for it."""
    from transformers import BertTokenizer

    from tests.worlds import WORDS

    folder = tmp_path_factory.mktemp("bert") / "bert-base-uncased"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def med_config(tmp_path_factory) -> Path:
    """Small text configuration of ImageReward; its head wants a width of 768."""
    path = tmp_path_factory.mktemp("med") / "med_config.json"
    config = {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64,
        "model_type": "bert",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 24,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def image_reward_module(bert_folder, med_config):
    """ImageReward with small towers, its weights made to react."""
    import torch

    from tests.parity.image_reward import SMALL_VISION
    from tests.worlds import randomize_image_reward
    from ttsnap_lib.rewards import image_reward

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(image_reward, "_VISION", SMALL_VISION)
        torch.manual_seed(0)
        module = image_reward.build_module(med_config, bert_folder)
    randomize_image_reward(module)
    return module
