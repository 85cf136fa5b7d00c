"""Step `dit`: train both text encoders and the diffusion transformer together, then distil guidance.

    python -m backbones.tiny.recipes.flux.dit [--minutes 70] [--guidance-minutes 25]
    python -m backbones.tiny.recipes.flux.dit --no-guidance-distillation

First plain rectified flow with a tenth of the captions empty and the guidance embedding silent; the first
part of the wall time runs on 64 px latents (16 tokens), the rest on 128 px (64). Then `guidance.py`.
Writes runs/flux/dit/last.pt and, after distillation, runs/flux/guided/last.pt, EMA weights under "ema".

Shapes: B batch, N image tokens, C packed latent channels.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.tiny.recipes.dit import COMMON_WEIGHT, TrainingSet, draw_times
from backbones.tiny.recipes.fast_dit import GRID
from backbones.tiny.recipes.flux.fast_dit import BlockFns, build_dit, dit_forward, rope
from backbones.tiny.recipes.flux.text import Prompts, build_encoders, encode_text
from backbones.tiny.recipes.flux.training import Loop, Step, arguments

SMALL_GRID = 4  # image tokens per side of the 64 px phase


@dataclass
class Batch:
    """Packed latents (B, N, C), CLIP ids (B, L), T5 ids (B, L)."""

    latents: Tensor
    clip_ids: Tensor
    t5_ids: Tensor


class FluxTrainingSet(TrainingSet):
    """Seeded batches of latents and fresh captions, tokenised twice."""

    def __init__(self, latents: Path, index: dict, prompts: Prompts, seed: int):
        super().__init__(latents, index, prompts, seed, COMMON_WEIGHT)

    def batch(self, size: int, grid: int) -> Batch:
        """`size` samples on a grid x grid token grid."""
        rows = torch.multinomial(self.weight, size, replacement=True, generator=self.generator)
        return Batch(self.packed[grid][rows], *self.tokens.batch([self.caption(int(row)) for row in rows]))

    def reseed(self, seed: int) -> None:
        """Other captions and rows, for a resumed run."""
        self.rng = random.Random(seed)
        self.generator.manual_seed(seed)


class TinyFlux(nn.Module):
    """Both encoders and the DiT as one module, so that optimiser, EMA and checkpoints see one state dict."""

    def __init__(self, prompts: Prompts):
        super().__init__()
        self.clip, self.t5 = build_encoders(prompts)
        self.dit = build_dit()

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled CLIP state (B, D_clip) and T5 states (B, L, D_t5)."""
        return encode_text(self.clip, self.t5, clip_ids, t5_ids)


def muon_takes(name: str, p: Tensor) -> bool:
    """Attention and MLP matrices of the DiT and of CLIP.

    Not adaLN projections, which start at zero; not T5, whose attention has no 1/sqrt(K) and was made for
    elementwise optimisers.
    """
    inside = ("transformer_blocks" in name and "norm" not in name) or (
        name.startswith("clip.") and ".layers." in name
    )
    return p.dim() == 2 and inside


def noisy_batch(batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logit-normal times: (noisy latents, noise, sigma (B,))."""
    sigma = draw_times(len(batch.latents), generator)
    noise = torch.randn(batch.latents.shape, generator=generator)
    return torch.lerp(batch.latents, noise, sigma[:, None, None]), noise, sigma


def flow_step(model: TinyFlux, batch: Batch, grid: int, generator: torch.Generator, fns: BlockFns) -> Step:
    """Mean squared error of the predicted velocity, noise - data, without guidance."""
    noisy, noise, sigma = noisy_batch(batch, generator)
    with torch.autocast("cpu", torch.bfloat16):
        text = model.encode(batch.clip_ids, batch.t5_ids)
        velocity = dit_forward(model.dit, noisy, sigma, text, rope(model.dit, grid=grid), fns=fns)
    return Step((velocity.float() - (noise - batch.latents)).square().mean(), len(noisy), {"grid": grid})


def load_data(args: argparse.Namespace) -> FluxTrainingSet:
    """The training set with its tokenizers, which step `text` wrote."""
    index = json.loads((args.data / "pictures.json").read_text())
    return FluxTrainingSet(args.latents, index, Prompts.load(args.tokenizer), args.seed)


def load_model(checkpoint: Path, prompts: Prompts) -> tuple[TinyFlux, dict]:
    """The EMA weights of a checkpoint, frozen, and what it stored beside them ("guided": bool)."""
    state = torch.load(checkpoint, weights_only=True)
    model = TinyFlux(prompts)
    model.load_state_dict(state["model"])
    model.load_state_dict(state["ema"], strict=False)
    return model.requires_grad_(False).eval(), state["extra"]


def train(args: argparse.Namespace) -> Path:
    """Train the plain model until `args.minutes` are used up; returns its checkpoint."""
    torch.manual_seed(args.seed)
    data = load_data(args)
    model = TinyFlux(data.tokens)
    # Silent until it is distilled: its output layer is zero and must stay so.
    model.dit.time_text_embed.guidance_embedder.requires_grad_(False)
    loop = Loop.from_args("dit", model, muon_takes, "dit", args, schedule="constant", extra={"guided": False})
    data.reseed(args.seed + loop.step)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.dit, model.clip, model.t5)]
    print("dit: {:.2f} M DiT, {:.2f} M CLIP, {:.2f} M T5".format(*sizes), flush=True)
    fns = BlockFns.compiled() if args.compile else BlockFns()

    def take(progress: float) -> Step:
        small = progress < args.small_share
        grid, size = (SMALL_GRID, args.small_batch) if small else (GRID, args.batch)
        return flow_step(model, data.batch(size, grid), grid, loop.generator, fns)

    loop.run(take)
    return loop.checkpoint


def main() -> None:
    """Parse the command line, train, and distil guidance unless told not to."""
    from backbones.tiny.recipes.flux import guidance

    parser = arguments(__doc__, minutes=70.0, lr=2e-3, ema=0.999)
    parser.add_argument(
        "--small-share", type=float, default=0.45, help="share of the time spent on 64 px latents"
    )
    parser.add_argument("--small-batch", type=int, default=128)
    parser.add_argument("--guidance-distillation", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--guidance-minutes", type=float, default=25.0)
    args = parser.parse_args()
    checkpoint = train(args)
    if args.guidance_distillation:
        shared = ("data", "latents", "tokenizer", "out", "seed", "batch", "compile", "max_steps")
        options = {name: getattr(args, name) for name in shared}
        options |= {"plain": checkpoint, "minutes": args.guidance_minutes}
        guidance.distil(argparse.Namespace(**{**vars(guidance.parser().parse_args([])), **options}))


if __name__ == "__main__":
    main()
