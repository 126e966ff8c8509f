"""What the tests of the segment engine share: the stock call, and the same run in parts."""

from __future__ import annotations

import torch

from tests import tiny
from ttsnap_lib.diffusion.denoise import Candidates, Denoiser, Settings, image_generator

__all__ = ["PROMPTS", "RELATIVE", "STEPS", "generators", "in_parts", "same_to", "settings", "stock"]

PROMPTS = ["a red ring", "blue square left", "green dot"]
STEPS = 6
RELATIVE = 1e-5  # of the largest latent, in fp32, where the batch shape differs


def settings(**changes) -> Settings:
    return Settings(**{"n_steps": STEPS, "height": tiny.SIZE, "width": tiny.SIZE} | changes)


def generators(n: int = len(PROMPTS)) -> list[torch.Generator]:
    return [image_generator(0, 0, image) for image in range(n)]


def stock(pipeline, output_type: str = "latent", **changes):
    """Call the pipeline as its users do."""
    options = {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": STEPS} | changes
    if hasattr(pipeline, "transformer"):
        options.setdefault("max_sequence_length", tiny.TOKENS)
    return pipeline(PROMPTS, generator=generators(), output_type=output_type, **options).images


def in_parts(denoiser: Denoiser, cuts, conditioning=None) -> tuple[Candidates, dict[int, torch.Tensor]]:
    """Run to each of `cuts` in turn, recording every estimate."""
    conditioning = denoiser.encode(PROMPTS) if conditioning is None else conditioning
    candidates, estimates = denoiser.noise(generators()), {}
    for end in cuts:
        candidates = denoiser.run(
            candidates, conditioning, end, range(candidates.step + 1, end + 1), estimates.__setitem__
        )
    return candidates, estimates


def same_to(got: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert (got - expected).abs().max() <= relative * expected.abs().max()
