"""Step `dit`: train the text encoder and the diffusion transformer together, from scratch.

    python -m backbones.tiny.recipes.dit [--minutes 65]

Rectified flow (sigma = t, velocity = noise - data), logit-normal times, Muon beside AdamW, EMA, bf16
autocast, compiled blocks. The first part of the wall time runs on 64 px latents (16 tokens), the rest on
128 px (64).
Writes runs/dit/last.pt (to resume) with the EMA weights under "ema".

Shapes: B batch, N image tokens, L text tokens, C packed latent channels.
"""

import argparse
import gc
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from backbones.tiny.recipes.captions import caption, common_prompts
from backbones.tiny.recipes.concepts import COLOURS
from backbones.tiny.recipes.fast_dit import block_forward, build_dit, dit_forward, pack, rope
from backbones.tiny.recipes.muon import Muon
from backbones.tiny.recipes.text import PromptTokens, build_text_encoder, encode_text, train_tokenizer

TEXT_TOKENS = 11  # user tokens plus the template's 5-token tail; longer captions are drawn again
COMMON_WEIGHT = 2.0  # sampling weight of the concepts of the quality bar's prompts
ADAM_FACTOR = 0.6  # AdamW's learning rate relative to Muon's
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


def make_optimizers(model: TinyModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the attention and MLP matrices of both models, AdamW for everything else."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            inside = ("transformer_blocks" in name and "_mod" not in name) or ".layers." in name
            (matrices if p.dim() == 2 and inside else others).append(p)
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=lr), adam]


def apply_gradients(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """One step of both optimisers; AdamW's share of the learning rate is smaller."""
    for optimizer, factor in zip(optimizers, (1.0, ADAM_FACTOR), strict=False):
        optimizer.param_groups[0]["lr"] = lr * factor
        optimizer.step()


def schedule(progress: float, step: int, decay_from: float = 0.55) -> float:
    """Warm-up, constant, then a cosine to 2 % from `decay_from` of the wall time on (WSD)."""
    warm = min(1.0, (step + 1) / 150)
    if progress < decay_from:
        return warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - decay_from) / (1 - decay_from)))


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


def save(path: Path, **state) -> None:
    """Write a checkpoint whole."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def train(args: argparse.Namespace) -> None:
    """Run or resume training until `args.minutes` of training time are used up."""
    args.out.mkdir(parents=True, exist_ok=True)
    model, _, data = setup(args)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(model, args.lr)
    ema = {name: p.detach().clone() for name, p in params.items()}
    step, used, checkpoint = 0, 0.0, args.out / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=False):
            optimizer.load_state_dict(saved)
        ema, step, used = state["ema"], state["step"], state["used"]
        data.rng, data.generator = (
            random.Random(args.seed + step),
            torch.Generator().manual_seed(args.seed + step),
        )
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.dit, model.text)]
    print(f"dit: {sizes[0]:.2f} M DiT, {sizes[1]:.2f} M text, step {step}", flush=True)
    generator = torch.Generator().manual_seed(args.seed + 1 + step)
    block_fn = torch.compile(block_forward) if args.compile else block_forward
    total, base, started = args.minutes * 60, used, time.time()
    logged, seen, losses, saved_at = time.time(), 0, [], time.time()
    while used < total:
        used = base + time.time() - started
        progress = min(1.0, used / total)
        grid, size = (4, args.small_batch) if progress < args.small_share else (8, args.batch)
        loss = flow_loss(model, data.tokens, data.batch(size, grid), grid, generator, encode_text, block_fn)
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        lr = args.lr * schedule(progress, step)
        apply_gradients(optimizers, lr)
        step, seen = step + 1, seen + size
        decay = min(args.ema, (1 + step) / (20 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()], 1 - decay)
        losses.append(loss.item())
        if step % 50 == 0:
            rate = seen / (time.time() - logged)
            print(f"dit: step {step} {100 * progress:.1f}% grid {grid} loss {np.mean(losses):.4f} "
                  f"grad {norm:.2f} lr {lr:.1e} {rate:.0f}/s", flush=True)  # fmt: skip
            logged, seen, losses = time.time(), 0, []
        if step % 200 == 0:
            gc.collect()
        if time.time() - saved_at > 120 or used >= total:
            states = [optimizer.state_dict() for optimizer in optimizers]
            save(checkpoint, model=model.state_dict(), optimizers=states, ema=ema, step=step, used=used)
            saved_at = time.time()


def arguments(description: str, out: str, minutes: float) -> argparse.ArgumentParser:
    """The options that every training step of the DiT shares."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--latents", type=Path, default=Path("runs/latents.npz"))
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/tokenizer"))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--minutes", type=float, default=minutes, help="training time, over all resumed runs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, "runs/dit", 65.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument(
        "--small-share", type=float, default=0.4, help="share of the time spent on 64 px latents"
    )
    parser.add_argument("--small-batch", type=int, default=96)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
