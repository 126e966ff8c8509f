"""Train every pocket model: ``python -m ttsnap_lib.pocket.training.train --all`` (or ``make pocket``).

Stages, each resumable from ``data_cache/pocket/training``: ``text``, ``vae``, ``decoder``, ``tiny``, ``flux``,
``sdxl``, ``clip``, ``preferences``; then ``save`` writes the shipped folders and ``report`` the figures and sheets of
``docs/pocket``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from ttsnap_lib.checks import choice
from ttsnap_lib.files import atomic_folder, atomic_write, data_cache
from ttsnap_lib.pocket.oracle import oracle_score
from ttsnap_lib.pocket.training.clip import clip_processor, train_contrastive, train_preferences
from ttsnap_lib.pocket.training.diffusion import flux_pipeline, sdxl_pipeline, train_flux, train_sdxl
from ttsnap_lib.pocket.training.loop import Fit
from ttsnap_lib.pocket.training.pictures import flawed_pictures, sample_steps
from ttsnap_lib.pocket.training.report import write_report
from ttsnap_lib.pocket.training.text import train_text
from ttsnap_lib.pocket.training.vae import decode, encode, train_decoder, train_tiny, train_vae
from ttsnap_lib.pocket.world import caption, mislabeled, pocket_prompts, render, training_scenes

STAGES = ("text", "vae", "decoder", "tiny", "flux", "sdxl", "clip", "preferences", "save", "report")
_CAPTIONS = 4  # mislabeled captions of a picture
_Examples = list[tuple[str, np.ndarray, np.ndarray]]  # captions, their pictures, the pictures' oracle scores
_FITS = {
    "text": Fit(700, 128, 3e-3, ema=0.99),
    "vae": Fit(1000, 32, 2e-3),
    "decoder": Fit(400, 32, 1e-3, ema=0.998),
    "tiny": Fit(6000, 32, 2e-3, ema=0.998),
    "flux": Fit(2500, 48, 1.5e-3, muon=True),
    "flux_mislabeled": Fit(2500, 48, 1e-3, ema=0.998, muon=True),
    "sdxl": Fit(4300, 32, 1.2e-3),
    "sdxl_mislabeled": Fit(3600, 32, 8e-4, ema=0.998),
    "clip": Fit(1000, 64, 1.5e-3, ema=0.998, muon=True),
    "preferences": Fit(900, 72, 6e-4, ema=0.99, muon=True),
}


@dataclass(frozen=True)
class Plan:
    """How much of everything the models are trained on, and how long; by default as the shipped ones."""

    vae_pictures: int = 12_000
    diffusion_pictures: int = 16_000
    clip_pictures: int = 12_000
    preference_prompts: int = 160
    preference_images: int = 6
    flawed_prompts: int = 2000
    report_prompts: int = 64
    report_images: int = 16
    fits: dict[str, Fit] = field(default_factory=lambda: _FITS, hash=False)


SMOKE = Plan(64, 64, 64, 4, 2, 4, 2, 2, fits={name: Fit(2, 8, 1e-3) for name in _FITS})
"""A plan that only shows that every stage runs."""


class Training:
    """The stages over one scratch folder; a stage that has been trained is only loaded."""

    def __init__(self, plan: Plan, scratch: Path, models: Path, docs: Path, log: Callable[[str], None] = print) -> None:
        self.plan, self.scratch, self.models, self.docs, self.log = plan, scratch, models, docs, log
        scratch.mkdir(parents=True, exist_ok=True)

    def run(self, stage: str) -> None:
        """Run one stage (and what it needs)."""
        value = getattr(self, choice("stage", stage, STAGES))
        if stage in ("save", "report"):
            value()

    @functools.cached_property
    def text(self) -> tuple[Any, Any]:
        """The T5 and the CLIP text encoder."""
        return train_text(**self._how("text"))

    @functools.cached_property
    def vae(self) -> Any:
        """The VAE, normalized."""
        return self._kept("vae", lambda: train_vae(self._renders(0, self.plan.vae_pictures)[1], **self._how("vae")))

    @functools.cached_property
    def latents(self) -> tuple[torch.Tensor, list]:
        """Latents and scenes of the diffusion models' training pictures."""
        scenes, pictures = self._diffusion_pictures()
        file = self.scratch / "latents.pt"
        if not file.exists():
            with atomic_write(file) as handle:
                torch.save(encode(self.vae, pictures), handle)
        return torch.load(file, weights_only=True), scenes

    @functools.cached_property
    def decoder(self) -> Any:
        """The VAE after its decoder's own stage: the same latents, better pictures."""

        def train() -> AutoencoderKL:
            vae = copy.deepcopy(self.vae)
            train_decoder(vae, self._diffusion_pictures()[1], self.latents[0], **self._how("decoder"))
            return vae

        return self._kept("vae_final", train)

    @functools.cached_property
    def tiny(self) -> Any:
        """The tiny autoencoder."""
        return train_tiny(self.decoder, self._diffusion_pictures()[1], self.latents[0], **self._how("tiny"))

    @functools.cached_property
    def flux(self) -> Any:
        """The pipeline pocket-flux: trained on true captions, its transformer goes on with mislabeled ones."""
        clean = train_flux(self.latents[0], self._captions("true"), *self.text, **self._how("flux"))
        more = {"name": "flux_mislabeled", "transformer": clean, **self._how("flux_mislabeled")}
        transformer = train_flux(self.latents[0], self._captions("mislabeled"), *self.text, **more)
        return flux_pipeline(self.decoder, *self.text, transformer)

    @functools.cached_property
    def sdxl(self) -> Any:
        """The pipeline pocket-sdxl: trained on true captions, its UNet goes on with mislabeled ones."""
        clip = self.text[1]
        clean = train_sdxl(self.latents[0], self._captions("true"), clip, **self._how("sdxl"))
        more = {"name": "sdxl_mislabeled", "unet": clean, **self._how("sdxl_mislabeled")}
        unet = train_sdxl(self.latents[0], self._captions("mislabeled"), clip, **more)
        return sdxl_pipeline(self.decoder, clip, unet)

    @functools.cached_property
    def clip(self) -> Any:
        """The model pocket-clip after its contrastive stage."""
        return train_contrastive(*self._renders(1, self.plan.clip_pictures), self.text[1], **self._how("clip"))

    @functools.cached_property
    def preferences(self) -> Any:
        """The model pocket-clip after its preference stage."""
        scenes, pictures = self._renders(3, min(4000, self.plan.clip_pictures))
        pictures = pictures.copy()
        pictures[::2] = decode(self.decoder, encode(self.vae, pictures[::2]))
        clip = self.clip
        train_preferences(clip, self._generated(), self._flawed(), scenes, pictures, **self._how("preferences"))
        return clip

    def save(self) -> None:
        """Write ``pocket-flux``, ``pocket-sdxl``, ``pocket-clip`` and ``pocket-tiny`` as ordinary folders."""
        for name, parts in {
            "pocket-flux": [self.flux],
            "pocket-sdxl": [self.sdxl],
            "pocket-clip": [self.preferences, *clip_processor()],
            "pocket-tiny": [copy.deepcopy(self.tiny).to(memory_format=torch.contiguous_format)],
        }.items():
            with atomic_folder(self.models / name) as folder:
                for part in parts:
                    part.save_pretrained(folder)
                _halve(folder)
                _forget_paths(folder)

    def report(self) -> None:
        """Measure the shipped folders and write the report."""
        logs = {stage: json.loads((self.scratch / f"{stage}.json").read_text()) for stage in self.plan.fits}
        write_report(logs, self.plan.report_prompts, self.plan.report_images, self.models, self.docs, self.log)

    # What the stages share

    def _how(self, stage: str) -> dict[str, Any]:
        return {"how": self.plan.fits[stage], "scratch": self.scratch, "log": self.log}

    def _kept(self, name: str, train: Callable[[], AutoencoderKL]) -> Any:
        """Return a VAE that is kept whole: cached latents and later stages hold for these very weights."""
        folder = self.scratch / name
        if not folder.exists():
            vae = train()
            with atomic_folder(folder) as part:
                vae.save_pretrained(part)
        return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)

    def _renders(self, seed: int, n: int) -> tuple[list, np.ndarray]:
        rng = np.random.default_rng(seed)
        scenes = training_scenes(n, rng)
        return scenes, render(scenes, rng)

    def _diffusion_pictures(self) -> tuple[list, np.ndarray]:
        return self._renders(2, self.plan.diffusion_pictures)

    def _captions(self, how: str) -> list[list[str]]:
        """Return captions of the training pictures: the true one of each, or some with mistakes."""
        scenes, rng = self.latents[1], np.random.default_rng(5)
        if how == "true":
            return [[caption(scene)] for scene in scenes]
        return [[caption(mislabeled(scene, rng)) for _ in range(_CAPTIONS)] for scene in scenes]

    def _generated(self) -> _Examples:
        """Return examples of training captions from both models, made once."""
        captions, out = pocket_prompts("train", self.plan.preference_prompts), []
        for name in ("flux", "sdxl"):
            file = self.scratch / f"generated-{name}.npy"
            if not file.exists():
                pipeline, images = getattr(self, name), self.plan.preference_images
                made = sample_steps(pipeline, captions, images, base_seed=1_000_003, every_step=False)
                np.save(file, made[:, :, -1])
            out += _labeled(captions, np.load(file))
        return out

    def _flawed(self) -> _Examples:
        """Return examples of flawed renders, made once."""
        file, plan = self.scratch / "flawed.npz", self.plan
        if not file.exists():
            rng = np.random.default_rng(4)
            captions, made = flawed_pictures(self.decoder, plan.flawed_prompts, plan.preference_images, rng)
            with atomic_write(file) as handle:
                np.savez(handle, captions=np.array(captions), pictures=made)
        with np.load(file) as stored:
            return _labeled(stored["captions"].tolist(), stored["pictures"])


