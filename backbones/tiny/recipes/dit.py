"""Step `dit`: train the text encoder and the diffusion transformer together.

    python -m backbones.tiny.recipes.dit [--minutes 600] [--start FOLDER]
    python -m backbones.tiny.recipes.dit --device cuda --batch 2048 --lr 3e-3 --small-share 0 --minutes 7

Rectified flow (sigma = t, velocity = noise - data), logit-normal times, Muon beside AdamW, EMA, bf16
autocast, compiled blocks. Every step draws one picture size: mostly 128 px (64 tokens), in the first part
of the time half of the steps 64 px (16 tokens), which are cheap, and now and then another size. `--start`
begins with the weights of a pipeline folder, grown to this size (grow.py).
Writes runs/dit/last.pt (to resume) with the EMA weights under "ema".

Shapes: B batch, N image tokens, L text tokens, C packed latent channels.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from backbones.tiny.recipes import parcel
from backbones.tiny.recipes.dataset import SMALL, SQUARE, TrainingSet, all_captions
from backbones.tiny.recipes.fast_dit import block_forward, build_dit, dit_forward, rope
from backbones.tiny.recipes.grow import grow
from backbones.tiny.recipes.text import PromptTokens, build_text_encoder, encode_text, train_tokenizer
from backbones.tiny.recipes.training import Loop, Step, constant
from backbones.tiny.recipes.training import arguments as common_arguments

TEXT_TOKENS = 20  # user tokens plus the template's 5-token tail; longer captions are not drawn
OTHER_SIZE_SHARE = 0.12  # of the steps on sizes other than the square one
TOKENS = 84  # image and text tokens of the square size, whose batch is --batch


class TinyModel(nn.Module):
    """Text encoder and DiT as one module, so that optimiser, EMA and checkpoints see one state dict."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        super().__init__()
        self.text = build_text_encoder(tokenizer)
        self.dit = build_dit()
        for p in self.text.model.visual.parameters():
            p.requires_grad_(False)


def load_average(checkpoint: Path, tokenizer: Qwen2Tokenizer) -> TinyModel:
    """The EMA weights of a checkpoint or a parcel, frozen, in eval mode."""
    model = TinyModel(tokenizer)
    parcel.fill(model, checkpoint)
    return model.requires_grad_(False).eval()


@dataclass
class Batch:
    """latents (B, N, C) packed, ids (B, L), mask (B, L) bool, on the training device; grid and rope step."""

    latents: Tensor
    ids: Tensor
    mask: Tensor
    grid: tuple[int, int]
    step: int = 1


class PromptBatches:
    """Batches of the training set, tokenised."""

    def __init__(self, data: TrainingSet, tokens: PromptTokens):
        self.data, self.tokens = data, tokens
        tokens.prefix = tokens.prefix.to(data.device)

    def __call__(self, size: int, key: str = SQUARE) -> Batch:
        """`size` samples of one picture size."""
        batch = self.data.batch(size, key)
        ids, mask = self.tokens.batch(batch.captions, TEXT_TOKENS)
        device = self.data.device
        return Batch(batch.latents, ids.to(device), mask.to(device), batch.grid, batch.step)


class Sizes:
    """Which picture size a step trains on, and how many pictures make a batch of about the same work."""

    def __init__(self, data: TrainingSet, generator: torch.Generator, small_share: float, batch: int):
        self.buckets, self.generator = data.buckets, generator
        self.small_share, self.size = small_share, batch
        self.others = sorted(key for key in data.buckets if key not in (SQUARE, SMALL))

    def draw(self, progress: float) -> tuple[str, int]:
        """A size and its number of pictures. progress: in [0, 1], of the training."""
        pick = float(torch.rand((), generator=self.generator))
        key = SQUARE
        if self.others and pick < OTHER_SIZE_SHARE:
            key = self.others[int(pick / OTHER_SIZE_SHARE * len(self.others))]
        elif progress < self.small_share and SMALL in self.buckets and pick > 0.5:
            key = SMALL
        rows, cols = self.buckets[key].grid
        return key, max(1, round(self.size * TOKENS / (rows * cols + TEXT_TOKENS)))


def draw_times(size: int, generator: torch.Generator) -> Tensor:
    """Logit-normal sigmas (Esser et al. 2024), a tenth of them uniform to cover both ends."""
    normal = torch.sigmoid(torch.randn(size, generator=generator))
    uniform = torch.rand(size, generator=generator)
    return torch.where(torch.rand(size, generator=generator) < 0.1, uniform, normal)


