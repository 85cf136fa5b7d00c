"""Step `dit`: train both text encoders and the diffusion transformer together, guided and elastic.

    python -m backbones.tiny.recipes.flux.dit [--minutes 120]

A first short part learns plain rectified flow on 64 px latents (16 tokens), where samples are cheap. Then
the packaged qwen-image-tiny is the teacher: the student learns in one call, told the scale, what the teacher
predicts with and without the caption (Meng et al. 2023, arXiv 2210.03142, stage one; as FLUX.1-dev was made,
but from another architecture). In the last part some rows of a batch run in random sub-networks - blocks
skipped, image MLPs at 1/4, 1/2 or 3/4 width - against the same targets, so that the model is elastic.
Writes runs/flux/dit/last.pt, EMA weights under "ema".

Shapes: B batch, N image tokens, C packed latent channels, F MLP hidden units.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.tiny.recipes.dit import TrainingSet, draw_times
from backbones.tiny.recipes.elastic import draw_subnetworks
from backbones.tiny.recipes.fast_dit import GRID
from backbones.tiny.recipes.flux.fast_dit import BlockFns, build_dit, dit_forward, rope
from backbones.tiny.recipes.flux.options import arguments
from backbones.tiny.recipes.flux.teacher import FOLDER, Teacher
from backbones.tiny.recipes.flux.text import Prompts, build_encoders, encode_text
from backbones.tiny.recipes.training import Loop, Step, constant

SMALL_GRID = 4  # image tokens per side of the 64 px part
COMMON_WEIGHT = 3.0  # sampling weight of the quality bar's concepts
SCALES = (1.0, 6.0)  # guidance scales the embedding learns
UNGUIDED_SHARE = 0.1  # rows at scale 1, the teacher's plain velocity
SUB_SHARE = 0.35  # rows of a batch in a sub-network, in the elastic part


@dataclass
class Batch:
    """Packed latents (B, N, C), CLIP ids (B, L), T5 ids (B, L), and the captions they came from."""

    latents: Tensor
    clip_ids: Tensor
    t5_ids: Tensor
    captions: list[str]


class FluxTrainingSet(TrainingSet):
    """Seeded batches of latents and fresh captions, tokenised twice."""

    def __init__(
        self, latents: Path, index: dict, prompts: Prompts, seed: int, teacher: Teacher | None = None
    ):
        super().__init__(latents, index, prompts, seed, COMMON_WEIGHT)
        self.teacher = teacher

    def caption(self, row: int) -> str:
        """A fresh caption that fits T5's tokens, and the teacher's if there is one."""
        while True:
            text = super().caption(row)
            if self.teacher is None or self.teacher.fits(text):
                return text

    def batch(self, size: int, grid: int) -> Batch:
        """`size` samples on a grid x grid token grid."""
        rows = torch.multinomial(self.weight, size, replacement=True, generator=self.generator)
        captions = [self.caption(int(row)) for row in rows]
        return Batch(self.packed[grid][rows], *self.tokens.batch(captions), captions)


class TinyFlux(nn.Module):
    """Both encoders and the DiT as one module, so that optimiser, EMA and checkpoints see one state dict."""

    def __init__(self, prompts: Prompts):
        super().__init__()
        self.clip, self.t5 = build_encoders(prompts)
        self.dit = build_dit()

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled CLIP state (B, D_clip) and T5 states (B, L, D_t5)."""
        return encode_text(self.clip, self.t5, clip_ids, t5_ids)

    @property
    def blocks(self) -> int:
        """Blocks of both kinds."""
        return len(self.dit.transformer_blocks) + len(self.dit.single_transformer_blocks)

    @property
    def hidden(self) -> int:
        """Hidden units of a block's image MLP; both kinds have the same number."""
        return int(self.dit.single_transformer_blocks[0].mlp_hidden_dim)


def muon_takes(name: str, p: Tensor) -> bool:
    """Attention and MLP matrices of the DiT and of CLIP.

    Not adaLN projections, which start at zero; not T5, whose attention has no 1/sqrt(K) and was made for
    elementwise optimisers.
    """
    inside = ("transformer_blocks" in name and "norm" not in name) or (
        name.startswith("clip.") and ".layers." in name
    )
    return p.dim() == 2 and inside


def draw_scales(size: int, generator: torch.Generator) -> Tensor:
    """Guidance scales (B,): uniform over SCALES, a share of them exactly 1."""
    low, high = SCALES
    scales = low + (high - low) * torch.rand(size, generator=generator)
    return torch.where(torch.rand(size, generator=generator) < UNGUIDED_SHARE, 1.0, scales)


