"""Step `elastic`: train block skips and nested MLP widths into the model while its training goes on.

    python -m backbones.tiny.recipes.elastic [--minutes 30]
    python -m backbones.tiny.recipes.elastic --device cuda --batch 1024 --minutes 2 --probe-prompts 0

First each block's image-MLP hidden units are reordered by mean |activation| x out-column norm, an exact
permutation, so that a prefix holds the units that matter (arXiv 2602.13993 uses prefixes as they come).
Then training continues. Most rows of a batch run the whole model against the data, as in step `dit`; the
rest repeat some of these rows in random sub-networks - blocks skipped, image MLPs at 1/4, 1/2 or 3/4
width - matched to what the whole model has just predicted for the same row (in-place distillation, arXiv
1903.05134). So the dense model keeps improving, at no extra forward pass. Writes runs/elastic/last.pt.

Shapes: B batch, N image tokens, F MLP hidden units.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from backbones.tiny.recipes.captions import common_prompts
from backbones.tiny.recipes.dit import (
    TEXT_TOKENS,
    Batch,
    PromptBatches,
    Sizes,
    TinyModel,
    add_noise,
    arguments,
    compiled,
    muon_takes,
    setup,
    worth_compiling,
)
from backbones.tiny.recipes.fast_dit import GRID, block_forward, dit_forward, rope
from backbones.tiny.recipes.sampling import Sampler
from backbones.tiny.recipes.text import PromptTokens, encode_text
from backbones.tiny.recipes.training import Loop, Step, constant

WIDTHS = (0.25, 0.5, 0.75, 1.0)
SUB_SHARE = 0.3  # rows of a batch that repeat others in a sub-network
MAX_SKIPS = 5  # of the blocks, in training


@torch.no_grad()
def order_units(model: TinyModel, batches: PromptBatches, count: int = 8, size: int = 64) -> None:
    """Permute every image MLP's hidden units in place, most important first; the function stays the same."""
    blocks = model.dit.transformer_blocks
    activity = [torch.zeros_like(block.img_mlp.net[0].proj.bias) for block in blocks]

    def watch(total: Tensor):
        return lambda _module, inputs: total.add_(inputs[0].float().abs().mean((0, 1)))

    hooks = [
        block.img_mlp.net[2].register_forward_pre_hook(watch(total))
        for block, total in zip(blocks, activity, strict=False)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        batch = batches(size)
        noisy, sigma, _ = add_noise(batch.latents, generator)
        states = encode_text(model.text, batches.tokens.prefix, batch.ids)
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
    size: int, blocks: int, hidden: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random decisions per sample: keep (blocks, B, 1, 1) and width masks (blocks, B, 1, F), both bool."""
    skips = torch.randint(0, MAX_SKIPS + 1, (size,), generator=generator)
    rank = torch.rand(size, blocks, generator=generator).argsort(1).argsort(1)
    keep = rank >= skips[:, None]
    widths = torch.tensor(WIDTHS)[torch.randint(0, len(WIDTHS), (size, blocks), generator=generator)]
    narrow = torch.rand(size, 1, generator=generator) < 0.6
    widths = torch.where(narrow, widths, torch.ones(()))
    units = (widths * hidden).T.to(device)[..., None, None]
    return keep.T[..., None, None].to(device), torch.arange(hidden, device=device) < units


def fixed_subnetwork(name: str, blocks: int, hidden: int) -> tuple[Tensor, Tensor]:
    """A named decision for every sample: 'skip I,J', 'width 0.5', or 'dense', shaped to broadcast over B."""
    keep, width = torch.ones(blocks, dtype=torch.bool), 1.0
    kind, _, value = name.partition(" ")
    if kind == "skip":
        keep[[int(index) for index in value.split(",")]] = False
    elif kind == "width":
        width = float(value)
    mask = torch.arange(hidden) < width * hidden
    return keep[:, None, None, None], mask.expand(blocks, 1, 1, hidden)


PROBES = (
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


def probe(model: TinyModel, tokens, vae, prompts: list[str]) -> dict[str, float]:
    """PSNR (dB) of each fixed sub-network's pictures to the same model's dense ones."""
    sampler = Sampler(model, tokens, vae)
    blocks, hidden = dimensions(model)
    goal = sampler.pictures(prompts, seed=1).astype(np.float32)
    result = {}
    for name in PROBES:
        keep, masks = fixed_subnetwork(name, blocks, hidden)

        def velocity(x, sigma, states, mask, step, keep=keep, masks=masks):
            angles = rope(states.shape[1])
            return dit_forward(model.dit, x, sigma, states, mask, angles, keep=keep, width_masks=masks)

        pictures = sampler.pictures(prompts, seed=1, velocity=velocity).astype(np.float32)
        errors = ((pictures - goal) ** 2).mean((1, 2, 3))
        result[name] = float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-2))))
    return result


def dimensions(model: TinyModel) -> tuple[int, int]:
    """Number of blocks, and hidden units of one image MLP."""
    blocks = model.dit.transformer_blocks
    return len(blocks), blocks[0].img_mlp.net[2].in_features


def show(title: str, psnr: dict[str, float]) -> None:
    """One log line of a probe."""
    print(
        f"elastic: {title}: " + ", ".join(f"{name} {value:.1f}" for name, value in psnr.items()) + " dB",
        flush=True,
    )


def elastic_loss(
    model: TinyModel, tokens: PromptTokens, batch: Batch, generator: torch.Generator, block_fn
) -> tuple[Tensor, Tensor]:
    """Mean squared velocity errors: the whole model to the data, the sub-networks to the whole model.

    Some of the batch's rows are repeated in sub-networks: SUB_SHARE of what is computed.
    """
    blocks, hidden = dimensions(model)
    whole, device = len(batch.latents), batch.latents.device
    narrow = round(whole * SUB_SHARE / (1 - SUB_SHARE))
    noisy, sigma, goal = add_noise(batch.latents, generator)
    some_keep, some_masks = draw_subnetworks(narrow, blocks, hidden, generator, device)
    keep = torch.cat([some_keep.new_ones(blocks, whole, 1, 1), some_keep], dim=1)
    masks = torch.cat([some_masks.new_ones(blocks, whole, 1, hidden), some_masks], dim=1)

    def repeat(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows[:narrow]])

    with torch.autocast(device.type, torch.bfloat16):
        states = encode_text(model.text, tokens.prefix, batch.ids)
        velocity = dit_forward(
            model.dit, repeat(noisy), repeat(sigma), repeat(states), repeat(batch.mask),
            rope(TEXT_TOKENS, batch.grid, batch.step, device.type), block_fn, keep, masks,
        ).float()  # fmt: skip
    dense = (velocity[:whole] - goal).square().mean()
    sub = (velocity[whole:] - velocity[:narrow].detach()).square().mean()
    return dense, sub


def train(args: argparse.Namespace) -> None:
    """Run or resume until `args.minutes` of training time are used up."""
    model, batches = setup(args)
    model.to(args.device)
    tokens = batches.tokens
    vae = AutoencoderKLQwenImage.from_pretrained(args.vae) if args.probe_prompts else None
    prompts = [prompt for prompt, _ in common_prompts()][:: max(1, 100 // max(1, args.probe_prompts))]
    if not (args.out / "last.pt").exists():
        model.load_state_dict(torch.load(args.dense, weights_only=True, map_location=args.device)["model"])
        if args.order_units:
            order_units(model, batches)
    schedule = partial(constant, decay_from=0.35)
    loop = Loop.from_args("elastic", model, muon_takes, args, schedule=schedule, ema_start=1)
    if loop.step:
        batches.data.reseed(args.seed + loop.step)
    elif args.probe_prompts:
        show("before", probe(model, tokens, vae, prompts))
    block_fn = compiled(args.compile)
    loop.generator.manual_seed(args.seed + 7 + loop.step)

    draws = Sizes(batches.data, loop.generator, 0.0, round(args.batch * (1 - SUB_SHARE)))

    def take(progress: float) -> Step:
        key, size = draws.draw(progress)
        run = block_fn if worth_compiling(key, args.device) else block_forward
        dense, sub = elastic_loss(model, tokens, batches(size, key), loop.generator, run)
        shown = {"dense loss": dense.item(), "sub-network mse": sub.item()}
        return Step((1 - SUB_SHARE) * dense + SUB_SHARE * sub, size, shown)

    loop.run(take)
    loop.load_average()
    if args.probe_prompts:
        show("after", probe(model, tokens, vae, prompts))


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, Path("runs/elastic"), 30.0, 1.5e-3, 0.998)
    parser.add_argument("--dense", type=Path, default=Path("runs/dit/last.pt"), help="the dense checkpoint")
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/model"))
    parser.add_argument(
        "--order-units",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="no: --dense is a checkpoint of this step, whose units are in order already",
    )
    parser.add_argument(
        "--probe-prompts", type=int, default=10, help="prompts for the before/after PSNR; 0: none"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