def add_noise(latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, their sigma (B,), and the velocity that leads there from the data."""
    sigma = draw_times(len(latents), generator).to(latents.device)
    if latents.device.type == "cpu":
        noise = torch.randn(latents.shape, generator=generator)
    else:  # the CPU's generator would be the slowest part of a step
        noise = torch.randn_like(latents)
    return torch.lerp(latents, noise, sigma[:, None, None]), sigma, noise - latents


def flow_loss(
    model: TinyModel, tokens: PromptTokens, batch: Batch, generator: torch.Generator, block_fn=block_forward
) -> Tensor:
    """Mean squared error of the predicted velocity."""
    device = batch.latents.device.type
    noisy, sigma, goal = add_noise(batch.latents, generator)
    with torch.autocast(device, torch.bfloat16):
        states = encode_text(model.text, tokens.prefix, batch.ids)
        angles = rope(TEXT_TOKENS, batch.grid, batch.step, device)
        velocity = dit_forward(model.dit, noisy, sigma, states, batch.mask, angles, block_fn)
    return (velocity.float() - goal).square().mean()


def muon_takes(name: str, p: Tensor) -> bool:
    """The attention and MLP matrices of both models."""
    inside = ("transformer_blocks" in name and "_mod" not in name) or ".layers." in name
    return p.dim() == 2 and inside


def compiled(enabled: bool):
    """The block's forward pass, compiled once per picture size."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(block_forward, dynamic=False) if enabled else block_forward


def worth_compiling(key: str, device: str) -> bool:
    """Whether blocks of this picture size are compiled: on a card a compilation takes as long as hundreds
    of steps, so there only the square size is.
    """
    return key == SQUARE or not device.startswith("cuda")


def setup(args: argparse.Namespace) -> tuple[TinyModel, PromptBatches]:
    """Model and data; the tokenizer is trained once."""
    torch.manual_seed(args.seed)
    index = json.loads((args.data / "pictures.json").read_text())
    folder = args.tokenizer
    tokenizer = Qwen2Tokenizer.from_pretrained(folder) if folder.exists() else train_tokenizer(index, folder)
    tokens = PromptTokens(tokenizer)
    tokens.read(all_captions(args.latents))
    model = TinyModel(tokenizer)
    data = TrainingSet(
        args.latents, index, args.seed, lambda text: len(tokens.ids(text)) <= TEXT_TOKENS, args.device
    )
    return model, PromptBatches(data, tokens)


def begin(model: TinyModel, start: Path, tokenizer: Qwen2Tokenizer) -> None:
    """Fill the model with the weights of a parcel, or of a pipeline folder, grown to its size."""
    if list(start.glob("part-*.safetensors")):
        parcel.fill(model, start)
        print(f"dit: begins with {start}", flush=True)
    else:
        grow(model, start, tokenizer)


def train(args: argparse.Namespace) -> None:
    """Run or resume training until `args.minutes` of training time are used up."""
    model, batches = setup(args)
    if args.start and not (args.out / "last.pt").exists():
        begin(model, args.start, batches.tokens.tokenizer)
    model.to(args.device)
    loop = Loop.from_args("dit", model, muon_takes, args, schedule=constant, ema_start=1)
    batches.data.reseed(args.seed + loop.step)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.dit, model.text)]
    print(f"dit: {sizes[0]:.2f} M DiT, {sizes[1]:.2f} M text, step {loop.step}", flush=True)
    block_fn = compiled(args.compile)
    draws = Sizes(batches.data, loop.generator, args.small_share, args.batch)

    def take(progress: float) -> Step:
        key, size = draws.draw(progress)
        run = block_fn if worth_compiling(key, args.device) else block_forward
        loss = flow_loss(model, batches.tokens, batches(size, key), loop.generator, run)
        return Step(loss, size, {key: loss.item()} if key in (SQUARE, SMALL) else {})

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
    parser = arguments(__doc__, Path("runs/dit"), 600.0, 1.6e-3, 0.9995)
    parser.add_argument(
        "--start", type=Path, help="a pipeline folder or a parcel (parcel.py) whose weights to begin with"
    )
    parser.add_argument(
        "--small-share", type=float, default=0.15, help="share of the time with 64 px latents"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