def noisy_batch(batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logit-normal times: (noisy latents, noise, sigma (B,))."""
    sigma = draw_times(len(batch.latents), generator)
    noise = torch.randn(batch.latents.shape, generator=generator)
    return torch.lerp(batch.latents, noise, sigma[:, None, None]), noise, sigma


def flow_step(model: TinyFlux, batch: Batch, grid: int, generator: torch.Generator, fns: BlockFns) -> Step:
    """Mean squared error of the predicted velocity, noise - data; such rows count as scale 1."""
    noisy, noise, sigma = noisy_batch(batch, generator)
    scales = torch.ones(len(noisy))
    with torch.autocast("cpu", torch.bfloat16):
        text = model.encode(batch.clip_ids, batch.t5_ids)
        velocity = dit_forward(model.dit, noisy, sigma, text, rope(model.dit, grid=grid), scales, fns)
    return Step((velocity.float() - (noise - batch.latents)).square().mean(), len(noisy), {"grid": grid})


def distil_step(
    model: TinyFlux, teacher: Teacher, batch: Batch, generator: torch.Generator, fns: BlockFns, elastic: bool
) -> Step:
    """Mean squared error to the teacher's guided velocity, some rows in sub-networks when `elastic`."""
    size = len(batch.latents)
    noisy, _, sigma = noisy_batch(batch, generator)
    scales = draw_scales(size, generator)
    goal = teacher.velocity(noisy, sigma, batch.captions, scales)
    keep, masks, whole = None, None, torch.ones(size, dtype=torch.bool)
    if elastic:
        whole = torch.rand(size, generator=generator) >= SUB_SHARE
        keep, masks = draw_subnetworks(size, model.blocks, model.hidden, generator)
        keep, masks = (torch.where(whole[:, None, None], 1.0, part) for part in (keep, masks))
    with torch.autocast("cpu", torch.bfloat16):
        text = model.encode(batch.clip_ids, batch.t5_ids)
        velocity = dit_forward(model.dit, noisy, sigma, text, rope(model.dit), scales, fns, keep, masks)
    error = (velocity.float() - goal).square().mean((1, 2))
    parts = {"whole": error[whole], "sub": error[~whole]}
    shown = {name: part.mean().item() for name, part in parts.items() if len(part)}
    return Step(error.mean(), size, shown)


def load_data(args: argparse.Namespace, teacher: Teacher | None = None) -> FluxTrainingSet:
    """The training set with its tokenizers, which step `text` wrote."""
    index = json.loads((args.data / "pictures.json").read_text())
    return FluxTrainingSet(args.latents, index, Prompts.load(args.tokenizer), args.seed, teacher)


def load_model(checkpoint: Path, prompts: Prompts) -> TinyFlux:
    """The EMA weights of a checkpoint, frozen."""
    state = torch.load(checkpoint, weights_only=True)
    model = TinyFlux(prompts)
    model.load_state_dict(state["model"])
    model.load_state_dict(state["ema"], strict=False)
    return model.requires_grad_(False).eval()


def train(args: argparse.Namespace) -> Path:
    """Run or resume until `args.minutes` are used up; returns the checkpoint."""
    torch.manual_seed(args.seed)
    teacher = Teacher(args.teacher, args.compile)
    data = load_data(args, teacher)
    model = TinyFlux(data.tokens)
    loop = Loop.from_args("dit", model, muon_takes, args, "dit", schedule=constant)
    data.reseed(args.seed + loop.step)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.dit, model.clip, model.t5)]
    print("dit: {:.2f} M DiT, {:.2f} M CLIP, {:.2f} M T5".format(*sizes), flush=True)
    fns = BlockFns.compiled() if args.compile else BlockFns()

    def take(progress: float) -> Step:
        if progress < args.small_share:
            batch = data.batch(args.small_batch, SMALL_GRID)
            return flow_step(model, batch, SMALL_GRID, loop.generator, fns)
        elastic = progress >= args.elastic_from
        return distil_step(model, teacher, data.batch(args.batch, GRID), loop.generator, fns, elastic)

    loop.run(take)
    return loop.checkpoint


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, minutes=120.0, ema=0.999)
    parser.add_argument("--teacher", type=Path, default=FOLDER, help="folder of the teacher's pipeline")
    parser.add_argument("--small-share", type=float, default=0.12, help="share of the time on 64 px latents")
    parser.add_argument("--small-batch", type=int, default=128)
    parser.add_argument(
        "--elastic-from", type=float, default=0.5, help="share of the time from which on sub-networks train"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
