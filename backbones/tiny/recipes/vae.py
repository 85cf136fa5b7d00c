"""Step `vae`: train the picture autoencoder from scratch.

    python -m backbones.tiny.recipes.vae [--minutes 20]

Loss: L1 + gradient L1 + (1 - SSIM) + a small KL term, with noise added to the latents that the decoder sees,
so that it forgives the diffusion model's small errors. Muon for the kernels, AdamW for the rest, cosine
learning rate over wall time, EMA.
Writes runs/vae/last.pt (to resume) and runs/vae/model/ (the diffusers folder with latent statistics).
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from backbones.tiny.recipes.picture_vae import (
    build_vae,
    decode,
    encode_moments,
    largest_difference,
    zero_unused_slices,
)
from backbones.tiny.recipes.training import Loop, Step, arguments, cosine

WEIGHTS = {"l1": 1.0, "grad": 1.0, "ssim": 0.25}
KL_WEIGHT = 2e-3
CONV_ADAM = {"betas": (0.9, 0.98), "fused": False}  # of the picture VAE's steps


def load_pictures(folder: Path) -> tuple[np.ndarray, dict]:
    """The rendered pictures, memory-mapped (N, 128, 128, 3) uint8, and their index."""
    return np.load(folder / "pictures.npy", mmap_mode="r"), json.loads((folder / "pictures.json").read_text())


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1], channels last."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Mean structural similarity of pictures in [-1, 1] with a box window (Wang et al. 2004)."""
    c1, c2 = 0.02**2, 0.06**2  # (K1 L)^2, (K2 L)^2 with L = 2
    mean_a, mean_b = F.avg_pool2d(a, window, 1), F.avg_pool2d(b, window, 1)
    var_a = F.avg_pool2d(a * a, window, 1) - mean_a**2
    var_b = F.avg_pool2d(b * b, window, 1) - mean_b**2
    cov = F.avg_pool2d(a * b, window, 1) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


def picture_loss(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Weighted loss of decoded pictures y against x, with its terms and the PSNR in dB for the log."""
    dx, dy = x.diff(dim=-1) - y.diff(dim=-1), x.diff(dim=-2) - y.diff(dim=-2)
    terms = {"l1": (x - y).abs().mean(), "grad": dx.abs().mean() + dy.abs().mean(), "ssim": 1 - ssim(x, y)}
    shown = {name: term.item() for name, term in terms.items()}
    shown["psnr"] = 10 * math.log10(4 / F.mse_loss(y.clamp(-1, 1), x).item())
    return sum(WEIGHTS[name] * term for name, term in terms.items()), shown


def vae_step(vae: AutoencoderKLQwenImage, x: Tensor) -> Step:
    """The loss of pictures x, decoded from their noisy latents; KL is per latent value."""
    shape = (len(x), vae.config.z_dim, x.shape[2] // 8, x.shape[3] // 8)
    jitter = torch.randn(shape) * torch.rand(len(x), 1, 1, 1) * 0.1
    eps = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = encode_moments(vae, x)
        mean, logvar = mean.float(), logvar.float().clamp(-12, 8)
        z = mean + eps * (0.5 * logvar).exp() + jitter * mean.detach().std()
        y = decode(vae, z).float()
    loss, shown = picture_loss(x, y)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return Step(loss + KL_WEIGHT * kl, len(x), {**shown, "kl": kl.item()})


def is_kernel(name: str, p: Tensor) -> bool:
    """Kernels for Muon; the 3-channel ends and 1x1 convolutions are too small to orthogonalise."""
    return p.dim() >= 4 and p.numel() > 1000


def train(args: argparse.Namespace) -> None:
    """Run or resume training until `args.minutes` of training time are used up."""
    torch.manual_seed(args.seed)
    pictures, index = load_pictures(args.data)
    plain = np.array([row[2] is None for row in index["rows"]])
    # A third of each batch is original art: it is what most prompts ask for.
    groups = np.flatnonzero(plain), np.flatnonzero(~plain)
    vae = build_vae()
    zero_unused_slices(vae)
    for name, p in vae.named_parameters():
        p.requires_grad_("time_conv" not in name)

    def schedule(progress: float, step: int) -> float:
        return cosine(progress, step - 1, warm_up=100)  # the first step only fills Muon's momentum

    loop = Loop.from_args("vae", vae, is_kernel, args, adam=CONV_ADAM, schedule=schedule, adam_factor=1.0)
    rng = np.random.default_rng(args.seed + loop.step)

    def take(progress: float) -> Step:
        # Random crops first: four times the optimiser steps for the same pixels; whole pictures at the end.
        crop, batch = (64, args.batch) if progress < args.crop_share else (128, args.batch * 2 // 3)
        third = batch // 3
        ids = np.concatenate([rng.choice(groups[0], third), rng.choice(groups[1], batch - third)])
        top, left = rng.integers(0, 129 - crop, 2)
        return vae_step(vae, to_tensor(pictures[np.sort(ids), top : top + crop, left : left + crop]))

    loop.run(take)
    finish(args.out, loop.load_average(), pictures, groups[0])


@torch.no_grad()
def finish(out: Path, vae: AutoencoderKLQwenImage, pictures: np.ndarray, plain: np.ndarray) -> None:
    """Measure latent statistics of the EMA weights, check against the real class, save runs/vae/model."""
    zero_unused_slices(vae)
    sample = to_tensor(pictures[plain[:: max(1, len(plain) // 512)]])
    mean, _ = encode_moments(vae, sample)
    stats = mean.mean((0, 2, 3)).tolist(), mean.std((0, 2, 3)).tolist()
    final = build_vae(*stats)
    final.load_state_dict(vae.state_dict())
    y = decode(final, mean).clamp(-1, 1)
    psnr = 10 * math.log10(4 / F.mse_loss(y, sample).item())
    print(f"vae: EMA psnr {psnr:.2f} dB on {len(sample)} plain pictures")
    spread = ", ".join(f"{value:.3f}" for value in stats[1])
    print(f"vae: latent std {spread}; off the real class by {largest_difference(final, sample[:4]):.1e}")
    final.save_pretrained(out / "model")


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, Path("runs/vae"), 20.0, 2e-3, 0.998, batch=24)
    parser.add_argument(
        "--crop-share", type=float, default=0.7, help="share of the time spent on 64 px crops"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
