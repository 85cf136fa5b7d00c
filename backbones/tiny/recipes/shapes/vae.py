"""Step `vae`: train the shape VAE, `point_encoder.EncodingShapeVAE` at a tiny size.

    python -m backbones.tiny.recipes.shapes.vae [--minutes 35]

Targets clamp(-distance / 0.1); loss MSE + 0.1 BCE(8 x logit) + 1e-3 KL. Every latent belongs to a place in
the box (see `codes`): the encoder's query points are those places, and the last latent channels carry them.
Without self attention in the encoder (3DShape2VecSet, Zhang et al. 2023, has none either) a latent depends on
the shape and its own place only, not on where the others lie.
Latents are jittered in training, so that the decoder forgives the diffusion model's small errors.
Writes runs/shapes/vae/last.pt (to resume) and model.pt: EMA weights, latent statistics, scheme and size.

Shapes: B batch, L latents, E latent channels, P surface points, Q volume points.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.hunyuan3d.shape_vae import ShapeVAE
from backbones.tiny.recipes.shapes.codes import CODE_CHANNELS, SCHEMES, pair, positions
from backbones.tiny.recipes.shapes.dataset import grid_points
from backbones.tiny.recipes.shapes.point_encoder import EncodingShapeVAE, Posterior
from backbones.tiny.recipes.shapes.store import KINDS, ShapeBatch, ShapeSet, target
from backbones.tiny.recipes.shapes.training import arguments, compile_blocks, plain_attention
from backbones.tiny.recipes.training import Loop, Step, constant, save

VAE_PARAMS: dict[str, Any] = {
    "num_latents": 64, "embed_dim": 16 + CODE_CHANNELS, "width": 128, "heads": 4, "num_decoder_layers": 6,
    "num_encoder_layers": 0,
    "pc_size": 1024, "pc_sharpedge_size": 0, "point_feats": 3, "downsample_ratio": 16,
    "num_freqs": 8, "include_pi": False, "qkv_bias": False, "qk_norm": True,
}  # fmt: skip
BCE_WEIGHT, BCE_SHARPNESS, KL_WEIGHT = 0.1, 8.0, 1e-3
QUERY_FREQUENCIES = 4  # of 8: 1, 2, 4 and 8 rad per box unit; tokens lie about 0.6 units apart
CHECK_EVERY = 7  # grid points left out of quick checks; prime to the grid's side, so that none lines up
JITTER = 0.15  # largest noise on latents in training, in their own standard deviations
Stats = tuple[Tensor, Tensor]


def is_matrix(name: str, p: Tensor) -> bool:
    """Muon's share: attention and MLP matrices inside the blocks."""
    return p.dim() == 2 and any(part in name for part in ("resblocks", "cross_attn"))


def encode(vae: EncodingShapeVAE, surface: Tensor, codes: Tensor) -> Posterior:
    """Posterior over the content channels, (B, L, E - 3), of surfaces (B, P, 6) read at codes (B, L, 3)."""
    queries = torch.cat([positions(codes), torch.zeros_like(codes)], dim=-1)
    features = vae.features(queries) * smooth_query_mask(vae)
    moments = Posterior.from_moments(vae.pre_kl(vae.encoder(features, vae.features(surface))))
    return Posterior(moments.mean[..., :-CODE_CHANNELS], moments.logvar[..., :-CODE_CHANNELS])


def smooth_query_mask(vae: ShapeVAE) -> Tensor:
    """Ones and zeros over the encoder's features: of a query's Fourier features only the slow ones count.

    A latent then changes smoothly with its place, which is what a small diffusion model can learn.
    """
    count = vae.embedder.num_freqs
    slow = (torch.arange(count) < QUERY_FREQUENCIES).float().repeat(6)
    return torch.cat([torch.ones(3), slow, torch.ones(VAE_PARAMS["point_feats"])])


