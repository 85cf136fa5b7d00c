"""Step `decoder`: go on training the picture decoder alone, on the latents that the transformer learned.

    python -m backbones.tiny.recipes.decoder [--minutes 20]

The encoder stays as it is, so the latents keep their meaning and the transformer needs no new training. The
decoder sees cached latents with noise added, up to NOISE of their standard deviation, because what it will
decode comes from a diffusion model. Same losses and optimisers as step `vae`.
Writes runs/decoder/last.pt (to resume) and runs/decoder/model/ (the diffusers folder).

Shapes: B batch, C latent channels; z (B, C, 16, 16), pictures (B, 3, 128, 128) in [-1, 1].
"""

import argparse
import gc
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from backbones.tiny.recipes.muon import Muon
from backbones.tiny.recipes.picture_vae import decode, largest_difference
from backbones.tiny.recipes.vae import WEIGHTS, load_pictures, save, ssim, to_tensor

NOISE = 0.15
PLAIN_SHARE = 0.6  # of each batch is original art


def loss_terms(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The unweighted terms of step `vae` that concern the picture."""
    dx, dy = x.diff(dim=-1) - y.diff(dim=-1), x.diff(dim=-2) - y.diff(dim=-2)
    return {"l1": (x - y).abs().mean(), "grad": dx.abs().mean() + dy.abs().mean(), "ssim": 1 - ssim(x, y)}


def train(args: argparse.Namespace) -> None:
    """Run or resume until `args.minutes` of training time are used up."""
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures, _ = load_pictures(args.data)
    cached = np.load(args.latents)
    rows, plain = cached["row"], cached["colour"] < 0
    vae = AutoencoderKLQwenImage.from_pretrained(args.vae)
    shift, scale = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    z_all = torch.from_numpy(cached["z128"])
    trained = {
        name: p
        for name, p in vae.named_parameters()
        if name.startswith(("decoder", "post_quant")) and "time_conv" not in name
    }
    vae.requires_grad_(False)
    for p in trained.values():
        p.requires_grad_(True)
    kernels = [p for p in trained.values() if p.dim() >= 4 and p.numel() > 1000]
    others = [p for p in trained.values() if all(p is not kernel for kernel in kernels)]
    optimizers = [Muon(kernels, lr=args.lr), torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98))]
    ema = {name: p.detach().clone() for name, p in trained.items()}
    step, used, checkpoint = 0, 0.0, args.out / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema, step, used = state["ema"], state["step"], state["used"]
    rng = np.random.default_rng(args.seed + step)
    groups = np.flatnonzero(plain), np.flatnonzero(~plain)
    print(
        f"decoder: before {measure(vae, z_all, scale, shift, pictures, rows, groups[0]):.2f} dB", flush=True
    )
    total, base, started = args.minutes * 60, used, time.time()
    logged, saved_at, sums = time.time(), time.time(), {}
    while used < total:
        used = base + time.time() - started
        progress = min(used / total, 1.0)
        lr = args.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
        # Crops first: four times the optimiser steps for the same pixels; whole pictures at the end.
        crop, batch = (64, args.batch) if progress < args.crop_share else (128, args.batch // 2)
        art = round(PLAIN_SHARE * batch)
        ids = np.concatenate([rng.choice(groups[0], art), rng.choice(groups[1], batch - art)])
        top, left = 8 * rng.integers(0, (128 - crop) // 8 + 1, 2)
        x = to_tensor(pictures[rows[ids], top : top + crop, left : left + crop])
        part = slice(top // 8, (top + crop) // 8), slice(left // 8, (left + crop) // 8)
        z = z_all[torch.from_numpy(ids)][:, :, part[0], part[1]].float()
        z = z + torch.randn(z.shape) * torch.rand(batch, 1, 1, 1) * NOISE
        with torch.autocast("cpu", torch.bfloat16):
            y = decode(vae, z * scale + shift).float()
        terms = loss_terms(x, y)
        loss = sum(WEIGHTS[name] * term for name, term in terms.items())
        vae.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        decay = min(0.998, step / (step + 20))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in trained.values()], 1 - decay)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.item() / 50
        if step % 50 == 0:
            shown = " ".join(f"{name} {value:.4f}" for name, value in sums.items())
            rate = 50 * batch / (time.time() - logged)
            print(f"decoder: step {step} {100 * progress:.0f}% {shown} lr {lr:.1e} {rate:.0f}/s", flush=True)
            logged, sums = time.time(), {}
        if step % 200 == 0:
            gc.collect()
        if time.time() - saved_at > 120:
            save(checkpoint, vae, optimizers, ema, step, used)
            saved_at = time.time()
    save(checkpoint, vae, optimizers, ema, step, used)
    vae.load_state_dict(ema, strict=False)
    print(f"decoder: after {measure(vae, z_all, scale, shift, pictures, rows, groups[0]):.2f} dB", flush=True)
    sample = to_tensor(pictures[rows[groups[0][:4]]])
    print(f"decoder: off the real class by {largest_difference(vae, sample):.1e}")
    vae.save_pretrained(args.out / "model")


@torch.no_grad()
def measure(vae, z: Tensor, scale: Tensor, shift: Tensor, pictures, rows, plain) -> float:
    """PSNR in dB over some 512 pictures of original art from their cached latents."""
    chosen = plain[:: max(1, len(plain) // 512)]
    error = 0.0
    for ids in np.array_split(chosen, max(1, len(chosen) // 32)):
        x = to_tensor(pictures[rows[ids]])
        y = decode(vae, z[torch.from_numpy(ids)].float() * scale + shift).clamp(-1, 1)
        error += F.mse_loss(y, x).item() * len(ids)
    return 10 * math.log10(4 * len(chosen) / error)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--latents", type=Path, default=Path("runs/latents.npz"))
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/model"))
    parser.add_argument("--out", type=Path, default=Path("runs/decoder"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--crop-share", type=float, default=0.6, help="share of the time spent on 64 px crops"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
