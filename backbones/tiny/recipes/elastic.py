"""Step `elastic`: train skips and nested MLP widths into the dense model, keeping its dense quality.

    python -m backbones.tiny.recipes.elastic [--minutes 22]

The dense EMA model is the frozen teacher. First each block's image-MLP hidden units are reordered by
mean |activation| x out-column norm, an exact permutation, so that a prefix holds the units that matter
(arXiv 2602.13993 uses prefixes as they come). Then each sample of a batch gets its own sub-network - some
blocks skipped, some image MLPs at 1/4, 1/2 or 3/4 width - and a share stays dense; all are matched to the
teacher's dense velocity. The text encoder is not touched. Writes runs/elastic/last.pt.

Shapes: B batch, N image tokens, F MLP hidden units.
"""

import argparse
import copy
import gc
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from backbones.tiny.recipes.captions import common_prompts
from backbones.tiny.recipes.dit import (
    TEXT_TOKENS,
    TinyModel,
    TrainingSet,
    apply_gradients,
    arguments,
    draw_times,
    make_optimizers,
    save,
    setup,
)
from backbones.tiny.recipes.fast_dit import GRID, block_forward, dit_forward, rope
from backbones.tiny.recipes.sampling import Sampler
from backbones.tiny.recipes.text import encode_text

WIDTHS = (0.25, 0.5, 0.75, 1.0)
DENSE_SHARE = 0.35  # samples of a batch that stay dense
MAX_SKIPS = 5  # of 12 blocks, in training


