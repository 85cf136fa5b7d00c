"""Step `vae`: train the picture autoencoder from scratch.

    python -m backbones.tiny.recipes.flux.vae [--minutes 20]

Loss as for qwen-image-tiny: L1 + gradient L1 + (1 - SSIM) + a small KL term, with noise added to the latents
that the decoder sees. Writes runs/flux/vae/last.pt (to resume) and runs/flux/vae/model/, the diffusers
folder.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from backbones.tiny.recipes.flux.picture_vae import (
    LATENTS,
    build_vae,
    decode,
    encode_moments,
    fold_statistics,
)
from backbones.tiny.recipes.flux.training import Loop, Step, arguments
from backbones.tiny.recipes.vae import WEIGHTS, load_pictures, loss_terms, to_tensor

SIDE, CROP = 128, 64  # px
JITTER = 0.1  # largest noise on the decoder's latents, relative to their deviation


def is_kernel(name: str, p: Tensor) -> bool:
    """Kernels for Muon; the 3-channel ends and 1x1 convolutions are too small to orthogonalise."""
    return p.dim() == 4 and p.numel() > 1000


class Pictures:
    """Seeded batches of crops, a third of them original art: it is what most prompts ask for."""

    def __init__(self, folder: Path, seed: int):
        self.pictures, index = load_pictures(folder)
        plain = np.array([row[2] is None for row in index["rows"]])
        self.plain, self.recoloured = np.flatnonzero(plain), np.flatnonzero(~plain)
        self.rng = np.random.default_rng(seed)

    def batch(self, size: int, crop: int) -> Tensor:
        """(size, 3, crop, crop) in [-1, 1], one window for the whole batch."""
        third = size // 3
        rows = [self.rng.choice(self.plain, third), self.rng.choice(self.recoloured, size - third)]
        top, left = self.rng.integers(0, SIDE + 1 - crop, 2)
        rows = np.sort(np.concatenate(rows))
        # Not channels last: group norm's backward pass is far slower there.
        return to_tensor(self.pictures[rows, top : top + crop, left : left + crop]).contiguous()


def vae_step(vae: AutoencoderKL, x: Tensor, generator: torch.Generator) -> Step:
    """The loss of one batch; the decoder sees a posterior sample plus up to JITTER of noise."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = (part.float() for part in encode_moments(vae, x))
        logvar = logvar.clamp(-12, 8)
        noise = torch.randn(mean.shape, generator=generator)
        strength = torch.rand(len(x), 1, 1, 1, generator=generator) * JITTER * mean.detach().std()
        jitter = torch.randn(mean.shape, generator=generator) * strength
        y = decode(vae, mean + noise * (0.5 * logvar).exp() + jitter).float()
    terms = loss_terms(x, y, mean, logvar)
    loss = sum(WEIGHTS[name] * term for name, term in terms.items())
    shown = {name: term.item() for name, term in terms.items()}
    shown["psnr"] = 10 * math.log10(4 / F.mse_loss(y.clamp(-1, 1), x).item())
    return Step(loss, len(x), shown)


@torch.no_grad()
def finish(out: Path, vae: AutoencoderKL, data: Pictures, count: int = 256) -> None:
    """Measure the latents on original art, fold their statistics in, and save the diffusers folder."""
    sample = to_tensor(data.pictures[data.plain[:: max(1, len(data.plain) // count)]])
    mean, _ = encode_moments(vae, sample)
    spread = mean.std((0, 2, 3))
    fold_statistics(vae, mean.mean((0, 2, 3)), spread)
    z, _ = encode_moments(vae, sample)
    psnr = 10 * math.log10(4 / F.mse_loss(decode(vae, z).clamp(-1, 1), sample).item())
    deviations = ", ".join(f"{value:.3f}" for value in spread.tolist())
    print(f"vae: EMA psnr {psnr:.2f} dB on {len(sample)} plain pictures; latent std was {deviations}")
    print(f"vae: now mean {z.mean().item():.4f}, std {z.std().item():.4f}")
    vae.save_pretrained(out)


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, minutes=20.0, lr=2e-3, ema=0.998)
    parser.set_defaults(batch=24)
    parser.add_argument(
        "--crop-share", type=float, default=0.7, help="share of the time spent on 64 px crops"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = build_vae()
    loop = Loop.from_args("vae", vae, is_kernel, "vae", args)
    data = Pictures(args.data, args.seed + loop.step)
    size = sum(p.numel() for p in vae.parameters()) / 1e6
    print(f"vae: {size:.2f} M parameters, {LATENTS} channels, step {loop.step}", flush=True)

    def take(progress: float) -> Step:
        # Crops first: four times the optimiser steps for the same pixels; whole pictures at the end.
        crops = progress < args.crop_share
        x = data.batch(args.batch if crops else max(3, args.batch * 2 // 3), CROP if crops else SIDE)
        return vae_step(vae, x, loop.generator)

    loop.run(take)
    finish(args.out / "vae" / "model", loop.load_average(), data)


if __name__ == "__main__":
    main()
