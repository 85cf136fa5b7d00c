"""Step `dit`: train conditioner and shape DiT together, from scratch.

    python -m backbones.tiny.recipes.shapes.dit [--minutes 120]

Rectified flow in the published convention (t = 1 is data, velocity = data - noise), Muon beside AdamW, EMA,
bf16 autocast, compiled blocks. Latents are encoded on the fly at the places that the noise names (see
`codes`); the encoder is a fiftieth of a step. From --field-from on, the data that the velocity points at is
also decoded by the frozen VAE and compared with the true distances, so errors count by what they do to the
shape.
Writes runs/shapes/dit/last.pt (to resume) with the EMA weights under "ema".

Shapes: B batch, L latents, C latent channels, Q volume points.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.hunyuan3d.shape_vae import ShapeVAE
from backbones.tiny.recipes.shapes.codes import CODE_CHANNELS, pair
from backbones.tiny.recipes.shapes.model import ShapeModel, chain_iou
from backbones.tiny.recipes.shapes.store import ShapeBatch, ShapeSet, target
from backbones.tiny.recipes.shapes.training import arguments, compile_blocks, plain_attention
from backbones.tiny.recipes.shapes.vae import (
    BCE_SHARPNESS,
    BCE_WEIGHT,
    CHECK_EVERY,
    VAE_PARAMS,
    Stats,
    encode,
    load_vae,
    logits,
)  # fmt: skip
from backbones.tiny.recipes.training import Loop, Step, constant

UNCONDITIONAL_SHARE = 0.1  # pictures hidden for classifier-free guidance (Ho & Salimans 2022)
EARLY_POWER = 1.4  # t = u^1.4: early times, where the picture decides, are drawn more often


def is_matrix(name: str, p: Tensor) -> bool:
    """Muon's share: attention and MLP matrices of both models, not their modulations and embeddings."""
    inside = "double_blocks" in name or "single_blocks" in name or "encoder.layer." in name
    return p.dim() == 2 and inside and "mod" not in name.removeprefix("conditioner.main_image_encoder.model")


def draw_times(size: int) -> Tensor:
    """Times (B,) in [0, 1], one from each of B equal slices, so that every batch covers them all."""
    u = (torch.randperm(size) + torch.rand(size)) / size
    return u**EARLY_POWER


def field_loss(vae: ShapeVAE, stats: Stats, data: Tensor, codes: Tensor, batch: ShapeBatch) -> Tensor:
    """The VAE's own loss of predicted normalised latents (B, L, C), at the batch's volume points."""
    latents = data * stats[1] + stats[0]
    predicted = logits(vae, latents[..., :-CODE_CHANNELS], codes, batch.points).float()
    inside = (batch.distance < 0).float()
    entropy = F.binary_cross_entropy_with_logits(BCE_SHARPNESS * predicted, inside)
    return F.mse_loss(predicted, target(batch.distance)) + BCE_WEIGHT * entropy


def losses(
    model: ShapeModel, vae: ShapeVAE, stats: Stats, scheme: str, batch: ShapeBatch, field_rows: int
) -> tuple[Tensor, Tensor]:
    """Flow loss, and field loss of the first `field_rows` shapes whose picture is shown (0: none)."""
    size, length = len(batch.image), vae.latent_shape[0]
    codes, noise = pair(scheme, torch.randn(size, length, VAE_PARAMS["embed_dim"]))
    with torch.autocast("cpu", torch.bfloat16), plain_attention():
        with torch.no_grad():
            content = encode(vae, batch.surface, codes).mean.float()
        data = (torch.cat([content, codes], dim=-1) - stats[0]) / stats[1]
        t = draw_times(size)
        x = torch.lerp(noise, data, t[:, None, None])
        keep = torch.rand(size) >= UNCONDITIONAL_SHARE
        velocity = model(x, t, batch.image, keep).float()
        flow = (velocity - (data - noise)).square().mean()
        field = torch.zeros(())
        if field_rows:
            goal = x + (1 - t[:, None, None]) * velocity
            shown = torch.argsort(~keep, stable=True)[:field_rows]
            part = ShapeBatch(*(column[shown] for column in batch))
            field = field_loss(vae, stats, goal[shown], codes[shown], part)
    return flow, field


def check(loop: Loop, vae: ShapeVAE, stats: Stats, held_out: ShapeSet, count: int) -> None:
    """Print the EMA weights' chain IoU on a few held-out shapes."""
    with loop.averaged() as model, torch.compiler.set_stance("force_eager"):
        scores = chain_iou(model, vae, stats, held_out, count, CHECK_EVERY)
    shown = ", ".join(f"{kind} {value.mean():.3f}" for kind, value in scores.items())
    print(f"dit: held-out chain IoU at step {loop.step}: {shown}", flush=True)


def train(args: argparse.Namespace) -> None:
    """Run or resume training until `args.minutes` of training time are used up."""
    vae, stats, scheme = load_vae(args.vae)
    torch.manual_seed(args.seed)
    model = ShapeModel()
    loop = Loop.from_args(
        "dit", model, is_matrix, args, schedule=partial(constant, decay_from=0.5), ema_start=1,
        log_every=args.log_every,
    )  # fmt: skip
    torch.manual_seed(args.seed + loop.step)
    data = ShapeSet(args.data, "train", args.seed + loop.step, args.puff_share)
    held_out = ShapeSet(args.data, "held-out")
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.dit, model.conditioner)]
    print(f"dit: {sizes[0]:.2f} M DiT, {sizes[1]:.2f} M conditioner, scheme {scheme}, {len(data)} shapes, "
          f"step {loop.step}", flush=True)  # fmt: skip
    layers = model.conditioner.main_image_encoder.model.encoder.layer
    compile_blocks([*model.dit.double_blocks, *model.dit.single_blocks, *layers], args.compile)

    def take(progress: float) -> Step:
        field_rows = args.batch // 2 if progress >= args.field_from and args.field_weight else 0
        batch = data.batch(data.draw(args.batch), VAE_PARAMS["pc_size"], args.points)
        flow, field = losses(model, vae, stats, scheme, batch, field_rows)
        shown = {"flow": flow.item(), "field": field.item()}
        return Step(flow + args.field_weight * field, args.batch, shown)

    loop.run(take, lambda: check(loop, vae, stats, held_out, args.check_shapes), args.check_minutes)
    check(loop, vae, stats, held_out, 2 * args.check_shapes)


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, "runs/shapes/dit", 120.0)
    parser.add_argument("--vae", type=Path, default=Path("runs/shapes/vae/model.pt"))
    parser.add_argument("--points", type=int, default=128, help="volume points per shape of the field loss")
    parser.add_argument("--field-weight", type=float, default=0.5, help="of the field loss; 0: none")
    parser.add_argument("--field-from", type=float, default=0.2, help="share of the time it starts after")
    parser.add_argument("--check-shapes", type=int, default=16, help="held-out shapes per kind and check")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
