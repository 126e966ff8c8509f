"""What a pool of trajectories of a real model needs: hours on a GPU and disk, computed from the cost presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ttsnap_lib.costs import CostModel
from ttsnap_lib.trajectories.layout import RAW_SHARE

if TYPE_CHECKING:
    import pandas as pd

CARDS = {"RTX 4090": 165, "A100": 312, "H100": 989}
"""Dense bf16 TFLOP/s of the vendor's data sheet."""
UTILISATION = 0.4
"""Part of that a diffusion model is taken to reach: an assumption, to be replaced by `ttsnap cost --unit seconds`."""


@dataclass(frozen=True)
class Recording:
    """A pool of trajectories: every image with the estimates of all its steps, each decoded and scored."""

    preset: str
    pixels: int
    prompts: int
    images: int
    steps: int = 20
    rewards: int = 1

    @property
    def image_tflops(self) -> float:
        """TFLOPs of one image: its steps, and a decode and a score (ImageReward) at each."""
        cost = CostModel.preset(f"{self.preset}+image_reward")
        step, decode, verify = (cost.each(part, 1) for part in ("step", "decode", "verify"))
        return self.steps * (step + decode + self.rewards * verify)

    @property
    def pictures(self) -> int:
        """Number of pictures, the same as of files when they are kept."""
        return self.prompts * self.images * self.steps

    def tflops(self) -> float:
        """TFLOPs of everything."""
        return self.prompts * self.images * self.image_tflops

    def picture_bytes(self, image_format: str) -> float:
        """Bytes of all pictures, from the share of the raw bytes that a photograph needs."""
        return self.pictures * self.pixels**2 * 3 * RAW_SHARE[image_format]

    def tensor_bytes(self, noise_aware: bool = True) -> float:
        """Bytes of the reward tensor, uncompressed float32."""
        return self.pictures * 4 * self.rewards * (2 if noise_aware else 1)


def hours(tflops: float, card: str) -> float:
    """Return the hours that one card takes."""
    return tflops / (CARDS[card] * UTILISATION) / 3600


def on_a_gpu(prompts: int, images: int, steps: int = 20) -> pd.DataFrame:
    """Return hours on one card, and gigabytes of pictures and of the reward tensor, of a pool of FLUX.1-dev or SDXL.

    One row a model and size. The hours are computed, not measured: `ttsnap cost --unit seconds` measures yours.
    """
    import pandas as pd

    rows = {}
    for label, preset, pixels in (
        ("FLUX.1-dev, 512 px", "flux-512", 512), ("FLUX.1-dev, 1024 px", "flux-1024", 1024),
        ("SDXL, 512 px", "sdxl-512", 512), ("SDXL, 1024 px", "sdxl-1024", 1024),
    ):  # fmt: skip
        pool = Recording(preset, pixels, prompts, images, steps)
        rows[label] = {f"hours, {card}": hours(pool.tflops(), card) for card in CARDS}
        rows[label] |= {"GB as PNG": pool.picture_bytes("png") / 1e9, "GB as WebP": pool.picture_bytes("webp") / 1e9}
        rows[label]["GB of the tensor alone"] = pool.tensor_bytes() / 1e9
    return pd.DataFrame(rows).T
