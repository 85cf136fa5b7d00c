"""Step `elastic`: train skips and nested MLP widths into the dense model, keeping its dense quality.

    python -m backbones.tiny.recipes.flux.elastic [--minutes 25] [--dense runs/flux/guided/last.pt]

The dense EMA model is the frozen teacher. First the MLP units of both block kinds are put in order of
importance, an exact permutation. Then each sample of a batch gets its own sub-network, drawn as for
qwen-image-tiny, and is matched to the teacher's dense velocity. The text encoders are not touched.
Writes runs/flux/elastic/last.pt.

Shapes: B batch, N image tokens, F MLP hidden units.
"""

import argparse
import copy
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn

from backbones.flux import TRANSFORMER
from backbones.tiny.recipes.captions import common_prompts
from backbones.tiny.recipes.elastic import draw_subnetworks, fixed_subnetwork
from backbones.tiny.recipes.fast_dit import GRID
from backbones.tiny.recipes.flux.dit import (
    Batch,
    FluxTrainingSet,
    TinyFlux,
    load_data,
    load_model,
    muon_takes,
    noisy_batch,
)
from backbones.tiny.recipes.flux.fast_dit import BlockFns, class_forward, dit_forward, rope
from backbones.tiny.recipes.flux.guidance import draw_scales
from backbones.tiny.recipes.flux.sampling import FluxSampler
from backbones.tiny.recipes.flux.training import RUNS, Loop, Step, arguments
from routers.spec import MlpSpec
from routers.width import importance_order, reorder_units

DENSE_SHARE = 0.3  # samples of a batch that stay dense
PROBES = (
    "dense", "width 0.75", "width 0.5", "width 0.25", "skip 0", "skip 2", "skip 5", "skip 8", "skip 11",
    "skip 3,7", "skip 2,6,9",
)  # blocks 0-3 are double, 4-11 single  # fmt: skip


def mlps(dit: FluxTransformer2DModel) -> list[tuple[nn.Module, MlpSpec]]:
    """(block, its image MLP) in the order blocks run: the double blocks, then the single ones."""
    return [(block, spec.mlps[0]) for spec in TRANSFORMER.blocks for block in dit.get_submodule(spec.path)]


def hidden_units(dit: FluxTransformer2DModel) -> int:
    """MLP hidden units of a block; both kinds have the same number."""
    return int(dit.single_transformer_blocks[0].mlp_hidden_dim)


@torch.no_grad()
def order_units(
    model: TinyFlux, data: FluxTrainingSet, guided: bool, batches: int = 8, size: int = 64
) -> None:
    """Permute every image MLP's hidden units in place, most important first; the function stays the same."""
    units = hidden_units(model.dit)
    activity = [torch.zeros(units) for _ in mlps(model.dit)]
    hooks = []
    for (block, spec), total in zip(mlps(model.dit), activity, strict=True):

        def watch(_module, inputs: tuple[Tensor, ...], total: Tensor = total) -> None:
            total.add_(inputs[0][..., -units:].float().abs().mean((0, 1)))

        hooks.append(attrgetter(spec.out_linear)(block).register_forward_pre_hook(watch))
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        batch = data.batch(size, GRID)
        noisy, _, sigma = noisy_batch(batch, generator)
        # A silent guidance embedding adds nothing, but the class wants a scale.
        scales = draw_scales(size, generator) if guided else torch.ones(size)
        class_forward(model.dit, noisy, sigma, model.encode(batch.clip_ids, batch.t5_ids), scales)
    for hook in hooks:
        hook.remove()
    for (block, spec), total in zip(mlps(model.dit), activity, strict=True):
        columns = attrgetter(spec.out_linear)(block).weight[:, -units:]
        reorder_units(block, spec, importance_order(total, columns))


