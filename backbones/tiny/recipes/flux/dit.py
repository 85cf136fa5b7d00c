"""Step `dit`: train both text encoders and the diffusion transformer together, guided and elastic.

    python -m backbones.tiny.recipes.flux.dit [--minutes 600]

A first short part learns plain rectified flow on 64 px latents (16 tokens), where samples are cheap. Then
the packaged qwen-image-tiny is the teacher: the student learns in one call, told the scale, what the teacher
predicts with and without the caption (Meng et al. 2023, arXiv 2210.03142, stage one; as FLUX.1-dev was made,
but from another architecture). In some rows the data take the place of the teacher's conditional
prediction, so that the student also learns what the teacher has not. In the last part some rows of a batch
run in random sub-networks - blocks skipped, image MLPs at 1/4, 1/2 or 3/4 width - against the same targets,
so that the model is elastic. Writes runs/flux/dit/last.pt, EMA weights under "ema".

Shapes: B batch, N image tokens, C packed latent channels, F MLP hidden units.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.tiny.recipes import parcel
from backbones.tiny.recipes.dataset import SMALL, TrainingSet, all_captions
from backbones.tiny.recipes.dit import Sizes, add_noise, worth_compiling
from backbones.tiny.recipes.elastic import draw_subnetworks
from backbones.tiny.recipes.flux.fast_dit import BlockFns, build_dit, dit_forward, rope
from backbones.tiny.recipes.flux.options import arguments
from backbones.tiny.recipes.flux.teacher import FOLDER, Teacher
from backbones.tiny.recipes.flux.text import Prompts, build_encoders, encode_text
from backbones.tiny.recipes.training import Loop, Step, constant

SCALES = (1.0, 6.0)  # guidance scales the embedding learns
UNGUIDED_SHARE = 0.1  # rows at scale 1, the teacher's plain velocity
REAL_SHARE = 0.3  # rows whose conditional velocity is the data's, not the teacher's
SUB_SHARE = 0.35  # rows of a batch in a sub-network, in the elastic part


@dataclass
class Batch:
    """Packed latents (B, N, C), CLIP ids (B, L), T5 ids (B, L), their captions, token grid and rope step."""

    latents: Tensor
    clip_ids: Tensor
    t5_ids: Tensor
    captions: list[str]
    grid: tuple[int, int]
    step: int = 1


class PromptBatches:
    """Batches of the training set, tokenised twice."""

    def __init__(self, data: TrainingSet, tokens: Prompts):
        self.data, self.tokens = data, tokens

    def __call__(self, size: int, key: str) -> Batch:
        """`size` samples of one picture size."""
        batch = self.data.batch(size, key)
        ids = (part.to(self.data.device) for part in self.tokens.batch(batch.captions))
        return Batch(batch.latents, *ids, batch.captions, batch.grid, batch.step)


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


def predict(
    model: TinyFlux, batch: Batch, noisy: Tensor, sigma: Tensor, scales: Tensor, fns: BlockFns, **choices
) -> Tensor:
    """The student's velocity (B, N, C), fp32. choices: keep and width_masks of `dit_forward`."""
    device = noisy.device.type
    with torch.autocast(device, torch.bfloat16):
        text = model.encode(batch.clip_ids, batch.t5_ids)
        angles = rope(model.dit, batch.t5_ids.shape[1], batch.grid, batch.step, device)
        return dit_forward(model.dit, noisy, sigma, text, angles, scales, fns, **choices).float()


def flow_step(model: TinyFlux, batch: Batch, generator: torch.Generator, fns: BlockFns) -> Step:
    """Mean squared error of the predicted velocity, noise - data; such rows count as scale 1."""
    noisy, sigma, goal = add_noise(batch.latents, generator)
    velocity = predict(model, batch, noisy, sigma, torch.ones_like(sigma), fns)
    return Step((velocity - goal).square().mean(), len(noisy), {"step": batch.step})


