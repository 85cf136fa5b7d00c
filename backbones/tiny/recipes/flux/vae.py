"""Step `vae`: an AutoencoderKL with the latents of qwen-image-tiny's picture VAE.

    python -m backbones.tiny.recipes.flux.vae [--minutes 25]

The encoder learns the cached, normalised latents of step `latents`, the decoder the pictures from them, each
on its own: losses of step `vae` for the picture (L1, gradient L1, 1 - SSIM), squared error for the latents.
So both tiny text-to-image models live in one latent space, and one can teach the other. The decoder sees
up to NOISE of noise, because what it will decode comes from a diffusion model. There is no KL term: the
posterior is given a small fixed variance. Writes runs/flux/vae/last.pt (to resume) and
runs/flux/vae/model/, the diffusers folder.

Shapes: B batch; x (B, 3, H, W) in [-1, 1]; z (B, LATENTS, H/8, W/8).
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from backbones.tiny.recipes.flux.options import arguments
from backbones.tiny.recipes.flux.picture_vae import LATENTS, build_vae, decode, encode_moments
from backbones.tiny.recipes.pairs import SIDE, Pairs
from backbones.tiny.recipes.training import Loop, Step
from backbones.tiny.recipes.vae import is_kernel, picture_loss

CROP = 64  # px
NOISE = 0.15  # largest noise on the decoder's latents, relative to their deviation of 1
LATENT_WEIGHT = 0.3
LOG_VARIANCE = -10.0  # of the posterior, fixed


def vae_step(vae: AutoencoderKL, x: Tensor, z: Tensor, generator: torch.Generator) -> Step:
    """The loss of one batch: decoder from noisy true latents, encoder to true latents."""
    strength = NOISE * torch.rand(len(x), 1, 1, 1, generator=generator)
    noisy = z + strength * torch.randn(z.shape, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        y = decode(vae, noisy).float()
        mean = encode_moments(vae, x)[0].float()
    loss, shown = picture_loss(x, y)
    latent = F.mse_loss(mean, z)
    return Step(loss + LATENT_WEIGHT * latent, len(x), {**shown, "latent": latent.item()})


@torch.no_grad()
def finish(out: Path, vae: AutoencoderKL, data: Pairs, count: int = 256) -> None:
    """Fix the posterior's variance, measure both halves on original art, and save the diffusers folder."""
    vae.quant_conv.weight[LATENTS:] = 0
    vae.quant_conv.bias[LATENTS:] = LOG_VARIANCE
    chosen = data.some("plain", count)
    errors = []
    for ids in np.array_split(chosen, max(1, len(chosen) // 32)):
        x, z = data.window(ids)
        x = x.contiguous()
        mean, _ = encode_moments(vae, x)
        found = [decode(vae, z).clamp(-1, 1) - x, decode(vae, mean).clamp(-1, 1) - x, mean - z]
        errors.append([len(ids) * part.square().mean().item() for part in found])
    decoded, round_trip, latent = np.sum(errors, axis=0) / len(chosen)
    print(
        f"vae: EMA {10 * math.log10(4 / decoded):.2f} dB from the latents, "
        f"{10 * math.log10(4 / round_trip):.2f} dB through its own encoder, latent error {latent:.3f}, "
        f"on {len(chosen)} plain pictures"
    )
    vae.save_pretrained(out)


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, minutes=25.0, ema=0.998)
    parser.set_defaults(batch=24)
    parser.add_argument(
        "--crop-share", type=float, default=0.7, help="share of the time spent on 64 px crops"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = build_vae()
    loop = Loop.from_args("vae", vae, is_kernel, args, "vae")
    data = Pairs(args.data, args.latents, args.seed + loop.step)
    size = sum(p.numel() for p in vae.parameters()) / 1e6
    print(f"vae: {size:.2f} M parameters, {LATENTS} channels, step {loop.step}", flush=True)

    def take(progress: float) -> Step:
        # Crops first: four times the optimiser steps for the same pixels; whole pictures at the end.
        crops = progress < args.crop_share
        x, z = data.batch(args.batch if crops else max(3, args.batch * 2 // 3), CROP if crops else SIDE)
        # Not channels last: group norm's backward pass is far slower there.
        return vae_step(vae, x.contiguous(), z, loop.generator)

    loop.run(take)
    finish(args.out / "vae" / "model", loop.load_average().requires_grad_(False), data)


if __name__ == "__main__":
    main()
