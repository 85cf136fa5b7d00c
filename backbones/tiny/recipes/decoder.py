"""Step `decoder`: go on training the picture decoder alone, on the latents that the transformer learned.

    python -m backbones.tiny.recipes.decoder [--minutes 20]

The encoder stays as it is, so the latents keep their meaning and the transformer needs no new training. The
decoder sees cached latents with noise added, up to NOISE of their standard deviation, because what it will
decode comes from a diffusion model. Same losses and optimisers as step `vae`.
Writes runs/decoder/last.pt (to resume) and runs/decoder/model/ (the diffusers folder).

Shapes: B batch, C latent channels; z (B, C, 16, 16), pictures (B, 3, 128, 128) in [-1, 1].
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from backbones.tiny.recipes.pairs import Pairs
from backbones.tiny.recipes.picture_vae import decode, largest_difference
from backbones.tiny.recipes.training import Loop, Step, arguments, cosine
from backbones.tiny.recipes.vae import CONV_ADAM, is_kernel, picture_loss

NOISE = 0.15


def train(args: argparse.Namespace) -> None:
    """Run or resume until `args.minutes` of training time are used up."""
    torch.manual_seed(args.seed)
    pairs = Pairs(args.data, args.latents, args.seed)
    vae = AutoencoderKLQwenImage.from_pretrained(args.vae)
    shift, scale = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    for name, p in vae.named_parameters():
        p.requires_grad_(name.startswith(("decoder", "post_quant")) and "time_conv" not in name)
    loop = Loop.from_args(
        "decoder", vae, is_kernel, args, adam={**CONV_ADAM, "weight_decay": 0.01},
        schedule=partial(cosine, warm_up=100), adam_factor=1.0,
    )  # fmt: skip
    pairs.rng = np.random.default_rng(args.seed + loop.step)
    show("before", vae, pairs, scale, shift)

    def take(progress: float) -> Step:
        # Crops first: four times the optimiser steps for the same pixels; whole pictures at the end.
        crop, batch = (64, args.batch) if progress < args.crop_share else (128, args.batch // 2)
        x, z = pairs.batch(batch, crop)
        z = z + torch.randn(z.shape) * torch.rand(batch, 1, 1, 1) * NOISE
        with torch.autocast("cpu", torch.bfloat16):
            y = decode(vae, z * scale + shift).float()
        loss, shown = picture_loss(x, y)
        return Step(loss, batch, shown)

    loop.run(take)
    loop.load_average()
    show("after", vae, pairs, scale, shift)
    sample, _ = pairs.window(pairs.some("plain", 4)[:4])
    print(f"decoder: off the real class by {largest_difference(vae, sample):.1e}")
    vae.save_pretrained(args.out / "model")


def show(when: str, vae, pairs: Pairs, scale: Tensor, shift: Tensor) -> None:
    """Print the PSNR of plain and of composed pictures."""
    kinds = [kind for kind in ("plain", "scene") if len(pairs.some(kind, 1))]
    numbers = ", ".join(f"{kind} {measure(vae, pairs, kind, scale, shift):.2f} dB" for kind in kinds)
    print(f"decoder: {when} {numbers}", flush=True)


@torch.no_grad()
def measure(vae, pairs: Pairs, kind: str, scale: Tensor, shift: Tensor, count: int = 256) -> float:
    """PSNR in dB over about `count` pictures of one kind from their cached latents."""
    chosen, error = pairs.some(kind, count), 0.0
    for ids in np.array_split(chosen, max(1, len(chosen) // 32)):
        x, z = pairs.window(ids)
        y = decode(vae, z * scale + shift).clamp(-1, 1)
        error += F.mse_loss(y, x).item() * len(ids)
    return 10 * math.log10(4 * len(chosen) / error)


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, Path("runs/decoder"), 20.0, 1.5e-3, 0.998, batch=24)
    parser.add_argument("--latents", type=Path, default=Path("runs/latents.npz"))
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/model"))
    parser.add_argument(
        "--crop-share", type=float, default=0.6, help="share of the time spent on 64 px crops"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
