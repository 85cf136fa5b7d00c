"""Step `vae`: train the picture autoencoder from scratch.

    python -m backbones.tiny.recipes.vae [--minutes 20]

Loss: L1 + gradient L1 + (1 - SSIM) + a small KL term, with noise added to the latents that the decoder sees,
so that it forgives the diffusion model's small errors. Muon for the kernels, AdamW for the rest, cosine
learning rate over wall time, EMA.
Writes runs/vae/last.pt (to resume) and runs/vae/model/ (the diffusers folder with latent statistics).
"""

import argparse
import gc
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.tiny.recipes.muon import Muon
from backbones.tiny.recipes.picture_vae import (
    build_vae,
    decode,
    encode_moments,
    largest_difference,
    zero_unused_slices,
)


def load_pictures(folder: Path) -> tuple[np.ndarray, dict]:
    """The rendered pictures, memory-mapped (N, 128, 128, 3) uint8, and their index."""
    return np.load(folder / "pictures.npy", mmap_mode="r"), json.loads((folder / "pictures.json").read_text())


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1], channels last."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Mean structural similarity of pictures in [-1, 1] with a box window (Wang et al. 2004)."""
    c1, c2 = 0.02**2, 0.06**2  # (K1 L)^2, (K2 L)^2 with L = 2
    mean_a, mean_b = F.avg_pool2d(a, window, 1), F.avg_pool2d(b, window, 1)
    var_a = F.avg_pool2d(a * a, window, 1) - mean_a**2
    var_b = F.avg_pool2d(b * b, window, 1) - mean_b**2
    cov = F.avg_pool2d(a * b, window, 1) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


def loss_terms(x: Tensor, y: Tensor, mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    """The unweighted terms; KL is per latent value."""
    dx, dy = x.diff(dim=-1) - y.diff(dim=-1), x.diff(dim=-2) - y.diff(dim=-2)
    return {
        "l1": (x - y).abs().mean(),
        "grad": dx.abs().mean() + dy.abs().mean(),
        "ssim": 1 - ssim(x, y),
        "kl": 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean(),
    }


WEIGHTS = {"l1": 1.0, "grad": 1.0, "ssim": 0.25, "kl": 2e-3}


def train(args: argparse.Namespace) -> None:
    """Run or resume training until `args.minutes` of training time are used up."""
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures, index = load_pictures(args.data)
    plain = np.array([row[2] is None for row in index["rows"]])
    # A third of each batch is original art: it is what most prompts ask for.
    groups, rng = (np.flatnonzero(plain), np.flatnonzero(~plain)), np.random.default_rng(args.seed)
    vae = build_vae()
    zero_unused_slices(vae)
    names = [name for name, _ in vae.named_parameters() if "time_conv" not in name]
    params = [p for name, p in vae.named_parameters() if "time_conv" not in name]
    kernels = [p for p in params if p.dim() >= 4 and p.numel() > 1000]
    others = [p for p in params if all(p is not kernel for kernel in kernels)]
    optimizers = [
        Muon(kernels, lr=args.lr),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    ema = {name: p.detach().clone() for name, p in zip(names, params, strict=False)}
    step, used, checkpoint = 0, 0.0, args.out / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=False):
            optimizer.load_state_dict(saved)
        ema, step, used = state["ema"], state["step"], state["used"]
        rng = np.random.default_rng(args.seed + step)

    def forward(x: Tensor, eps: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = encode_moments(vae, x)
            mean, logvar = mean.float(), logvar.float().clamp(-12, 8)
            z = mean + eps * (0.5 * logvar).exp() + jitter * mean.detach().std()
            return mean, logvar, decode(vae, z).float()

    total, started, logged, sums = args.minutes * 60, time.time(), time.time(), {}
    base, last_save = used, time.time()
    while used < total:
        used = base + time.time() - started
        progress = min(used / total, 1.0)
        lr = args.lr * min(1.0, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
        # Random crops first: four times the optimiser steps for the same pixels; whole pictures at the end.
        crop, batch = (64, args.batch) if progress < args.crop_share else (128, args.batch * 2 // 3)
        third = batch // 3
        ids = np.concatenate([rng.choice(groups[0], third), rng.choice(groups[1], batch - third)])
        top, left = rng.integers(0, 129 - crop, 2)
        x = to_tensor(pictures[np.sort(ids), top : top + crop, left : left + crop])
        shape = (batch, 8, crop // 8, crop // 8)
        jitter = torch.randn(shape) * torch.rand(batch, 1, 1, 1) * 0.1
        mean, logvar, y = forward(x, torch.randn(shape), jitter)
        terms = loss_terms(x, y, mean, logvar)
        loss = sum(WEIGHTS[name] * term for name, term in terms.items())
        vae.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        decay = min(0.998, step / (step + 20))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params], 1 - decay)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.item()
        sums["mse"] = sums.get("mse", 0.0) + F.mse_loss(y.clamp(-1, 1), x).item()
        if step % 50 == 0:
            rate = 50 * batch / (time.time() - logged)
            shown = " ".join(f"{name} {value / 50:.4f}" for name, value in sums.items() if name != "mse")
            psnr = 10 * math.log10(4 / (sums["mse"] / 50))
            print(
                f"vae: step {step} {100 * progress:.0f}% {shown} psnr {psnr:.2f} dB lr {lr:.1e} {rate:.0f}/s",
                flush=True,
            )
            logged, sums = time.time(), {}
        if step % 200 == 0:
            gc.collect()
        if time.time() - last_save > 120:
            save(checkpoint, vae, optimizers, ema, step, used)
            last_save = time.time()
    save(checkpoint, vae, optimizers, ema, step, used)
    finish(args.out, vae, ema, pictures, groups[0])


def save(path: Path, vae, optimizers, ema: dict, step: int, used: float) -> None:
    """Write a resumable checkpoint whole."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    state = {"model": vae.state_dict(), "optimizers": states, "ema": ema, "step": step, "used": used}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


@torch.no_grad()
def finish(out: Path, vae, ema: dict, pictures: np.ndarray, plain: np.ndarray) -> None:
    """Load the EMA weights, measure latent statistics, check against the real class, save runs/vae/model."""
    vae.load_state_dict(ema, strict=False)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/vae"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--crop-share", type=float, default=0.7, help="share of the time spent on 64 px crops"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
