"""Training: every stage runs, goes on where it stopped, and gives the same weights for the same seed."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ttsnap_lib.errors import CheckpointError
from ttsnap_lib.pocket.training.clip import degrade
from ttsnap_lib.pocket.training.loop import Fit, fit
from ttsnap_lib.pocket.training.train import SMOKE, main


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_smoke_training_writes_models_and_report(tmp_path, capsys):
    seed = torch.initial_seed()
    main(["--all", "--smoke", "--scratch", str(tmp_path), "--threads", "1"])
    assert torch.initial_seed() == seed  # no global seed is set
    names = {"pocket-flux", "pocket-sdxl", "pocket-clip", "pocket-tiny"}
    assert {folder.name for folder in (tmp_path / "models").iterdir()} == names
    figures = json.loads((tmp_path / "docs" / "figures.json").read_text())
    assert set(figures["training"]) == set(SMOKE.fits)
    assert len(figures["pocket-flux"]["kendall_tau_by_step"]) == 20
    assert len(list((tmp_path / "docs").glob("*.png"))) == 4
    assert "| preferences | 2 |" in (tmp_path / "docs" / "index.md").read_text()
    with pytest.raises(SystemExit):  # no stage is named
        main([])
    assert "--all" in capsys.readouterr().err


def _problem(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torch.nn.ModuleDict(
            {"blocks": torch.nn.ModuleList([torch.nn.Linear(6, 6)]), "out": torch.nn.Linear(6, 2)}
        )

    def loss(rng, batch):
        x = torch.from_numpy(rng.standard_normal((batch, 6)).astype(np.float32))
        made = model["out"](torch.tanh(model["blocks"][0](x)))
        return {"loss": (made - x[:, :2]).square().mean()}

    return model, loss


@pytest.mark.parametrize("muon", [False, True])
def test_fit_resumes_to_the_same_weights(tmp_path, muon):
    how = Fit(steps=40, batch=16, lr=1e-2, muon=muon)
    whole, loss = _problem()
    history = fit("a", {"m": whole}, loss, how, seed=1, scratch=tmp_path, log=lambda text: None)
    assert history[-1]["loss"] < history[0]["loss"]

    class Stop(Exception):
        pass

    cut, loss = _problem()

    def interrupted(rng, batch, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == 18:
            raise Stop
        return loss(rng, batch)

    with pytest.raises(Stop):
        fit("b", {"m": cut}, interrupted, how, seed=1, scratch=tmp_path, save_every_s=0.0, log=lambda text: None)
    resumed, loss = _problem(seed=9)
    fit("b", {"m": resumed}, loss, how, seed=1, scratch=tmp_path, log=lambda text: None)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_state_of_another_architecture_is_refused(tmp_path):
    model, loss = _problem()
    fit("a", {"m": model}, loss, Fit(2, 4, 1e-2), seed=0, scratch=tmp_path, log=lambda text: None)
    with pytest.raises(CheckpointError, match="another architecture"):
        fit("a", {"m": model["out"]}, loss, Fit(2, 4, 1e-2), seed=0, scratch=tmp_path, log=lambda text: None)


def test_divergence_is_an_error(tmp_path):
    model, _ = _problem()
    bad = lambda rng, batch: {"loss": model["out"].weight.sum() * float("nan")}
    with pytest.raises(CheckpointError, match="diverged"):
        fit("a", {"m": model}, bad, Fit(2, 4, 1e-2), seed=0, scratch=tmp_path, log=lambda text: None)


def test_degraded_pictures_stay_close():
    pictures = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    out = degrade(pictures, np.random.default_rng(1))
    assert out.dtype == np.float32
    assert 0 <= out.min() <= out.max() <= 1
    same = np.abs(out - pictures / 255.0).max(axis=(1, 2, 3)) < 1e-6
    assert 3 < same.sum() < 20