def logits(vae: ShapeVAE, content: Tensor, codes: Tensor, points: Tensor) -> Tensor:
    """Decoder logits (B, Q) of latents at points (B, Q, 3)."""
    decoded = vae(torch.cat([content, codes.to(content.dtype)], dim=-1))
    return vae.geo_decoder(points, decoded)[..., 0]


def loss_terms(predicted: Tensor, distance: Tensor, posterior: Posterior) -> dict[str, Tensor]:
    """MSE to the clamped distance, cross entropy of the sign, KL."""
    inside = (distance < 0).float()
    return {
        "mse": F.mse_loss(predicted, target(distance)),
        "bce": F.binary_cross_entropy_with_logits(BCE_SHARPNESS * predicted, inside),
        "kl": posterior.kl(),
    }


def iou(inside: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Volumetric intersection over union (B,) of two stacks (B, G^3) of booleans."""
    return (inside & truth).sum(1) / np.maximum((inside | truth).sum(1), 1)


@torch.no_grad()
def occupied(vae: ShapeVAE, latents: Tensor, every: int = 1, chunk: int = 8192) -> np.ndarray:
    """Inside or not at every n-th grid point of latents (B, L, E): (B, points) bool."""
    points = torch.from_numpy(grid_points()[::every].copy()).float()
    rows = []
    for row in vae(latents):
        field = vae.field(row)
        rows.append(torch.cat([field(part) > 0 for part in points.split(chunk)]).numpy())
    return np.stack(rows)


@torch.no_grad()
def held_out_iou(
    vae: EncodingShapeVAE, data: ShapeSet, scheme: str, count: int, every: int = 1
) -> dict[str, float]:
    """Mean reconstruction IoU on the first `count` shapes of each kind, at every n-th grid point."""
    length, generator = vae.latent_shape[0], torch.Generator().manual_seed(0)
    result = {}
    for kind in KINDS:
        rows = data.rows[kind][:count]
        if len(rows):
            batch = data.batch(rows, VAE_PARAMS["pc_size"], 1, augment=False)
            codes, _ = pair(scheme, torch.randn(len(rows), length, CODE_CHANNELS, generator=generator))
            mean = encode(vae, batch.surface, codes).mean
            inside = occupied(vae, torch.cat([mean, codes], dim=-1), every)
            result[kind] = float(iou(inside, data.occupancy(rows)[:, ::every]).mean())
    return result


@torch.no_grad()
def latent_stats(vae: EncodingShapeVAE, data: ShapeSet, scheme: str, shapes: int = 1024) -> Stats:
    """Mean and standard deviation (E,) of latents; codes are standard already."""
    contents, generator = [], torch.Generator().manual_seed(0)
    for _ in range(max(1, shapes // 64)):
        batch = data.batch(data.draw(64), VAE_PARAMS["pc_size"], 1)
        codes, _ = pair(scheme, torch.randn(64, vae.latent_shape[0], CODE_CHANNELS, generator=generator))
        contents.append(encode(vae, batch.surface, codes).mean.flatten(0, 1))
    content = torch.cat(contents)
    zeros = torch.zeros(CODE_CHANNELS)
    return torch.cat([content.mean(0), zeros]), torch.cat([content.std(0), zeros + 1])


def load_vae(path: Path) -> tuple[EncodingShapeVAE, Stats, str]:
    """The trained VAE, the statistics of its latents, and its scheme of codes."""
    state = torch.load(path, weights_only=True)
    vae = EncodingShapeVAE(**state["params"])
    vae.load_state_dict(state["model"])
    return vae.requires_grad_(False).eval(), (state["mean"], state["std"]), state["scheme"]


def train_step(vae: EncodingShapeVAE, batch: ShapeBatch, scheme: str) -> Step:
    """The loss of one batch."""
    shape = (len(batch.surface), vae.latent_shape[0])
    codes, _ = pair(scheme, torch.randn(*shape, CODE_CHANNELS))
    with torch.autocast("cpu", torch.bfloat16), plain_attention():
        posterior = encode(vae, batch.surface, codes)
        posterior = Posterior(posterior.mean.float(), posterior.logvar.float())
        content = posterior.sample()
        spread = posterior.mean.detach().std() * JITTER * torch.rand(shape[0], 1, 1)
        predicted = logits(vae, content + spread * torch.randn_like(content), codes, batch.points)
    terms = loss_terms(predicted.float(), batch.distance, posterior)
    loss = terms["mse"] + BCE_WEIGHT * terms["bce"] + KL_WEIGHT * terms["kl"]
    return Step(loss, shape[0], {name: term.item() for name, term in terms.items()})


def train(args: argparse.Namespace) -> None:
    """Run or resume training until `args.minutes` of training time are used up."""
    torch.manual_seed(args.seed)
    params = {**VAE_PARAMS, "num_encoder_layers": args.encoder_layers, "num_latents": args.latents}
    vae = EncodingShapeVAE(**params)
    loop = Loop.from_args(
        "vae", vae, is_matrix, args, schedule=partial(constant, decay_from=0.5), ema_start=1,
        log_every=args.log_every,
    )  # fmt: skip
    torch.manual_seed(args.seed + loop.step)
    data = ShapeSet(args.data, "train", args.seed + loop.step, args.puff_share)
    held_out = ShapeSet(args.data, "held-out")
    size = sum(p.numel() for p in vae.parameters()) / 1e6
    print(f"vae: {size:.2f} M, {len(data)} shapes, {len(held_out)} held out, step {loop.step}", flush=True)
    blocks = [*vae.encoder.self_attn.resblocks, *vae.transformer.resblocks]
    compile_blocks([*blocks, vae.geo_decoder.cross_attn_decoder], args.compile)

    def take(progress: float) -> Step:
        batch = data.batch(data.draw(args.batch), VAE_PARAMS["pc_size"], args.points)
        return train_step(vae, batch, args.codes)

    loop.run(take, lambda: report(loop, held_out, args.codes, 32, every=CHECK_EVERY), args.check_minutes)
    finish(loop, data, held_out, args, params)


def report(loop: Loop, held_out: ShapeSet, scheme: str, count: int, every: int = 1) -> None:
    """Print the EMA weights' held-out IoU."""
    with loop.averaged() as vae, torch.compiler.set_stance("force_eager"):
        scores = held_out_iou(vae, held_out, scheme, count, every)
    shown = ", ".join(f"{kind} {value:.3f}" for kind, value in scores.items())
    print(f"vae: held-out IoU at step {loop.step}: {shown}", flush=True)


def finish(
    loop: Loop, data: ShapeSet, held_out: ShapeSet, args: argparse.Namespace, params: dict[str, Any]
) -> None:
    """Measure the EMA weights and write model.pt."""
    report(loop, held_out, args.codes, 64)
    vae = EncodingShapeVAE(**params)
    vae.load_state_dict(loop.model.state_dict())
    vae.load_state_dict(loop.average, strict=False)
    mean, std = latent_stats(vae.eval(), data, args.codes)
    state = {"model": vae.state_dict(), "params": params, "mean": mean, "std": std, "scheme": args.codes}
    save(args.out / "model.pt", **state)
    print(f"vae: latent std {std[:-CODE_CHANNELS].min():.2f} to {std.max():.2f} -> {args.out / 'model.pt'}")


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, "runs/shapes/vae", 35.0)
    parser.add_argument("--codes", choices=SCHEMES, default="free", help="how tokens know their places")
    parser.add_argument("--latents", type=int, default=VAE_PARAMS["num_latents"])
    parser.add_argument("--encoder-layers", type=int, default=VAE_PARAMS["num_encoder_layers"])
    parser.add_argument("--points", type=int, default=512, help="volume points per shape and step")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
