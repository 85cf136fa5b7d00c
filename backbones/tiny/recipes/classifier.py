"""Step `classifier`: train the judge of generated pictures on the real ones.

    python -m backbones.tiny.recipes.classifier [--minutes 5]

Pictures are shifted, scaled, blurred, recoloured and made noisy, so that the judge forgives the softness of a
generated picture but not a wrong shape. One random tenth of the pictures is held out to report accuracy.
Writes runs/classifier/last.pt (to resume), benchmarks/classifier/classifier.safetensors (fp16) and
labels.json.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from backbones.tiny.recipes.latents import select_rows
from backbones.tiny.recipes.training import Loop, Step, arguments, cosine
from backbones.tiny.recipes.vae import load_pictures, to_tensor
from benchmarks.classifier import HERE, SIDE, Classifier


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift, scale, blur, channel gain and noise for x (B, 3, 64, 64); white stays outside."""
    size = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(size, *shape, generator=generator)

    theta = torch.zeros(size, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = uniform(0.85, 1.2), uniform(0.85, 1.2)
    theta[:, 0, 1], theta[:, 1, 0] = uniform(-0.1, 0.1), uniform(-0.1, 0.1)
    theta[:, :, 2] = uniform(-0.15, 0.15, 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, grid, align_corners=False) + 1
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=1.0), 3, 1)
    x = torch.lerp(x, soft, uniform(0, 1, 1, 1, 1))
    x = 1 - (1 - x) * uniform(0.75, 1.25, 3, 1, 1)
    return x + uniform(0, 0.08, 1, 1, 1) * torch.randn(x.shape, generator=generator)


def train(args: argparse.Namespace) -> None:
    """Run or resume training until `args.minutes` of training time are used up, and save."""
    torch.manual_seed(args.seed)
    pictures, index = load_pictures(args.data)
    rows = select_rows(index)
    small = torch.cat(
        [
            F.avg_pool2d(to_tensor(pictures[rows[s : s + 512]]), 128 // SIDE).half()
            for s in range(0, len(rows), 512)
        ]
    )
    labels = torch.tensor([index["rows"][row][0] for row in rows])
    plain = torch.tensor([index["rows"][row][2] is None for row in rows])
    generator = torch.Generator().manual_seed(args.seed)
    held_out = torch.rand(len(rows), generator=generator) < 0.1
    weight = torch.where(plain, 2.0, 1.0) * (~held_out)
    model = Classifier([concept["name"] for concept in index["concepts"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.02)
    loop = Loop(
        "classifier", model, [optimizer], args.out / "last.pt", args.minutes, args.lr, args.ema,
        partial(cosine, warm_up=100, floor=0.01), args.seed, args.max_steps, log_every=100, max_norm=math.inf,
    )  # fmt: skip
    if loop.step:
        generator = loop.generator

    def take(progress: float) -> Step:
        ids = torch.multinomial(weight, args.batch, replacement=True, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(augment(small[ids].float(), generator))
        return Step(F.cross_entropy(logits.float(), labels[ids], label_smoothing=0.1), args.batch)

    loop.run(take)
    loop.load_average()
    report(model.eval(), small[held_out], labels[held_out])
    HERE.mkdir(exist_ok=True)
    save_file(
        {name: p.half().contiguous() for name, p in model.state_dict().items()},
        HERE / "classifier.safetensors",
    )
    (HERE / "labels.json").write_text(json.dumps(list(model.labels), indent=0) + "\n", "utf-8")


@torch.no_grad()
def report(model: Classifier, pictures: Tensor, labels: Tensor) -> None:
    """Print held-out accuracy."""
    logits = torch.cat([model(pictures[s : s + 256].float()) for s in range(0, len(pictures), 256)])
    best = logits.topk(5, dim=1).indices == labels[:, None]
    first, five = best[:, 0].float().mean(), best.any(1).float().mean()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"classifier: {len(labels)} held-out pictures, top-1 {first:.3f}, top-5 {five:.3f}, "
        f"{millions:.2f} M parameters"
    )


def main() -> None:
    """Parse the command line and train."""
    parser = arguments(__doc__, Path("runs/classifier"), 5.0, 3e-3, ema=0.0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
