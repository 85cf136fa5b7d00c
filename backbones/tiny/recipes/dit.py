"""Step `dit`: train the text encoder and the diffusion transformer together, from scratch.

    python -m backbones.tiny.recipes.dit [--minutes 65]

Rectified flow (sigma = t, velocity = noise - data), logit-normal times, Muon beside AdamW, EMA, bf16
autocast, compiled blocks. The first part of the wall time runs on 64 px latents (16 tokens), the rest on
128 px (64).
Writes runs/dit/last.pt (to resume) with the EMA weights under "ema".

Shapes: B batch, N image tokens, L text tokens, C packed latent channels.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from backbones.tiny.recipes.captions import caption, common_prompts
from backbones.tiny.recipes.concepts import COLOURS
from backbones.tiny.recipes.fast_dit import block_forward, build_dit, dit_forward, pack, rope
from backbones.tiny.recipes.text import PromptTokens, build_text_encoder, encode_text, train_tokenizer
from backbones.tiny.recipes.training import Loop, Step, constant
from backbones.tiny.recipes.training import arguments as common_arguments

TEXT_TOKENS = 11  # user tokens plus the template's 5-token tail; longer captions are drawn again
COMMON_WEIGHT = 2.0  # sampling weight of the concepts of the quality bar's prompts
PLAIN_SHARE = 0.68  # share of original art among the samples; the rest are recoloured copies


@dataclass
class Batch:
    """latents (B, N, C) packed, ids (B, L), mask (B, L) bool."""

    latents: Tensor
    ids: Tensor
    mask: Tensor


class TrainingSet:
    """Seeded batches of latents and fresh captions."""

    def __init__(self, latents: Path, index: dict, tokens: PromptTokens, seed: int, common_weight: float):
        data = np.load(latents)
        self.packed = {
            8: pack(torch.from_numpy(data["z128"]).float()),
            4: pack(torch.from_numpy(data["z64"]).float()),
        }
        self.concept, self.style, self.colour = data["concept"], data["style"], data["colour"]
        self.concepts, self.tokens, self.colours = index["concepts"], tokens, list(COLOURS)
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        common = {name for _, name in common_prompts()}
        weight = np.array(
            [common_weight if self.concepts[c]["name"] in common else 1.0 for c in self.concept]
        )
        plain = self.colour < 0
        weight[plain] *= PLAIN_SHARE / weight[plain].sum()
        weight[~plain] *= (1 - PLAIN_SHARE) / weight[~plain].sum()
        self.weight = torch.from_numpy(weight)

    def caption(self, row: int) -> str:
        """A fresh caption of at most TEXT_TOKENS tokens."""
        colour = self.colours[self.colour[row]] if self.colour[row] >= 0 else None
        while True:
            text = caption(self.concepts[self.concept[row]], int(self.style[row]), colour, self.rng)
            if len(self.tokens.ids(text)) <= TEXT_TOKENS:
                return text

    def batch(self, size: int, grid: int) -> Batch:
        """`size` samples on a grid x grid token grid."""
        rows = torch.multinomial(self.weight, size, replacement=True, generator=self.generator)
        ids, mask = self.tokens.batch([self.caption(int(row)) for row in rows], TEXT_TOKENS)
        return Batch(self.packed[grid][rows], ids, mask)

    def reseed(self, seed: int) -> None:
        """Other captions and rows, for a resumed run."""
        self.rng = random.Random(seed)
        self.generator.manual_seed(seed)


class TinyModel(nn.Module):
    """Text encoder and DiT as one module, so that optimiser, EMA and checkpoints see one state dict."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        super().__init__()
        self.text = build_text_encoder(tokenizer)
        self.dit = build_dit()
        for p in self.text.model.visual.parameters():
            p.requires_grad_(False)


def draw_times(size: int, generator: torch.Generator) -> Tensor:
    """Logit-normal sigmas (Esser et al. 2024), a tenth of them uniform to cover both ends."""
    normal = torch.sigmoid(torch.randn(size, generator=generator))
    uniform = torch.rand(size, generator=generator)
    return torch.where(torch.rand(size, generator=generator) < 0.1, uniform, normal)


def flow_loss(
    model: TinyModel, tokens: PromptTokens, batch: Batch, grid: int, generator, encode_fn, block_fn
) -> Tensor:
    """Mean squared error of the predicted velocity."""
    size = len(batch.latents)
    sigma = draw_times(size, generator)
    noise = torch.randn(batch.latents.shape, generator=generator)
    noisy = torch.lerp(batch.latents, noise, sigma[:, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        states = encode_fn(model.text, tokens.prefix, batch.ids)
        velocity = dit_forward(model.dit, noisy, sigma, states, batch.mask, rope(TEXT_TOKENS, grid), block_fn)
    return (velocity.float() - (noise - batch.latents)).square().mean()


def muon_takes(name: str, p: Tensor) -> bool:
    """The attention and MLP matrices of both models."""
    inside = ("transformer_blocks" in name and "_mod" not in name) or ".layers." in name
    return p.dim() == 2 and inside


def setup(
    args: argparse.Namespace, common_weight: float = COMMON_WEIGHT
) -> tuple[TinyModel, Qwen2Tokenizer, TrainingSet]:
    """Tokenizer (trained once), model and data."""
    torch.manual_seed(args.seed)
    index = json.loads((args.data / "pictures.json").read_text())
    folder = args.tokenizer
    tokenizer = Qwen2Tokenizer.from_pretrained(folder) if folder.exists() else train_tokenizer(index, folder)
    return (
        TinyModel(tokenizer),
        tokenizer,
        TrainingSet(args.latents, index, PromptTokens(tokenizer), args.seed, common_weight),
    )


def train(args: argparse.Namespace) -> None:
    """Run or resume training until `args.minutes` of training time are used up."""
    model, _, data = setup(args)
    loop = Loop.from_args("dit", model, muon_takes, args, schedule=constant, ema_start=1)
    data.reseed(args.seed + loop.step)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.dit, model.text)]
    print(f"dit: {sizes[0]:.2f} M DiT, {sizes[1]:.2f} M text, step {loop.step}", flush=True)
    block_fn = torch.compile(block_forward) if args.compile else block_forward

    def take(progress: float) -> Step:
        grid, size = (4, args.small_batch) if progress < args.small_share else (8, args.batch)
        batch = data.batch(size, grid)
        loss = flow_loss(model, data.tokens, batch, grid, loop.generator, encode_text, block_fn)
        return Step(loss, size, {"grid": grid})

    loop.run(take)


def arguments(
    description: str | None, out: Path, minutes: float, lr: float, ema: float = 0.999
) -> argparse.ArgumentParser:
    """The options that every training step of a text-to-image model shares."""
    parser = common_arguments(description, out, minutes, lr, ema)
    parser.add_argument("--latents", type=Path, default=Path("runs/latents.npz"))
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/tokenizer"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, Path("runs/dit"), 65.0, 2e-3)
    parser.add_argument(
        "--small-share", type=float, default=0.4, help="share of the time spent on 64 px latents"
    )
    parser.add_argument("--small-batch", type=int, default=96)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
