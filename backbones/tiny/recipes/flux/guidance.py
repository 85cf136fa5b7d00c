"""The second half of step `dit`: distil classifier-free guidance into the guidance embedding.

    python -m backbones.tiny.recipes.flux.guidance [--minutes 25]   (also run by step `dit`)

The plain EMA model, called with and without the caption, is the teacher at random guidance scales; a copy of
it learns the guided velocity in one call, told the scale (Meng et al. 2023, arXiv 2210.03142, stage one; as
FLUX.1-dev was made). The text encoders stay as they are. Writes runs/flux/guided/last.pt.

Shapes: B batch, N image tokens, C packed latent channels.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor

from backbones.tiny.recipes.fast_dit import GRID
from backbones.tiny.recipes.flux.dit import (
    Batch,
    TinyFlux,
    load_data,
    load_model,
    muon_takes,
    noisy_batch,
)
from backbones.tiny.recipes.flux.fast_dit import BlockFns, dit_forward, rope
from backbones.tiny.recipes.flux.training import RUNS, Loop, Step, arguments

SCALES = (1.0, 6.0)  # guidance scales the embedding learns
UNGUIDED_SHARE = 0.1  # samples at scale 1, where the student must stay the plain model


def draw_scales(size: int, generator: torch.Generator) -> Tensor:
    """Guidance scales (B,): uniform over SCALES, a share of them exactly 1."""
    low, high = SCALES
    scales = low + (high - low) * torch.rand(size, generator=generator)
    return torch.where(torch.rand(size, generator=generator) < UNGUIDED_SHARE, 1.0, scales)


def guided_velocity(cond: Tensor, uncond: Tensor, scale: Tensor | float, keep_norm: float = 1.0) -> Tensor:
    """Classifier-free guidance of velocities (B, N, C) at scales (B,) or one number.

    keep_norm: 1 gives each token the length of its conditional velocity, as QwenImagePipeline does, which
    keeps high scales from oversaturating; 0 is plain guidance; between, a blend.
    """
    if isinstance(scale, Tensor):
        scale = scale[:, None, None]
    mixed = uncond + scale * (cond - uncond)
    length = mixed.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    kept = mixed * (cond.norm(dim=-1, keepdim=True) / length)
    return torch.lerp(mixed, kept, keep_norm)


def guidance_step(
    student: TinyFlux, teacher: TinyFlux, batch: Batch, empty: tuple[Tensor, Tensor],
    generator: torch.Generator, fns: BlockFns, keep_norm: float,
) -> Step:  # fmt: skip
    """Mean squared error between the student's one call and the teacher's guided pair.

    empty: (pooled, states) of the empty prompt, one row.
    """
    size = len(batch.latents)
    noisy, _, sigma = noisy_batch(batch, generator)
    scales, angles = draw_scales(size, generator), rope(student.dit)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            text = teacher.encode(batch.clip_ids, batch.t5_ids)
            none = tuple(part.to(full.dtype).expand_as(full) for part, full in zip(empty, text, strict=True))
            both = tuple(torch.cat(pair) for pair in zip(text, none, strict=True))
            pair = dit_forward(teacher.dit, noisy.repeat(2, 1, 1), sigma.repeat(2), both, angles, fns=fns)
            cond, uncond = pair.float().chunk(2)
            goal = guided_velocity(cond, uncond, scales, keep_norm)
        velocity = dit_forward(student.dit, noisy, sigma, text, angles, scales, fns=fns).float()
    error = (velocity - goal).square().mean((1, 2)).detach()
    shown = {"low": error[scales < 2.5], "high": error[scales >= 4.5]}
    shown = {name: values.mean().item() for name, values in shown.items() if len(values)}
    # What guidance changes at all: a student that ignores the scale stays at this error.
    shown["undone"] = (cond - goal).square().mean().item()
    return Step((velocity - goal).square().mean(), size, shown)


def distil(args: argparse.Namespace) -> Path:
    """Run or resume the distillation until `args.minutes` are used up; returns its checkpoint."""
    torch.manual_seed(args.seed)
    data = load_data(args)
    teacher, extra = load_model(args.plain, data.tokens)
    student = copy.deepcopy(teacher)
    student.dit.requires_grad_(True)
    extra = {**extra, "guided": True}
    loop = Loop.from_args("guidance", student, muon_takes, "guided", args, extra=extra)
    data.reseed(args.seed + 1000 + loop.step)
    fns = BlockFns.compiled() if args.compile else BlockFns()
    with torch.no_grad():
        empty = teacher.encode(*data.tokens.batch([""]))

    def take(_progress: float) -> Step:
        batch = data.batch(args.batch, GRID)
        return guidance_step(student, teacher, batch, empty, loop.generator, fns, args.keep_norm)

    loop.run(take)
    return loop.checkpoint


def parser() -> argparse.ArgumentParser:
    """The options of the distillation alone."""
    options = arguments(__doc__, minutes=25.0, lr=8e-4, ema=0.998)
    options.add_argument("--plain", type=Path, default=RUNS / "dit" / "last.pt", help="the plain checkpoint")
    options.add_argument(
        "--keep-norm",
        type=float,
        default=1.0,
        help="1: guided velocities keep their length; 0: plain guidance",
    )
    return options


def main() -> None:
    """Parse the command line and distil."""
    distil(parser().parse_args())


if __name__ == "__main__":
    main()