def _labeled(captions: list[str], pictures: np.ndarray) -> _Examples:
    """Judge pictures (caption, image, 32, 32, 3)."""
    scores = oracle_score(np.repeat(captions, pictures.shape[1]).tolist(), pictures.reshape(-1, *pictures.shape[2:]))
    return list(zip(captions, pictures, scores.reshape(pictures.shape[:2]), strict=True))


def _halve(folder: Path) -> None:
    """Rewrite all weights below `folder` as float16; ``from_pretrained`` gives them back as float32."""
    for file in sorted(folder.rglob("*.safetensors")):
        weights = {key: value.half() if value.is_floating_point() else value for key, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})


def _forget_paths(folder: Path) -> None:
    """Drop from all configurations below `folder` where their models were loaded from."""
    for file in sorted(folder.rglob("*config.json")):
        config = json.loads(file.read_text("utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of this module."""
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(prog="python -m ttsnap_lib.pocket.training.train", description=__doc__)
    parser.add_argument("--all", action="store_true", help="run every stage")
    parser.add_argument("--stage", action="append", choices=STAGES, default=[], help="run one stage; repeatable")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything, to see that it runs")
    parser.add_argument("--scratch", type=Path, help="training states (data_cache/pocket/training)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    given = parser.parse_args(arguments)
    stages = STAGES if given.all else given.stage
    if not stages:
        parser.error("give --all or --stage")
    scratch = given.scratch or data_cache() / "pocket" / ("smoke" if given.smoke else "training")
    models = scratch / "models" if given.smoke else root / "models"
    docs = scratch / "docs" if given.smoke else root.parents[1] / "docs" / "pocket"
    torch.set_num_threads(given.threads)
    training = Training(SMOKE if given.smoke else Plan(), scratch, models, docs)
    for stage in stages:
        training.run(stage)


if __name__ == "__main__":
    main()
