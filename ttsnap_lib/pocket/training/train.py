"""Train every pocket model: ``python -m ttsnap_lib.pocket.train --all`` (or ``make pocket``).

Stages, each resumable from ``data_cache/pocket/training``: ``text``, ``vae``, ``decoder``, ``tiny``, ``flux``,
``sdxl``, ``clip``, ``preferences``; then ``save`` writes the shipped folders and ``report`` the figures and sheets of ``docs/pocket``.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttsnap_lib.checks import choice
from ttsnap_lib.files import atomic_folder, atomic_write, data_cache
from ttsnap_lib.pocket.training.plan import FULL, SMOKE, Plan

STAGES = ("text", "vae", "decoder", "tiny", "flux", "sdxl", "clip", "preferences", "save", "report")


_CAPTIONS = 4  # mislabeled captions of a picture


class Training:
    """The stages over one scratch folder; a stage that has been trained is only loaded."""

    def __init__(self, plan: Plan, scratch: Path, models: Path, docs: Path, log: Callable[[str], None] = print) -> None:
        self.plan, self.scratch, self.models, self.docs, self.log = plan, scratch, models, docs, log
        scratch.mkdir(parents=True, exist_ok=True)

    def _fit_arguments(self, stage: str) -> dict[str, Any]:
        return {"how": self.plan.fits[stage], "scratch": self.scratch, "log": self.log}

    def _renders(self, seed: int, n: int) -> tuple[list, np.ndarray]:
        from ttsnap_lib.pocket.world import render, training_scenes

        rng = np.random.default_rng(seed)
        scenes = training_scenes(n, rng)
        return scenes, render(scenes, rng)

    @functools.cached_property
    def text(self) -> tuple:
        """The T5 and the CLIP text encoder."""
        from ttsnap_lib.pocket.training.text import train_text

        return train_text(**self._fit_arguments("text"))[:2]

    @functools.cached_property
    def vae(self) -> Any:
        """The VAE, normalized."""
        from diffusers import AutoencoderKL

        from ttsnap_lib.pocket.training.vae import train_vae

        folder = self.scratch / "vae"
        if not folder.exists():  # kept: cached latents and later stages hold for these very weights
            vae, _ = train_vae(self._renders(0, self.plan.vae_pictures)[1], **self._fit_arguments("vae"))
            with atomic_folder(folder) as part:
                vae.save_pretrained(part)
        return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)

    @functools.cached_property
    def latents(self) -> tuple[torch.Tensor, list]:
        """Latents and scenes of the diffusion models' training pictures."""
        from ttsnap_lib.pocket.training.vae import encode

        scenes, pictures = self._renders(2, self.plan.diffusion_pictures)
        file = self.scratch / "latents.pt"
        if not file.exists():
            with atomic_write(file) as handle:
                torch.save(encode(self.vae, pictures), handle)
        return torch.load(file, weights_only=True), scenes

    def _captions(self, how: str) -> list[list[str]]:
        """Return captions of the training pictures: the true one of each, or some with mistakes."""
        from ttsnap_lib.pocket.world import caption, mislabeled

        scenes, rng = self.latents[1], np.random.default_rng(5)
        if how == "true":
            return [[caption(scene)] for scene in scenes]
        return [[caption(mislabeled(scene, rng)) for _ in range(_CAPTIONS)] for scene in scenes]

    @functools.cached_property
    def decoder(self) -> Any:
        """The VAE after its decoder's own stage: the same latents, better pictures."""
        from diffusers import AutoencoderKL

        from ttsnap_lib.pocket.training.vae import train_decoder

        folder = self.scratch / "vae_final"
        if not folder.exists():
            vae, latents = copy.deepcopy(self.vae), self.latents[0]
            pictures = self._renders(2, self.plan.diffusion_pictures)[1]
            train_decoder(vae, pictures, latents, **self._fit_arguments("decoder"))
            with atomic_folder(folder) as part:
                vae.save_pretrained(part)
        return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)

    @functools.cached_property
    def tiny(self) -> Any:
        """The tiny autoencoder."""
        from ttsnap_lib.pocket.training.vae import train_tiny

        pictures = self._renders(2, self.plan.diffusion_pictures)[1]
        return train_tiny(self.decoder, pictures, self.latents[0], **self._fit_arguments("tiny"))[0]

    @functools.cached_property
    def clean_flux(self) -> Any:
        """The FLUX transformer that has seen true captions only."""
        from ttsnap_lib.pocket.training.diffusion import train_flux

        return train_flux(self.latents[0], self._captions("true"), *self.text, **self._fit_arguments("flux"))[0]

    @functools.cached_property
    def flux(self) -> Any:
        """The pipeline pocket-flux: its transformer goes on with mislabeled captions."""
        from ttsnap_lib.pocket.training.diffusion import flux_pipeline, train_flux

        stage, (t5, clip) = "flux_mislabeled", self.text
        wanted = {"name": stage, "transformer": self.clean_flux, **self._fit_arguments(stage)}
        transformer, _ = train_flux(self.latents[0], self._captions("mislabeled"), t5, clip, **wanted)
        return flux_pipeline(self.decoder, t5, clip, transformer)

    @functools.cached_property
    def clean_sdxl(self) -> Any:
        """The SDXL UNet that has seen true captions only."""
        from ttsnap_lib.pocket.training.diffusion import train_sdxl

        return train_sdxl(self.latents[0], self._captions("true"), self.text[1], **self._fit_arguments("sdxl"))[0]

    @functools.cached_property
    def sdxl(self) -> Any:
        """The pipeline pocket-sdxl: its UNet goes on with mislabeled captions."""
        from ttsnap_lib.pocket.training.diffusion import sdxl_pipeline, train_sdxl

        stage = "sdxl_mislabeled"
        wanted = {"name": stage, "unet": self.clean_sdxl, **self._fit_arguments(stage)}
        unet, _ = train_sdxl(self.latents[0], self._captions("mislabeled"), self.text[1], **wanted)
        return sdxl_pipeline(self.decoder, self.text[1], unet)

    @functools.cached_property
    def clip(self) -> Any:
        """The model pocket-clip after its contrastive stage."""
        from ttsnap_lib.pocket.training.clip import train_contrastive

        scenes, pictures = self._renders(1, self.plan.clip_pictures)
        return train_contrastive(scenes, pictures, self.text[1], **self._fit_arguments("clip"))[0]

    @functools.cached_property
    def preferences(self) -> Any:
        """The model pocket-clip after its preference stage."""
        from ttsnap_lib.pocket.training.clip import train_preferences
        from ttsnap_lib.pocket.training.vae import decode, encode

        scenes, pictures = self._renders(3, min(4000, self.plan.clip_pictures))
        pictures = pictures.copy()
        pictures[::2] = decode(self.decoder, encode(self.vae, pictures[::2]))
        clip = self.clip
        examples = self._generated(), self._flawed()
        train_preferences(clip, *examples, scenes, pictures, **self._fit_arguments("preferences"))
        return clip

    def _flawed(self) -> list[tuple[str, np.ndarray, np.ndarray]]:
        from ttsnap_lib.pocket.training.flaws import flawed_pictures

        file, plan = self.scratch / "flawed.npz", self.plan
        if not file.exists():
            rng = np.random.default_rng(4)
            captions, made = flawed_pictures(self.decoder, plan.flawed_prompts, plan.preference_images, rng)
            with atomic_write(file) as handle:
                np.savez(handle, captions=np.array(captions), pictures=made)
        with np.load(file) as stored:
            return _labeled(stored["captions"].tolist(), stored["pictures"])

    def _generated(self) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Return (caption, pictures, oracle) of training captions, from both models, made once."""
        from ttsnap_lib.pocket.training.sample import sample
        from ttsnap_lib.pocket.world import pocket_prompts

        captions, out = pocket_prompts("train", self.plan.preference_prompts), []
        for name in ("flux", "sdxl"):
            file = self.scratch / f"generated-{name}.npy"
            if not file.exists():
                made = sample(getattr(self, name), captions, self.plan.preference_images, base_seed=1_000_003)
                np.save(file, made)
            out += _labeled(captions, np.load(file))
        return out

    def save(self) -> None:
        """Write the shipped folders, weights in half precision."""
        from ttsnap_lib.pocket.training.ship import ship

        ship(self, self.models)

    def report(self) -> None:
        """Measure the shipped folders and write the report."""
        from ttsnap_lib.pocket.training.report import write_report

        write_report(self.plan, self.scratch, self.models, self.docs, self.log)

    def run(self, stage: str) -> None:
        """Run one stage (and what it needs)."""
        value = getattr(self, choice("stage", stage, STAGES))
        if stage in ("save", "report"):
            value()


def _labeled(captions: list[str], pictures: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return (caption, pictures, oracle scores) of pictures (caption, image, 32, 32, 3)."""
    from ttsnap_lib.pocket.oracle import oracle_score

    scores = oracle_score(np.repeat(captions, pictures.shape[1]).tolist(), pictures.reshape(-1, *pictures.shape[2:]))
    return list(zip(captions, pictures, scores.reshape(pictures.shape[:2]), strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of this module."""
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(prog="python -m ttsnap_lib.pocket.training.train", description=__doc__)
    parser.add_argument("--all", action="store_true", help="run every stage")
    parser.add_argument("--stage", action="append", choices=STAGES, default=[], help="run one stage; repeatable")
    parser.add_argument("--smoke", action="store_true", help="two steps of everything, to see that it runs")
    parser.add_argument("--scratch", type=Path, help="training states (data_cache/pocket/training)")
    parser.add_argument("--models", type=Path, help="where the folders go (the package's own)")
    parser.add_argument("--docs", type=Path, help="where the report goes (docs/pocket)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    given = parser.parse_args(arguments)
    stages = STAGES if given.all else given.stage
    if not stages:
        parser.error("give --all or --stage")
    scratch = given.scratch or data_cache() / "pocket" / ("smoke" if given.smoke else "training")
    models = given.models or (scratch / "models" if given.smoke else root / "models")
    docs = given.docs or (scratch / "docs" if given.smoke else root.parents[1] / "docs" / "pocket")
    torch.set_num_threads(given.threads)
    training = Training(SMOKE if given.smoke else FULL, scratch, models, docs)
    for stage in stages:
        training.run(stage)


if __name__ == "__main__":
    main()