@torch.no_grad()
def order_units(model: TinyModel, data: TrainingSet, batches: int = 8, size: int = 64) -> None:
    """Permute every image MLP's hidden units in place, most important first; the function stays the same."""
    blocks = model.dit.transformer_blocks
    activity = [torch.zeros(block.img_mlp.net[2].in_features) for block in blocks]

    def watch(total: Tensor):
        return lambda _module, inputs: total.add_(inputs[0].float().abs().mean((0, 1)))

    hooks = [
        block.img_mlp.net[2].register_forward_pre_hook(watch(total))
        for block, total in zip(blocks, activity, strict=False)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        batch = data.batch(size, GRID)
        sigma = draw_times(size, generator)
        noisy = torch.lerp(
            batch.latents, torch.randn(batch.latents.shape, generator=generator), sigma[:, None, None]
        )
        states = encode_text(model.text, data.tokens.prefix, batch.ids)
        model.dit(noisy, states, batch.mask, sigma, img_shapes=[[(1, GRID, GRID)]] * size, return_dict=False)
    for hook in hooks:
        hook.remove()
    for block, total in zip(blocks, activity, strict=False):
        into, out = block.img_mlp.net[0].proj, block.img_mlp.net[2]
        order = (total * out.weight.norm(dim=0)).argsort(descending=True)
        into.weight.copy_(into.weight[order])
        into.bias.copy_(into.bias[order])
        out.weight.copy_(out.weight[:, order])


def draw_subnetworks(
    size: int, blocks: int, hidden: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random decisions per sample: keep (blocks, B, 1, 1) in {0, 1} and width masks (blocks, B, 1, F)."""
    skips = torch.randint(0, MAX_SKIPS + 1, (size,), generator=generator)
    rank = torch.rand(size, blocks, generator=generator).argsort(1).argsort(1)
    keep = (rank >= skips[:, None]).float()
    widths = torch.tensor(WIDTHS)[torch.randint(0, len(WIDTHS), (size, blocks), generator=generator)]
    narrow = torch.rand(size, 1, generator=generator) < 0.6
    widths = torch.where(narrow, widths, torch.ones(()))
    dense = torch.rand(size, 1, generator=generator) < DENSE_SHARE
    keep, widths = torch.where(dense, 1.0, keep), torch.where(dense, 1.0, widths)
    masks = (torch.arange(hidden) < (widths * hidden)[..., None]).float()
    return keep.T[..., None, None].contiguous(), masks.transpose(0, 1)[:, :, None].contiguous()


def fixed_subnetwork(name: str, blocks: int, hidden: int) -> tuple[Tensor, Tensor]:
    """A named decision for every sample: 'skip I,J', 'width 0.5', or 'dense', shaped to broadcast over B."""
    keep, width = torch.ones(blocks), 1.0
    kind, _, value = name.partition(" ")
    if kind == "skip":
        keep[[int(index) for index in value.split(",")]] = 0
    elif kind == "width":
        width = float(value)
    mask = (torch.arange(hidden) < width * hidden).float()
    return keep[:, None, None, None], mask.expand(blocks, 1, 1, hidden)


PROBES = (
    "dense",
    "width 0.75",
    "width 0.5",
    "width 0.25",
    "skip 1",
    "skip 4",
    "skip 6",
    "skip 9",
    "skip 3,7",
    "skip 2,5,8",
)


def probe(student: TinyModel, teacher: TinyModel, tokens, vae, prompts: list[str]) -> dict[str, float]:
    """PSNR (dB) of the student's pictures to the teacher's dense ones, per fixed sub-network."""
    sampler = Sampler(student, tokens, vae)
    blocks, hidden = (
        len(student.dit.transformer_blocks),
        student.dit.transformer_blocks[0].img_mlp.net[2].in_features,
    )
    goal = Sampler(teacher, tokens, vae).pictures(prompts, seed=1).astype(np.float32)
    result = {}
    for name in PROBES:
        keep, masks = fixed_subnetwork(name, blocks, hidden)

        def velocity(x, sigma, states, mask, step, keep=keep, masks=masks):
            return dit_forward(
                student.dit, x, sigma, states, mask, rope(states.shape[1]), keep=keep, width_masks=masks
            )

        pictures = sampler.pictures(prompts, seed=1, velocity=velocity).astype(np.float32)
        errors = ((pictures - goal) ** 2).mean((1, 2, 3))
        result[name] = float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-2))))
    return result


def show(title: str, psnr: dict[str, float]) -> None:
    """One log line of a probe."""
    print(
        f"elastic: {title}: " + ", ".join(f"{name} {value:.1f}" for name, value in psnr.items()) + " dB",
        flush=True,
    )


def load_teacher(args: argparse.Namespace) -> tuple[TinyModel, TrainingSet]:
    """The dense EMA model with reordered units, and the data it was trained on."""
    model, _, data = setup(args)
    state = torch.load(args.dense, weights_only=True)
    model.load_state_dict(state["model"])
    model.load_state_dict(state["ema"], strict=False)
    order_units(model, data)
    return model.requires_grad_(False).eval(), data


def train(args: argparse.Namespace) -> None:
    """Run or resume the fine-tune until `args.minutes` of training time are used up."""
    args.out.mkdir(parents=True, exist_ok=True)
    teacher, data = load_teacher(args)
    vae = AutoencoderKLQwenImage.from_pretrained(args.vae)
    prompts = [prompt for prompt, _ in common_prompts()][:: max(1, 100 // args.probe_prompts)]
    student = copy.deepcopy(teacher)
    student.dit.requires_grad_(True)
    params = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(student, args.lr)
    ema = {name: p.detach().clone() for name, p in params.items()}
    step, used, checkpoint = 0, 0.0, args.out / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=False):
            optimizer.load_state_dict(saved)
        ema, step, used = state["ema"], state["step"], state["used"]
        data.generator.manual_seed(args.seed + step)
    elif args.probe_prompts:
        show("before", probe(student, teacher, data.tokens, vae, prompts))
    blocks, hidden = (
        len(student.dit.transformer_blocks),
        student.dit.transformer_blocks[0].img_mlp.net[2].in_features,
    )
    block_fn = torch.compile(block_forward) if args.compile else block_forward
    generator = torch.Generator().manual_seed(args.seed + 7 + step)
    total, base, started, angles = args.minutes * 60, used, time.time(), rope(TEXT_TOKENS)
    logged, losses, saved_at = time.time(), [], time.time()
    while used < total:
        used = base + time.time() - started
        progress = min(1.0, used / total)
        batch = data.batch(args.batch, GRID)
        sigma = draw_times(args.batch, generator)
        noisy = torch.lerp(
            batch.latents, torch.randn(batch.latents.shape, generator=generator), sigma[:, None, None]
        )
        keep, masks = draw_subnetworks(args.batch, blocks, hidden, generator)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                states = encode_text(teacher.text, data.tokens.prefix, batch.ids)
                goal = dit_forward(teacher.dit, noisy, sigma, states, batch.mask, angles, block_fn).float()
            velocity = dit_forward(
                student.dit, noisy, sigma, states, batch.mask, angles, block_fn, keep, masks
            )
        error = (velocity.float() - goal).square().mean((1, 2))
        student.zero_grad(set_to_none=True)
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        lr = args.lr * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        apply_gradients(optimizers, lr)
        step += 1
        decay = min(args.ema, (1 + step) / (20 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()], 1 - decay)
        full = (
            (keep.sum(0) == blocks) & (masks.sum((0, 3), keepdim=False)[..., None] == blocks * hidden)
        ).flatten()
        losses.append([error[full].mean().item(), error[~full].mean().item()])
        if step % 50 == 0:
            dense, narrow = np.nanmean(losses, axis=0)
            print(f"elastic: step {step} {100 * progress:.1f}% dense mse {dense:.5f} "
                  f"sub-network mse {narrow:.4f} lr {lr:.1e} "
                  f"{50 * args.batch / (time.time() - logged):.0f}/s", flush=True)  # fmt: skip
            logged, losses = time.time(), []
        if step % 200 == 0:
            gc.collect()
        if time.time() - saved_at > 120 or used >= total:
            states_ = [optimizer.state_dict() for optimizer in optimizers]
            save(checkpoint, model=student.state_dict(), optimizers=states_, ema=ema, step=step, used=used)
            saved_at = time.time()
    student.load_state_dict(ema, strict=False)
    if args.probe_prompts:
        show("after", probe(student, teacher, data.tokens, vae, prompts))


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, "runs/elastic", 22.0)
    parser.add_argument("--dense", type=Path, default=Path("runs/dit/last.pt"), help="the dense checkpoint")
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/model"))
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument(
        "--probe-prompts", type=int, default=20, help="prompts for the before/after PSNR; 0: none"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
