"""How much of everything the pocket models are trained on, and how long."""

from __future__ import annotations

from dataclasses import dataclass, field

from ttsnap_lib.pocket.training.loop import Fit


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    vae_pictures: int
    diffusion_pictures: int
    clip_pictures: int
    preference_prompts: int
    preference_images: int
    flawed_prompts: int
    report_prompts: int
    report_images: int
    fits: dict[str, Fit] = field(hash=False)


FULL = Plan(
    vae_pictures=12_000,
    diffusion_pictures=16_000,
    clip_pictures=12_000,
    preference_prompts=160,
    preference_images=6,
    flawed_prompts=2000,
    report_prompts=64,
    report_images=16,
    fits={
        "text": Fit(700, 128, 3e-3, ema=0.99),
        "vae": Fit(1000, 32, 2e-3),
        "tiny": Fit(6000, 32, 2e-3, ema=0.998),
        "decoder": Fit(400, 32, 1e-3, ema=0.998),
        "flux": Fit(2500, 48, 1.5e-3, muon=True),
        "sdxl": Fit(4300, 32, 1.2e-3),
        "flux_mislabeled": Fit(2500, 48, 1e-3, ema=0.998, muon=True),
        "sdxl_mislabeled": Fit(3600, 32, 8e-4, ema=0.998),
        "clip": Fit(1000, 64, 1.5e-3, ema=0.998, muon=True),
        "preferences": Fit(900, 72, 6e-4, ema=0.99, muon=True),
    },
)
"""The plan of the shipped models."""


SMOKE = Plan(
    vae_pictures=64,
    diffusion_pictures=64,
    clip_pictures=64,
    preference_prompts=4,
    preference_images=2,
    flawed_prompts=4,
    report_prompts=2,
    report_images=2,
    fits={name: Fit(2, 8, 1e-3) for name in FULL.fits},
)
"""A plan that only shows that every stage runs."""