def elastic_step(
    student: TinyFlux,
    teacher: TinyFlux,
    batch: Batch,
    guided: bool,
    generator: torch.Generator,
    fns: BlockFns,
) -> Step:
    """Mean squared error between random sub-networks of the student and the dense teacher."""
    size, blocks, hidden = len(batch.latents), len(mlps(student.dit)), hidden_units(student.dit)
    noisy, _, sigma = noisy_batch(batch, generator)
    keep, masks = draw_subnetworks(size, blocks, hidden, generator)
    dense = torch.rand(size, 1, 1, generator=generator) < DENSE_SHARE
    keep, masks = torch.where(dense, 1.0, keep), torch.where(dense, 1.0, masks)
    scales, angles = draw_scales(size, generator) if guided else None, rope(student.dit)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            text = teacher.encode(batch.clip_ids, batch.t5_ids)
            goal = dit_forward(teacher.dit, noisy, sigma, text, angles, scales, fns).float()
        velocity = dit_forward(student.dit, noisy, sigma, text, angles, scales, fns, keep, masks)
    error = (velocity.float() - goal).square().mean((1, 2))
    full = (keep.amin((0, 2, 3)) > 0) & (masks.amin((0, 2, 3)) > 0)
    parts = {"dense": error[full], "narrow": error[~full]}
    shown = {name: part.mean().item() for name, part in parts.items() if len(part)}
    return Step(error.mean(), size, shown)


def probe(student: TinyFlux, teacher: TinyFlux, data: FluxTrainingSet, vae, prompts: list[str], guided: bool
          ) -> dict[str, float]:  # fmt: skip
    """PSNR (dB) of the student's pictures to the teacher's dense ones, per fixed sub-network."""
    sampler = FluxSampler(student, data.tokens, vae, guided)
    goal = FluxSampler(teacher, data.tokens, vae, guided).pictures(prompts, seed=1).astype(np.float32)
    result = {}
    for name in PROBES:
        keep, masks = fixed_subnetwork(name, len(mlps(student.dit)), hidden_units(student.dit))

        def velocity(x, sigma, text, scales, keep=keep, masks=masks):
            return dit_forward(
                student.dit, x, sigma, text, rope(student.dit), scales, keep=keep, width_masks=masks
            )

        pictures = sampler.pictures(prompts, seed=1, velocity=velocity).astype(np.float32)
        errors = ((pictures - goal) ** 2).mean((1, 2, 3))
        result[name] = float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-2))))
    return result


def show(title: str, psnr: dict[str, float]) -> None:
    """One log line of a probe."""
    shown = ", ".join(f"{name} {value:.1f}" for name, value in psnr.items())
    print(f"elastic: {title}: {shown} dB", flush=True)


def train(args: argparse.Namespace) -> None:
    """Run or resume the fine-tune until `args.minutes` of training time are used up."""
    torch.manual_seed(args.seed)
    data = load_data(args)
    teacher, extra = load_model(args.dense, data.tokens)
    guided = extra["guided"]
    order_units(teacher, data, guided, batches=args.order_batches)
    student = copy.deepcopy(teacher)
    student.dit.requires_grad_(True)
    if not guided:
        student.dit.time_text_embed.guidance_embedder.requires_grad_(False)
    loop = Loop.from_args("elastic", student, muon_takes, "elastic", args, extra=extra)
    prompts = [prompt for prompt, _ in common_prompts()][:: max(1, 100 // max(1, args.probe_prompts))]
    vae = AutoencoderKL.from_pretrained(args.vae) if args.probe_prompts else None
    if vae is not None and loop.step == 0:
        show("before", probe(student, teacher, data, vae, prompts, guided))
    data.reseed(args.seed + 2000 + loop.step)
    fns = BlockFns.compiled() if args.compile else BlockFns()

    def take(_progress: float) -> Step:
        return elastic_step(student, teacher, data.batch(args.batch, GRID), guided, loop.generator, fns)

    loop.run(take)
    loop.load_average()
    if vae is not None:
        show("after", probe(student, teacher, data, vae, prompts, guided))


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, minutes=25.0, lr=8e-4, ema=0.998)
    parser.add_argument(
        "--dense",
        type=Path,
        default=RUNS / "guided" / "last.pt",
        help="the dense checkpoint; a plain one works too",
    )
    parser.add_argument("--vae", type=Path, default=RUNS / "vae" / "model")
    parser.add_argument("--order-batches", type=int, default=8, help="batches that measure units' importance")
    parser.add_argument(
        "--probe-prompts", type=int, default=20, help="prompts for the before/after PSNR; 0: none"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