def distil_step(
    model: TinyFlux, teacher: Teacher, batch: Batch, generator: torch.Generator, fns: BlockFns, elastic: bool
) -> Step:
    """Mean squared error to the guided velocity of teacher and data, some rows in sub-networks when
    `elastic`.
    """
    size, device = len(batch.latents), batch.latents.device
    noisy, sigma, data = add_noise(batch.latents, generator)
    scales = draw_scales(size, generator).to(device)
    real = (torch.rand(size, generator=generator) < REAL_SHARE).to(device)
    goal = teacher.velocity(noisy, sigma, batch.captions, scales, batch.grid, data, real)
    choices, whole = {}, torch.ones(size, dtype=torch.bool, device=device)
    if elastic:
        whole = (torch.rand(size, generator=generator) >= SUB_SHARE).to(device)
        parts = draw_subnetworks(size, model.blocks, model.hidden, generator, device)
        keep, masks = (whole[:, None, None] | part for part in parts)
        choices = {"keep": keep, "width_masks": masks}
    error = (predict(model, batch, noisy, sigma, scales, fns, **choices) - goal).square().mean((1, 2))
    rows = {"whole": whole & ~real, "real": whole & real, "sub": ~whole}
    shown = {name: error[chosen].mean().item() for name, chosen in rows.items() if chosen.any()}
    return Step(error.mean(), size, shown)


def load_data(args: argparse.Namespace, teacher: Teacher | None = None) -> PromptBatches:
    """The training set with its tokenizers, which step `text` wrote."""
    index = json.loads((args.data / "pictures.json").read_text())
    prompts = Prompts.load(args.tokenizer)
    prompts.read(all_captions(args.latents))
    if teacher is not None:
        teacher.tokens.read(all_captions(args.latents))

    def fits(text: str) -> bool:
        return prompts.fits(text) and (teacher is None or teacher.fits(text))

    return PromptBatches(TrainingSet(args.latents, index, args.seed, fits, args.device), prompts)


def load_model(checkpoint: Path, prompts: Prompts) -> TinyFlux:
    """The EMA weights of a checkpoint or a parcel, frozen."""
    model = TinyFlux(prompts)
    parcel.fill(model, checkpoint)
    return model.requires_grad_(False).eval()


def train(args: argparse.Namespace) -> Path:
    """Run or resume until `args.minutes` are used up; returns the checkpoint."""
    torch.manual_seed(args.seed)
    teacher = Teacher(args.teacher, args.compile, args.device, args.teacher_tokenizer)
    batches = load_data(args, teacher)
    model = TinyFlux(batches.tokens)
    if args.start and not (args.out / "dit" / "last.pt").exists():
        parcel.fill(model, args.start)
    model.to(args.device)
    loop = Loop.from_args("dit", model, muon_takes, args, "dit", schedule=constant)
    batches.data.reseed(args.seed + loop.step)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.dit, model.clip, model.t5)]
    print("dit: {:.2f} M DiT, {:.2f} M CLIP, {:.2f} M T5".format(*sizes), flush=True)
    fns = BlockFns.compiled() if args.compile else BlockFns()
    draws = Sizes(batches.data, loop.generator, 0.0, args.batch)

    def take(progress: float) -> Step:
        if progress < args.small_share:
            return flow_step(model, batches(args.small_batch, SMALL), loop.generator, fns)
        elastic = progress >= args.elastic_from
        key, size = draws.draw(progress)
        run = fns if worth_compiling(key, args.device) else BlockFns()
        return distil_step(model, teacher, batches(size, key), loop.generator, run, elastic)

    loop.run(take)
    return loop.checkpoint


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, minutes=600.0, ema=0.9995)
    parser.add_argument(
        "--teacher", type=Path, default=FOLDER, help="the teacher's pipeline folder, or its checkpoint"
    )
    parser.add_argument("--teacher-tokenizer", type=Path, help="of a teacher that is a checkpoint")
    parser.add_argument("--start", type=Path, help="a parcel of weights to begin with (flux/grow.py)")
    parser.add_argument("--small-share", type=float, default=0.12, help="share of the time on 64 px latents")
    parser.add_argument("--small-batch", type=int, default=128)
    parser.add_argument(
        "--elastic-from", type=float, default=0.5, help="share of the time from which on sub-networks train"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
