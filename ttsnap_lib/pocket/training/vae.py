"""Training of the autoencoders: the VAE, and the tiny one over its latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch.nn import functional as F

from ttsnap_lib.pocket.training.loop import fit
from ttsnap_lib.pocket.training.models import make_tiny_decoder, make_vae

_KL = 1e-6  # only keeps the latents' range near one; their scale is fixed afterwards


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """Return uint8 (n, 32, 32, 3) pictures as a float tensor (n, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float().div_(127.5).sub_(1.0)


def _weight(x: torch.Tensor) -> torch.Tensor:
    """Return per-pixel weights (n, 1, 32, 32) that lift the shapes above the background they stand on."""
    edge = x[:, :, ::31, ::31].median(dim=3).values.median(dim=2).values
    return 1.0 + 3.0 * ((x - edge[:, :, None, None]).abs().amax(dim=1, keepdim=True) > 0.15).float()


def _reconstruction(made: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    difference = made - x
    return (_weight(x) * (difference.square() + 0.1 * difference.abs())).mean()


def train_vae(pictures: np.ndarray, seed: int = 0, **how: Any) -> AutoencoderKL:
    """Train the VAE on uint8 pictures (n, 32, 32, 3) and return it, normalized."""
    vae = make_vae(seed).to(memory_format=torch.channels_last)

    def loss(rng: np.random.Generator, batch: int) -> dict[str, torch.Tensor]:
        x = to_pixels(pictures[rng.integers(len(pictures), size=batch)]).contiguous(memory_format=torch.channels_last)
        code = vae.encode(x).latent_dist
        noise = torch.from_numpy(rng.standard_normal(tuple(code.mean.shape), dtype=np.float32))
        made = vae.decode(code.mean + code.std * noise).sample
        kl = code.kl().mean() / x[0].numel()
        mse = F.mse_loss(made.detach(), x)
        return {"loss": _reconstruction(made, x) + _KL * 3072 * kl, "mse": mse, "kl": kl}

    fit("vae", {"vae": vae}, loss, seed=seed, **how)
    normalize(vae, to_pixels(pictures[:2048]))
    return vae.eval()


def train_decoder(vae: AutoencoderKL, pictures: np.ndarray, latents: torch.Tensor, seed: int = 1, **how: Any) -> None:
    """Go on training the decoder alone, in place, on lightly noised latents.

    The latents stay what they are, so this may run beside the diffusion models' training. The noise stands for the
    small errors of sampled latents.
    """
    vae.requires_grad_(False)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)

    def loss(rng: np.random.Generator, batch: int) -> dict[str, torch.Tensor]:
        rows = rng.integers(len(pictures), size=batch)
        x, z = to_pixels(pictures[rows]), latents[torch.from_numpy(rows)]
        level = torch.from_numpy(rng.uniform(0.0, 0.15, size=(batch, 1, 1, 1)).astype(np.float32))
        noise = torch.from_numpy(rng.standard_normal(tuple(z.shape), dtype=np.float32))
        made = vae.decode(z + level * noise).sample
        return {"loss": _reconstruction(made, x), "mse": F.mse_loss(made.detach(), x)}

    fit("decoder", {"vae": vae}, loss, seed=seed, **how)
    vae.eval().requires_grad_(False)


@torch.no_grad()
def normalize(vae: AutoencoderKL, x: torch.Tensor) -> None:
    """Fold the mean and deviation of each latent channel over `x` into the VAE's 1 x 1 convolutions.

    Afterwards latents have mean 0 and deviation 1, so scale 1 and shift 0 are right for FLUX, which reads both, and
    for SDXL, which reads the scale alone: the two pipelines share one VAE.
    """
    mean = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(256)])
    shift, scale = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3))
    channels = len(shift)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:channels] /= scale[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - shift) / scale
    before.bias[channels:] -= 2 * scale.log()  # log variance
    after.bias += (after.weight[:, :, 0, 0] * shift).sum(dim=1)
    after.weight *= scale[None, :, None, None]


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """Return the latent means (n, 8, 8, 8) of uint8 pictures."""
    parts = [vae.encode(to_pixels(pictures[k : k + 256])).latent_dist.mean for k in range(0, len(pictures), 256)]
    return torch.cat(parts)


def train_tiny(
    vae: AutoencoderKL, pictures: np.ndarray, latents: torch.Tensor, seed: int = 0, **how: Any
) -> AutoencoderTiny:
    """Train the tiny autoencoder: its decoder draws what the VAE's decoder draws, its encoder writes the VAE's latents.

    It has to read estimates, which are not latents of clean pictures: early ones are near a mean of several pictures,
    later ones a little off. So it learns from mixtures of two latents and from noised ones.
    """
    tiny = make_tiny_decoder(seed).to(memory_format=torch.channels_last)
    vae.requires_grad_(False)

    def loss(rng: np.random.Generator, batch: int) -> dict[str, torch.Tensor]:
        rows, others = rng.integers(len(pictures), size=(2, batch))
        clean = latents[torch.from_numpy(rows)]
        share = np.where(rng.random(batch) < 0.5, 0.0, rng.uniform(0.0, 0.5, batch)).astype(np.float32)
        level = (0.5 * rng.random(batch) ** 2).astype(np.float32)
        noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), dtype=np.float32))
        z = torch.lerp(clean, latents[torch.from_numpy(others)], torch.from_numpy(share)[:, None, None, None])
        z = z + torch.from_numpy(level)[:, None, None, None] * noise
        with torch.no_grad():
            wanted = vae.decode(z).sample.clamp(-1, 1)
        made = tiny.decode(z).sample
        read = F.mse_loss(tiny.encode(to_pixels(pictures[rows])).latents, clean)
        mse = F.mse_loss(made.detach(), wanted)
        return {"loss": _reconstruction(made, wanted) + 0.1 * read, "mse": mse, "encoder": read}

    fit("tiny", {"tiny": tiny}, loss, seed=seed, **how)
    return tiny.eval()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> np.ndarray:
    """Return uint8 pictures (n, 32, 32, 3) of latents."""
    made = torch.cat([vae.decode(part).sample for part in latents.split(256)])
    return ((made / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
